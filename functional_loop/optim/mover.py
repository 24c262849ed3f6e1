"""A mover: parameters and slots in memory of their own, which it moves in place."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from .buckets import Buckets
from .kernels import Column, Columns, Group, Kernel, Shared, Write
from .reuse import LARGE, Pages
from .torch_update import State, Tensors


class Mover:
    """Columns, and the kernel that moves them.

    A column has one tensor per parameter: the parameters themselves, their gradients, or one of their slots.

    Args:
        names: of the parameters.
        keys: names of the slots.
        values: hyperparameters.
        columns: of parameters and slots; it writes to their tensors until it is renewed.
        buckets: which tensors of a column to put side by side.
    """

    def __init__(
        self,
        kernel: Kernel,
        flags: Group,
        names: list[str],
        keys: tuple[str, ...],
        values: Group,
        columns: Columns,
        buckets: Buckets,
    ) -> None:
        self.names, self.keys = names, keys
        self._kernel, self._flags = kernel, flags
        self._buckets = buckets
        self._joined = [_replaceable(buckets.join(column)) for column in columns]
        self._columns = [_replaceable(buckets.split(joined)) for joined in self._joined]
        self._pages = [{i: Pages() for i, tensor in enumerate(j) if tensor.nbytes >= LARGE} for j in self._joined]
        alone = set(buckets.alone.values())
        self.copies_all = not alone
        """Whether it makes no use of the memory of gradients."""
        self._inside = [i for i in range(len(names)) if i not in alone]
        self._values: list[Any] = []
        self.set(values)

    def set(self, values: Group) -> None:
        """Move by these hyperparameters from now on."""
        if (frozen := _frozen(values)) != self._values:
            self._values = frozen
            self._move = self._kernel.prepare(values, self._flags, self._joined) if self.names else None

    def row(self, grads: Column) -> Sequence[Write]:
        """Calls that make a step."""
        return self._move(self._buckets.join(grads)) if self._move is not None else ()

    def renew(self) -> None:
        """Go on with copies: what it has now belongs to others."""
        # What moves the columns is replaced before they are: an interrupt in between leaves equal values behind.
        for joined, pages in zip(self._joined, self._pages):
            joined[:] = _copies(joined, pages)
        for joined, column in zip(self._joined, self._columns):
            column[:] = self._buckets.split(joined)

    def has(self, names: list[str], keys: tuple[str, ...], params: Tensors, slots: State) -> bool:
        """Whether its columns are these very tensors."""
        if self.names != names or self.keys != keys:
            return False
        own, *others = self._columns
        try:
            return all(map(is_, own, map(params.__getitem__, names))) and all(
                all(map(is_, column, [slots[name][key] for name in names])) for key, column in zip(keys, others)
            )
        except KeyError:
            return False

    def by_name(self, apart: bool = False) -> tuple[Tensors, State]:
        """Parameters and slots as they are now, by the names of the parameters; no slots where there are no keys.

        Args:
            apart: each has memory of its own.
        """
        params, *slots = map(self._apart, self._columns) if apart else self._columns
        return dict(zip(self.names, params)), {n: dict(zip(self.keys, row)) for n, row in zip(self.names, zip(*slots))}

    def _apart(self, column: Column) -> Column:
        if isinstance(column, Shared):
            return column
        made = list(column)
        for i in self._inside:
            made[i] = column[i].clone()
        return made


def _replaceable(column: Column) -> list[Tensor]:
    return column if isinstance(column, Shared) else list(column)


def _copies(column: Column, pages: dict[int, Pages]) -> Column:
    if isinstance(column, Shared):
        return [column[0].clone()] * len(column)
    if pages:
        return [pages[i].copy(tensor) if i in pages else tensor.clone() for i, tensor in enumerate(column)]
    return torch._foreach_clone(column)


def _frozen(values: Group) -> list[Any]:
    """Hyperparameters as they are now, to be compared."""
    return [tuple(value) if isinstance(value, list) else value for value in values.values()]
