"""``torch.func.vmap`` with less work around it, and faster forms of what small networks are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.vmap
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from ..core.record import tree_map

# Private API of torch.
_functorch: Any = torch._C._functorch
_nesting: Any = getattr(torch._functorch.vmap, "vmap_increment_nesting", None)


def over_members(function: Callable[..., Any], arguments: tuple[Any, ...], members: int, randomness: str) -> Any:
    """As ``torch.func.vmap(function, randomness=randomness)(*arguments)``.

    Args:
        arguments: trees of tensors, with the members along their first axes.

    >>> over_members(lambda a: {"total": a.sum()}, (torch.ones(2, 3),), 2, "error")
    {'total': tensor([3., 3.])}
    """
    if not _is_known:
        with FasterRules():
            return torch.func.vmap(function, randomness=randomness)(*arguments)
    with _nesting(members, randomness) as level:
        inside = tree_map(lambda tensor: _functorch._add_batch_dim(tensor, 0, level), arguments)
        with FasterRules():
            outputs = function(*inside)
        return tree_map(lambda tensor: _functorch._remove_batch_dim(tensor, level, members, 0), outputs)


def is_of_members(tensor: Tensor) -> bool:
    """Whether ``tensor`` is that of every member at once, inside of a function that ``torch.func.vmap`` maps."""
    batched: bool = _functorch.is_batchedtensor(tensor)
    return batched


def is_any(flag: Tensor) -> bool:
    """Whether ``flag`` is true; inside of a function that ``torch.func.vmap`` maps, whether it is for any member.

    It waits for the device. What is done where it holds must be right for the members for which it does not.

    >>> torch.func.vmap(lambda x: torch.where(x > 1, 0.0, x) if is_any(x > 1) else x)(torch.tensor([1.0, 2.0]))
    tensor([1., 0.])
    """
    while is_of_members(flag):
        flag = _functorch.get_unwrapped(flag)
    return bool(flag.any())


class FasterRules(TorchFunctionMode):
    """A region in which linear layers, cross entropy and attention of all members are one call each.

    ``vmap`` takes them apart into many small operations, which on a small network is most of the time of a step.
    """

    def __init__(self) -> None:
        super().__init__()
        self._autocast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = _RULES.get(func) if not self._autocast else None
        if rule is not None and (result := rule(*args, **(kwargs or {}))) is not None:
            return result
        return func(*args, **(kwargs or {}))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """Of ``x`` of shape (members, rows, in); the members' weights keep their layout in their gradients."""
    level = _functorch.maybe_get_level(weight)
    inputs, weights = _of_members(x, level), _of_members(weight, level)
    biases = None if bias is None else _of_members(bias, level)
    if inputs is None or weights is None or inputs.dim() != 3 or (bias is not None and biases is None):
        return None
    columns = inputs.transpose(1, 2)
    made = torch.bmm(weights, columns) if biases is None else torch.baddbmm(biases.unsqueeze(2), weights, columns)
    return _as_members(made.transpose(1, 2), level)


def _cross_entropy(y_hat: Tensor, y: Tensor, *others: Any, **options: Any) -> Tensor | None:
    """Of classes by number, with the mean as it is by default."""
    if others or not _are_defaults(options):
        return None
    level = _functorch.maybe_get_level(y_hat)
    outputs, targets = _of_members(y_hat, level), _of_members(y, level)
    if outputs is None or targets is None or outputs.dim() != 3 or targets.dim() != 2:
        return None
    losses = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    return _as_members(losses.sum(1) / (targets != _IGNORED).sum(1), level)


def _cross_entropy_of_rows(y_hat: Tensor, y: Tensor, *others: Any, **options: Any) -> Tensor | None:
    """The same for one member, by operators that vmap knows: it takes cross entropy apart in Python."""
    if others or not _are_defaults(options) or y_hat.dim() != 2 or y.dim() != 1 or y.is_floating_point():
        return None
    counted = y != _IGNORED
    picked = torch.log_softmax(y_hat, 1).gather(1, torch.where(counted, y, 0).unsqueeze(1)).squeeze(1)
    return -torch.where(counted, picked, 0.0).sum() / counted.sum()


def _are_defaults(options: dict[str, Any]) -> bool:
    return not any(isinstance(v, Tensor) or v != _DEFAULTS.get(name, _OTHER) for name, v in options.items())


def _attention_by_products(function: Callable[..., Any]) -> Callable[..., Any]:
    """Attention of all members as matrix products: of the fused kernel for CPUs, vmap makes a loop over members."""

    def rule(query: Tensor, *others: Any, **options: Any) -> Any:
        if query.device.type != "cpu":
            return None
        with sdpa_kernel(SDPBackend.MATH):
            return function(query, *others, **options)

    return rule


def _of_members(tensor: Tensor, level: int) -> Tensor | None:
    """The tensor of all members, with their axis first, or ``None`` if it is not one of each."""
    if level < 0 or not _functorch.is_batchedtensor(tensor) or _functorch.maybe_get_level(tensor) != level:
        return None
    value: Tensor = _functorch.get_unwrapped(tensor)
    axis = _functorch.maybe_get_bdim(tensor)
    return value.movedim(axis, 0) if axis else value


def _as_members(tensor: Tensor, level: int) -> Tensor:
    made: Tensor = _functorch._add_batch_dim(tensor, 0, level)
    return made


_OTHER = object()
_IGNORED = -100
_DEFAULTS = {
    "weight": None,
    "size_average": None,
    "ignore_index": _IGNORED,
    "reduce": None,
    "reduction": "mean",
    "label_smoothing": 0.0,
}
_NEEDED = (
    "maybe_get_level",
    "is_batchedtensor",
    "get_unwrapped",
    "maybe_get_bdim",
    "_add_batch_dim",
    "_remove_batch_dim",
)
_is_known = _nesting is not None and all(hasattr(_functorch, name) for name in _NEEDED)
_BY_LEVELS = {F.linear: _linear, F.cross_entropy: _cross_entropy}
_BY_ROWS = {F.cross_entropy: _cross_entropy_of_rows}
_RULES: dict[Any, Any] = dict(_BY_LEVELS if _is_known else _BY_ROWS)
for _function in (F.scaled_dot_product_attention, F.multi_head_attention_forward):
    _RULES[_function] = _attention_by_products(_function)
