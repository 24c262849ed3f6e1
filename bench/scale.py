"""What grows: time and memory of a step in long runs, and start-up with tensors, parameters and rows.

"long run" is one call of ``fl.train`` with AdamW(fused=True): a row for every tenth of it, whose time is microseconds
per step over its epochs (minimum and median), and whose memory is what the process holds at its end. "start" goes from
a network and tensors to the context after the first step, against the same by hand with a DataLoader; its last column
is our time for one more of what grows, since the row before. A shuffle makes a permutation of all rows, on both sides.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import functional_loop as fl

from . import handwritten
from .report import Chart
from .resident import resident_memory
from .timing import CLOCKS, add_timing, compare, positive
from .workloads import mlp, table

CHART = Chart(("case", "at"), ("of the first",), "time / that of the first row of the case")
PARTS = ("steps", "epochs", "tensors", "parameters", "rows", "rows shuffled")
BATCH_SIZE = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(default: all)")
    parser.add_argument("--steps", type=positive, default=100_000, help="of the long run (default: %(default)s)")
    parser.add_argument("--epochs", type=positive, default=1000, help="of many short epochs (default: %(default)s)")
    parser.add_argument("--largest", type=positive, default=10**7, help="sizes at most (default: %(default)s)")
    add_timing(parser, repeats=20, seconds=3)


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for part in args.parts:
        if part == "steps":
            yield from long_run(f"long run, {args.steps} steps", 8192, -(-args.steps * BATCH_SIZE // 8192), args.clock)
        elif part == "epochs":
            yield from long_run(f"long run, {args.epochs} epochs", 2 * BATCH_SIZE, args.epochs, args.clock)
        else:
            yield from starts(part, args)


class Sample(NamedTuple):
    """What is seen at the end of an epoch."""

    step: int
    time: float
    memory: int


def long_run(case: str, rows: int, epochs: int, clock: str) -> Iterator[dict[str, Any]]:
    samples: list[Sample] = []

    def watch(ctx: fl.Context) -> fl.Context:
        samples.append(Sample(ctx.global_step, CLOCKS[clock](), resident_memory()))
        return ctx

    watching = fl.Callback("watch", begin=watch, epoch_end=watch)
    x, y = table(rows)
    optimizer = fl.optimizer(torch.optim.AdamW, lr=1e-3, fused=True)
    data = fl.batches(x, y, batch_size=BATCH_SIZE, shuffle=True)
    fl.train(fl.init(fl.Loop(mlp, F.cross_entropy, optimizer, data, epochs=epochs, callbacks=[watching])))
    first = 0.0
    for members in _tenths(list(pairwise(samples))):
        times = [(after.time - before.time) / (after.step - before.step) * 1e6 for before, after in members]
        least = min(times)
        first = first or least
        end = members[-1][1]
        yield {
            "case": case,
            "at": end.step,
            "ours min µs": round(least, 1),
            "ours median µs": round(statistics.median(times), 1),
            "of the first": round(least / first, 3),
            "MiB": round(end.memory / 2**20, 1),
        }


def _tenths(values: list[Any]) -> Iterator[list[Any]]:
    size = -(-len(values) // 10)
    for start in range(0, len(values), size):
        yield values[start : start + size]


class Start(NamedTuple):
    """What a run starts from."""

    make_network: Callable[[], nn.Module]
    x: Tensor
    y: Tensor
    shuffle: bool = False


def layers(number: int) -> Start:
    """As many tensors as ``number``, all small."""
    return Start(lambda: nn.Sequential(*(nn.Linear(16, 16) for _ in range(number // 2))), *_rows(1024, 16))


def parameters(number: int) -> Start:
    """About ``number`` parameters in two tensors."""
    width = round(number**0.5)
    return Start(partial(nn.Linear, width, width), *_rows(64, width))


def rows(number: int, shuffle: bool) -> Start:
    return Start(partial(nn.Linear, 16, 16), *_rows(number, 16), shuffle)


def _rows(number: int, width: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(number, width), torch.zeros(number, width)


GROWING: dict[str, tuple[tuple[int, ...], Callable[[int], Start]]] = {
    "tensors": ((8, 80, 800), layers),
    "parameters": ((10**4, 10**5, 10**6, 10**7), parameters),
    "rows": ((10**3, 10**4, 10**5, 10**6), partial(rows, shuffle=False)),
    "rows shuffled": ((10**3, 10**4, 10**5, 10**6), partial(rows, shuffle=True)),
}


def starts(part: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    sizes, make = GROWING[part]
    before: tuple[int, float] | None = None
    first = 0.0
    for size in (size for size in sizes if size <= args.largest):
        start = make(size)
        times = compare(
            lambda: partial(ours, start),
            lambda: partial(theirs, start),
            args.repeats,
            args.clock,
            args.seconds,
            per=1e-6,
        )
        least = min(times.ours)
        first = first or least
        row = {
            "case": f"start, {part}",
            "at": size,
            "ours min µs": round(least, 1),
            "ours median µs": round(statistics.median(times.ours), 1),
            "of the first": round(least / first, 3),
            "theirs min µs": round(min(times.theirs), 1),
            "median ratio": round(times.median_ratio, 3),
        }
        if before is not None:
            row["ns for one more"] = round(1e3 * (least - before[1]) / (size - before[0]), 3)
        yield row
        before = size, least


def ours(start: Start) -> fl.Context:
    data = fl.batches(start.x, start.y, batch_size=BATCH_SIZE, shuffle=start.shuffle)
    optimizer = fl.optimizer(torch.optim.AdamW, lr=1e-3, fused=True)
    return fl.train(fl.init(fl.Loop(start.make_network, F.mse_loss, optimizer, data, epochs=1)), steps=1)


def theirs(start: Start) -> nn.Module:
    model = start.make_network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    loader = DataLoader(TensorDataset(start.x, start.y), BATCH_SIZE, shuffle=start.shuffle)
    handwritten.train(model, F.mse_loss, optimizer, islice(loader, 1), epochs=1)
    return model
