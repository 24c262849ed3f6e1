"""Trees as JSON beside tensors: nested dict and list of tensor, int, float, bool, str and None, exactly."""

from __future__ import annotations

import math
import re
import struct
from typing import Any

import torch
from torch import Tensor

MAX_DEPTH = 100
TENSOR = "$tensor"
"""The key of an object that stands for a tensor."""

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
        *(torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
        *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
        torch.float8_e8m0fnu,
    )
}
"""What a tensor in a tree may consist of, by name."""

Place = tuple[str | int, ...]

_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_IN_KEYS = re.compile("[/~\ud800-\udfff]")


def encode(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """``tree`` as JSON, and its tensors under keys made of their paths.

    What JSON lacks becomes an object of one key that begins with ``$``. A tensor object that occurs twice is
    one tensor. The keys of a path are joined by ``/``; in them ``/``, ``~`` and what UTF-8 lacks become ``~``
    and four hexadecimal digits.

    Raises:
        TypeError: something else is in the tree; the message names its path.
        ValueError: the tree is nested deeper than 100 levels, or contains itself.

    >>> encode({"layers": [{"weight": torch.ones(2)}], "best": float("inf")})
    ({'layers': [{'weight': {'$tensor': 'layers/0/weight'}}], 'best': {'$float': '7ff0000000000000'}},
     {'layers/0/weight': tensor([1., 1.])})
    """
    found: dict[int, tuple[str, Tensor]] = {}
    return _encode(tree, (), found), dict(found.values())


def _encode(node: Any, place: Place, found: dict[int, tuple[str, Tensor]]) -> Any:
    if len(place) > MAX_DEPTH:
        raise ValueError(f"can't save {_codify(place[:3])}…: it is nested deeper than {MAX_DEPTH} levels, or in itself")
    if node is None or type(node) is bool:
        return node
    if type(node) is str:
        return {"$str": node.encode("utf-8", "surrogatepass").hex()} if _SURROGATE.search(node) else node
    if type(node) is int:
        return node if node.bit_length() <= 63 else {"$int": hex(node)}
    if type(node) is float:
        return node if math.isfinite(node) else {"$float": struct.pack(">d", node).hex()}
    if type(node) is list:
        return [_encode(child, (*place, i), found) for i, child in enumerate(node)]
    if type(node) is dict:
        return _encode_dict(node, place, found)
    if isinstance(node, Tensor):
        _check_tensor(node, place)
        key, _ = found.setdefault(id(node), (_tensor_key(place), node))
        return {TENSOR: key}
    raise TypeError(
        f"can't save {_codify(place)}: it is of type {type(node).__name__}; "
        "use dicts with string keys, lists, tensors, int, float, bool, str or None"
    )


def _encode_dict(node: dict[Any, Any], place: Place, found: dict[int, tuple[str, Tensor]]) -> dict[str, Any]:
    for key in node:
        if type(key) is not str:
            raise TypeError(f"can't save {_codify(place)}: its key {key!r} is of type {type(key).__name__}, not str")
    items = {key: _encode(value, (*place, key), found) for key, value in node.items()}
    if any(key.startswith("$") or _SURROGATE.search(key) for key in items):
        return {"$dict": [[_encode(key, (), found), value] for key, value in items.items()]}
    return items


def _check_tensor(tensor: Tensor, place: Place) -> None:
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        what = f"of type {type(tensor).__name__}, not a plain tensor"
    elif tensor.is_meta:
        what = "a meta tensor, which has no values"
    elif tensor.is_nested:
        what = "a nested tensor, not a dense one"
    elif tensor.layout is not torch.strided:
        what = f"a {str(tensor.layout).removeprefix('torch.')} tensor, not a dense one"
    elif tensor.dtype not in DTYPES.values():
        what = f"a tensor of {tensor.dtype}"
    else:
        return
    raise TypeError(f"can't save {_codify(place)}: it is {what}")


def _tensor_key(place: Place) -> str:
    key = "/".join(_ESCAPED_IN_KEYS.sub(lambda m: f"~{ord(m[0]):04x}", str(entry)) for entry in place)
    # safetensors has a use of its own for this name.
    return "~005f_metadata__" if key == "__metadata__" else key


def _codify(place: Place) -> str:
    return "".join(f"[{entry!r}]" for entry in place) or "the tree"


def decode(node: Any, tensors: dict[str, Tensor], depth: int = 0) -> Any:
    """The tree that `encode` was given, with ``tensors`` in their places.

    Raises:
        LookupError, TypeError, ValueError, AttributeError, struct.error: no such node is made by `encode`.

    >>> decode(*encode({"a": [1, -0.0, None], "$b": 10**30}))
    {'a': [1, -0.0, None], '$b': 1000000000000000000000000000000}
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
    if isinstance(node, list):
        return [decode(child, tensors, depth + 1) for child in node]
    if not isinstance(node, dict):
        return node
    if not any(key.startswith("$") for key in node):
        return {key: decode(child, tensors, depth + 1) for key, child in node.items()}
    ((tag, value),) = node.items()
    match tag:
        case "$tensor":
            return tensors[value]
        case "$int":
            return int(value, 16)
        case "$float":
            return struct.unpack(">d", bytes.fromhex(value))[0]
        case "$str":
            return bytes.fromhex(value).decode("utf-8", "surrogatepass")
        case "$dict":
            return {decode(key, {}): decode(child, tensors, depth + 1) for key, child in value}
    raise ValueError(f"there is no type {tag!r}")
