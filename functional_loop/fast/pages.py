"""Pages: memory that contexts are made of in turns, once nobody has the context that it was."""

from __future__ import annotations

import sys
import weakref
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from ..borrowed import State, Tensors
from .kernels import Column, Shared, by_name
from .mover import Mover


class Page:
    """Parameters and slots in memory of their own, which a mover moves before anybody gets to see them.

    ``params`` and ``slots`` are given to contexts; nothing is written to while somebody has any of it.

    Args:
        mover: what moves them; they are copies.
        keys: names of the slots.
    """

    def __init__(self, mover: Mover, keys: tuple[str, ...]) -> None:
        mover.renew()
        self.mover, self.keys = mover, keys
        self.params, self.slots = by_name(mover.names, keys, mover.columns())
        self._tensors = [tensor for column in mover.columns() for tensor in column]
        self._storages = {storage._cdata: storage for storage in map(Tensor.untyped_storage, self._tensors)}
        self._objects = [*self._tensors, *self._storages.values(), *self.slots.values()]
        self._form = [*mover.names, *keys, *((type(column), len(column)) for column in mover.joined)]
        self._alone = self._counts()

    def is_for(self, names: list[str], keys: tuple[str, ...]) -> bool:
        """Whether it is for these parameters and slots."""
        return self.mover.names == names and self.keys == keys

    def is_of(self, params: Tensors, slots: State) -> bool:
        """Whether it is these very parameters and slots."""
        names = self.mover.names
        try:
            given = [params[name] for name in names]
            for key in self.keys:
                given += [slots[name][key] for name in names]
        except KeyError:
            return False
        return all(map(is_, given, self._tensors)) and not any(map(_requires_grad, self._tensors))

    def is_free(self) -> bool:
        """Whether nobody else has any of it, nor shares memory with it, nor has a weak reference to it."""
        return _can_tell and self._counts() == self._alone

    def is_like(self, other: Page) -> bool:
        """Whether it can `take` what the other page has."""
        return self._form == other._form

    def take(self, other: Page) -> None:
        """Become the same as another page."""
        for own, theirs in zip(self.mover.joined, other.mover.joined):
            _copy(own, theirs)

    def _counts(self) -> list[int]:
        if not _can_tell:
            return []
        return [
            *map(sys.getrefcount, self._objects),
            *map(_storage_uses, self._storages),
            *map(_tensor_uses, self._tensors),
            *map(weakref.getweakrefcount, self._tensors),
            # Memory that other processes see: nobody here knows whether they have it still.
            *map(torch.UntypedStorage.is_shared, self._storages.values()),
            # What a hook makes of what it was given would stay with it.
            *map(_requires_grad, self._tensors),
            *map(len, self.slots.values()),
        ]


def _copy(own: Column, theirs: Column) -> None:
    if isinstance(own, Shared):
        own[0].copy_(theirs[0])
    elif own:
        torch._foreach_copy_(own, theirs)


_requires_grad = attrgetter("requires_grad")

# Private API of torch: how many tensors have a storage, and how many have a tensor outside of Python.
_storage_uses: Any = getattr(torch._C, "_storage_Use_Count", None)
_tensor_uses: Any = getattr(Tensor, "_use_count", None)
_can_tell = _storage_uses is not None and _tensor_uses is not None
