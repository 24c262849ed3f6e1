"""What every runner shares: the work, and the timing of a peer in turns with the hand-written loop and with ours."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import functional_loop as fl

from .. import handwritten
from ..timing import CLOCKS, LEAST_PAIRS, add_timing
from ..workloads import WORKLOADS, table

LEARNING_RATE = 1e-3
BATCH_SIZE = 32
MORE_EPOCHS = 2

Prepare: TypeAlias = Callable[[int], Callable[[], int]]
"""Of a number of epochs: prepares a run, and returns the function to be measured, which returns how many updates it
made."""

network = WORKLOADS["mlp"].network
ROWS = int(os.environ.get("BENCH_ROWS", "8192"))


def rows() -> tuple[Tensor, Tensor]:
    with fl.seeded(1):
        return table(ROWS)


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*rows()), BATCH_SIZE, shuffle=True)


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)


def updates(optimizer: torch.optim.Optimizer) -> int:
    """How many updates an AdamW has made."""
    return int(next(iter(optimizer.state.values()))["step"])


def by_hand(epochs: int) -> Callable[[], int]:
    model, batches = network(), loader()
    optimizer = adamw(model)

    def run() -> int:
        handwritten.train(model, F.cross_entropy, optimizer, batches, epochs)
        return updates(optimizer)

    return run


def ours(epochs: int) -> Callable[[], int]:
    data = fl.batches(*rows(), batch_size=BATCH_SIZE, shuffle=True)
    optimizer = fl.optimizer(torch.optim.AdamW, lr=LEARNING_RATE)
    start = fl.init(fl.Loop(network, F.cross_entropy, optimizer, data, epochs=epochs))
    return lambda: fl.train(start).global_step


def measure(settings: Mapping[str, Prepare]) -> None:
    """The main function of a runner: prints a JSON list of rows, one a setting.

    Raises:
        SystemExit: a side has made another number of updates than it should have.
    """
    parser = argparse.ArgumentParser()
    add_timing(parser, repeats=10, seconds=20)
    args = parser.parse_args()
    # What trainers print must not get into the JSON.
    out = os.dup(1)
    os.dup2(2, 1)
    torch.set_num_threads(1)
    measured = []
    for setting, peer in settings.items():
        times = _times({"peer": peer, "by hand": by_hand, "ours": ours}, args)
        measured.append({"setting": setting, "times": times})
    sys.stdout.flush()
    os.write(out, json.dumps(measured).encode())


def _times(sides: dict[str, Prepare], args: argparse.Namespace) -> dict[str, list[float]]:
    """Microseconds per step of every side.

    Every time is that of a longer run less that of a run of one epoch: without the start, which trainers do once.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    steps_per_epoch = len(loader())
    started = perf_counter()
    for i in range(1 + args.repeats):
        if i > LEAST_PAIRS and perf_counter() - started > args.seconds:
            break
        for name in list(sides)[:: 1 if i % 2 else -1]:
            short, long = (_seconds(name, sides[name], n, n * steps_per_epoch, args) for n in (1, 1 + MORE_EPOCHS))
            times[name].append((long - short) / (MORE_EPOCHS * steps_per_epoch) * 1e6)
    return {name: values[1:] for name, values in times.items()}


def _seconds(name: str, prepare: Prepare, epochs: int, steps: int, args: argparse.Namespace) -> float:
    run, now = prepare(epochs), CLOCKS[args.clock]
    gc.collect()
    start = now()
    made = run()
    taken = now() - start
    if made != steps:
        raise SystemExit(f"{name} made {made} updates in {epochs} epochs, not {steps}")
    return taken
