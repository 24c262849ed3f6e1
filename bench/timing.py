"""Timing two sides against each other, in one process and in turns."""

from __future__ import annotations

import argparse
import gc
import math
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

    @property
    def median_difference(self) -> float:
        return statistics.median(a - b for a, b in zip(self.ours, self.theirs, strict=True))

    @property
    def quartiles(self) -> tuple[float, float]:
        """Between them lies half of the pairs' ratios."""
        ratios = sorted(a / b for a, b in zip(self.ours, self.theirs, strict=True))
        return ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]

    def as_row(self, unit: str = "µs", digits: int = 1) -> dict[str, Any]:
        """The cells of a table: minimum and median of each side, their difference, and the ratios."""
        times = {
            f"{side} {name} {unit}": round(of(values), digits)
            for side, values in (("ours", self.ours), ("theirs", self.theirs))
            for name, of in (("min", min), ("median", statistics.median))
        }
        return times | {
            "difference": round(self.median_difference, digits),
            "ratio of minima": round(self.ratio_of_minima, 3),
            "median ratio": round(self.median_ratio, 3),
            "half of ratios": "{:.2f} to {:.2f}".format(*self.quartiles),
            "pairs": len(self.ours),
        }


LEAST_PAIRS = 3


def add_timing(parser: argparse.ArgumentParser, repeats: int, seconds: float, clock: str = "wall") -> None:
    """The options that every comparison has."""
    parser.add_argument(
        "--repeats", type=positive, default=repeats, help="pairs of runs, at most (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=seconds,
        help=f"start no pair of a row after this time, once there are {LEAST_PAIRS} (default: %(default)s)",
    )
    parser.add_argument("--clock", choices=CLOCKS, default=clock, help="cpu: for a busy machine (default: %(default)s)")


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError
    return value


def compare(
    ours: Side, theirs: Side, repeats: int, clock: str, limit: float = math.inf, per: float = 1.0, warm_up: int = 1
) -> Comparison:
    """Seconds of ``repeats`` runs of each side in turns, divided by ``per``; fewer if ``limit`` seconds have passed.

    Which side goes first alternates, so that what the one leaves behind (caches, a clock that has risen) favours
    neither. The first ``warm_up`` pairs are dropped.
    """
    sides = {"ours": ours, "theirs": theirs}
    times: dict[str, list[float]] = {name: [] for name in sides}
    started = perf_counter()
    for i in range(warm_up + repeats):
        if i >= warm_up + LEAST_PAIRS and perf_counter() - started > limit:
            break
        for name in sorted(sides, reverse=i % 2 == 1):
            times[name].append(seconds(sides[name], clock) / per)
    return Comparison(*(tuple(times[name][warm_up:]) for name in sides))


def seconds(side: Side, clock: str) -> float:
    """The time of one run.

    The garbage collector stays on, since its work is a cost of the side that makes garbage, and starts with nothing to
    collect.
    """
    run, now = side(), CLOCKS[clock]
    gc.collect()
    start = now()
    run()
    return now() - start
