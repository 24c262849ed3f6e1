"""Plain trees: nested dict, list, tensor, int, float, bool, str and None; what is saved is nothing else."""

from __future__ import annotations

from typing import Any

import torch

_SCALARS = (int, float, bool, str, type(None))
_TUPLE = "()"
_SPARSE = "(sparse)"
RESERVED = (_TUPLE, _SPARSE)
"""Keys that no dict may have as its only one."""


def check_plain(tree: Any, where: str) -> None:
    """Refuse what can't be saved, by its path; ``()`` stands for "nothing yet" and is allowed anywhere.

    Raises:
        TypeError: a container other than dict and list, a key that is not a string, or a leaf of another type.

    >>> check_plain({"best": [1.0, object()]}, "the state of callback 'best'")
    Traceback (most recent call last):
        ...
    TypeError: the state of callback 'best' can't be saved: ['best'][1] is of type object; use dicts with string keys,
    lists, tensors, int, float, bool, str or None
    """
    if found := _unplain(tree, ""):
        path, kind = found
        raise TypeError(
            f"{where} can't be saved: {path or 'it'} is {kind}; "
            "use dicts with string keys, lists, tensors, int, float, bool, str or None"
        )


def _unplain(node: Any, path: str) -> tuple[str, str] | None:
    if isinstance(node, torch.Tensor) or type(node) in _SCALARS or (type(node) is tuple and not node):
        return None
    if type(node) is dict:
        for key, value in node.items():
            if type(key) is not str:
                return f"{path}[{key!r}]", f"under a key of type {type(key).__name__}"
            if found := _unplain(value, f"{path}[{key!r}]"):
                return found
        reserved = [key for key in RESERVED if list(node) == [key]]
        return (path, f"a dict of the reserved key {reserved[0]!r}") if reserved else None
    if type(node) is list:
        for i, value in enumerate(node):
            if found := _unplain(value, f"{path}[{i}]"):
                return found
        return None
    return path, f"of type {type(node).__name__}"


def encode(node: Any) -> Any:
    """A tree as plain types and dense tensors alone.

    A tuple becomes ``{"()": [items]}``, and a sparse tensor ``{"(sparse)": {"indices": ..., "values": ...}}``.

    >>> encode({"loss": (), "y": (1, 2)})
    {'loss': {'()': []}, 'y': {'()': [1, 2]}}
    """
    if isinstance(node, torch.Tensor) and node.is_sparse:
        parts = {"indices": node._indices(), "values": node._values()}
        return {_SPARSE: {**parts, "shape": list(node.shape), "coalesced": node.is_coalesced()}}
    if type(node) is tuple:
        return {_TUPLE: [encode(value) for value in node]}
    if type(node) is list:
        return [encode(value) for value in node]
    if type(node) is dict:
        return {key: encode(value) for key, value in node.items()}
    return node


def decode(node: Any) -> Any:
    """The inverse of `encode`; dicts and lists are new.

    Raises:
        ValueError: a sparse tensor has not the parts of one.

    >>> decode(encode({"loss": (), "y": (1, [2])}))
    {'loss': (), 'y': (1, [2])}
    """
    if isinstance(node, dict):
        if list(node) == [_TUPLE] and isinstance(node[_TUPLE], list):
            return tuple(decode(value) for value in node[_TUPLE])
        if list(node) == [_SPARSE]:
            return _sparse(node[_SPARSE])
        return {key: decode(value) for key, value in node.items()}
    return [decode(value) for value in node] if isinstance(node, list) else node


def _sparse(parts: Any) -> torch.Tensor:
    try:
        size, coalesced = parts["shape"], parts["coalesced"]
        if parts["indices"].dtype is not torch.int64 or type(coalesced) is not bool:
            raise TypeError("its indices are no integers, or it does not say whether it is coalesced")
        return torch.sparse_coo_tensor(
            parts["indices"], parts["values"], size, is_coalesced=coalesced, check_invariants=True
        )
    except (LookupError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"this is not a sparse tensor: {error}") from error
