"""Time per step of ``fl.train`` against the hand-written PyTorch loop: same optimizer flags, same bits.

A run is one epoch from fresh parameters and a fresh optimizer, with everything that the epoch takes. "ready":
both sides read the same list of batches that are made already. "own": each has its own way to shuffled
batches, ``fl.batches`` and a DataLoader. "kept": as "ready", and our side keeps every context of ``fl.iterate``.
"dropped": as "ready", and our side looks at every context and keeps none, for four epochs.
"given up": as "ready", and the context that training begins with is not kept, so that no tensor is copied.
"bare": as "ready", but theirs is the tensor work of the step without a loop, so that the difference is what the
framework costs. Times are microseconds per step, on one thread; the difference is the median over the pairs of ours
less theirs.
"""

from __future__ import annotations

import argparse
import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import nn

import functional_loop as fl

from . import bare, handwritten
from .report import Chart
from .sources import Data, own, ready
from .timing import DifferentWorkError, add_timing, compare
from .workloads import WORKLOADS, Workload

LEARNING_RATE = 1e-3
CHART = Chart(("workload", "setting", "AdamW"), ("ratio of minima", "median ratio"), "time of ours / theirs")


class Setting(NamedTuple):
    data: Callable[[Workload], Data] = ready
    ours: Callable[[fl.Context], fl.Context] = fl.train
    theirs: Callable[..., None] = handwritten.train
    gives_up: bool = False
    """Whether our side lets go of the context that it starts from."""
    epochs: int = 1


def keep_all(ctx: fl.Context) -> fl.Context:
    return list(fl.iterate(ctx))[-1]


def drop_all(ctx: fl.Context) -> fl.Context:
    contexts = fl.iterate(ctx)
    del ctx
    return deque(contexts, maxlen=1).pop()


SETTINGS = {
    "ready": Setting(),
    "own": Setting(own),
    "kept": Setting(ours=keep_all),
    "dropped": Setting(ours=drop_all, gives_up=True, epochs=4),
    "given up": Setting(gives_up=True),
    "bare": Setting(theirs=bare.train),
}
FLAGS: dict[str, dict[str, Any]] = {"default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}
TELLING = {
    "mlp": ("ready", "own", "kept", "dropped", "bare"),
    "cnn": ("ready", "own"),
    "gpt": ("ready", "own"),
    "wide": ("ready", "kept", "dropped", "given up"),
}
"""The settings that say something about a workload."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def choices(name: str, known: Iterable[str], default: list[str] | None, what: str) -> None:
        shown = "those that tell something" if default is None else " ".join(default)
        parser.add_argument(name, nargs="+", choices=[*known], default=default, help=f"{what} (default: {shown})")

    choices("--workloads", WORKLOADS, list(WORKLOADS), "what to train")
    choices("--settings", SETTINGS, None, "what is compared")
    choices("--flags", FLAGS, ["default", "fused"], "flags of AdamW")
    add_timing(parser, repeats=50, seconds=5)


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name in args.workloads:
        for setting in args.settings or TELLING[name]:
            # The bare work is that of the fused kernel.
            for flags in ["fused"] if setting == "bare" else args.flags:
                case = Case(WORKLOADS[name], SETTINGS[setting], FLAGS[flags])
                case.check()
                times = compare(case.ours, case.theirs, args.repeats, args.clock, args.seconds, per=case.steps * 1e-6)
                yield {"workload": WORKLOADS[name].title, "setting": setting, "AdamW": flags, **times.as_row()}


class Case:
    """One workload, one setting and one set of flags, as the two sides of a comparison.

    Every run has a seed of its own, the i-th of either side the same, because a source remembers the order that it
    drew last.
    """

    def __init__(
        self,
        workload: Workload,
        setting: Setting,
        flags: dict[str, Any],
        optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
        lr: float = LEARNING_RATE,
        epochs: int | None = None,
    ) -> None:
        self.network = workload.network()
        self.loss = workload.loss
        self.setting = setting
        self.data = setting.data(workload)
        self.optimizer, self.options = optimizer, {"lr": lr, **flags}
        self.epochs = setting.epochs if epochs is None else epochs
        self.steps = self.epochs * len(self.data.ours)
        self.loop = fl.Loop(
            self.network, self.loss, fl.optimizer(optimizer, **self.options), self.data.ours, epochs=self.epochs
        )
        self.our_seeds, self.their_seeds = count(), count()

    def ours(self) -> Callable[[], fl.Context]:
        train, start = self.setting.ours, [fl.init(self.loop, next(self.our_seeds))]
        return lambda: train(start.pop() if self.setting.gives_up else start[0])

    def theirs(self) -> Callable[[], nn.Module]:
        model = copy.deepcopy(self.network)
        optimizer = self.optimizer(model.parameters(), **self.options)
        batches = self.data.theirs(next(self.their_seeds))

        def train() -> nn.Module:
            self.setting.theirs(model, self.loss, optimizer, batches, self.epochs)
            return model

        return train

    def check(self) -> None:
        """Run both sides once, and compare the parameters and buffers that come out.

        Raises:
            DifferentWorkError: they differ in a bit.
        """
        ours, theirs = self.ours()(), self.theirs()()
        equal = fl.tree_equal(fl.state_dict(ours)["network"], dict(theirs.state_dict()))
        if not equal:
            raise DifferentWorkError(
                f"fl.train and the hand-written loop end with different parameters ({self.options}): {equal}"
            )
