"""The Loop and the first context: what they refuse before training starts, and what they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import functional_loop as fl
from functional_loop.engine.template import template
from tests.sample_loops import counter, data, make_loop, mlp

X, Y = data(3)
ERROR = fl.measure("error", lambda y_hat, y: 0.0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"network": 3}, TypeError, "network is an nn.Module or a function that makes one, not 3"),
        ({"loss": "mse"}, TypeError, "loss is a function .*, not 'mse'"),
        ({"optimizer": torch.optim.SGD}, TypeError, "optimizer is made by optimizer"),
        ({"optimizer": torch.optim.SGD(mlp().parameters())}, TypeError, "optimizer is made by .*, not SGD"),
        ({"train": (X, Y)}, TypeError, r"train is made by batches\(...\), not tuple"),
        ({"train": None}, TypeError, "train is made by .*, not NoneType"),
        ({"valid": [X, Y]}, TypeError, r"valid is made by batches\(...\), not list"),
        ({"epochs": -1}, ValueError, "epochs must be an integer of at least 0, not -1"),
        ({"epochs": 2.0}, ValueError, "epochs must be an integer of at least 0, not 2.0"),
        ({"epochs": True}, ValueError, "epochs must be an integer of at least 0, not True"),
        ({"epochs": None}, ValueError, "epochs must be an integer of at least 0, not None"),
        ({"eval_freq": 0}, ValueError, "eval_freq must be an integer of at least 1, not 0"),
        ({"accumulate": 0}, ValueError, "accumulate must be an integer of at least 1, not 0"),
        ({"accumulate": 1.5}, ValueError, "accumulate must be an integer of at least 1, not 1.5"),
        ({"measures_train": ERROR}, TypeError, "measures are given as a list"),
        ({"measures_valid": [max]}, TypeError, "measures are given as a list of what measure"),
        ({"measures_valid": {"error": ERROR}}, TypeError, "measures are given as a list"),
        ({"measures_valid": "error"}, TypeError, "measures are given as a list"),
        ({"measures_train": [ERROR, ERROR]}, ValueError, "measures_train has more than one of the id 'error'"),
        ({"measures_valid": [ERROR, ERROR]}, ValueError, "measures_valid has more than one of the id 'error'"),
        ({"callbacks": [counter(), counter()]}, ValueError, "callbacks has more than one of the id 'counter'"),
        ({"callbacks": counter()}, TypeError, "callbacks is a list of callbacks"),
        ({"callbacks": None}, TypeError, "callbacks is a list of callbacks, not None"),
        ({"callbacks": "early_stopping"}, TypeError, "callbacks is a list of callbacks"),
        ({"callbacks": [print]}, TypeError, "not a callback: <built-in function print>"),
        ({"callbacks": [fl.Callback]}, TypeError, "not a callback: <class"),
        ({"device": "cuda:7"}, ValueError, "no device 'cuda:7' on this machine"),
        ({"device": "fpga"}, ValueError, "no device 'fpga' on this machine"),
        ({"device": None}, ValueError, "no device None on this machine"),
        ({"autocast": torch.float16}, ValueError, "autocast is torch.bfloat16 or None, .*loss scaling"),
        ({"autocast": True}, ValueError, "autocast is torch.bfloat16 or None, not True"),
        ({"compile": 1}, TypeError, "compile is True or False, not 1"),
        (
            {"optimizer": fl.optimizer(torch.optim.LBFGS), "accumulate": 2},
            ValueError,
            "LBFGS evaluates the loss of a batch several times",
        ),
    ],
)
def test_a_loop_that_cannot_work_is_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"Loop: .*{message}"):
        make_loop(**changes)


def test_a_misspelt_argument_is_refused() -> None:
    with pytest.raises(TypeError, match="epoch_count"):
        make_loop(epoch_count=3)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fl.batches(X[:0], Y[:0]), ValueError, "no rows"),
        (lambda: fl.batches(X, Y, batch_size=0), ValueError, "batch_size must be at least 1, not 0"),
        (lambda: fl.batches(X, Y, batch_size=-3), ValueError, "batch_size must be at least 1, not -3"),
        (lambda: fl.batches(X, Y[:-1]), ValueError, "x has 10 rows, but y has 9"),
        (lambda: fl.batches((X, X[:3]), Y), ValueError, r"x\[0\] has 10 rows, but x\[1\] has 3"),
        (lambda: fl.batches(X, Y, batch_size="4"), TypeError, "batch_size must be an int, not '4'"),
    ],
)
def test_data_that_cannot_work_is_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_loop_is_frozen_and_evolves() -> None:
    loop = make_loop()
    with pytest.raises(AttributeError):
        loop.epochs = 7
    longer = fl.evolve(loop, epochs=7)
    assert (longer.epochs, loop.epochs) == (7, 2)
    with pytest.raises(ValueError, match="epochs must be"):
        fl.evolve(loop, epochs=-7)


def test_the_list_of_callbacks_belongs_to_the_loop() -> None:
    callbacks = [counter()]
    loop = make_loop(callbacks=callbacks)
    callbacks.append(counter("second"))
    assert fl.init(loop).callbacks == {"counter": 0}


def test_anything_that_can_be_made_a_callback_is_one() -> None:
    class Described:
        def as_callback(self) -> fl.Callback:
            return counter("described")

    assert fl.train(fl.init(make_loop(callbacks=[Described()]))).callbacks == {"described": 6}


@pytest.mark.parametrize("seed", [None, 1.0, "1", True, torch.tensor(1)])
def test_a_seed_is_an_integer(seed: Any) -> None:
    with pytest.raises(TypeError, match="the seed is an integer"):
        fl.init(make_loop(), seed=seed)


def test_init_takes_a_loop() -> None:
    with pytest.raises(TypeError, match="init takes a Loop, not Sequential"):
        fl.init(mlp())


def test_any_integer_is_a_seed() -> None:
    loop = make_loop()
    digests = {fl.digest(fl.train(fl.init(loop, seed))) for seed in (-1, 0, 2**32, 2**100)}
    assert len(digests) == 4


def test_a_function_makes_the_network_under_the_seed() -> None:
    loop = make_loop(network=lambda: nn.Linear(3, 2))
    first, again, other = (fl.init(loop, seed) for seed in (1, 1, 2))
    assert fl.tree_equal(first.params, again.params)
    assert not fl.tree_equal(first.params, other.params)
    state = torch.get_rng_state()
    fl.init(loop, seed=5)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_function_that_makes_no_network_is_refused() -> None:
    with pytest.raises(TypeError, match=r"must return an nn.Module, not NoneType"):
        fl.init(make_loop(network=lambda: None))


def test_the_values_of_a_module_when_init_is_called_are_the_start() -> None:
    network = mlp()
    loop = make_loop(network=network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(0.5)
    ctx = fl.init(loop)
    assert all(bool((param == 0.5).all()) for param in ctx.params.values())


def test_the_first_context() -> None:
    ctx = fl.init(make_loop(callbacks=[counter(), fl.Callback("plain")]), seed=3)
    assert (ctx.epoch, ctx.step, ctx.step_valid, ctx.global_step, ctx.stage, ctx.seed) == (0, 0, 0, 0, "", 3)
    assert ctx.callbacks == {"counter": 0, "plain": ()}
    assert ctx.trainable == tuple(ctx.params)
    assert ctx.terminate is False


def test_names_are_those_of_the_module() -> None:
    network = mlp()
    ctx = fl.init(make_loop(network=network))
    assert list(ctx.params) == [name for name, _ in network.named_parameters()]
    assert list(ctx.buffers) == [name for name, _ in network.named_buffers()]


def test_an_initial_state_that_cannot_be_saved_is_refused() -> None:
    bad = fl.Callback("bad", init=lambda ctx: {"seen": {1, 2}})
    with pytest.raises(TypeError, match=r"initial state of callback 'bad' can't be saved: \['seen'\] is of type set"):
        fl.init(make_loop(callbacks=[bad]))


@pytest.mark.parametrize("pattern", ["0.wieght", "*.gamma"])
def test_a_pattern_that_matches_nothing_is_refused(pattern: str) -> None:
    optimizer = fl.optimizer(torch.optim.SGD, lr=0.1, params=pattern)
    with pytest.raises(ValueError, match="matches no parameter"):
        fl.init(make_loop(optimizer=optimizer))


def test_frozen_parameters_are_not_trainable() -> None:
    network: Any = mlp()
    network[0].requires_grad_(False)
    assert fl.init(make_loop(network=network)).trainable == ("1.weight", "1.bias", "3.weight", "3.bias")


def test_the_loop_of_a_function_holds_no_second_copy_of_the_parameters() -> None:
    loop = make_loop(network=lambda: nn.Linear(3, 2))
    fl.train(fl.init(loop))
    assert all(p.untyped_storage().nbytes() <= p.element_size() for p in template(loop).parameters())
