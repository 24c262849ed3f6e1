"""Timing two sides against each other, in one process and in turns."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from time import perf_counter, process_time
from typing import Any, TypeAlias

import attrs

Side: TypeAlias = Callable[[], Callable[[], object]]
"""Prepares one run, outside of the measured time, and returns the function to be measured."""

CLOCKS: dict[str, Callable[[], float]] = {"wall": perf_counter, "cpu": process_time}
"""Wall time is what people wait for; CPU time leaves out the waits for other processes of a busy machine."""


class DifferentWorkError(Exception):
    """The two sides of a comparison did not do the same work, so that their times mean nothing."""


@attrs.frozen
class Comparison:
    """Times of two sides in pairs: ``ours[i]`` was measured right before or right after ``theirs[i]``.

    Whatever else the machine does slows down both halves of a pair, and spares some of many short runs, so that the
    ratios are steady where the times are not.
    """

    ours: tuple[float, ...]
    theirs: tuple[float, ...]

    @property
    def ratio_of_minima(self) -> float:
        return min(self.ours) / min(self.theirs)

    @property
    def median_ratio(self) -> float:
        """The median over the pairs of ours by theirs."""
        return statistics.median(a / b for a, b in zip(self.ours, self.theirs, strict=True))

    def as_row(self, digits: int = 1) -> dict[str, Any]:
        """The cells of a table: minimum, median and maximum of each side, and the ratios."""
        times = {
            f"{side} {name}": round(of(values), digits)
            for side, values in (("ours", self.ours), ("theirs", self.theirs))
            for name, of in (("min", min), ("median", statistics.median), ("max", max))
        }
        return times | {
            "ratio of minima": round(self.ratio_of_minima, 3),
            "median ratio": round(self.median_ratio, 3),
        }


def compare(ours: Side, theirs: Side, repeats: int, clock: str, per: float = 1.0, warm_up: int = 2) -> Comparison:
    """Seconds of ``repeats`` runs of each side in turns, divided by ``per``.

    Which side goes first alternates, so that what the one leaves behind (caches, a clock that has risen) favours
    neither. The first ``warm_up`` pairs are dropped.
    """
    sides = {"ours": ours, "theirs": theirs}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(warm_up + repeats):
        for name in sorted(sides, reverse=i % 2 == 1):
            times[name].append(seconds(sides[name], clock) / per)
    return Comparison(*(tuple(times[name][warm_up:]) for name in sides))


def seconds(side: Side, clock: str) -> float:
    """The time of one run.

    The garbage collector stays on, since its work is a cost of whoever makes garbage, and starts with nothing to
    collect.
    """
    run, now = side(), CLOCKS[clock]
    gc.collect()
    start = now()
    run()
    return now() - start
