"""Measures are functions of predictions and targets: those that keep a state of their own are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import functional_loop as fl
from tests.sample_loops import full_loop, mean_absolute


class Mean:
    """Accumulates as the metrics of other libraries do."""

    def __init__(self) -> None:
        self.total, self.rows = 0.0, 0

    def update(self, y_hat: Tensor, y: Tensor) -> None:
        self.total += float((y_hat - y).abs().sum())
        self.rows += y.numel()

    def compute(self) -> float:
        return self.total / self.rows

    def reset(self) -> None:
        self.total, self.rows = 0.0, 0

    def __call__(self, y_hat: Tensor, y: Tensor) -> float:
        self.update(y_hat, y)
        return self.compute()


def test_objects_that_accumulate_are_refused_when_the_loop_is_made() -> None:
    metric = Mean()
    for fn in (metric, metric.__call__, lambda y_hat, y: metric(y_hat, y)):
        with pytest.raises(TypeError, match=r"measure 'mean' uses a Mean .*init=, update=, compute="):
            fl.measure("mean", fn)

    def update(state: int, y_hat: Tensor, y: Tensor) -> int:
        metric.update(y_hat, y)
        return state

    with pytest.raises(TypeError, match=r"measure 'mean' uses a Mean \(update > metric\)"):
        fl.measure("mean", init=lambda: 0, update=update, compute=lambda state: 0.0)
    with pytest.raises(TypeError, match=r"measure 'mean' uses a Mean \(compute > metric\)"):
        fl.measure("mean", init=lambda: 0, update=lambda s, y_hat, y: s, compute=lambda state: metric.compute())
    with pytest.raises(TypeError, match=r"uses a Mean .*init=, update=, compute="):
        full_loop(measures_valid=[metric])


def stateful() -> dict[str, fl.Measure]:
    totals: list[float] = [0.0, 0.0]

    def mean_so_far(y_hat: Tensor, y: Tensor) -> float:
        totals[0] += float((y_hat - y).abs().sum())
        totals[1] += y.numel()
        return totals[0] / totals[1]

    def best_so_far(y_hat: Tensor, y: Tensor) -> float:
        totals.append(float((y_hat - y).abs().mean()))
        return max(totals[2:])

    def counted(state: int, y_hat: Tensor, y: Tensor) -> int:
        totals.append(1.0)
        return state + len(totals)

    def appended(state: list[int], y_hat: Tensor, y: Tensor) -> list[int]:
        state.append(len(y))
        return state

    def added(state: Tensor, y_hat: Tensor, y: Tensor) -> Tensor:
        return state.add_(len(y))

    def computed(state: int) -> float:
        totals.append(1.0)
        return state + len(totals)

    def rows(state: int, y_hat: Tensor, y: Tensor) -> int:
        return state + len(y)

    return {
        "in place, a list": fl.measure("own", init=list, update=appended, compute=len),
        "in place, a tensor": fl.measure("own", init=lambda: torch.zeros(()), update=added, compute=float),
        "compute": fl.measure("own", init=lambda: 0, update=rows, compute=computed),
        "mean so far": fl.measure("own", mean_so_far),
        "best so far": fl.measure("own", best_so_far),
        "random": fl.measure("own", lambda y_hat, y: torch.rand(())),
        "update": fl.measure("own", init=lambda: 0, update=counted, compute=lambda n: n),
    }


@pytest.mark.parametrize("name", stateful())
@pytest.mark.parametrize("part", ["measures_train", "measures_valid"])
def test_a_measure_with_a_state_of_its_own_is_refused_at_its_first_use(name: str, part: str) -> None:
    changes: dict[str, Any] = {part: [stateful()[name]]}
    with pytest.raises(ValueError, match=r"measure 'own'(: update writes| gives two results)") as caught:
        fl.train(fl.init(full_loop(**changes)))
    ctx = fl.context_of(caught.value)
    assert ctx is not None
    assert ctx.epoch == 1


@pytest.mark.parametrize("mode", ["vectorised", "exact"])
@pytest.mark.parametrize("name", stateful())
def test_members_refuse_them_too(name: str, mode: str) -> None:
    loop = full_loop(measures_train=[stateful()[name]], callbacks=[])
    with pytest.raises(ValueError, match=r"measure 'own'(: update writes| gives two results)"):
        fl.train(fl.stack([fl.init(loop, seed) for seed in range(2)], mode=mode))


def test_a_measure_that_reads_what_it_never_changes_is_none_of_these() -> None:
    weight, calls = torch.ones(2), []

    def weighted(y_hat: Tensor, y: Tensor) -> Tensor:
        calls.append(len(y))
        return mean_absolute(y_hat * weight, y * weight)

    loop = full_loop(measures_valid=[fl.measure("own", weighted)])
    assert fl.digest(fl.train(fl.init(loop))) == fl.digest(fl.train(fl.init(loop)))
    # One validation in each of two epochs, twice, and four more calls for the first.
    assert len(calls) == 8


def test_vectorised_members_check_a_measure_once() -> None:
    calls: list[int] = []

    def rows(state: Tensor, y_hat: Tensor, y: Tensor) -> Tensor:
        calls.append(1)
        return state + len(y)

    counted = fl.measure("rows", init=lambda: torch.zeros(()), update=rows, compute=lambda n: n)
    loop = full_loop(measures_train=[], measures_valid=[counted], accumulate=1, callbacks=[])
    members = fl.stack([fl.init(loop, seed) for seed in range(3)], mode="vectorised")
    scores = fl.train(members).last_scores_valid
    assert scores == {"rows": 10.0}
    # Two batches in each of two epochs, once for all members, and the five calls of the check.
    assert len(calls) == 9


def test_a_measure_of_vectorised_members_with_a_state_of_its_own_is_refused() -> None:
    loop = full_loop(measures_valid=[stateful()["update"]], measures_train=[], callbacks=[])
    members = fl.stack([fl.init(loop, seed) for seed in range(3)], mode="vectorised")
    with pytest.raises(ValueError, match="measure 'own' gives two results"):
        fl.train(members)
