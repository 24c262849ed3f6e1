"""Where the batches of a benchmark come from: the same ones, in the same order, for both sides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import attrs
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

import functional_loop as fl

from .workloads import Workload


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
    """Both sides read one list of batches."""
    x, y = (tensor.split(workload.batch_size) for tensor in workload.data())  # type: ignore[no-untyped-call]
    pairs: list[tuple[Tensor, Tensor]] = list(zip(x, y, strict=True))
    return Data(ReadyBatches([fl.Batch(x, y) for x, y in pairs]), lambda seed: pairs)


def own(workload: Workload) -> Data:
    """Shuffled batches of tensors: ``fl.batches`` against a DataLoader."""
    x, y = workload.data()
    ours = fl.batches(x, y, batch_size=workload.batch_size, shuffle=True)
    return Data(ours, loader(TensorDataset(x, y), workload.batch_size))


def loader(dataset: Dataset[Any], batch_size: int, **workers: Any) -> Callable[[int], Iterable[Any]]:
    """A DataLoader of a seed, which reads the rows in the order in which ``fl.batches`` shuffles them."""
    generator = torch.Generator()
    # The sampler that shuffle=True makes, with a generator of its own.
    sampler = RandomSampler(dataset, generator=generator)  # type: ignore[arg-type]
    made = DataLoader(dataset, batch_size, sampler=sampler, **workers)

    def theirs(seed: int) -> Iterable[Any]:
        generator.manual_seed(fl.fold_in(seed, "order", 1))
        return made

    return theirs


DATA = {"ready": ready, "own": own}
