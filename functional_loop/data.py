"""`batches`: the one way to make a source of batches, from tensors, a dataset or a loader."""

from __future__ import annotations

from typing import Any

from .batch import Batch, BatchSource, as_batch, to_device
from .indexed import from_tensors

__all__ = ["Batch", "BatchSource", "as_batch", "batches", "to_device"]


def batches(data: Any, /, y: Any = None, **options: Any) -> BatchSource:
    return from_tensors(data, y, **options)
