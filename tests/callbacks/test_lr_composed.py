from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.optim import lr_scheduler as torchs

import functional_loop as fl
from functional_loop.callbacks.registry.dictionary import t_clbk
from functional_loop.callbacks.schedules.lr_composed import lr_chained, lr_sequential
from functional_loop.callbacks.schedules.lr_custom import lr_lambda
from functional_loop.callbacks.schedules.lr_cycles import lr_cyclic, lr_one_cycle
from functional_loop.callbacks.schedules.lr_plateau import lr_reduce_on_plateau
from functional_loop.callbacks.schedules.lr_schedulers import (
    lr_constant,
    lr_exponential,
    lr_linear,
    lr_multi_step,
    lr_step,
)
from tests.callbacks.laws import holds_for
from tests.callbacks.torch_schedules import OPTIMIZERS, loop_of, same_as_torch
from tests.sample_loops import counter, full_loop

Pair = tuple[Callable[[], fl.Callback], Callable[[Any], Any]]

PAIRS: dict[str, Pair] = {
    "sequential": (
        lambda: lr_sequential([lr_linear(0.1, total_iters=2), lr_exponential(0.8)], [2], step_on="batch"),
        lambda o: torchs.SequentialLR(o, [torchs.LinearLR(o, 0.1, total_iters=2), torchs.ExponentialLR(o, 0.8)], [2]),
    ),
    "chained": (
        lambda: lr_chained([lr_constant(0.2, 3), lr_multi_step([1, 4], 0.7), lr_linear()], step_on="batch"),
        lambda o: torchs.ChainedScheduler(
            [torchs.ConstantLR(o, 0.2, 3), torchs.MultiStepLR(o, [1, 4], 0.7), torchs.LinearLR(o)], o
        ),
    ),
    "functions and cycles": (
        lambda: lr_sequential(
            [lr_lambda(lambda step: 1 / (1 + step)), lr_cyclic(0.01, 0.1, 2, cycle_momentum=False), lr_step(1)],
            [2, 7],
            step_on="batch",
        ),
        lambda o: torchs.SequentialLR(
            o,
            [
                torchs.LambdaLR(o, lambda step: 1 / (1 + step)),
                torchs.CyclicLR(o, 0.01, 0.1, 2, cycle_momentum=False),
                torchs.StepLR(o, 1),
            ],
            [2, 7],
        ),
    ),
    "one in the other": (
        lambda: lr_chained(
            [lr_sequential([lr_constant(0.5, 2), lr_exponential(0.9)], [3]), lr_multi_step([5])], step_on="batch"
        ),
        lambda o: torchs.ChainedScheduler(
            [
                torchs.SequentialLR(o, [torchs.ConstantLR(o, 0.5, 2), torchs.ExponentialLR(o, 0.9)], [3]),
                torchs.MultiStepLR(o, [5]),
            ],
            o,
        ),
    ),
}
ALL = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@ALL
def test_rates_and_parameters_are_torchs_at_every_step(pair: Pair, optimizer: str) -> None:
    ours, theirs = pair
    same_as_torch(loop_of(optimizer), ours(), theirs, "batch")


@ALL
def test_it_resumes_anywhere_and_its_forks_do_not_mix(pair: Pair, tmp_path: Path) -> None:
    holds_for(lambda: full_loop(callbacks=[pair[0]()]), tmp_path)


def test_the_parts_are_not_used_up() -> None:
    parts = [lr_constant(0.5, 2), lr_exponential(0.9)]
    first, second = (fl.train(fl.init(loop_of(callbacks=[lr_chained(parts)]))) for _ in range(2))
    assert fl.digest(first) == fl.digest(second)


def test_a_part_can_end_before_the_run_does() -> None:
    parts = [lr_one_cycle(0.2, total_steps=6), lr_constant(0.1)]
    fl.train(fl.init(loop_of(callbacks=[lr_sequential(parts, [6], step_on="batch")])))


def test_a_run_that_began_with_other_parts_is_refused() -> None:
    ctx = fl.train(fl.init(loop_of(callbacks=[lr_chained([lr_constant(), lr_exponential(0.9)])])), steps=2)
    for parts, message in [
        ([lr_constant(), lr_exponential(0.8)], "schedules/1/gamma: 0.9 in what was saved, 0.8 here"),
        ([lr_step(2), lr_exponential(0.9)], "schedules/0/kind: 'lr_constant' in what was saved, 'lr_step' here"),
    ]:
        here = fl.load_state_dict(fl.init(loop_of(callbacks=[lr_chained(parts)])), fl.state_dict(ctx))
        with pytest.raises(fl.StateDictError, match=message):
            fl.train(here)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: lr_chained(lr_step(1)), TypeError, "lr_chained: schedules is a list of what functions"),  # type: ignore[arg-type]
        (lambda: lr_chained([]), ValueError, "lr_chained: there are no schedules"),
        (lambda: lr_chained([counter()]), TypeError, "lr_chained: Callback.* is not a schedule"),
        (lambda: lr_chained([torchs.StepLR]), TypeError, "lr_chained: .*StepLR.* is not a schedule"),  # type: ignore[list-item]
        (lambda: lr_chained([lr_reduce_on_plateau()]), TypeError, "lr_reduce_on_plateau steps on a score"),
        (lambda: lr_sequential([lr_step(1)], [2]), ValueError, "lr_sequential: 1 schedules have 0 milestones, not 1"),
        (lambda: lr_sequential([lr_step(1)] * 3, [2, 1]), ValueError, "lr_sequential: milestones must ascend"),
        (lambda: lr_sequential([lr_step(1)], [], step_on="x"), ValueError, "lr_sequential: step_on is"),
    ],
)
def test_bad_arguments_are_refused(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_parts_may_be_descriptors() -> None:
    described = [t_clbk("lr_linear", total_iters=2), t_clbk("lr_exponential", gamma=0.8)]
    made = [lr_linear(total_iters=2), lr_exponential(0.8)]
    for make in (lr_chained, lambda parts: lr_sequential(parts, [2])):
        digests = {fl.digest(fl.train(fl.init(loop_of(callbacks=[make(parts)])))) for parts in (described, made)}
        assert len(digests) == 1
