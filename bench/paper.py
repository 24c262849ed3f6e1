"""The runtime study of the mlr3torch paper on a CPU, ours against plain PyTorch: MLPs by depth, width and optimizer.

Regression on 1000 inputs: 2000 rows, batches of 32 in order, mean squared error, learning rate 0.0001, torch's default
flags; ours reads tensors in memory, theirs a DataLoader, as in the paper. Times are microseconds per step, on one
thread. The paper trains for 20 epochs: ``--epochs 20``. It measured mlr3torch at 2.82 (SGD) and 1.56 (AdamW) times the
time of PyTorch.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import functional_loop as fl

from .report import Chart
from .sources import Data
from .step import Case, Setting
from .timing import add_timing, compare, positive
from .workloads import Workload

CHART = Chart(("optimizer", "layers", "width"), ("median ratio",), "time of ours / plain PyTorch")
OPTIMIZERS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
LAYERS = (0, 4, 8, 12, 16)
WIDTHS = (100, 200, 400)
INPUTS = 1000
ROWS = 2000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name, known in (("--layers", LAYERS), ("--widths", WIDTHS)):
        parser.add_argument(name, nargs="+", type=int, choices=known, default=known, help="(default: all)")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS), help="(default: all)")
    parser.add_argument("--epochs", type=positive, default=1, help="epochs of a run (default: %(default)s)")
    add_timing(parser, repeats=20, seconds=4)


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    ratios = []
    for optimizer, layers, width in product(args.optimizers, args.layers, args.widths):
        if layers == 0 and width != args.widths[0]:
            continue  # A network without hidden layers has no width.
        workload = Workload(f"{layers}x{width}", partial(network, layers, width), table, F.mse_loss, batch_size=32)
        case = Case(workload, Setting(in_order), {}, OPTIMIZERS[optimizer], lr=1e-4, epochs=args.epochs)
        case.check()
        times = compare(case.ours, case.theirs, args.repeats, args.clock, args.seconds, per=case.steps * 1e-6)
        ratios.append(times.median_ratio)
        yield {"optimizer": optimizer, "layers": layers, "width": width if layers else "", **times.as_row()}
    yield {"optimizer": "median of all", "median ratio": round(statistics.median(ratios), 3)}
    yield {"optimizer": "largest", "median ratio": round(max(ratios), 3)}


def network(layers: int, width: int) -> nn.Module:
    if layers == 0:
        return nn.Linear(INPUTS, 1)
    inputs = [INPUTS, *[width] * (layers - 1)]
    hidden = [part for n in inputs for part in (nn.Linear(n, width), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, 1))


def table() -> tuple[Tensor, Tensor]:
    x = torch.randn(ROWS, INPUTS)
    return x, x @ torch.randn(INPUTS, 1) + 0.01 * torch.randn(ROWS, 1)


def in_order(workload: Workload) -> Data:
    x, y = workload.data()
    loader = DataLoader(TensorDataset(x, y), workload.batch_size)
    return Data(fl.batches(x, y, batch_size=workload.batch_size), lambda seed: loader)
