"""The parts of a learner as values with parameters: what ``optimizer__lr`` and the like mean.

A part is a class or function, a `functools.partial` of one, an optimizer, or the descriptor of a callback. Setting a
parameter makes another part, and leaves the one that the user has given as it is.
"""

from __future__ import annotations

import functools
import inspect
from contextlib import suppress
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch

from ..callbacks.objects.callback_set import CallbackSet
from ..callbacks.registry.descriptor import TorchCallback
from ..callbacks.registry.dictionary import as_torch_callback
from ..core.callback import Callback
from ..core.record import did_you_mean
from ..optim.optimizer import Optimizer, optimizer
from .arrays import as_python
from .networks import SHAPE

_FUNCTIONS = (type, FunctionType, BuiltinFunctionType, functools.partial)
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
        case _ if isinstance(part, _FUNCTIONS):
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
    values = {name: as_python(value) for name, value in values.items()}
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
    if not isinstance(part, (Optimizer, *_FUNCTIONS)):
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


def callback_parameters(callbacks: Any) -> dict[str, Any]:
    """The callbacks of a list by id, and their parameters as ``<id>__<name>``."""
    found: dict[str, Any] = {}
    for id, (place, part) in _by_id(callbacks).items():
        found[id] = callbacks[place]
        found |= {f"{id}__{name}": value for name, value in parameters(part).items()}
    return found


def with_callback_parameters(callbacks: Any, values: dict[str, Any]) -> list[Any]:
    """A list of callbacks in which some are replaced (``<id>``), or have other parameters (``<id>__<name>``).

    Raises:
        ValueError: there is no callback of that id, or it has no such parameter.
        TypeError: a value is of a wrong type, or the callback is made already.
    """
    nested: dict[str, dict[str, Any]] = {}
    known, replaced = _by_id(callbacks), list(callbacks)
    for key, value in values.items():
        id, separator, name = key.partition("__")
        if id not in known:
            raise ValueError(f"there is no callback {id!r} in callbacks{did_you_mean(id, known)}")
        if separator:
            nested.setdefault(id, {})[name] = value
        else:
            replaced[known[id][0]] = value
    for id, own in nested.items():
        place = known[id][0]
        part = _addressable(replaced[place])
        if not isinstance(part, TorchCallback):
            raise TypeError(
                f"callback {id!r} is made already, so that {next(iter(own))!r} can't be set: give its descriptor, such "
                "as TorchCallback(function_or_class), or the key of one"
            )
        replaced[place] = with_parameters(part, "callback", own)
    return replaced


def _by_id(callbacks: Any) -> dict[str, tuple[int, Any]]:
    """Of what has an id in a list of callbacks: where it stands, and whose parameters it has."""
    listed = callbacks if isinstance(callbacks, (list, tuple)) else ()
    found = [(place, _addressable(item)) for place, item in enumerate(listed)]
    return {part.id: (place, part) for place, part in found if part is not None}


def _addressable(item: Any) -> Callback | CallbackSet | TorchCallback | None:
    """A callback that is made already as it is, another as its descriptor; ``None`` for what is none of them."""
    if isinstance(item, (Callback, CallbackSet)):
        return item
    with suppress(TypeError, ValueError, KeyError):
        return as_torch_callback(item)
    return None
