"""The batches of all members of an ensemble, side by side."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from typing import Any

import optree
from torch import Tensor

from ..core.batch import Batch, BatchSource
from ..core.record import tree_map
from ..data.reader import Item, Reader
from ..data.same_order import SameOrder
from ..data.tensors import TensorSource
from .stacking import combine, split
from .trial import NotVectorisedError

Read = tuple[Batch, Sequence[Any], bool]
"""The stacked batch, ``ctx.data`` of every member after it, and whether it is the last of the epoch."""


class MemberReader:
    """As `Reader`, of all members; ``data`` is that of their stacked context."""

    def __init__(self, source: BatchSource, part: str, seeds: Sequence[int], epoch: int, start: int, data: Any) -> None:
        self._data, self._of_members = data, split(data, len(seeds))
        self._fetched = fetch_members(source, part, seeds, epoch, start, self._of_members)

    def take(self) -> Item | None:
        """The next batch; ``None`` after the last."""
        if (read := next(self._fetched, None)) is None:
            return None
        batch, data, last = read
        return Item(batch, self._data if data is self._of_members else combine(data), last)

    def close(self) -> None:
        """Let go of the data."""
        self._fetched.close()


def fetch_members(
    source: BatchSource, part: str, seeds: Sequence[int], epoch: int, start: int, data: Sequence[Any]
) -> Generator[Read]:
    """What a `Reader` of every member would give in its solo run, with the batches of all members stacked.

    Where all get the same rows there is one copy of them, which all share.

    Raises:
        NotVectorisedError: the members get different numbers of batches, or of rows in a batch.
    """
    if len(set(seeds)) == 1 or isinstance(source, SameOrder) or (isinstance(source, TensorSource) and source.is_fixed):
        return _shared(Reader(source, part, seeds[0], epoch, start, data[0]), data)
    if isinstance(source, TensorSource):
        return _in_one_copy(source, seeds, epoch, start, data)
    return _side_by_side([Reader(source, part, s, epoch, start, d) for s, d in zip(seeds, data, strict=True)], data)


def _in_one_copy(
    source: TensorSource, seeds: Sequence[int], epoch: int, start: int, data: Sequence[Any]
) -> Generator[Read]:
    for step, batch in enumerate(source.fetch_many(seeds, epoch, start), start + 1):
        yield batch, data, step == source.length


def _shared(reader: Reader, data: Sequence[Any]) -> Generator[Read]:
    members = len(data)
    with closing(reader):
        while (item := reader.take()) is not None:
            after = data if item.data is data[0] else [item.data] * members
            yield tree_map(lambda leaf: _expanded(leaf, members), item.batch), after, item.last


def _expanded(leaf: Any, members: int) -> Any:
    return leaf.expand(members, *leaf.shape) if isinstance(leaf, Tensor) else leaf


def _side_by_side(readers: Sequence[Reader], data: Sequence[Any]) -> Generator[Read]:
    with ExitStack() as opened:
        for reader in readers:
            opened.enter_context(closing(reader))
        while True:
            items = [reader.take() for reader in readers]
            made = [item for item in items if item is not None]
            if not made:
                return
            if len(made) < len(items) or len({item.last for item in made}) > 1:
                raise NotVectorisedError("the members get different numbers of batches")
            batch = combine([item.batch for item in made])
            if not all(isinstance(leaf, Tensor) for leaf in optree.tree_leaves(batch)):
                raise NotVectorisedError("the batches of the members are of different shapes")
            after = data if all(i.data is d for i, d in zip(made, data, strict=True)) else [i.data for i in made]
            yield batch, after, made[0].last
