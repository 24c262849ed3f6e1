from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler

import functional_loop as fl
from functional_loop.callbacks.schedules.lr_cycles import lr_cyclic, lr_one_cycle
from tests.callbacks.laws import holds_for
from tests.callbacks.torch_schedules import OPTIMIZERS, loop_of, rates, same_as_torch
from tests.sample_loops import data, full_loop

Make = Callable[..., fl.Callback]
THREE = [0.1, 0.2, 0.3]

CYCLIC: list[dict[str, Any]] = [
    {"base_lr": 0.01, "max_lr": 0.2, "step_size_up": 3},
    {"base_lr": 0.01, "max_lr": 0.2, "step_size_up": 1, "step_size_down": 3, "mode": "triangular2"},
    {"base_lr": 0.01, "max_lr": 0.2, "step_size_up": 2, "mode": "exp_range", "gamma": 0.9, "cycle_momentum": False},
    {"base_lr": 0.01, "max_lr": 0.2, "step_size_up": 2, "scale_fn": lambda x: 0.5**x, "scale_mode": "iterations"},
    {"base_lr": 0.01, "max_lr": 0.2, "step_size_up": 2, "base_momentum": 0.5, "max_momentum": 0.6},
]
ONE_CYCLE: list[dict[str, Any]] = [
    {"max_lr": 0.2},
    {"max_lr": 0.2, "pct_start": 0.45, "anneal_strategy": "linear", "three_phase": True},
    {"max_lr": 0.2, "cycle_momentum": False, "div_factor": 3.0, "final_div_factor": 7.0},
    {"max_lr": 0.2, "base_momentum": 0.5, "max_momentum": 0.6},
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("step_on", ["epoch", "batch"])
@pytest.mark.parametrize("arguments", CYCLIC)
def test_cycles_are_torchs_at_every_step(arguments: dict[str, Any], step_on: str, optimizer: str) -> None:
    callback = lr_cyclic(**arguments, step_on=step_on)
    same_as_torch(loop_of(optimizer), callback, lambda torchs: lr_scheduler.CyclicLR(torchs, **arguments), step_on)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("step_on", "accumulate", "steps"), [("epoch", 1, 4), ("batch", 1, 12), ("batch", 2, 8)])
@pytest.mark.parametrize("arguments", ONE_CYCLE)
def test_the_one_cycle_is_torchs_at_every_step_of_the_whole_run(
    arguments: dict[str, Any], step_on: str, accumulate: int, steps: int, optimizer: str
) -> None:
    def make(torchs: torch.optim.Optimizer) -> Any:
        return lr_scheduler.OneCycleLR(torchs, total_steps=steps, **arguments)

    loop = loop_of(optimizer, accumulate=accumulate)
    for given in ({}, {"total_steps": steps}):
        same_as_torch(loop, lr_one_cycle(**arguments, **given, step_on=step_on), make, step_on)


def test_every_group_can_have_bounds_of_its_own() -> None:
    cyclic: dict[str, Any] = {"base_lr": [0.01, 0.02, 0.03], "max_lr": THREE, "step_size_up": 2}
    cyclic |= {"base_momentum": [0.1, 0.2, 0.3], "max_momentum": [0.5, 0.6, 0.7]}
    same_as_torch(loop_of(), lr_cyclic(**cyclic), lambda torchs: lr_scheduler.CyclicLR(torchs, **cyclic), "batch")
    one: dict[str, Any] = {"max_lr": THREE, "base_momentum": THREE, "max_momentum": THREE}
    same_as_torch(
        loop_of(), lr_one_cycle(**one), lambda torchs: lr_scheduler.OneCycleLR(torchs, total_steps=12, **one), "batch"
    )


@pytest.mark.parametrize(
    "make", [lambda: lr_cyclic(0.01, 0.2, step_size_up=2), lambda: lr_one_cycle(0.2)], ids=["cyclic", "one_cycle"]
)
def test_it_resumes_anywhere_and_its_forks_do_not_mix(make: Callable[[], fl.Callback], tmp_path: Path) -> None:
    holds_for(lambda: full_loop(callbacks=[make()]), tmp_path)


def test_a_run_of_another_length_is_refused_before_its_first_epoch() -> None:
    loop = loop_of(callbacks=[lr_one_cycle(0.2)])
    *_, last, _ = fl.iterate(fl.init(loop))
    longer = fl.load_state_dict(fl.init(attrs.evolve(loop, epochs=6)), fl.state_dict(last))
    with pytest.raises(fl.StateDictError, match="total_steps: 12 in what was saved, 18 here"):
        next(iter(fl.iterate(longer)))


def test_a_run_of_another_length_goes_on_where_the_total_is_given() -> None:
    loop = loop_of(callbacks=[lr_one_cycle(0.2, total_steps=18)])
    *_, last, _ = fl.iterate(fl.init(loop))
    longer = attrs.evolve(loop, epochs=6)
    resumed = fl.train(fl.load_state_dict(fl.init(longer), fl.state_dict(last)))
    assert fl.digest(resumed) == fl.digest(fl.train(fl.init(longer)))


