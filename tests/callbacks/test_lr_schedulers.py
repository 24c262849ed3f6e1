from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
from torch.optim import lr_scheduler

import functional_loop as fl
from functional_loop.callbacks.schedules.lr_schedulers import (
    lr_constant,
    lr_cosine_annealing,
    lr_exponential,
    lr_linear,
    lr_multi_step,
    lr_polynomial,
    lr_step,
    lr_warm_restarts,
)
from tests.callbacks.laws import holds_for
from tests.callbacks.torch_schedules import OPTIMIZERS, loop_of, rates, same_as_torch
from tests.sample_loops import full_loop

Make = Callable[..., fl.Callback]

SCHEDULES: list[tuple[Make, Callable[..., Any], dict[str, Any]]] = [
    (lr_step, lr_scheduler.StepLR, {"step_size": 2, "gamma": 0.3}),
    (lr_multi_step, lr_scheduler.MultiStepLR, {"milestones": [1, 3, 3], "gamma": 0.7}),
    (lr_constant, lr_scheduler.ConstantLR, {"factor": 0.2, "total_iters": 2}),
    (lr_linear, lr_scheduler.LinearLR, {"start_factor": 0.1, "end_factor": 0.9, "total_iters": 3}),
    (lr_exponential, lr_scheduler.ExponentialLR, {"gamma": 0.77}),
    (lr_polynomial, lr_scheduler.PolynomialLR, {"total_iters": 3, "power": 1.7}),
    (lr_cosine_annealing, lr_scheduler.CosineAnnealingLR, {"T_max": 3, "eta_min": 0.001}),
    (lr_warm_restarts, lr_scheduler.CosineAnnealingWarmRestarts, {"T_0": 1, "T_mult": 2, "eta_min": 0.001}),
]
ALL = pytest.mark.parametrize(("make", "cls", "arguments"), SCHEDULES, ids=[make.__name__ for make, _, _ in SCHEDULES])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("step_on", "accumulate"), [("epoch", 1), ("batch", 1), ("batch", 2)])
@ALL
def test_rates_and_parameters_are_torchs_at_every_step(
    make: Make, cls: Callable[..., Any], arguments: dict[str, Any], step_on: str, accumulate: int, optimizer: str
) -> None:
    loop = loop_of(optimizer, accumulate=accumulate)
    same_as_torch(loop, make(**arguments, step_on=step_on), lambda torchs: cls(torchs, **arguments), step_on)


@pytest.mark.parametrize("step_on", ["epoch", "batch"])
@ALL
def test_it_resumes_anywhere_and_its_forks_do_not_mix(
    make: Make, cls: Any, arguments: dict[str, Any], step_on: str, tmp_path: Path
) -> None:
    holds_for(lambda: full_loop(callbacks=[make(**arguments, step_on=step_on)]), tmp_path)


@ALL
def test_a_step_back_in_time_is_the_earlier_rate(make: Make, cls: Any, arguments: dict[str, Any]) -> None:
    start = fl.init(loop_of(callbacks=[make(**arguments, step_on="batch")]))
    contexts = [ctx for ctx in fl.iterate(start) if ctx.stage == "batch_end"]
    for ctx, following in zip(contexts[::-1][1:], contexts[::-1], strict=False):
        assert fl.tree_equal(fl.train(ctx, steps=1).callbacks, following.callbacks)
        assert rates(fl.train(ctx, steps=1)) == rates(following)


@ALL
def test_a_run_that_began_with_other_arguments_is_refused(make: Make, cls: Any, arguments: dict[str, Any]) -> None:
    ctx = fl.train(fl.init(loop_of(callbacks=[make(**arguments)])), steps=2)
    name, value = next(iter(arguments.items()))
    changed = arguments | {name: [*value, 9] if isinstance(value, list) else value * 0.5 if value < 1 else value + 1}
    for other in (make(**changed), make(**arguments, step_on="batch")):
        here = fl.load_state_dict(fl.init(loop_of(callbacks=[other])), fl.state_dict(ctx))
        with pytest.raises(fl.StateDictError, match=f"'{make.__name__}' can't continue a schedule") as raised:
            fl.train(here)
        assert raised.value.differences[0].startswith(name if other.hooks.get("epoch_end") else "step_on")


def test_more_epochs_are_no_other_schedule() -> None:
    loop = loop_of(callbacks=[lr_step(2)])
    *_, last, _ = fl.iterate(fl.init(loop))
    longer = attrs.evolve(loop, epochs=7)
    resumed = fl.train(fl.load_state_dict(fl.init(longer), fl.state_dict(last)))
    assert fl.digest(resumed) == fl.digest(fl.train(fl.init(longer)))


def test_a_schedule_that_comes_late_starts_with_its_first_step() -> None:
    ctx = fl.train(fl.init(loop_of("sgd")), steps=3)
    late = fl.init(loop_of("sgd", callbacks=[lr_exponential(0.5)]))
    end = fl.train(fl.load_state_dict(late, fl.state_dict(ctx), strict=False))
    assert rates(end) == [0.1 * 0.5**4]


def test_two_schedules_work_on_the_same_rates() -> None:
    both = [lr_exponential(0.5, id="fast"), lr_exponential(0.25, id="faster")]
    assert rates(fl.train(fl.init(loop_of("sgd", epochs=2, callbacks=both)))) == [0.1 * 0.5 * 0.25 * 0.5 * 0.25]


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lr_step, {"step_size": 0}, "lr_step: step_size must be an integer of at least 1, not 0"),
        (lr_step, {"step_size": 1, "gamma": "x"}, "lr_step: gamma must be a number of at least 0"),
        (lr_step, {"step_size": 1, "step_on": "step"}, "lr_step: step_on is 'epoch' or 'batch', not 'step'"),
        (lr_multi_step, {"milestones": [3, 1]}, "lr_multi_step: milestones must ascend"),
        (lr_multi_step, {"milestones": [0.5]}, "lr_multi_step: a milestone must be an integer of at least 1"),
        (lr_constant, {"factor": 1.5}, "lr_constant: factor must be a number from 0 to 1, not 1.5"),
        (lr_constant, {"total_iters": -1}, "lr_constant: total_iters must be an integer of at least 0"),
        (lr_linear, {"start_factor": 0}, "lr_linear: start_factor must be above 0"),
        (lr_linear, {"end_factor": 2}, "lr_linear: end_factor must be a number from 0 to 1"),
        (lr_linear, {"total_iters": 0}, "lr_linear: total_iters must be an integer of at least 1"),
        (lr_exponential, {"gamma": -1}, "lr_exponential: gamma must be a number of at least 0, not -1"),
        (lr_polynomial, {"total_iters": 1.0}, "lr_polynomial: total_iters must be an integer"),
        (lr_polynomial, {"power": None}, "lr_polynomial: power must be a number"),
        (lr_cosine_annealing, {"T_max": 0}, "lr_cosine_annealing: T_max must be an integer of at least 1"),
        (
            lr_cosine_annealing,
            {"T_max": 1, "eta_min": -1},
            "lr_cosine_annealing: eta_min must be a number of at least 0",
        ),
        (lr_warm_restarts, {"T_0": 0}, "lr_warm_restarts: T_0 must be an integer of at least 1"),
        (lr_warm_restarts, {"T_0": 1, "T_mult": 0}, "lr_warm_restarts: T_mult must be an integer of at least 1"),
    ],
)
def test_bad_arguments_are_refused_by_name(make: Make, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_milestones_are_a_list() -> None:
    with pytest.raises(TypeError, match="lr_multi_step: milestones is a list of steps, not 3"):
        lr_multi_step(3)  # type: ignore[arg-type]
