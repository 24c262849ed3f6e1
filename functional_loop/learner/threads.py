"""Threads of torch, for a region of code."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch

from ..core.errors import region
from .arrays import checked_integer


@region
def threads(number: Any) -> Generator[None]:
    """A region in which torch uses ``number`` threads; ``None`` for as many as it uses anyway.

    Raises:
        ValueError: it is no positive integer.

    >>> with threads(1):
    ...     torch.get_num_threads()
    1
    """
    before = torch.get_num_threads()
    torch.set_num_threads(before if number is None else checked_integer("num_threads", number))
    try:
        yield
    finally:
        torch.set_num_threads(before)
