"""The step: every optimizer, accumulation and mixed precision give the bits of the hand-written loop."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import functional_loop as fl
from tests.sample_loops import data, full_loop, hand_written, make_loop, mlp, recorder, same_bits

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "SGD momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}),
    "SGD nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    "SGD fused": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "fused": True}),
    "SGD foreach": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "foreach": True}),
    "Adam": (torch.optim.Adam, {"lr": 0.01}),
    "Adam decayed": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}),
    "Adam for-loop": (torch.optim.Adam, {"lr": 0.01, "foreach": False}),
    "Adam tensor lr": (torch.optim.Adam, {"lr": torch.tensor(0.01), "foreach": False}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01}),
    "AdamW fused": (torch.optim.AdamW, {"lr": 0.01, "fused": True, "amsgrad": True}),
    "AdamW foreach": (torch.optim.AdamW, {"lr": 0.01, "foreach": True, "maximize": True}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01}),
    "RMSprop centered": (torch.optim.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.9}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.01, "lr_decay": 0.1, "initial_accumulator_value": 0.1}),
    "Adadelta": (torch.optim.Adadelta, {"lr": 1.0}),
    "Adamax": (torch.optim.Adamax, {"lr": 0.01}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.01, "decoupled_weight_decay": True, "weight_decay": 0.1}),
    "RAdam": (torch.optim.RAdam, {"lr": 0.01}),
    "Rprop": (torch.optim.Rprop, {"lr": 0.01}),
    "ASGD": (torch.optim.ASGD, {"lr": 0.01, "t0": 2.0}),
    "Adafactor": (torch.optim.Adafactor, {"lr": 0.01}),
    "LBFGS": (torch.optim.LBFGS, {"lr": 0.1, "max_iter": 3}),
    "LBFGS strong Wolfe": (torch.optim.LBFGS, {"lr": 0.5, "max_iter": 4, "line_search_fn": "strong_wolfe"}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_like_the_hand_written_loop(name: str) -> None:
    cls, flags = OPTIMIZERS[name]
    loop = make_loop(optimizer=fl.optimizer(cls, **flags), epochs=4)
    module = copy.deepcopy(loop.network)
    optimizer = cls(module.parameters(), **copy.deepcopy(flags))
    hand_written(module, optimizer, loop)
    ctx = fl.train(fl.init(loop, seed=0))
    assert same_bits(ctx, module)
    for parameter_name, parameter in module.named_parameters():
        slot = ctx.optimizer_state["slots"].get(parameter_name, {})
        assert fl.tree_equal(dict(slot), dict(optimizer.state[parameter]))


def test_muon_trains_the_matrices_alone() -> None:
    matrices = ["0.weight", "3.weight"]
    loop = make_loop(optimizer=fl.optimizer(torch.optim.Muon, lr=0.1, params="*[03].weight"), epochs=4)
    module = copy.deepcopy(loop.network)
    hand_written(module, torch.optim.Muon([module.get_parameter(name) for name in matrices], lr=0.1), loop)
    start = fl.init(loop, seed=0)
    ctx = fl.train(start)
    assert ctx.trainable == tuple(matrices)
    assert same_bits(ctx, module)
    moved = [name for name in ctx.params if not torch.equal(ctx.params[name], start.params[name])]
    assert moved == matrices


def test_groups_train_like_the_groups_of_torch() -> None:
    groups = [{"params": "*.bias", "lr": 0.2, "momentum": 0.0}]
    loop = make_loop(optimizer=fl.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9, groups=groups), epochs=4)
    module = copy.deepcopy(loop.network)
    named = dict(module.named_parameters())
    biases = [named[name] for name in named if name.endswith("bias")]
    others = [named[name] for name in named if not name.endswith("bias")]
    optimizer = torch.optim.SGD(
        [{"params": biases, "lr": 0.2, "momentum": 0.0}, {"params": others}], lr=0.1, momentum=0.9
    )
    hand_written(module, optimizer, loop)
    assert same_bits(fl.train(fl.init(loop, seed=0)), module)


def sparse_loop(**changes: Any) -> fl.Loop:
    class Averaged(nn.Embedding):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).mean(1)

    tokens = torch.arange(50).reshape(10, 5) % 7
    source = fl.batches(tokens, data(3)[1], batch_size=4, shuffle=True)
    return make_loop(network=Averaged(7, 2, sparse=True), train=source, **changes)


SPARSE = {
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "SGD momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "SparseAdam": (torch.optim.SparseAdam, {"lr": 0.1}),
}


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_gradients_train_like_the_hand_written_loop(name: str) -> None:
    cls, flags = SPARSE[name]
    loop = sparse_loop(optimizer=fl.optimizer(cls, **flags))
    module = copy.deepcopy(loop.network)
    hand_written(module, cls(module.parameters(), **flags), loop)
    assert same_bits(fl.train(fl.init(loop, seed=0)), module)


@pytest.mark.parametrize("name", SPARSE)
def test_a_run_of_sparse_gradients_can_be_saved(name: str) -> None:
    cls, flags = SPARSE[name]
    loop = sparse_loop(optimizer=fl.optimizer(cls, **flags))
    start = fl.init(loop)
    ctx = fl.train(start, steps=3)
    loaded = fl.load_state_dict(start, fl.state_dict(ctx))
    assert fl.digest(loaded) == fl.digest(ctx) != fl.digest(fl.train(start, steps=4))
    assert fl.digest(fl.train(loaded)) == fl.digest(fl.train(ctx))


def test_an_open_window_of_sparse_gradients_can_be_saved() -> None:
    loop = sparse_loop(optimizer=fl.optimizer(torch.optim.SGD, lr=0.1), accumulate=2)
    ctx = fl.train(fl.init(loop), steps=1)
    loaded = fl.load_state_dict(fl.init(loop), fl.state_dict(ctx))
    assert fl.digest(loaded) == fl.digest(ctx)
    assert fl.digest(fl.train(loaded)) == fl.digest(fl.train(ctx))


@pytest.mark.parametrize("accumulate", [1, 2, 3, 4])
@pytest.mark.parametrize("rows_per_batch", [2, 4])
def test_accumulation_averages_over_windows_and_closes_the_last_one(accumulate: int, rows_per_batch: int) -> None:
    source = fl.batches(*data(3), batch_size=rows_per_batch, shuffle=True)
    loop = make_loop(accumulate=accumulate, train=source, epochs=3)
    module = copy.deepcopy(loop.network)
    hand_written(module, torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9), loop)
    assert same_bits(fl.train(fl.init(loop, seed=0)), module)


def test_a_window_is_open_in_the_context_until_it_is_used() -> None:
    start = fl.init(make_loop(accumulate=2, epochs=1))
    contexts = [ctx for ctx in fl.iterate(start) if ctx.stage == "batch_end"]
    assert [bool(ctx.accumulated) for ctx in contexts] == [True, False, False]
    assert fl.tree_equal(contexts[0].params, start.params)
    assert not fl.tree_equal(contexts[1].params, start.params)


def test_a_hook_sees_the_mean_gradient_of_the_window_so_far() -> None:
    seen: list[tuple[str, Any]] = []
    look = recorder(seen, lambda ctx: dict(ctx.grads), ("after_backward",))
    single: list[tuple[str, Any]] = []
    alone = recorder(single, lambda ctx: dict(ctx.grads), ("after_backward",))
    frozen = fl.optimizer(torch.optim.SGD, lr=0.0)
    network = nn.Linear(3, 2)
    fl.train(fl.init(make_loop(network=network, optimizer=frozen, callbacks=[look], accumulate=3, epochs=1)))
    fl.train(fl.init(make_loop(network=network, optimizer=frozen, callbacks=[alone], epochs=1)))
    grads = [g["weight"] for _, g in single]
    assert torch.equal(seen[0][1]["weight"], grads[0])
    assert torch.equal(seen[1][1]["weight"], (grads[0] + grads[1]) / 2)
    assert torch.equal(seen[2][1]["weight"], (grads[0] + grads[1] + grads[2]) / 3)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_mixed_precision_trains_like_torch_autocast(accumulate: int) -> None:
    loop = make_loop(autocast=torch.bfloat16, accumulate=accumulate)
    module = copy.deepcopy(loop.network)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    hand_written(module, optimizer, loop, autocast=torch.bfloat16)
    ctx = fl.train(fl.init(loop, seed=0))
    assert same_bits(ctx, module)
    assert not same_bits(ctx, fl.to_module(fl.train(fl.init(fl.evolve(loop, autocast=None)))))
    assert {param.dtype for param in ctx.params.values()} == {torch.float32}


def test_evaluation_is_in_mixed_precision_too() -> None:
    ctx = fl.init(make_loop(network=nn.Linear(3, 2), autocast=torch.bfloat16))
    assert fl.predict(ctx, torch.ones(2, 3)).dtype == torch.bfloat16


def bad_loss(value: Any) -> Any:
    return lambda y_hat, y: value(y_hat)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (lambda y_hat: y_hat, ValueError, r"scalar tensor, not one of shape \[4, 2\]: take its mean"),
        (lambda y_hat: y_hat.mean().reshape(1), ValueError, r"not one of shape \[1\]"),
        (lambda y_hat: 0.5, TypeError, "scalar tensor, not float"),
        (lambda y_hat: None, TypeError, "scalar tensor, not NoneType"),
        (lambda y_hat: y_hat.mean().detach(), ValueError, "does not depend on any trainable parameter"),
        (lambda y_hat: y_hat.mean() * 1j, ValueError, "a real number, not a complex one"),
        (lambda y_hat: torch.tensor(1.0), ValueError, "does not depend on any trainable parameter"),
    ],
)
def test_a_loss_that_teaches_nothing_is_refused_before_the_first_update(value: Any, error: Any, message: str) -> None:
    start = fl.init(make_loop(loss=bad_loss(value)))
    with pytest.raises(error, match=message) as caught:
        fl.train(start)
    last = fl.context_of(caught.value)
    assert last is not None
    assert last.global_step == 0
    assert fl.tree_equal(last.params, start.params)
    assert "in the network or the loss" in caught.value.__notes__[0]


def test_a_network_of_frozen_parameters_only_keeps_them() -> None:
    loop = make_loop(network=mlp().requires_grad_(False))
    start = fl.init(loop)
    ctx = fl.train(start)
    assert start.trainable == ()
    assert fl.tree_equal(ctx.params, start.params)
    assert not fl.tree_equal(ctx.buffers, start.buffers)


def test_a_run_gives_the_same_bits_twice_and_seeds_differ() -> None:
    loop = full_loop()
    digests = [fl.digest(fl.train(fl.init(loop, seed))) for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]


def test_nothing_in_a_context_has_a_graph() -> None:
    leaves: list[Any] = []

    def look(ctx: fl.Context) -> fl.Context:
        fl.tree_map(leaves.append, ctx)
        return ctx

    stages = dict.fromkeys(fl.STAGES, look)
    fl.train(fl.init(full_loop(callbacks=[fl.Callback("look", **stages)])))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    assert tensors
    assert not any(tensor.requires_grad or tensor.grad_fn is not None for tensor in tensors)
