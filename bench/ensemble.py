"""Time of an ensemble of K members as one stacked context, against K hand-written loops one after the other.

A run is one epoch from fresh parameters and a fresh optimizer. Every member of ours reads the data in an order of its
own, from ``fl.batches(..., shuffle=True)``. "ready": a hand-written loop reads a list of batches that are made already;
"own": a DataLoader that shuffles. Of the hand-written loops at most 8 are run, and their time is scaled to K. Times are
microseconds per step of the whole ensemble, on one thread; "times faster" is theirs by ours.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import functional_loop as fl
from functional_loop.engine.template import template

from . import handwritten
from .report import Chart
from .sources import own, ready
from .step import FLAGS, LEARNING_RATE
from .timing import DifferentWorkError, add_timing, compare, positive
from .workloads import Workload, mlp, table

CHART = Chart(("workload", "members", "data"), ("times faster",), "time of the loops by hand / ours")
DATA = {"ready": ready, "own": own}
MOST_LOOPS = 8


def tiny() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))


def plane(rows: int = 4096) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(rows, 2)
    return x, (x[:, 0] * x[:, 1] > 0).long()


def small_cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 13 * 13, 10))


def few_images() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(256, 1, 28, 28), torch.randint(10, (256,))


WORKLOADS = {
    "tiny": Workload("MLP 2-16-16-2, batch 32", tiny, plane, F.cross_entropy, batch_size=32),
    "mlp": Workload("MLP 20-64-64-2, batch 32", mlp, lambda: table(4096), F.cross_entropy, batch_size=32),
    "cnn": Workload("CNN on 28x28, batch 32", small_cnn, few_images, F.cross_entropy, batch_size=32),
}
SIZES = {"tiny": (64, 512), "mlp": (8, 32, 128), "cnn": (8, 16)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    known = list(WORKLOADS)
    parser.add_argument("--workloads", nargs="+", choices=known, default=known, help="what to train (default: all)")
    parser.add_argument("--members", nargs="+", type=positive, help="sizes of the ensemble (default: by workload)")
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA), help="their batches (default: all)")
    parser.add_argument("--compile", action="store_true", help="our side with compile=True")
    parser.add_argument("--flags", choices=FLAGS, default="default", help="flags of AdamW (default: %(default)s)")
    add_timing(parser, repeats=10, seconds=20)


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name in args.workloads:
        for members in args.members or SIZES[name]:
            for data in args.data:
                case = Case(WORKLOADS[name], data, members, FLAGS[args.flags], args.compile)
                case.check()
                scale = case.loops / members
                times = compare(case.ours, case.theirs, args.repeats, args.clock, args.seconds, per=case.steps * 1e-6)
                yield {
                    "workload": WORKLOADS[name].title,
                    "members": members,
                    "data": data,
                    "mode": fl.ensemble_mode(case.start).partition(":")[0],
                    "ours µs": round(min(times.ours)),
                    "theirs µs": round(min(times.theirs) / scale),
                    "times faster": round(1 / (times.median_ratio * scale), 2),
                }


class Case:
    """One workload and size as the two sides of a comparison."""

    def __init__(self, workload: Workload, data: str, members: int, flags: dict[str, Any], compile: bool) -> None:
        x, y = workload.data()
        self.workload = workload
        self.flags = flags
        self.loops = min(members, MOST_LOOPS)
        self.batches = DATA[data](workload).theirs
        source = fl.batches(x, y, batch_size=workload.batch_size, shuffle=True)
        self.steps = len(source)
        optimizer = fl.optimizer(torch.optim.AdamW, lr=LEARNING_RATE, **flags)
        loop = fl.Loop(workload.network(), workload.loss, optimizer, source, epochs=1, compile=compile)
        self.start = fl.stack([fl.init(loop, seed) for seed in range(members)])

    def ours(self) -> Callable[[], fl.Context]:
        return lambda: fl.train(self.start)

    def theirs(self) -> Callable[[], None]:
        models = [copy.deepcopy(template(self.start.loop)) for _ in range(self.loops)]

        def train() -> None:
            for seed, model in enumerate(models):
                optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, **self.flags)
                handwritten.train(model, self.workload.loss, optimizer, self.batches(seed), epochs=1)

        return train

    def check(self) -> None:
        """Run both sides once from the same data, and compare the last losses.

        Raises:
            DifferentWorkError: those of the first member differ by more than 1e-4, relative.
        """
        ours = fl.unstack(fl.train(self.start))[0]
        solo = fl.train(fl.unstack(self.start)[0])
        a, b = float(torch.as_tensor(ours.last_loss)), float(torch.as_tensor(solo.last_loss))
        if abs(a - b) > 1e-4 * abs(b):
            raise DifferentWorkError(f"a member of the ensemble ends with loss {a}, its solo run with {b}")
