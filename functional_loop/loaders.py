"""Batches of any loader: a DataLoader, or another iterable that can be read once per epoch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch
from torch.utils.data import DataLoader, default_collate

from .batch import Batch, BatchSource, as_batch, copied
from .plain import check_plain
from .rng import fold_in, seeded

_EXACT = "batches(dataset, ...) resumes at once and exactly"


@attrs.frozen(eq=False)
class LoaderSource(BatchSource):
    """A loader that is read from its start in every epoch: resuming in mid-epoch replays the epoch."""

    loader: Any
    to_batch: Callable[[Any], Any] | None
    length: int | None

    def fetch(self, seed: int, epoch: int, start: int, state: Any) -> Iterator[tuple[Batch, Any]]:
        if start:
            _warn_of_replay(start)
        for batch in self._read(seed, epoch, skip=start):
            yield batch, ()

    def fingerprint(self) -> dict[str, Any]:
        dataset, sampler = getattr(self.loader, "dataset", None), getattr(self.loader, "sampler", None)
        return {
            "kind": "loader",
            "length": _length(dataset),
            "batches": self.length,
            "batch_size": getattr(self.loader, "batch_size", None),
            "shuffle": type(sampler).__name__ == "RandomSampler",
            "drop_last": getattr(self.loader, "drop_last", None),
        }

    def _read(self, seed: int, epoch: int, first: int = 1, skip: int = 0) -> Iterator[Batch]:
        """The batches of one pass over the loader, which starts with step ``first``; ``skip`` of them are dropped.

        Whatever the loader draws, it draws under the seed of its place.
        """
        place = fold_in(seed, "loader", epoch)
        with seeded(place):
            iterator = self._start(epoch)
        step = first
        while True:
            with seeded(fold_in(place, "batch", step)):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
                batch = self._batch(item) if step >= first + skip else None
            if batch is not None:
                yield batch
            step += 1

    def _start(self, epoch: int) -> Iterator[Any]:
        for name in ("dataset", "sampler", "batch_sampler"):
            if hasattr(part := getattr(self.loader, name, None), "set_epoch"):
                part.set_epoch(epoch)
        return iter(self.loader)

    def _batch(self, item: Any) -> Batch:
        batch = as_batch(self.to_batch(item) if self.to_batch else item)
        return batch if _makes_copies(self.loader) else copied(batch)
