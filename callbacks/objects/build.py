"""Object callbacks from functions: a class by `callback_set`, a descriptor of one by `torch_callback`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any, TypeAlias

from ...core.stages import STAGES
from ..registry.descriptor import TorchCallback
from ..registry.param_set import ParamSet
from .callback_set import CallbackSet

Method: TypeAlias = Callable[..., Any]

_TAKEN = ("id", "ctx", "stages", "as_callback", "known_state")


def callback_set(
    classname: str,
    *,
    initialize: Method | None = None,
    state_dict: Method | None = None,
    load_state_dict: Method | None = None,
    weight: float | None = None,
    inherit: type[CallbackSet] = CallbackSet,
    **members: Any,
) -> type[CallbackSet]:
    """A `CallbackSet` class made of functions, each of which takes ``self`` first.

    Args:
        classname: the name of the class, which starts with ``CallbackSet``.
        initialize: ``initialize(self, ...)`` becomes ``__init__``; its parameters are those of the class.
        state_dict, load_state_dict: ``state_dict(self)`` returns what ``load_state_dict(self, state_dict)`` takes; both
            or neither.
        weight: its place in the order of a stage; by default that of ``inherit``.
        inherit: the class to inherit from.
        members: ``on_<stage>(self)`` for the stages at which it does something (``None`` is left out), and whatever
            else the class is to have.

    Raises:
        TypeError: ``on_...`` is not a stage, a method is not a function or takes other arguments, only one of
            ``state_dict`` and ``load_state_dict`` is given, ``inherit`` is no `CallbackSet` class.
        ValueError: the class's name does not start with ``CallbackSet``, or a member has a name that is taken.

    Mirrors R's ``callback_set`` (mlr3torch).

    >>> def initialize(self, epoch: int):
    ...     self.epoch = epoch
    >>> def on_epoch_end(self):
    ...     self.ctx.terminate = self.ctx.epoch == self.epoch
    >>> StopAt = callback_set("CallbackSetStopAt", initialize=initialize, on_epoch_end=on_epoch_end)
    >>> StopAt(3)
    <CallbackSetStopAt 'stop_at': epoch_end>
    """
    _check_name(classname)
    _check_parent(classname, inherit)
    if (state_dict is None) != (load_state_dict is None):
        raise TypeError(f"{classname}: give both state_dict and load_state_dict, or neither")
    named = {name: member for name, member in members.items() if member is not None or not name.startswith("on_")}
    _check_members(classname, named)
    methods = {"__init__": initialize, "state_dict": state_dict, "load_state_dict": load_state_dict}
    namespace = {**named, **{name: method for name, method in methods.items() if method is not None}}
    _check_methods(classname, namespace)
    if weight is not None:
        namespace["weight"] = weight
    functions = [member for member in namespace.values() if isinstance(member, FunctionType)]
    if functions:
        # Of this module, it would pass for a class that ships.
        namespace.setdefault("__module__", functions[0].__module__)
    return type(classname, (inherit,), namespace)


def torch_callback(
    id: str,
    *,
    classname: str | None = None,
    label: str | None = None,
    packages: Iterable[str] = (),
    man: str | None = None,
    param_set: ParamSet | None = None,
    weight: float | None = None,
    **members: Any,
) -> TorchCallback:
    """The descriptor of a `CallbackSet` class made of functions.

    Args:
        id: the id of the callbacks.
        classname: the name of the class; by default ``CallbackSet`` and the id in camel case.
        label, packages, man, param_set: see `TorchCallback`.
        weight: the class's place in the order of a stage.
        members: the other arguments of `callback_set`: ``on_<stage>``, ``initialize``, ``state_dict``,
            ``load_state_dict``, ``inherit``, and other members of the class.

    Raises:
        TypeError, ValueError: what `callback_set` and `TorchCallback` refuse.

    Mirrors R's ``torch_callback`` (mlr3torch).

    >>> def initialize(self, name: str = "Marie"):
    ...     self.name = name
    >>> def on_begin(self):
    ...     print(f"Hello {self.name}, we will train for {self.ctx.total_epochs} epochs.")
    >>> greeting = torch_callback("greeting", initialize=initialize, on_begin=on_begin)
    >>> greeting.set_values(name="Ada")
    <TorchCallback 'greeting': CallbackSetGreeting(name='Ada')>
    >>> import functional_loop as fl
    >>> from functional_loop.examples.digits import loop
    >>> ctx = fl.train(fl.init(fl.evolve(loop(epochs=1), callbacks=[greeting])), steps=1)
    Hello Ada, we will train for 1 epochs.
    """
    if classname is None:
        classname = "CallbackSet" + "".join(word[:1].upper() + word[1:] for word in str(id).split("_"))
    made = callback_set(classname, weight=weight, **members)
    return TorchCallback(made, id, label=label, packages=packages, man=man, param_set=param_set)


def _check_name(classname: Any) -> None:
    if not isinstance(classname, str):
        raise TypeError(f"the name of a class is a string, not {classname!r}")
    if not classname.startswith("CallbackSet") or not classname.isidentifier():
        raise ValueError(f"the name of a class of callbacks starts with CallbackSet, unlike {classname!r}")


def _check_parent(classname: str, inherit: Any) -> None:
    if not isinstance(inherit, type) or not issubclass(inherit, CallbackSet):
        raise TypeError(f"{classname}: inherit is a CallbackSet class, not {inherit!r}")


def _check_members(classname: str, members: dict[str, Any]) -> None:
    for name in members:
        if name in STAGES:
            raise TypeError(f"{classname}: the method of the stage {name!r} is called on_{name}")
        if name in _TAKEN:
            raise ValueError(f"{classname}: {name!r} is taken by CallbackSet and can't be a member")


def _check_methods(classname: str, namespace: dict[str, Any]) -> None:
    arguments = {"load_state_dict": ("self", "state_dict"), "state_dict": ("self",)}
    arguments |= {f"on_{stage}": ("self",) for stage in STAGES}
    for name, method in namespace.items():
        if name not in (*arguments, "__init__"):
            continue
        shown = "initialize" if name == "__init__" else name
        if not callable(method):
            raise TypeError(f"{classname}: {shown} must be a function, not {method!r}")
        if name in arguments and not _takes(method, len(arguments[name])):
            raise TypeError(f"{classname}: {shown} must be a function of ({', '.join(arguments[name])})")


def _takes(function: Method, number: int) -> bool:
    try:
        inspect.signature(function).bind(*[None] * number)
    except TypeError:
        return False
    return True
