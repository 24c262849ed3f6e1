"""The parts of a learner as values with parameters: what ``optimizer__lr`` and the like mean.

A part is a class or function, a `functools.partial` of one, an optimizer, or the descriptor of a callback. Setting a
parameter makes another part, and leaves the one that the user has given as it is.
"""

from __future__ import annotations

import functools
import inspect
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch

from ..callbacks.callback_set import CallbackSet
from ..callbacks.descriptor import TorchCallback
from ..callbacks.dictionary import t_clbk, torch_callbacks
from ..optimizers import Optimizer, optimizer
from ..record import did_you_mean
from ..stages import Callback
from .networks import SHAPE

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def parameters(part: Any) -> dict[str, Any]:
    """The parameters of ``part`` that have a value, with it; none if it is nothing that has parameters.

    >>> parameters(functools.partial(lambda n_outputs, hidden=8, dropout=0.0: ..., hidden=4))
    {'hidden': 4, 'dropout': 0.0}
    """
    match part:
        case TorchCallback():
            values = {name: part.values.get(name, param.default) for name, param in part.param_set.items()}
            return {name: value for name, value in values.items() if value is not inspect.Parameter.empty}
        case Optimizer():
            return {**parameters(part.cls), **part.hyperparameters}
        case type() | FunctionType() | BuiltinFunctionType() | functools.partial():
            defaults = {name: p.default for name, p in _signature(part).items() if p.default is not p.empty}
            return {name: value for name, value in defaults.items() if name not in SHAPE}
    return {}


def with_parameters(part: Any, what: str, values: dict[str, Any]) -> Any:
    """``part`` with other values of some parameters.

    Args:
        what: the name of the part, for messages.

    Raises:
        ValueError: there is no such parameter.
        TypeError: a value is of a wrong type.

    >>> import functional_loop as fl
    >>> with_parameters(torch.optim.SGD, "optimizer", {"lr": 0.1}).hyperparameters
    {'lr': 0.1}
    """
    known = _known(part)
    for name in values:
        if known is not None and name not in known:
            raise ValueError(f"invalid parameter {name!r} of {what} {part!r}{did_you_mean(name, known)}")
    if isinstance(part, TorchCallback):
        return part.clone().set_values(**values)
    if isinstance(part, Optimizer):
        hyperparameters = {**part.hyperparameters, **values}
        return optimizer(part.cls, params=part.params, groups=part.groups, **hyperparameters)
    if isinstance(part, type) and issubclass(part, torch.optim.Optimizer):
        return optimizer(part, **values)
    return functools.partial(part, **values)


def _known(part: Any) -> list[str] | None:
    """The names of the parameters that ``part`` takes; ``None`` if it takes any."""
    if isinstance(part, TorchCallback):
        return None if part.param_set.open else list(part.param_set)
    if not callable(part) and not isinstance(part, Optimizer):
        return []
    signature = _signature(part.cls if isinstance(part, Optimizer) else part)
    if any(p.kind is p.VAR_KEYWORD for p in signature.values()):
        return None
    return [name for name, p in signature.items() if p.kind in _NAMED and name not in (*SHAPE, "params")]


def _signature(function: Any) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(function).parameters)
    except ValueError:  # a function of C that does not tell
        return {}


def callback_id(item: Any) -> str | None:
    """The id of what stands in a list of callbacks; ``None`` if it is nothing that has one."""
    if isinstance(item, str):
        return item
    return item.id if isinstance(item, (Callback, CallbackSet, TorchCallback)) else None


def callbacks_by_id(callbacks: Any) -> dict[str, Any]:
    """What has an id in a list of callbacks."""
    listed = callbacks if isinstance(callbacks, (list, tuple)) else ()
    return {id: item for item in listed if (id := callback_id(item)) is not None}


def callback_parameters(callbacks: Any) -> dict[str, Any]:
    """The callbacks of a list by id, and their parameters as ``<id>__<name>``."""
    found: dict[str, Any] = {}
    for id, item in callbacks_by_id(callbacks).items():
        part = torch_callbacks[item] if isinstance(item, str) and item in torch_callbacks else item
        found[id] = item
        found |= {f"{id}__{name}": value for name, value in parameters(part).items()}
    return found


def with_callback_parameters(callbacks: Any, values: dict[str, Any]) -> list[Any]:
    """A list of callbacks in which some are replaced (``<id>``), or have other parameters (``<id>__<name>``).

    Raises:
        ValueError: there is no callback of that id, or it has no such parameter.
        TypeError: a value is of a wrong type.
    """
    known = callbacks_by_id(callbacks)
    nested: dict[str, dict[str, Any]] = {}
    for key in sorted(values):
        id, separator, name = key.partition("__")
        if id not in known:
            raise ValueError(f"there is no callback {id!r} in callbacks{did_you_mean(id, known)}")
        if separator:
            nested.setdefault(id, {})[name] = values[key]
        else:
            known[id] = values[key]
    for id, own in nested.items():
        part = t_clbk(known[id]) if isinstance(known[id], str) else known[id]
        if not isinstance(part, TorchCallback):
            raise ValueError(
                f"callback {id!r} is made already, so that {next(iter(own))!r} can't be set: give its descriptor, such "
                "as TorchCallback(function_or_class) or the key of one"
            )
        known[id] = with_parameters(part, "callback", own)
    return [known.get(callback_id(item) or "", item) for item in callbacks]
