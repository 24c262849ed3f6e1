"""Copies given to code that may write to them, and a look at whether it did."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .bits import same_bits


def was_written(copy: Tensor, original: Tensor) -> bool:
    """Whether a tensor that was a copy of ``original`` has other bits now."""
    try:
        return not same_bits(copy, original)
    except RuntimeError:
        # Under torch.func.vmap tensors have no bits to look at.
        return True


def clone_tree(tree: Any) -> Any:
    """A copy of nested dicts, lists and tuples and of the tensors in them.

    >>> import torch
    >>> mine = {"a": torch.zeros(2)}
    >>> given = clone_tree(mine)
    >>> given["a"].add_(1)
    tensor([1., 1.])
    >>> mine, tree_was_written(given, mine)
    ({'a': tensor([0., 0.])}, True)
    """
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    if isinstance(tree, dict):
        return {key: clone_tree(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        # A named tuple is made from one argument for every field.
        make = getattr(type(tree), "_make", type(tree))
        return make([clone_tree(value) for value in tree])
    return tree


def tree_was_written(copy: Any, original: Any) -> bool:
    """`was_written` for a tree that `clone_tree` made of ``original``: any tensor, key, length or value."""
    if isinstance(copy, Tensor) and isinstance(original, Tensor):
        return was_written(copy, original)
    if isinstance(copy, dict) and isinstance(original, dict):
        return copy.keys() != original.keys() or any(tree_was_written(copy[key], original[key]) for key in copy)
    if isinstance(copy, (list, tuple)) and isinstance(original, (list, tuple)):
        return len(copy) != len(original) or any(map(tree_was_written, copy, original))
    if isinstance(copy, Tensor) or isinstance(original, Tensor):
        return True
    return copy is not original and bool(copy != original)
