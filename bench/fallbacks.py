"""Time of ``fl.train`` on its fallback paths, against the usual path or the loop by hand.

Each private function of torch or Python that makes a run faster has a public one in its place where it is missing. A
row takes one away and compares whole runs: "ready" batches without hooks; "own" shuffled data and a pure hook at
``batch_end``, so that every step makes a context; "members" an ensemble of 8. A fallback may cost 1.3 times the usual
path; without kernels of the optimizer, 1.05 times the loop by hand with the same flags.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any
from unittest import mock

import numpy as np
import torch

import functional_loop as fl
from functional_loop.engine import step as step_module
from functional_loop.ensembles import vmap_rules
from functional_loop.optim import fast_update

from . import step
from .report import Chart
from .sources import own, ready
from .step import LEARNING_RATE
from .timing import Side, add_timing, compare
from .workloads import WORKLOADS

CHART = Chart(("without",), ("median ratio",), "time of the fallback / usual path")
MEMBERS = 8


@contextlib.contextmanager
def a_cached_normal() -> Iterator[None]:
    """A state of numpy's generator that holds the second of two normals."""
    before = np.random.get_state()
    np.random.seed(0)
    np.random.normal()
    try:
        yield
    finally:
        np.random.set_state(before)


@contextlib.contextmanager
def without_levels() -> Iterator[None]:
    """Members under ``torch.func.vmap`` itself, by the rules that do not need its levels."""
    others = {function: rule for function, rule in vmap_rules._RULES.items() if function not in vmap_rules._BY_LEVELS}
    rules = others | vmap_rules._BY_ROWS
    with mock.patch.object(vmap_rules, "_is_known", False), mock.patch.object(vmap_rules, "_RULES", rules):
        yield


PATHS: dict[str, tuple[str, Callable[[], contextlib.AbstractContextManager[Any]]]] = {
    "nothing": ("ready", contextlib.nullcontext),
    "the engine call of autograd": ("ready", lambda: mock.patch.object(step_module, "_engine_run_backward", None)),
    "an empty cache of numpy's normals": ("own", a_cached_normal),
    "levels of vmap": ("members", without_levels),
}
"""What a row does without: how it trains, and a region in which that is missing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_timing(parser, repeats=50, seconds=5, clock="cpu")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name, (kind, missing) in PATHS.items():
        train = _runs(kind)
        times = compare(_within(missing, train), train, args.repeats, args.clock, args.seconds)
        yield {"without": name, "run": kind, "against": "the usual path", **_ratios(times)}
    for flags in ("default", "fused"):
        with mock.patch.object(fast_update, "KERNELS", {}):
            case = step.Case(WORKLOADS["mlp"], step.SETTINGS["ready"], step.FLAGS[flags])
            case.check()
            times = compare(case.ours, case.theirs, args.repeats, args.clock, args.seconds)
        yield {"without": f"kernels, AdamW {flags}", "run": "ready", "against": "the loop by hand", **_ratios(times)}


def _ratios(times: Any) -> dict[str, Any]:
    return {
        "ratio of minima": round(times.ratio_of_minima, 3),
        "median ratio": round(times.median_ratio, 3),
        "half of ratios": "{:.2f} to {:.2f}".format(*times.quartiles),
    }


def _runs(kind: str) -> Side:
    """One epoch of the small network."""
    workload, seeds = WORKLOADS["mlp"], count()
    loop = fl.Loop(
        workload.network(),
        workload.loss,
        fl.optimizer(torch.optim.AdamW, lr=LEARNING_RATE),
        (own if kind in ("own", "members") else ready)(workload).ours,
        epochs=1,
        callbacks=[fl.Callback("idle", batch_end=lambda ctx: ctx)] if kind == "own" else [],
    )

    def prepared() -> Callable[[], object]:
        if kind == "members":
            start = fl.stack([fl.init(loop, next(seeds)) for _ in range(MEMBERS)])
        else:
            start = fl.init(loop, next(seeds))
        return lambda: fl.train(start)

    return prepared


def _within(missing: Callable[[], contextlib.AbstractContextManager[Any]], side: Side) -> Side:
    """A side all of which, its preparation included, is in a region."""

    def prepared() -> Callable[[], object]:
        with missing():
            train = side()

        def run() -> object:
            with missing():
                return train()

        return run

    return prepared
