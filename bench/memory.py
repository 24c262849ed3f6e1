"""Peak memory of a run, and its time per step, each in a process of its own: ours against the hand-written loop.

All use AdamW with ``fused=True`` and batches that are made already. "every context kept" holds what ``fl.iterate``
gives, all of it; its counterpart by hand copies parameters and optimizer state after every step. "last 3 contexts kept"
is ``fl.History(3)``, and copies of the last three states by hand. "ensemble of K" trains K members of an MLP of 0.6M
parameters at once; its "in parameters" is per member: the same for all K if memory is linear in K. The peak is that of
the resident memory of the process, interpreter and torch included; "added" leaves out what they take, and is also given
in units of the parameters' own size. Times are milliseconds of wall time per step, of one run: rough.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .peak import COUNTERPARTS, ENSEMBLE
from .report import Chart
from .timing import positive
from .workloads import WORKLOADS

ROOT = Path(__file__).parent.parent
CHART = Chart(("run",), ("peak / theirs",), "peak memory / that of the loop by hand")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workload", choices=WORKLOADS, default="wide", help="what to train (default: %(default)s)")
    parser.add_argument(
        "--members", nargs="*", type=positive, default=[4, 16, 64], help="sizes of ensembles (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=positive, default=2, help="length of a run (default: %(default)s)")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name, counterpart in COUNTERPARTS.items():
        reference, measured = measure(counterpart, args), measure(name, args)
        yield _row(counterpart, reference) | {"peak / theirs": 1.0}
        yield _row(name, measured) | {"peak / theirs": round(measured["peak"] / reference["peak"], 3)}
    for members in args.members:
        name = f"{ENSEMBLE}{members}"
        yield _row(name, measure(name, args), members)


def _row(name: str, measured: dict[str, Any], members: int = 1) -> dict[str, Any]:
    added = measured["peak"] - measured["before"]
    return {
        "run": name,
        "steps": measured["steps"],
        "peak MiB": round(measured["peak"] / 2**20, 1),
        "added MiB": round(added / 2**20, 1),
        "in parameters": round(added / (members * measured["parameters"]), 2),
        "ms a step": round(1e3 * measured["seconds"] / measured["steps"], 2),
    }


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a fresh process measures; sizes in bytes."""
    command = [sys.executable, "-m", "bench.peak", name, args.workload, str(args.epochs)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured
