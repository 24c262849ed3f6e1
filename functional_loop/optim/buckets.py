"""Buckets: small tensors of a column side by side in one, because few elements cost an operator as much as many."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .kernels import Column, Shared
from .layouts import Layout, is_contiguous

# Torch's own helpers for distributed training.
_flatten: Any = torch._C._nn.flatten_dense_tensors
_unflatten: Any = torch._C._nn.unflatten_dense_tensors

_VECTOR = 64
"""A multiple of the number of elements that a vectorised loop of torch takes at a time."""


class Buckets:
    """Which tensors of a column lie side by side.

    An elementwise operator has the same bits on them as on each alone. Torch computes the last elements of a tensor,
    those that fill no vector, in another way than the others, so that only the last tensor of a bucket may have any.

    Args:
        layouts: of the tensors.
        most: how many elements a tensor may have that lies beside others. Torch splits no loop over twice as many
            between threads (``at::internal::GRAIN_SIZE``).

    >>> from functional_loop.optim.layouts import layout
    >>> column = [torch.ones(3), torch.ones(64), torch.ones(2, 64), torch.ones(64, 2).t()]
    >>> buckets = Buckets([layout(tensor) for tensor in column])
    >>> [tuple(tensor.shape) for tensor in buckets.join(column)]
    [(195,), (2, 64)]
    >>> [tuple(tensor.shape) for tensor in buckets.split(buckets.join(column))]
    [(3,), (64,), (2, 64), (2, 64)]
    """

    def __init__(self, layouts: Sequence[Layout], most: int = 16384) -> None:
        self._members = _arranged(layouts, most)
        self._order = list(chain.from_iterable(self._members))
        # What to make of a part of a bucket; they take no memory.
        likes = [torch.empty((), dtype=dtype, device="cpu").expand(shape) for dtype, shape, _ in layouts]
        self._likes = [[likes[i] for i in members] for members in self._members]
        self.alone = {i: members[0] for i, members in enumerate(self._members) if len(members) == 1}
        """Which of the joined tensors are members themselves, and which member each is."""

    def join(self, column: Column) -> Column:
        """One tensor for every bucket: a copy of its members, one after the other, or the only member itself."""
        if isinstance(column, Shared):
            return Shared(column[:1] * len(self._members))
        if len(self.alone) == len(column):
            return column
        return [
            _flatten([column[i] for i in members]) if len(members) > 1 else column[members[0]]
            for members in self._members
        ]

    def split(self, joined: Column) -> Column:
        """The tensors of the column, which are views of what `join` made."""
        if isinstance(joined, Shared):
            return Shared(joined[:1] * len(self._order))
        parts: list[Tensor] = []
        for tensor, likes in zip(joined, self._likes):
            parts += [tensor] if len(likes) == 1 else _unflatten(tensor, likes)
        column = parts.copy()
        for i, part in zip(self._order, parts):
            column[i] = part
        return column


def _arranged(layouts: Sequence[Layout], most: int) -> list[list[int]]:
    sizes = [math.prod(shape) for _, shape, _ in layouts]
    small = [i for i, layout in enumerate(layouts) if 0 < sizes[i] <= most and is_contiguous(layout)]
    buckets: list[list[int]] = []
    room = 0
    for i in small:
        if sizes[i] % _VECTOR == 0:
            if sizes[i] > room:
                buckets.append([])
                room = most
            buckets[-1].append(i)
            room -= sizes[i]
    for bucket, last in zip(buckets, [i for i in small if sizes[i] % _VECTOR]):
        bucket.append(last)
    joined = set(chain.from_iterable(buckets))
    return sorted(buckets + [[i] for i in range(len(layouts)) if i not in joined])
