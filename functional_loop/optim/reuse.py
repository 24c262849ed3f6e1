"""Double buffering: the memory of a context that nothing references any more is used again for a later one."""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
from torch import Tensor

LARGE = 2**20
"""Bytes from which on a tensor is worth pages of its own: the system gives new memory page by page."""

# Not shared with a process that is forked later; elsewhere than on Unix there is none.
_PRIVATE: dict[str, Any] = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


class _Page:
    """Memory for one tensor.

    The storage of the tensor over it holds a memoryview of the buffer for as long as any tensor, view, array, capsule
    or graph can see it; a weak reference to a storage does not outlive that. So the buffer is free when the memoryview
    is gone.
    """

    def __init__(self, size: int) -> None:
        self._buffer = mmap.mmap(-1, size, **_PRIVATE)
        self._seen: Callable[[], memoryview | None] = lambda: None

    @property
    def is_free(self) -> bool:
        return self._seen() is None

    def copy(self, tensor: Tensor) -> Tensor:
        view = memoryview(self._buffer)
        self._seen = ref(view)
        memory = torch.frombuffer(view, dtype=tensor.dtype, count=tensor.numel())
        return memory.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


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
