"""A mover: parameters and slots that nobody else has, which it moves in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .buckets import Buckets
from .kernels import Column, Columns, Group, Kernel, Shared, Write


class Mover:
    """Columns that nobody else has, and the kernel that moves them.

    A column has one tensor per parameter: the parameters themselves, their gradients, or one of their slots.

    Args:
        names: of the parameters.
        values: hyperparameters.
        columns: of parameters and slots.
        buckets: which tensors of a column to put side by side.
    """

    def __init__(
        self, kernel: Kernel, flags: Group, names: list[str], values: Group, columns: Columns, buckets: Buckets
    ) -> None:
        self.names = names
        self._kernel, self._flags = kernel, flags
        self._buckets = buckets
        self.joined = [_replaceable(buckets.join(column)) for column in columns]
        self._columns = [_replaceable(buckets.split(joined)) for joined in self.joined]
        alone = set(buckets.alone.values())
        self.copies_all = not alone
        """Whether it makes no use of the memory of gradients."""
        self._inside = [i for i in range(len(names)) if i not in alone]
        self.set(values)

    def set(self, values: Group) -> None:
        """Move by these hyperparameters from now on."""
        self._values = _frozen(values)
        self._move = self._kernel.prepare(values, self._flags, self.joined) if self.names else None

    def has(self, values: Group) -> bool:
        """Whether these are its hyperparameters."""
        return self._values == _frozen(values)

    def row(self, grads: Column) -> Sequence[Write]:
        """Calls that make a step."""
        return self._move(self._buckets.join(grads)) if self._move is not None else ()

    def columns(self, apart: bool = False) -> Columns:
        """Parameters and slots as they are now.

        Args:
            apart: for somebody else, who will not see what is done to them after the next `renew`.
        """
        return [self._apart(column) for column in self._columns] if apart else self._columns

    def _apart(self, column: Column) -> Column:
        if isinstance(column, Shared):
            return Shared((column[0].clone(),) * len(column))
        if len(self._inside) == len(column) > 0:
            return torch._foreach_clone(column)
        made = list(column)
        for i in self._inside:
            made[i] = column[i].clone()
        return made

    def renew(self) -> None:
        """Go on with copies of the tensors that somebody else may have."""
        for joined, column in zip(self.joined, self._columns):
            if isinstance(joined, list) and isinstance(column, list):
                for i, member in self._buckets.alone.items():
                    joined[i] = column[member] = joined[i].clone()


def _replaceable(column: Column) -> Column:
    return column if isinstance(column, Shared) else list(column)


def _frozen(values: Group) -> list[Any]:
    """Hyperparameters as they are now, to be compared."""
    return [tuple(value) if isinstance(value, list) else value for value in values.values()]