def test_fewer_steps_than_the_loop_makes_are_refused_before_training() -> None:
    with pytest.raises(ValueError, match="total_steps=11, but the loop makes 12 steps"):
        fl.init(loop_of(callbacks=[lr_one_cycle(0.2, total_steps=11)]))
    fl.init(loop_of(callbacks=[lr_one_cycle(0.2, total_steps=4, step_on="epoch")]))


class Stream:
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield data(3)


def test_where_the_number_of_batches_is_unknown_the_total_must_be_given() -> None:
    stream = fl.batches(Stream())
    with pytest.raises(ValueError, match="number of batches of an epoch is not known in advance; give total_steps"):
        fl.init(loop_of(train=stream, callbacks=[lr_one_cycle(0.2)]))
    ctx = fl.train(fl.init(loop_of(train=stream, callbacks=[lr_one_cycle(0.2, total_steps=4)])))
    assert ctx.global_step == 4


def test_a_run_of_no_epochs_has_nothing_to_refuse() -> None:
    assert fl.train(fl.init(loop_of(epochs=0, callbacks=[lr_one_cycle(0.2)]))).stage == "end"


def test_an_optimizer_without_momentum_is_refused_before_training() -> None:
    adagrad = fl.optimizer(torch.optim.Adagrad, lr=0.1)
    for callback in (lr_cyclic(0.01, 0.1), lr_one_cycle(0.1)):
        with pytest.raises(ValueError, match="optimizer must support momentum"):
            fl.init(loop_of(optimizer=adagrad, callbacks=[callback]))


def test_lists_of_another_length_than_the_groups_are_refused_before_training() -> None:
    for callback in (lr_cyclic([0.01, 0.02], 0.1), lr_one_cycle([0.1, 0.2])):
        with pytest.raises(ValueError, match="must have the same length as") as raised:
            fl.init(loop_of(callbacks=[callback]))
        assert callback.id in raised.value.__notes__[0]


def test_a_function_that_keeps_something_is_not_written_to() -> None:
    class Scale:
        factor = 0.5

        def __call__(self, x: float) -> float:
            return self.factor**x

    scale = Scale()
    end = fl.train(fl.init(loop_of(callbacks=[lr_cyclic(0.01, 0.2, step_size_up=2, scale_fn=scale)])))
    plain = fl.train(fl.init(loop_of(callbacks=[lr_cyclic(0.01, 0.2, step_size_up=2, scale_fn=lambda x: 0.5**x)])))
    assert rates(end) == rates(plain)
    assert not vars(scale)


@pytest.mark.parametrize(
    ("make", "arguments", "error", "message"),
    [
        (lr_cyclic, {"base_lr": -1}, ValueError, "lr_cyclic: base_lr must be a number of at least 0, not -1"),
        (lr_cyclic, {"max_lr": [0.1, "x"]}, ValueError, "lr_cyclic: max_lr must be a number of at least 0, not 'x'"),
        (lr_cyclic, {"step_size_up": 0}, ValueError, "lr_cyclic: step_size_up must be an integer of at least 1"),
        (lr_cyclic, {"step_size_down": 0}, ValueError, "lr_cyclic: step_size_down must be an integer of at least 1"),
        (lr_cyclic, {"mode": "square"}, ValueError, "lr_cyclic: mode is 'triangular' or"),
        (lr_cyclic, {"gamma": None}, ValueError, "lr_cyclic: gamma must be a number"),
        (lr_cyclic, {"scale_fn": 3}, TypeError, "lr_cyclic: scale_fn is a function or None"),
        (lr_cyclic, {"scale_mode": "step"}, ValueError, "lr_cyclic: scale_mode is 'cycle' or 'iterations'"),
        (lr_cyclic, {"cycle_momentum": 1}, TypeError, "lr_cyclic: cycle_momentum is True or False"),
        (lr_cyclic, {"base_momentum": 2}, ValueError, "lr_cyclic: base_momentum must be a number from 0 to 1"),
        (lr_one_cycle, {"total_steps": 0}, ValueError, "lr_one_cycle: total_steps must be an integer of at least 1"),
        (lr_one_cycle, {"pct_start": 2}, ValueError, "lr_one_cycle: pct_start must be a number from 0 to 1"),
        (lr_one_cycle, {"anneal_strategy": "sin"}, ValueError, "lr_one_cycle: anneal_strategy is 'cos' or 'linear'"),
        (lr_one_cycle, {"max_momentum": [2]}, ValueError, "lr_one_cycle: max_momentum must be a number from 0 to 1"),
        (lr_one_cycle, {"div_factor": 0}, ValueError, "lr_one_cycle: div_factor must be a number of at least 1"),
        (lr_one_cycle, {"final_div_factor": 0}, ValueError, "lr_one_cycle: final_div_factor must be a number"),
        (lr_one_cycle, {"three_phase": None}, TypeError, "lr_one_cycle: three_phase is True or False"),
        (lr_one_cycle, {"max_lr": True}, ValueError, "lr_one_cycle: max_lr must be a number"),
        (lr_one_cycle, {"step_on": "step"}, ValueError, "lr_one_cycle: step_on is 'epoch' or 'batch'"),
    ],
)
def test_bad_arguments_are_refused_by_name(
    make: Make, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    usual: dict[str, Any] = {"base_lr": 0.1, "max_lr": 0.2} if make is lr_cyclic else {"max_lr": 0.2}
    with pytest.raises(error, match=message):
        make(**usual | arguments)
