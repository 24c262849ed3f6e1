"""Time per step with ``compile=True`` against the hand-written PyTorch loop with torch's default flags; start-up times.

A run is one epoch over batches that are made already. Times are microseconds per step, on one thread. "start" is the
first step of a process in seconds: without compiling, compiled with an empty cache, and in a second process that finds
the graph in the cache. Both sides must end with close parameters: kernels round differently when they are compiled.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from time import perf_counter
from typing import Any

import torch

import functional_loop as fl

from .report import Chart
from .step import SETTINGS, Case
from .timing import DifferentWorkError, add_timing, compare
from .workloads import WORKLOADS, Workload

CHART = Chart(("workload",), ("ratio of minima", "median ratio"), "time of compiled steps / hand-written loop")
NAMES = ["mlp", "cnn", "gpt"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workloads", nargs="+", choices=WORKLOADS, default=NAMES, help=f"what to train (default: {' '.join(NAMES)})"
    )
    parser.add_argument("--no-start", action="store_true", help="leave out start-up times, which take a minute or two")
    add_timing(parser, repeats=50, seconds=5)


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name in args.workloads:
        case = CompiledCase(WORKLOADS[name])
        case.check()
        times = compare(case.ours, case.theirs, args.repeats, args.clock, args.seconds, per=case.steps * 1e-6)
        yield {"workload": case.title, **times.as_row(), **({} if args.no_start else starts(name))}


class CompiledCase(Case):
    def __init__(self, workload: Workload) -> None:
        super().__init__(workload, SETTINGS["ready"], {})
        self.title = workload.title
        self.loop = fl.evolve(self.loop, compile=True)

    def check(self) -> None:
        ours, theirs = self.ours()(), self.theirs()()
        for name, tensor in theirs.state_dict().items():
            made = {**ours.params, **ours.buffers}[name]
            # Adam turns rounding errors into steps where a gradient is zero: a bias before BatchNorm.
            if not torch.allclose(made, tensor, rtol=1e-2, atol=1e-3 * self.steps):
                raise DifferentWorkError(f"compiled and hand-written steps end with different values of {name}")


def starts(workload: str) -> dict[str, Any]:
    """Seconds of the first step in processes of their own."""
    with tempfile.TemporaryDirectory() as cache:
        return {
            f"start {kind}": round(_in_a_process(workload, kind != "eager", cache), 2)
            for kind in ("eager", "cold", "cached")
        }


def _in_a_process(workload: str, compiled: bool, cache: str) -> float:
    code = f"from bench.compile import first_step; print(first_step({workload!r}, {compiled}))"
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    return float(done.stdout)


def first_step(workload: str, compiled: bool) -> float:
    """Seconds of the first step of a process that has made its loop and its first context."""
    torch.set_num_threads(1)
    start = fl.init(fl.evolve(CompiledCase(WORKLOADS[workload]).loop, compile=compiled))
    before = perf_counter()
    fl.train(start, steps=1)
    return perf_counter() - before
