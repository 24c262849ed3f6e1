"""Whether another program of a step has made what the usual one makes, up to rounding."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .step import Gradients, Tensors

Part: TypeAlias = tuple[str, Tensor, Tensor]
"""What it is, as it was made, and as it should be."""

_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
_OF_HALF_PRECISION = 1e-1
_FLOOR = 1e-3
"""Rounding errors of a tensor go with the largest ones near it: so much of their norm is added to its own."""


def tolerance(tensors: Iterable[Tensor], autocast: torch.dtype | None) -> float:
    """How far tensors may differ, relative to their norms, that are computed from others in another order.

    Rounding makes a hundredth of that; another mask of dropout or another draw makes them differ by about one.
    """
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()} | {autocast or torch.float64}
    if torch.float32 in dtypes and _matmul_is_reduced():
        return _OF_HALF_PRECISION
    return max(_TOLERANCES.get(dtype, _OF_HALF_PRECISION) for dtype in dtypes)


def _matmul_is_reduced() -> bool:
    backends: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cuda)
    return any(str(backend.matmul.fp32_precision) not in ("none", "ieee") for backend in backends)


def gradients_differ(made: Gradients, right: Gradients, tolerance: float) -> str:
    """Which part of a forward and backward pass differs, and by how much; empty if none does."""
    if made.grads and made.grads.keys() != right.grads.keys():
        return f"the parameters with gradients are {sorted(made.grads)}, and should be {sorted(right.grads)}"
    return (
        outputs_differ(made.y_hats, right.y_hats, tolerance, [("the loss", made.loss, right.loss)])
        or differing(_named("", made.buffers, right.buffers), tolerance)
        or differing(_named("the gradient of ", made.grads, right.grads), tolerance)
    )


def outputs_differ(made: Any, right: Any, tolerance: float, others: Iterable[Part] = ()) -> str:
    """As `gradients_differ`, of the outputs of a network and ``others``."""
    given, wanted = _tensors(made), _tensors(right)
    if len(given) != len(wanted):
        return f"the network has {len(given)} outputs, and should have {len(wanted)}"
    names = ["the output of the network"] if len(wanted) == 1 else [f"output {i}" for i in range(len(wanted))]
    return differing([*others, *zip(names, given, wanted)], tolerance)


def update_differs(
    before: Tensors, grads: Tensors, made: tuple[Tensors, Any], right: tuple[Tensors, Any], tolerance: float
) -> str:
    """As `gradients_differ`, of updates by ``grads`` or ones that agree: new parameters and optimizer states.

    Elements whose gradients are rounding errors are left out: Adam makes whole steps of them.
    """
    names = sorted(grads.keys() & before.keys())
    largest = max((float(grads[name].abs().max()) for name in names if grads[name].numel()), default=0.0)
    moves: list[Part] = []
    slots: dict[str, list[Part]] = {}
    for name in names:
        counts = grads[name].abs() >= _FLOOR * largest
        a, b = ((params[name] - before[name]) * counts for params in (made[0], right[0]))
        moves.append((f"the update of {name}", a, b))
        own = [state["slots"].get(name, {}) for _, state in (made, right)]
        for key in own[1]:
            if key not in own[0]:
                return f"the optimizer has no {key} of {name}"
            if isinstance(own[1][key], Tensor):
                slots.setdefault(key, []).append((f"the optimizer's {key} of {name}", own[0][key], own[1][key]))
    return differing(moves, tolerance) or next(filter(None, (differing(s, tolerance) for s in slots.values())), "")


def _named(prefix: str, made: Tensors, right: Tensors) -> list[Part]:
    return [(prefix + name, made[name], right[name]) for name in right if name in made]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def differing(parts: Sequence[Part], tolerance: float) -> str:
    """The part that differs by more than rounding, and by how much; empty if none does.

    >>> differing([("x", torch.ones(2), torch.ones(2) * 1.1), ("y", torch.ones(2), torch.ones(2))], tolerance=1e-3)
    'x differs by 0.091 of its norm'
    """
    for name, made, right in parts:
        if made.shape != right.shape or made.dtype != right.dtype:
            return f"{name} is {_form(made)}, and should be {_form(right)}"
    norms = [_norm(right[right.isfinite()]) for _, _, right in parts]
    floats = [norm for norm, (_, _, right) in zip(norms, parts) if right.is_floating_point() or right.is_complex()]
    floor = _FLOOR * max(floats, default=0.0) + 1e-9
    for norm, (name, made, right) in zip(norms, parts):
        distance = _norm((_signed(made).to(right.device) - _signed(right))[right.isfinite()])
        if not math.isfinite(distance):
            return f"{name} is not finite, and should be"
        if distance > tolerance * (norm + floor):
            return f"{name} differs by {distance / max(norm, floor):.2g} of its norm"
    return ""


def _signed(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor if tensor.is_floating_point() or tensor.is_complex() else tensor.double()


def _norm(tensor: Tensor) -> float:
    tensor = _signed(tensor)
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    return float(torch.linalg.vector_norm(tensor, dtype=wide))


def _form(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {list(tensor.shape)}"
