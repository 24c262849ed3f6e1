"""Tensors lent to code that may write to them, and a look at whether it did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .record import tensor_bytes

# Copy-on-write clones are private API of torch: without them lending is a copy, and finding a change a comparison.
_lazy_clone: Any = getattr(torch, "_lazy_clone", torch.clone)
# Asking for `data_ptr()` would end the sharing.
_address: Any = getattr(torch._C, "_data_address", Tensor.data_ptr)


def lend(tensor: Tensor) -> Tensor:
    """A tensor of the same values for somebody else to use and write to; it costs memory only when written to.

    >>> mine = torch.zeros(2)
    >>> lent = lend(mine)
    >>> lent.data.add_(1)
    tensor([1., 1.])
    >>> mine, was_written(lent, mine)
    (tensor([0., 0.]), True)
    """
    lent = tensor.detach()
    return _lazy_clone(lent) if lent.layout == torch.strided else lent.clone()


def was_written(lent: Tensor, original: Tensor) -> bool:
    """Whether a tensor that was lent as a copy of ``original`` has other bits now."""
    if lent.shape != original.shape or lent.dtype != original.dtype:
        return True
    return _address(lent) != _address(original) and tensor_bytes(lent) != tensor_bytes(original)


def clone_tree(tree: Any) -> Any:
    """A copy of nested dicts, lists and tuples and of the tensors in them, which may have aliases outside of torch."""
    return tree.detach().clone() if isinstance(tree, Tensor) else _map_children(clone_tree, tree)


def lend_tree(tree: Any) -> Any:
    """`lend` for every tensor in nested dicts, lists and tuples, which are new."""
    return lend(tree) if isinstance(tree, Tensor) else _map_children(lend_tree, tree)


def _map_children(function: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: function(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        # A named tuple is made from one argument for every field.
        make = getattr(type(tree), "_make", type(tree))
        return make([function(value) for value in tree])
    return tree


def tree_was_written(lent: Any, original: Any) -> bool:
    """`was_written` for a tree that `lend_tree` made of ``original``: any tensor, key, length or value."""
    if isinstance(lent, Tensor) and isinstance(original, Tensor):
        return was_written(lent, original)
    if isinstance(lent, dict) and isinstance(original, dict):
        return lent.keys() != original.keys() or any(tree_was_written(lent[key], original[key]) for key in lent)
    if isinstance(lent, (list, tuple)) and isinstance(original, (list, tuple)):
        return len(lent) != len(original) or any(map(tree_was_written, lent, original))
    if isinstance(lent, Tensor) or isinstance(original, Tensor):
        return True
    return lent is not original and bool(lent != original)
