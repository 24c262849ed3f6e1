"""Time per batch of ``fl.batches`` against a DataLoader of the same rows in the same order, without training.

A run reads one shuffled epoch. "tensors": rows in memory. "dataset": an ordinary ``Dataset``, which makes one row a
call, without workers and with two. Times are microseconds per batch, on one thread; those with workers are wall time,
the start of the workers included.
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

import functional_loop as fl

from .report import Chart
from .sources import Data, loader, own
from .timing import DifferentWorkError, add_timing, compare
from .workloads import WORKLOADS, Workload

CHART = Chart(("rows", "source"), ("ratio of minima", "median ratio"), "time of fl.batches / DataLoader")
ROWS = {"mlp": "20 numbers, batch 32", "cnn": "images 28x28, batch 64"}
SOURCES = ("tensors", "dataset", "dataset, 2 workers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="of which workload (default: all)")
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES), help="(default: all)")
    add_timing(parser, repeats=50, seconds=8)


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for rows in args.rows:
        for source in args.sources:
            workers = 2 if "workers" in source else 0
            case = Case(_data(WORKLOADS[rows], source, workers))
            case.check()
            # The CPU time of a process leaves out that of its workers.
            clock = "wall" if workers else args.clock
            times = compare(case.ours, case.theirs, args.repeats, clock, args.seconds, per=len(case.data.ours) * 1e-6)
            yield {"rows": ROWS[rows], "source": source, **times.as_row()}


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """Makes one row a call, as most datasets do."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return (self.x[row] - 0.1) / 0.3, self.y[row]


def _data(workload: Workload, source: str, workers: int) -> Data:
    if source == "tensors":
        return own(workload)
    dataset = Rows(*workload.data())
    return Data(
        fl.batches(dataset, batch_size=workload.batch_size, shuffle=True, num_workers=workers),
        loader(dataset, workload.batch_size, num_workers=workers),
    )


class Case:
    """An epoch of both sides, each of its own seed."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self.our_seeds, self.their_seeds = count(), count()

    def ours(self) -> Callable[[], object]:
        seed = next(self.our_seeds)
        return lambda: deque(self.data.ours.fetch(seed, 1, 0, ()), maxlen=0)

    def theirs(self) -> Callable[[], object]:
        batches = self.data.theirs(next(self.their_seeds))
        return lambda: deque(batches, maxlen=0)

    def check(self) -> None:
        """Compare the batches of one epoch.

        Raises:
            DifferentWorkError: they differ.
        """
        ours = (batch for batch, _ in self.data.ours.fetch(0, 1, 0, ()))
        for step, (batch, (x, y)) in enumerate(zip(ours, self.data.theirs(0), strict=True), 1):
            if not (torch.equal(batch.x, x) and torch.equal(batch.y, y)):
                raise DifferentWorkError(f"fl.batches and the DataLoader differ in batch {step}")
