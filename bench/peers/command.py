"""Time per step of other trainers, each in its default and its leanest documented setting, against ours.

W1's MLP with AdamW in torch's default flags, 8192 shuffled rows, batch 32: every trainer gets its data the way it
prefers, the hand-written loop from a DataLoader, ours from ``fl.batches``. The three run in turns in one process, in a
virtual environment that this command makes for the trainer, with the torch that is installed here. Times are medians,
microseconds per step, on one thread: a run of three epochs less one of a single epoch, so that no side pays for its
start. A trainer that doesn't install beside this torch, or fails, is listed with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..report import Chart
from ..timing import add_timing, positive
from .environments import DEFAULT_ROOT, InstallError, environment, version

CHART = Chart(("peer", "setting"), ("peer / ours", "peer / hand-written"), "time per step of other trainers / ours")
PEERS: dict[str, Sequence[str]] = {
    "lightning": ["lightning"],
    "ignite": ["pytorch-ignite"],
    "skorch": ["skorch"],
    "accelerate": ["accelerate"],
    "keras": ["keras"],
    "composer": ["mosaicml>=0.30"],
    # It imports pkg_resources, which later ones have not.
    "torchtnt": ["torchtnt", "setuptools<81"],
    "poutyne": ["poutyne"],
}
"""What pip is asked for, by runner: modules of this package."""

ROOT = Path(__file__).parent.parent.parent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="(default: all)")
    parser.add_argument(
        "--envs", type=Path, default=DEFAULT_ROOT, metavar="DIR", help="of the environments (default: %(default)s)"
    )
    parser.add_argument("--rows", type=positive, default=8192, help="of an epoch (default: %(default)s)")
    add_timing(parser, repeats=10, seconds=20)


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for peer in args.peers:
        try:
            python = environment(peer, PEERS[peer], args.envs)
            measured = _run(python, peer, args)
        except InstallError as error:
            yield {"peer": peer, "setting": f"does not install: {error}"}
        except RunnerError as error:
            yield {"peer": peer, "setting": f"fails: {error}"}
        else:
            name = f"{peer} {version(python, PEERS[peer][0].partition('>')[0])}"
            yield from (_row(name, each["setting"], each["times"]) for each in measured)


class RunnerError(Exception):
    """A trainer has failed; the message is its last line."""


def _run(python: Path, peer: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    timing = [f"--{name}={getattr(args, name)}" for name in ("repeats", "seconds", "clock")]
    with tempfile.TemporaryDirectory() as folder:  # Some write logs where they are.
        done = subprocess.run(
            [python, "-m", f"bench.peers.{peer}", *timing],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "BENCH_ROWS": str(args.rows)},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        raise RunnerError((done.stderr.strip().splitlines() or ["no word"])[-1])
    measured: list[dict[str, Any]] = json.loads(done.stdout)
    return measured


def _row(peer: str, setting: str, times: dict[str, list[float]]) -> dict[str, Any]:
    def ratio(side: str) -> float:
        return round(statistics.median(a / b for a, b in zip(times["peer"], times[side], strict=True)), 2)

    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "peer": peer,
        "setting": setting,
        **{f"{name} µs": round(value, 1) for name, value in medians.items()},
        "added µs": round(medians["peer"] - medians["by hand"], 1),
        "peer / hand-written": ratio("by hand"),
        "peer / ours": ratio("ours"),
    }
