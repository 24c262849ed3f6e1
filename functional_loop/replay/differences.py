"""What differs between two state dicts, leaf by leaf."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from ..core.bits import most_ulps, same_bits
from ..core.plain import decode

_NOT_STATE = ("version", "fingerprint", "volatile")


@attrs.frozen
class Difference:
    """A leaf that two states do not have in common.

    Attributes:
        path: where it is in the state dict, such as ``"network/0.weight"``.
        reason: what differs, in words.
        max_abs: of tensors, the largest absolute difference of two elements; NaN where only one of them is.
        ulps: of floating-point tensors, the largest difference in units of the last place.
    """

    path: str
    reason: str
    max_abs: float | None = None
    ulps: int | None = None

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Difference]:
    """The leaves in which the durable states of two state dicts differ, in the order of the state dict.

    What is no part of a run's digest is left out: the fingerprint, and the states of volatile callbacks.

    >>> import functional_loop as fl
    >>> from functional_loop.examples.digits import loop
    >>> a, b = fl.train(fl.init(loop()), steps=1), fl.train(fl.init(loop()), steps=2)
    >>> [difference.path for difference in differences(fl.state_dict(a), fl.state_dict(b))][:2]
    ['step', 'global_step']
    >>> differences(fl.state_dict(a), fl.state_dict(a))
    []
    """
    return list(_compare(decode(_state(a)), decode(_state(b)), ""))


def _state(sd: Mapping[str, Any]) -> dict[str, Any]:
    state = {key: value for key, value in sd.items() if key not in _NOT_STATE}
    if "members" in state:
        state["members"] = [_state(member) for member in state["members"]]
    return state


def _compare(a: Any, b: Any, path: str) -> Iterator[Difference]:
    left, right = _children(a), _children(b)
    if left is None or right is None or type(a) is not type(b):
        if (found := _leaf(a, b, path)) is not None:
            yield found
        return
    for key in {**left, **right}:
        where = f"{path}/{key}" if path else key
        if key not in left or key not in right:
            yield Difference(where, f"only in the {'first' if key in left else 'second'}")
        else:
            yield from _compare(left[key], right[key], where)


def _children(node: Any) -> dict[str, Any] | None:
    if isinstance(node, dict):
        return node
    if isinstance(node, Tensor) and node.is_sparse:
        return {"indices": node._indices(), "values": node._values(), "shape": list(node.shape)}
    return {str(i): value for i, value in enumerate(node)} if isinstance(node, (list, tuple)) else None


def _leaf(a: Any, b: Any, path: str) -> Difference | None:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return _tensors(a, b, path)
    if type(a) is float and type(b) is float:
        if struct.pack("<d", a) == struct.pack("<d", b):
            return None
        pair = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
        return Difference(path, f"{a!r} against {b!r}", abs(a - b), most_ulps(*pair))
    if type(a) is type(b) and a == b:
        return None
    return Difference(path, f"{_short(a)} against {_short(b)}")


def _tensors(a: Tensor, b: Tensor, path: str) -> Difference | None:
    if same_bits(a, b):
        return None
    if describe(a) != describe(b):
        return Difference(path, f"{describe(a)} against {describe(b)}")
    b = b.to(a.device)
    wide = torch.complex128 if a.is_complex() else torch.float64
    unequal = (a != b) & ~(a.isnan() & b.isnan())
    # An element that is infinite on both sides has no gap, and inf - inf would say NaN.
    gaps = torch.where(unequal, a.to(wide) - b.to(wide), torch.zeros((), dtype=wide, device=a.device)).abs()
    number = int(unequal.sum())
    reason = f"{number} of {a.numel()} elements" if number else "the same numbers in other bits"
    return Difference(path, reason, gaps.max().item(), most_ulps(a, b))


def describe(tensor: Tensor) -> str:
    """Dtype and shape in short.

    >>> describe(torch.zeros(2, 3))
    'float32[2, 3]'
    """
    sparse = "sparse " if tensor.is_sparse else ""
    return f"{sparse}{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _short(value: Any) -> str:
    text = describe(value) if isinstance(value, Tensor) else repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
