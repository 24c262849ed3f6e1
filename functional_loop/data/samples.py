"""A hash of some rows that are spread over the data, by which other data of equal shape are told from them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..core.hashes import MOST, hash_of
from ..core.rng import fold_in, seeded

_ROWS, _COMPUTED_ROWS = 16, 4


def spread(rows: int, most: int) -> list[int]:
    """At most ``most`` row numbers from the first to the last, at equal distances.

    >>> spread(100, 4), spread(2, 4)
    ([0, 33, 66, 99], [0, 1])
    """
    return [*range(rows)] if rows <= most else [i * (rows - 1) // (most - 1) for i in range(most)]


def sample_of_tensors(tensors: Iterable[Tensor]) -> str:
    """A hash of some rows of every tensor: all rows of small ones, of large ones at least 16."""
    return hash_of([tensor[_spread_over(tensor)] for tensor in tensors])[:16]


def _spread_over(tensor: Tensor) -> Tensor:
    rows = spread(len(tensor), max(_ROWS, MOST * len(tensor) // max(tensor.numel(), 1)))
    return torch.tensor(rows, dtype=torch.long, device=tensor.device)


def sample_of(dataset: Any, num_workers: int = 0, multiprocessing_context: Any = None) -> dict[str, str]:
    """A hash of a few rows of a map-style dataset, each asked for twice, under a fixed seed.

    Nothing of a dataset that fails, that is not a function of row and seed, or that depends on the epoch. Where workers
    make the batches, a worker makes the sample, for files that are opened by the first process that asks for a row.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__") or hasattr(dataset, "set_epoch"):
        return {}
    try:
        rows = spread(len(dataset), _COMPUTED_ROWS)
        hashes: Any = map(_Hashes(dataset).__getitem__, rows)
        if num_workers:
            hashes = DataLoader(
                _Hashes(dataset),
                batch_size=None,
                sampler=rows,
                num_workers=1,
                multiprocessing_context=multiprocessing_context,
                generator=torch.Generator(),  # or it would draw the worker's seed from the global one
            )
        found = [*hashes]
    except Exception:
        return {}
    return {"samples": " ".join(found)} if all(found) else {}


@attrs.frozen(eq=False)
class _Hashes(Dataset[str]):
    dataset: Any

    def __getitem__(self, row: int) -> str:
        return first if (first := self._hash(row)) == self._hash(row) else ""

    def _hash(self, row: int) -> str:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with seeded(fold_in(0, "sample", row)):
                return hash_of(self.dataset[row])[:16]
        finally:
            torch.set_num_threads(threads)
