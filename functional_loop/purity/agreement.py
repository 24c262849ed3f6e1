"""Whether another program of a step has made what the usual one makes, up to rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..engine.step import Gradients, Tensors

M = TypeVar("M")

_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
_OF_HALF_PRECISION = 1e-1
_FLOOR = 1e-3
"""Rounding errors of a tensor go with the largest ones near it: so much of their norm is added to its own."""
_FEW = 0.05
"""The share of the elements of a tensor of integers that rounding may change, where they are found by comparing."""
_MANY = 2000
"""Where the terms of a sum cancel, its rounding errors may be so many last bits of the largest gradient."""
_AMPLIFIED = 30
"""A program may differ so many times as much as the usual one does if parameters change in their last bits."""


class Part(NamedTuple):
    """What it is, as it was made, and as it should be; and how far it may be from that at least."""

    name: str
    made: Tensor
    right: Tensor
    slack: float = 0.0


class Difference(NamedTuple):
    """By how much of its norm the part differs that differs most, in words too."""

    by: float = 0.0
    what: str = ""


def tolerance(tensors: Iterable[Tensor], autocast: torch.dtype | None) -> float:
    """How far tensors may differ, relative to their norms, that are computed from others in another order.

    Rounding makes a hundredth of that; another mask of dropout or another draw makes them differ by about one.
    """
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()} | {autocast or torch.float64}
    if torch.float32 in dtypes and torch.get_float32_matmul_precision() != "highest":
        return _OF_HALF_PRECISION
    return max(_TOLERANCES.get(dtype, _OF_HALF_PRECISION) for dtype in dtypes)


def nudged(params: Tensors, autocast: torch.dtype | None) -> Tensors:
    """Parameters that differ from these in their last bits, up or down.

    >>> made = nudged({"weight": torch.ones(2)}, autocast=None)["weight"]
    >>> 1e-7 < (made - 1).abs().max() < 1e-6
    tensor(True)
    """
    generator = torch.Generator().manual_seed(0)

    def nudge(tensor: Tensor) -> Tensor:
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return tensor
        eps = max(torch.finfo(dtype).eps for dtype in (tensor.dtype, autocast or tensor.dtype))
        signs = torch.randint(2, tensor.shape, generator=generator).to(tensor) * 2 - 1
        return tensor.detach() * (1 + 2 * eps * signs)

    return {name: nudge(param) for name, param in params.items()}


def gradients_differ(
    made: Gradients, right: Gradients, tolerance: float, nearby: Callable[[], Gradients] | None = None
) -> str:
    """Which part of a forward and backward pass differs, and by how much; empty if none does.

    Args:
        nearby: makes what is right of `nudged` parameters. Where that differs too, as of a loss that magnifies rounding
            errors, it is the measure.
    """
    return _judged(lambda other: _of_gradients(other, right), made, tolerance, nearby)


def step_differs(
    before: Tensors,
    made: tuple[Gradients, Any],
    right: tuple[Gradients, Any],
    tolerance: float,
    nearby: Callable[[], tuple[Gradients, Any]] | None = None,
) -> str:
    """As `gradients_differ`, of a whole step from the parameters ``before``, and the new state of the optimizer."""

    def compare(other: tuple[Gradients, Any]) -> Difference:
        updates = ((found.params, state) for found, state in (other, right))
        return max(_of_gradients(other[0], right[0]), _of_update(before, right[0].grads, *updates))

    return _judged(compare, made, tolerance, nearby)


def update_differs(
    before: Tensors, grads: Tensors, made: tuple[Tensors, Any], right: tuple[Tensors, Any], tolerance: float
) -> str:
    """As `gradients_differ`, of updates by ``grads``: new parameters and optimizer states."""
    return _judged(lambda other: _of_update(before, grads, other, right), made, tolerance, None)


def outputs_differ(made: Any, right: Any, tolerance: float, others: Iterable[tuple[str, Tensor, Tensor]] = ()) -> str:
    """As `gradients_differ`, of the outputs of a network and ``others``."""
    return _judged(lambda other: _of_outputs(other, right, others), made, tolerance, None)


def _judged(compare: Callable[[M], Difference], made: M, tolerance: float, nearby: Callable[[], M] | None) -> str:
    found = compare(made)
    if found.by <= tolerance:
        return ""
    if nearby is not None and math.isfinite(found.by) and found.by <= _AMPLIFIED * compare(nearby()).by:
        return ""
    return found.what


def _of_gradients(made: Gradients, right: Gradients) -> Difference:
    if made.grads and made.grads.keys() != right.grads.keys():
        what = f"the parameters with gradients are {sorted(made.grads)}, and should be {sorted(right.grads)}"
        return Difference(math.inf, what)
    # What should be zero is made of rounding errors: of sums, as where a bias comes before a normalisation.
    grads = _named("the gradient of ", made.grads, right.grads)
    sums = 1 + _MANY * max((_norm(part.right[part.right.isfinite()]) for part in grads), default=0.0)
    return max(
        _of_outputs(made.y_hats, right.y_hats, [("the loss", made.loss, right.loss)]),
        difference(_named("", made.buffers, right.buffers)),
        difference([part._replace(slack=sums * _eps(part.right)) for part in grads]),
    )


def _of_outputs(made: Any, right: Any, others: Iterable[tuple[str, Tensor, Tensor]]) -> Difference:
    given, wanted = _tensors(made), _tensors(right)
    if len(given) != len(wanted):
        return Difference(math.inf, f"the network has {len(given)} outputs, and should have {len(wanted)}")
    names = ["the output of the network"] if len(wanted) == 1 else [f"output {i}" for i in range(len(wanted))]
    return difference([*(Part(*other) for other in others), *map(Part, names, given, wanted)])


def _of_update(before: Tensors, grads: Tensors, made: tuple[Tensors, Any], right: tuple[Tensors, Any]) -> Difference:
    """Elements whose gradients are rounding errors are left out: Adam makes whole steps of them."""
    sizes = {name: float(grad.abs().max()) for name, grad in grads.items() if name in before and grad.numel()}
    largest = max(sizes.values(), default=0.0)
    if largest <= max(map(_eps, grads.values()), default=0.0):
        return Difference()
    moves: list[Part] = []
    slots: dict[str, list[Part]] = {}
    for name, size in sizes.items():
        old, counts = before[name].detach(), grads[name].abs() >= _FLOOR * max(size, largest / 10)
        a, b = ((params[name] - old) * counts for params in (made[0], right[0]))
        # The last bits of a parameter may be much of a small move.
        slack = 4 * _eps(old) * _norm(old)
        moves.append(Part(f"the update of {name}", a, b, slack))
        own = [state["slots"].get(name, {}) for _, state in (made, right)]
        for key in own[1]:
            if key not in own[0]:
                return Difference(math.inf, f"the optimizer has no {key} of {name}")
            if isinstance(own[1][key], Tensor):
                slots.setdefault(key, []).append(Part(f"the optimizer's {key} of {name}", own[0][key], own[1][key]))
    return max(difference(moves), *map(difference, slots.values()), Difference())


def _named(prefix: str, made: Tensors, right: Tensors) -> list[Part]:
    return [Part(prefix + name, made[name], right[name]) for name in right if name in made]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def difference(parts: Sequence[Part]) -> Difference:
    """That of the part that differs most.

    >>> difference([Part("x", torch.ones(2), torch.ones(2) * 1.25), Part("y", torch.ones(2), torch.ones(2))])
    Difference(by=0.19..., what='x differs by 0.2 of its norm')
    """
    for part in parts:
        if part.made.shape != part.right.shape or part.made.dtype != part.right.dtype:
            return Difference(math.inf, f"{part.name} is {_form(part.made)}, and should be {_form(part.right)}")
    norms = [_norm(part.right[part.right.isfinite()]) for part in parts]
    floor = _FLOOR * max((norm for norm, part in zip(norms, parts) if _is_rounded(part.right)), default=0.0) + 1e-9
    found = Difference()
    for norm, part in zip(norms, parts):
        if not _is_rounded(part.right):
            share = float((part.made != part.right).double().mean()) if part.right.numel() else 0.0
            other = Difference(share if share > _FEW else 0.0, f"{part.name} differs in {share:.0%} of its elements")
        elif not math.isfinite(distance := _norm((part.made - part.right)[part.right.isfinite()])):
            other = Difference(math.inf, f"{part.name} is not finite, and should be")
        else:
            distance = max(distance - part.slack, 0.0)
            what = f"{part.name} differs by {distance / max(norm, floor):.2g} of its norm"
            other = Difference(distance / (norm + floor), what)
        found = max(found, other)
    return found


def _is_rounded(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _eps(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).eps


def _norm(tensor: Tensor) -> float:
    tensor = tensor.detach()
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    return float(torch.linalg.vector_norm(tensor if _is_rounded(tensor) else tensor.double(), dtype=wide))


def _form(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {list(tensor.shape)}"
