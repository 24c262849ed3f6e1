"""The parameters of what makes a callback: names, types and defaults, and values that fit them."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import attrs

from ...core.record import did_you_mean

REQUIRED: Any = inspect.Parameter.empty
"""The default of a parameter that has none."""

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@attrs.frozen(repr=False)
class Param:
    """One parameter.

    Args:
        name: what it is called.
        type: what its values are: a class, or anything else that an annotation may be; ``Any`` takes everything.
        default: what is used where no value is set; without one a value is required.

    >>> Param("patience", int), Param("min_delta", float, 0.0)
    (patience: int, min_delta: float = 0.0)
    """

    name: str
    type: Any = Any
    default: Any = REQUIRED

    @property
    def required(self) -> bool:
        return self.default is REQUIRED

    def __repr__(self) -> str:
        default = "" if self.required else f" = {self.default!r}"
        return f"{self.name}: {inspect.formatannotation(self.type)}{default}"


def _as_tuple(params: Iterable[Param]) -> tuple[Param, ...]:
    return tuple(params)


@attrs.frozen(repr=False)
class ParamSet(Mapping[str, Param]):
    """Parameters by name.

    Args:
        params: the parameters, in the order in which they are shown.
        open: whether values of other names are taken too, as a function with ``**kwargs`` does.

    Raises:
        ValueError: two parameters have one name.

    >>> ParamSet([Param("patience", int), Param("min_delta", float, 0.0)])
    ParamSet(patience: int, min_delta: float = 0.0)
    """

    params: tuple[Param, ...] = attrs.field(default=(), converter=_as_tuple)
    open: bool = False

    def __attrs_post_init__(self) -> None:
        names = [param.name for param in self.params]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"more than one parameter is called {twice[0]!r}")

    def __getitem__(self, name: str) -> Param:
        for param in self.params:
            if param.name == name:
                return param
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (param.name for param in self.params)

    def __len__(self) -> int:
        return len(self.params)

    def __repr__(self) -> str:
        return f"ParamSet({', '.join([*map(repr, self.params), *(['...'] if self.open else [])])})"

    def check(self, name: str, value: Any, owner: str) -> None:
        """Refuse a value that does not fit; ``owner`` tells in the message whose it is.

        Raises:
            TypeError: there is no such parameter, or its values are of another type.
        """
        if name not in self:
            if not self.open:
                raise TypeError(f"{owner} has no parameter {name!r}{did_you_mean(name, self)}")
        elif value is not self[name].default and not fits(value, self[name].type):
            wanted = inspect.formatannotation(self[name].type)
            raise TypeError(f"{owner}: {name} must be of type {wanted}, not {value!r}")

    def missing(self, values: Mapping[str, Any]) -> list[str]:
        """Names of the parameters that are required and have no value."""
        return [name for name in self if self[name].required and name not in values]


class Values(MutableMapping[str, Any]):
    """A dict of values that is checked by a `ParamSet` whenever something is put into it."""

    def __init__(self, param_set: ParamSet, owner: str, values: Mapping[str, Any]) -> None:
        self._param_set = param_set
        self._owner = owner
        self._values: dict[str, Any] = {}
        self.update(values)

    def __setitem__(self, name: str, value: Any) -> None:
        self._param_set.check(name, value, self._owner)
        self._values[name] = value

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __delitem__(self, name: str) -> None:
        del self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return repr(self._values)


def params_of(generator: Callable[..., Any]) -> ParamSet:
    """The parameters of a class or function, from its signature.

    ``id`` is left out: a descriptor has one of its own. An annotation that can't be resolved takes every value.

    >>> def early_stopping(patience: int, min_delta: float = 0.0, *, id: str = "early_stopping"): ...
    >>> params_of(early_stopping)
    ParamSet(patience: int, min_delta: float = 0.0)
    """
    parameters = _signature(generator).parameters.values()
    named = [p for p in parameters if p.kind in _NAMED and p.name != "id"]
    open = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    return ParamSet((Param(p.name, _type(p.annotation), p.default) for p in named), open)


def takes_id(generator: Callable[..., Any]) -> bool:
    return "id" in inspect.signature(generator).parameters


def _signature(generator: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(generator, eval_str=True)
    except (NameError, AttributeError):  # an annotation that only type checkers can resolve
        return inspect.signature(generator)


def _type(annotation: Any) -> Any:
    return Any if annotation is inspect.Parameter.empty or isinstance(annotation, str) else annotation


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value is of an annotated type; containers and functions are taken for what they are, not for what is
    in them.

    >>> fits(3, float), fits(True, int), fits("a", int | None), fits([1], list[str])
    (True, False, False, True)
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, each) for each in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is typing.Annotated:
        return fits(value, arguments[0])
    if annotation is None:
        return value is None
    if annotation in (int, float):
        return isinstance(value, (int, annotation)) and not isinstance(value, bool)
    try:
        return isinstance(value, origin or annotation)
    except TypeError:  # a protocol, a type variable: nothing that can be checked while running
        return True
