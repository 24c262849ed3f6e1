"""Time per step of ``fl.train`` against the hand-written PyTorch loop: same optimizer flags, same bits.

A run is one epoch from fresh parameters and a fresh optimizer, with everything that the epoch takes. "ready":
both sides read the same list of batches that are made already. "own": each has its own way to shuffled
batches, ``fl.batches`` and a DataLoader. Times are microseconds per step, on one thread.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import Any, NamedTuple

import attrs
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import functional_loop as fl

from . import handwritten
from .timing import CLOCKS, DifferentWorkError, compare
from .workloads import WORKLOADS, Workload

LEARNING_RATE = 1e-3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def choices(name: str, known: Iterable[str], what: str) -> None:
        known = list(known)
        parser.add_argument(name, nargs="+", choices=known, default=known, help=f"{what} (default: all)")

    choices("--workloads", WORKLOADS, "what to train")
    choices("--data", DATA, "where the batches come from")
    choices("--flags", FLAGS, "flags of AdamW")
    parser.add_argument("--repeats", type=positive, default=20, help="pairs of runs (default: %(default)s)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: for a busy machine (default: wall)")


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError
    return value


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for workload in map(WORKLOADS.__getitem__, args.workloads):
        for data in args.data:
            for flags in args.flags:
                case = Case(workload, DATA[data](workload), FLAGS[flags])
                case.check()
                times = compare(case.ours, case.theirs, args.repeats, args.clock, per=case.steps * 1e-6)
                yield {"workload": workload.title, "data": data, "AdamW": flags, **times.as_row()}


class Data(NamedTuple):
    """The same batches for both sides."""

    ours: fl.BatchSource
    theirs: Callable[[int], Iterable[Any]]
    """The batches of epoch 1 of a seed, as pairs of inputs and targets."""


@attrs.frozen(eq=False)
class ReadyBatches(fl.BatchSource):
    """Batches that are made already."""

    batches: list[fl.Batch]

    @property
    def length(self) -> int:
        return len(self.batches)

    def fetch(self, seed: int, epoch: int, start: int, state: Any) -> Iterator[tuple[fl.Batch, Any]]:
        for batch in self.batches[start:]:
            yield batch, ()

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "ready", "length": self.length}


def ready(workload: Workload) -> Data:
    x, y = (tensor.split(workload.batch_size) for tensor in workload.data())  # type: ignore[no-untyped-call]
    pairs: list[tuple[Tensor, Tensor]] = list(zip(x, y, strict=True))
    return Data(ReadyBatches([fl.Batch(x, y) for x, y in pairs]), lambda seed: pairs)


def own(workload: Workload) -> Data:
    x, y = workload.data()
    dataset, generator = TensorDataset(x, y), torch.Generator()
    # The sampler that shuffle=True makes, with a known generator: both sides read the rows in the same order.
    sampler = RandomSampler(dataset, generator=generator)
    loader = DataLoader(dataset, workload.batch_size, sampler=sampler)

    def theirs(seed: int) -> Iterable[Any]:
        generator.manual_seed(fl.fold_in(seed, "order", 1))
        return loader

    return Data(fl.batches(x, y, batch_size=workload.batch_size, shuffle=True), theirs)


DATA = {"ready": ready, "own": own}
FLAGS: dict[str, dict[str, Any]] = {"default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}


class Case:
    """One workload, one kind of data and one set of flags, as the two sides of a comparison.

    Every run has a seed of its own, the i-th of either side the same, because a source remembers the order that it
    drew last.
    """

    def __init__(self, workload: Workload, data: Data, flags: dict[str, Any]) -> None:
        self.network = workload.network()
        self.loss = workload.loss
        self.batches = data.theirs
        self.flags = flags
        self.steps = len(data.ours)
        optimizer = fl.optimizer(torch.optim.AdamW, lr=LEARNING_RATE, **flags)
        self.loop = fl.Loop(self.network, self.loss, optimizer, data.ours, epochs=1)
        self.our_seeds, self.their_seeds = count(), count()

    def ours(self) -> Callable[[], fl.Context]:
        start = fl.init(self.loop, next(self.our_seeds))
        return lambda: fl.train(start)

    def theirs(self) -> Callable[[], nn.Module]:
        model = copy.deepcopy(self.network)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, **self.flags)
        batches = self.batches(next(self.their_seeds))

        def train() -> nn.Module:
            handwritten.train(model, self.loss, optimizer, batches, epochs=1)
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
                f"fl.train and the hand-written loop end with different parameters (flags {self.flags}): {equal}"
            )
