"""Copies given to code that may write to them, and a look at whether it did."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .bits import same_bits
from .outputs import children, map_outputs


def was_written(copy: Tensor, original: Tensor) -> bool:
    """Whether a tensor that was a copy of ``original`` has other bits now."""
    try:
        return not same_bits(copy, original)
    except RuntimeError:
        # Under torch.func.vmap tensors have no bits to look at.
        return True


def clone_tree(tree: Any) -> Any:
    """A copy of nested dicts, lists and tuples, and of outputs of other classes, and of the tensors in them.

    >>> import torch
    >>> mine = {"a": torch.zeros(2)}
    >>> given = clone_tree(mine)
    >>> given["a"].add_(1)
    tensor([1., 1.])
    >>> mine, tree_was_written(given, mine)
    ({'a': tensor([0., 0.])}, True)
    """
    return map_outputs(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, tree)


def tree_was_written(copy: Any, original: Any) -> bool:
    """`was_written` for a tree that `clone_tree` made of ``original``: any tensor, key, length or value."""
    if isinstance(copy, Tensor) and isinstance(original, Tensor):
        return was_written(copy, original)
    if isinstance(copy, Tensor) or isinstance(original, Tensor):
        return True
    now, before = children(copy), children(original)
    if now is not None and before is not None:
        return now.keys() != before.keys() or any(tree_was_written(now[key], before[key]) for key in now)
    return copy is not original and bool(copy != original)
