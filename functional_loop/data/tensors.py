"""Batch sources over rows that have numbers: tensors in memory, and map-style datasets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import torch

from ..core.batch import Batch, BatchSource
from ..core.record import evolve, leaves_with_paths, tensor_bytes, tree_map
from .order import Order, make_order
from .samples import sample_of_tensors


@attrs.frozen(eq=False)
class IndexedSource(BatchSource):
    """Rows with numbers, in an order that is a function of (seed, epoch)."""

    _order: Order
    batch_size: int
    drop_last: bool

    @property
    def length(self) -> int:
        rows = len(self._order)
        return rows // self.batch_size if self.drop_last else -(-rows // self.batch_size)

    @property
    def is_fixed(self) -> bool:
        """Whether the order is the same for every seed."""
        order = self._order
        return not (order.shuffle or order.weights is not None or order.sampler is not None or order.bootstrap)

    def order(self, seed: int, epoch: int) -> torch.Tensor:
        """The row numbers of ``epoch`` in the order in which they are read, an int64 tensor.

        >>> from functional_loop.data.sources import batches
        >>> source = batches(torch.zeros(6, 2), batch_size=2, shuffle=True)
        >>> order = source.order(seed=0, epoch=1)
        >>> batch, _ = next(source.fetch(seed=0, epoch=1, start=0, state=()))
        >>> torch.equal(batch.index, order[:2])
        True
        """
        return self._order(seed, epoch).clone()

    def fingerprint(self) -> dict[str, Any]:
        order = self._order
        return {
            "length": order.rows,
            "batch_size": self.batch_size,
            "shuffle": order.shuffle,
            "drop_last": self.drop_last,
            "sampler": "" if order.sampler is None else type(order.sampler).__name__,
            "weighted": order.weights is not None,
            "weights": order.weights_sha256,
            **({"bootstrap": True} if order.bootstrap else {}),
            **({"sampled": len(order)} if order.sampler is not None else {}),
        }

    def _indices(self, seed: int, epoch: int, start: int) -> Iterator[torch.Tensor]:
        """The row numbers of batches ``start + 1``, ``start + 2``, … of ``epoch``."""
        order = self._order(seed, epoch)
        for step in range(start, self.length):
            yield order[step * self.batch_size : (step + 1) * self.batch_size]


@attrs.frozen(eq=False)
class TensorSource(IndexedSource):
    """Tensors in memory: a batch is one ``index_select`` per tensor."""

    x: Any = attrs.field(repr=False)
    y: Any = attrs.field(repr=False)
    content: str = ""

    def fetch(self, seed: int, epoch: int, start: int, state: Any) -> Iterator[tuple[Batch, Any]]:
        for index in self._indices(seed, epoch, start):
            yield Batch(_select(self.x, index), _select(self.y, index), index.clone()), ()

    def fetch_many(self, seeds: Sequence[int], epoch: int, start: int) -> Iterator[Batch]:
        """The batches of several runs side by side: tensors of shape ``(runs, rows, ...)``."""
        drawn = {seed: self._order(seed, epoch) for seed in set(seeds)}
        orders = torch.stack([drawn[seed] for seed in seeds])
        for step in range(start, self.length):
            index = orders[:, step * self.batch_size : (step + 1) * self.batch_size]
            rows = Batch(_select(self.x, index.reshape(-1)), _select(self.y, index.reshape(-1)))
            yield evolve(tree_map(lambda t, shape=index.shape: t.unflatten(0, shape), rows), index=index.clone())

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "tensors", **super().fingerprint(), "content": self.content}

    def sample(self) -> dict[str, str]:
        leaves = (leaf for _, leaf in leaves_with_paths((self.x, self.y)) if isinstance(leaf, torch.Tensor))
        return {"rows": sample_of_tensors(leaves)}


def _select(tensors: Any, index: torch.Tensor) -> Any:
    """The rows ``index`` of every tensor: copies, because a network may write to its input."""
    if isinstance(tensors, torch.Tensor):
        return tensors.index_select(0, index if tensors.device == index.device else index.to(tensors.device))
    if isinstance(tensors, dict):
        return {name: _select(tensor, index) for name, tensor in tensors.items()}
    return tuple(_select(tensor, index) for tensor in tensors)


def from_tensors(
    x: Any,
    y: Any = None,
    *,
    batch_size: int = 32,
    shuffle: bool = False,
    drop_last: bool = False,
    sampler: Any = None,
    weights: Any = None,
    bootstrap: bool = False,
    hash_content: bool = False,
) -> TensorSource:
    """Batches of tensors in memory; see ``batches``."""
    y = () if y is None else y
    rows = _count_rows({"x": x, "y": y})
    order = checked_order(rows, batch_size, shuffle, drop_last, sampler, weights, bootstrap)
    content = _hash({"x": x, "y": y}) if hash_content else ""
    return TensorSource(order, batch_size, drop_last, _detach(x), _detach(y), content)


def _count_rows(arguments: dict[str, Any]) -> int:
    """The number of rows that all tensors share."""
    rows: dict[str, int] = {}
    for name, argument in arguments.items():
        for path, leaf in leaves_with_paths(argument):
            if isinstance(leaf, torch.Tensor) and leaf.dim():
                rows[name + path] = len(leaf)
            elif not (name == "y" and path == "" and leaf == ()):
                what = "a tensor without rows" if isinstance(leaf, torch.Tensor) else f"of type {type(leaf).__name__}"
                raise TypeError(
                    f"{name}{path} is {what}; batches takes tensors, or tuples or dicts of tensors, "
                    "whose first dimension is the rows"
                )
    first, *others = rows
    for other in others:
        if rows[other] != rows[first]:
            raise ValueError(f"{first} has {rows[first]} rows, but {other} has {rows[other]}")
    return rows[first]


def checked_order(
    rows: int, batch_size: int, shuffle: bool, drop_last: bool, sampler: Any, weights: Any, bootstrap: bool
) -> Order:
    if type(batch_size) is not int:
        raise TypeError(f"batch_size must be an int, not {batch_size!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if type(drop_last) is not bool:
        raise TypeError(f"drop_last must be True or False, not {drop_last!r}")
    if not rows:
        raise ValueError("the data has no rows")
    order = make_order(rows, shuffle, sampler, weights, bootstrap)
    if drop_last and len(order) < batch_size:
        raise ValueError(
            f"an epoch has no batch: drop_last drops its {len(order)} rows, fewer than batch_size={batch_size}"
        )
    return order


def _detach(tensors: Any) -> Any:
    return tree_map(torch.Tensor.detach, tensors)


def _hash(tensors: Any) -> str:
    digest = hashlib.sha256()
    for path, leaf in leaves_with_paths(tensors):
        if isinstance(leaf, torch.Tensor):
            digest.update(f"{path} {leaf.dtype} {tuple(leaf.shape)}\n".encode())
            digest.update(tensor_bytes(leaf))
    return digest.hexdigest()
