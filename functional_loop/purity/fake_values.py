"""Modes for tensors without memory: what stands for their values, and how much memory they would take."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..compat import is_fake, known_value


class Ones(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Values of fake tensors, where they are read: what is known, else 1 or False."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and is_fake(args[0]):
            known = known_value(args[0])
            if known is not None:
                return known.item()
            # Most questions that code asks of its tensors are whether something is wrong with them.
            return False if args[0].dtype is torch.bool else 1.0 if args[0].dtype.is_floating_point else 1
        return func(*args, **(kwargs or {}))


class Copies(TorchFunctionMode):
    """Deep copies of tensors by operators: torch copies the memory of a fake tensor, which has none, and what it knows
    of the values, and damages the heap."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        # One with a graph is refused.
        if func is not Tensor.__deepcopy__ or not args[0].is_leaf:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            memo[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        return memo[id(tensor)]


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the memory that tensors would have, and the most of it between `begin` and `end`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._live: dict[int, int] = {}
        self._now = self._before = self._most = 0
        self.peak = self.most = 0

    def begin(self) -> None:
        self._before = self._most = self._now

    def end(self) -> None:
        self.peak = max(self.peak, self._most - self._before)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for tensor in _tensors(outputs):
            self._count(tensor)
        return outputs

    def _count(self, tensor: Tensor) -> None:
        if tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self._live:
            self._live[storage._cdata] = storage.nbytes()
            self._now += storage.nbytes()
            self._most = max(self._most, self._now)
            self.most = max(self.most, self._now)
            weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, storage: int) -> None:
        self._now -= self._live.pop(storage, 0)


def _tensors(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, (list, tuple)):
        for output in outputs:
            yield from _tensors(output)
