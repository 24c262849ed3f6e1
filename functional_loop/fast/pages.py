"""Pages: memory of large tensors, which is used again once nothing can see what was in it."""

from __future__ import annotations

import mmap
import sys
from collections import deque
from typing import Any

import torch
from torch import Tensor

LARGE = 2**20
"""Bytes from which on a tensor is worth pages of its own: the system gives new memory page by page."""

# Not shared with a process that is forked later; elsewhere than on Unix there is none.
_PRIVATE: dict[str, Any] = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
_counts_references = hasattr(sys, "getrefcount")


class _Page:
    """Memory for one tensor.

    The storage of every tensor over it is a new one, and refers to the buffer for as long as any tensor, view, array,
    capsule or graph can see it; a weak reference to a storage does not outlive that. So the buffer is free when nothing
    but the page refers to it.
    """

    def __init__(self, size: int) -> None:
        self._buffer = mmap.mmap(-1, size, **_PRIVATE)
        self._alone = self._references()

    @property
    def is_free(self) -> bool:
        return _counts_references and self._references() == self._alone

    def copy(self, tensor: Tensor) -> Tensor:
        memory = torch.frombuffer(self._buffer, dtype=tensor.dtype, count=tensor.numel())
        return memory.as_strided(tensor.shape, tensor.stride()).copy_(tensor)

    def _references(self) -> int:
        return sys.getrefcount(self._buffer) if _counts_references else 0


class Pages:
    """Memory for copies of one large tensor: two pages in turns, or a new one where the older can be seen still.

    >>> pages, tensor = Pages(), torch.ones(3)
    >>> places = set()
    >>> for _ in range(9):
    ...     tensor = pages.copy(tensor).add_(1)
    ...     _ = places.add(tensor.data_ptr())
    >>> tensor, len(places)
    (tensor([10., 10., 10.]), 2)
    """

    def __init__(self) -> None:
        self._pages: deque[_Page] = deque(maxlen=2)

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor without gaps, in memory that nothing else can see."""
        reused = len(self._pages) == 2 and self._pages[0].is_free
        page = self._pages.popleft() if reused else _Page(tensor.nbytes)
        self._pages.append(page)
        return page.copy(tensor)
