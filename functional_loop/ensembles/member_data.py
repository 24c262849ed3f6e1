"""The batches of all members of an ensemble, side by side."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import optree
from torch import Tensor

from ..batch import Batch, BatchSource
from ..indexed import TensorSource
from ..record import tree_map
from ..same_order import SameOrder
from .stacking import combine


def fetch_members(
    source: BatchSource, seeds: Sequence[int], epoch: int, start: int, states: Sequence[Any]
) -> Generator[tuple[Batch, list[Any]]]:
    """As ``source.fetch``, with the batches of all members stacked: those that each would get in its solo run.

    Where all get the same rows there is one copy of them, which all share.

    Raises:
        ValueError: the members get different numbers of batches, or of rows in a batch.
    """
    if len(set(seeds)) == 1 or isinstance(source, SameOrder):
        return _shared(source.fetch(seeds[0], epoch, start, states[0]), len(seeds))
    if isinstance(source, TensorSource):
        if source.is_fixed:
            return _shared(source.fetch(seeds[0], epoch, start, ()), len(seeds))
        return _without_states(source.fetch_many(seeds, epoch, start), len(seeds))
    return _side_by_side([source.fetch(seed, epoch, start, state) for seed, state in zip(seeds, states, strict=True)])


def _without_states(batches: Iterable[Batch], members: int) -> Generator[tuple[Batch, list[Any]]]:
    for batch in batches:
        yield batch, [()] * members


def _shared(batches: Iterable[tuple[Batch, Any]], members: int) -> Generator[tuple[Batch, list[Any]]]:
    for batch, state in batches:
        yield tree_map(lambda leaf: _expanded(leaf, members), batch), [state] * members


def _expanded(leaf: Any, members: int) -> Any:
    return leaf.expand(members, *leaf.shape) if isinstance(leaf, Tensor) else leaf


def _side_by_side(fetched: list[Iterator[tuple[Batch, Any]]]) -> Generator[tuple[Batch, list[Any]]]:
    while True:
        items = [next(batches, None) for batches in fetched]
        made = [item for item in items if item is not None]
        if not made:
            return
        if len(made) < len(items):
            raise ValueError("the members of an ensemble get different numbers of batches: use mode='exact'")
        batch = combine([batch for batch, _ in made])
        if not all(isinstance(leaf, Tensor) for leaf in optree.tree_leaves(batch)):
            raise ValueError("the batches of the members are of different shapes: use mode='exact'")
        yield batch, [state for _, state in made]
