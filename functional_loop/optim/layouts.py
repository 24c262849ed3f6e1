"""Layouts of tensors: what compiled code relies on without looking."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

Layout: TypeAlias = tuple[torch.dtype, torch.Size, tuple[int, ...]]


def layout(leaf: Any) -> Any:
    """Dtype, shape and strides of a tensor; the type of anything else."""
    return (leaf.dtype, leaf.shape, leaf.stride()) if isinstance(leaf, Tensor) else type(leaf)


def is_contiguous(layout: Layout) -> bool:
    """Whether the strides are those of row-major order.

    >>> is_contiguous(layout(torch.zeros(2, 3))), is_contiguous(layout(torch.zeros(2, 3).t()))
    (True, False)
    """
    _, shape, stride = layout
    return torch.empty(shape, device="meta").stride() == stride


def fit(tensor: Tensor, wanted: Layout, name: str) -> Tensor:
    """``tensor``, or a copy of it, with the strides of a layout.

    Args:
        name: the parameter or buffer that it belongs to, for the error.

    Raises:
        ValueError: its dtype or shape is another.

    >>> turned = torch.arange(6.0).view(2, 3).t()
    >>> fit(turned, layout(torch.zeros(3, 2)), "weight").is_contiguous()
    True
    """
    if layout(tensor) == wanted:
        return tensor
    dtype, shape, stride = wanted
    if tensor.dtype is not dtype or tensor.shape != shape:
        raise ValueError(
            f"{name!r} is of dtype {dtype} and shape {list(shape)} in the network, but what belongs to it in the "
            f"context (it, its gradient or its slot in the optimizer) of {tensor.dtype} and {list(tensor.shape)}"
        )
    return torch.empty_strided(shape, stride, dtype=dtype, device=tensor.device).copy_(tensor)
