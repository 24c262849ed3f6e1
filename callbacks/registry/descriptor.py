"""Descriptors: callbacks that are not made yet, with their parameters."""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import attrs

from ...core.callback import Callback
from ...core.record import did_you_mean, evolve
from ..objects.callback_set import CallbackSet, check_weight, default_id
from .packages import require
from .param_set import ParamSet, Values, params_of, takes_id

Generator: TypeAlias = Callable[..., CallbackSet | Callback]

_RESERVED = {
    "ctx": "inside a hook it is the state of training",
    "weight": "it places the callback in the order of a stage, and is an argument of the descriptor",
}


@attrs.frozen(init=False, repr=False)
class TorchCallback:
    """What a callback is made from: a class or function, its parameters and their values.

    It stands in ``Loop(callbacks=[...])`` like the callback itself, which is made, anew, for every loop. The descriptor
    is frozen, but for ``values``; `evolve` gives a copy with another ``id`` or ``weight``.

    Args:
        generator: a `CallbackSet` class, or a function that makes a `CallbackSet` or a pure `Callback`.
        id: the id of the callbacks; by default that of the class, or for a function the default of its argument ``id``,
            or its name.
        label: what it is called in a table; by default the id in words.
        packages: what must be importable to use it.
        man: where it is documented; by default the dotted name of the generator.
        weight: the weight of the callbacks in the order of a stage, instead of their own.
        param_set: the parameters; by default those of the generator's signature, with its annotations and defaults.
        values: values of parameters; checked, also when something is put into them later.

    Raises:
        TypeError: a generator that can't be called, a value that does not fit, an argument of another type.
        ValueError: a parameter of a reserved name (``ctx``, ``weight``), an empty id, a weight that is NaN.

    Two descriptors are equal if all of this is; `hash` and `phash` leave out ``values``, which may change.

    Mirrors R's ``TorchCallback`` (mlr3torch).

    >>> class CallbackSetStopAt(CallbackSet):
    ...     def __init__(self, epoch: int):
    ...         self.epoch = epoch
    ...     def on_epoch_end(self):
    ...         self.ctx.terminate = self.ctx.epoch == self.epoch
    >>> stop_at = TorchCallback(CallbackSetStopAt, values={"epoch": 2})
    >>> stop_at
    <TorchCallback 'stop_at': CallbackSetStopAt(epoch=2)>
    >>> stop_at.param_set
    ParamSet(epoch: int)
    >>> stop_at.generate().epoch
    2
    >>> import functional_loop as fl
    >>> from functional_loop.examples.digits import loop
    >>> fl.train(fl.init(fl.evolve(loop(epochs=9), callbacks=[stop_at]))).epoch
    2
    """

    generator: Generator
    id: str
    label: str
    packages: tuple[str, ...]
    man: str
    weight: float | None
    param_set: ParamSet
    values: Values

    def __init__(
        self,
        generator: Generator,
        id: str | None = None,
        *,
        label: str | None = None,
        packages: Iterable[str] = (),
        man: str | None = None,
        weight: float | None = None,
        param_set: ParamSet | None = None,
        values: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        _check_generator(generator)
        id = _default_id(generator) if id is None else id
        label = str(id).replace("_", " ").capitalize() if label is None else label
        man = _dotted_name(generator) if man is None else man
        _check_text(id=id, label=label, man=man)
        if weight is not None:
            check_weight(weight, f"callback {id!r}")
            weight = float(weight)
        packages = _checked_packages(packages, id)
        param_set = _checked_params(params_of(generator) if param_set is None else param_set, generator, id)
        checked = Values(param_set, f"callback {id!r}", values)
        self.__attrs_init__(generator, id, label, packages, man, weight, param_set, checked)

    @property
    def _owner(self) -> str:
        return f"callback {self.id!r}"

    def set_values(self, **values: Any) -> TorchCallback:
        """Set some values and keep the others.

        Returns:
            The descriptor itself.

        Raises:
            TypeError: there is no such parameter, or a value is of another type; then no value is changed.
        """
        for name, value in values.items():
            self.param_set.check(name, value, self._owner)
        self.values.update(values)
        return self

    def generate(self) -> CallbackSet | Callback:
        """A new callback.

        Raises:
            ImportError: a package is not installed; the message says what to install.
            TypeError: a required value is not set.
        """
        for package in self.packages:
            require(package, self._owner)
        if missing := self.param_set.missing(self.values):
            raise TypeError(f"{self._owner}: no value is set for {', '.join(missing)}: set_values({missing[0]}=...)")
        arguments = {"id": self.id} if takes_id(self.generator) else {}
        made = self.generator(**arguments, **self.values)
        if isinstance(made, CallbackSet):
            return self._adjust_object(made)
        if isinstance(made, Callback):
            return self._adjust_pure(made)
        raise TypeError(f"{self._owner}: the generator must make a CallbackSet or a Callback, not {made!r}")

    def _adjust_object(self, made: CallbackSet) -> CallbackSet:
        made._id = self.id
        if self.weight is not None:
            made.weight = self.weight
        return made

    def _adjust_pure(self, made: Callback) -> Callback:
        if made.id != self.id:
            raise ValueError(
                f"{self._owner}: the generator made a callback {made.id!r}, whose hooks know their slot by that id; "
                "give it an argument id, or leave the id of the descriptor as it is"
            )
        return made if self.weight is None else made.remade(weight=self.weight)

    def as_callback(self) -> Callback:
        """A new callback, for a Loop; see `generate`."""
        return self.generate().as_callback()

    def clone(self, deep: bool = False) -> TorchCallback:
        """A copy with values of its own; with ``deep`` the values are copied too."""
        values = dict(self.values)
        return evolve(self, values=copy.deepcopy(values) if deep else values)

    @property
    def phash(self) -> str:
        """A hash of everything but the values, as 64 hexadecimal digits, the same in every process."""
        described = (_dotted_name(self.generator), self.id, self.label, self.packages, self.man, self.weight)
        return hashlib.sha256(repr((described, list(self.param_set))).encode()).hexdigest()

    def __hash__(self) -> int:
        return int(self.phash[:15], 16)

    def __repr__(self) -> str:
        name = getattr(self.generator, "__name__", repr(self.generator))
        values = ", ".join(f"{key}={value!r}" for key, value in self.values.items())
        weight = "" if self.weight is None else f", weight {self.weight}"
        return f"<TorchCallback {self.id!r}: {name}({values}){weight}>"


def describe(x: Any, id: str | None = None) -> TorchCallback:
    """The descriptor of a class or a function that makes a callback, or of a callback that is made already.

    Raises:
        TypeError: ``x`` is none of these.
        ValueError: a callback that is made already can't have another id.
    """
    if not isinstance(x, (Callback, CallbackSet)):
        return TorchCallback(x, id)
    if id not in (None, x.id):
        raise ValueError(f"a callback that is made already can't have another id: {x!r} is not {id!r}")
    return TorchCallback(x.as_callback, x.id)


def _check_generator(generator: Any) -> None:
    if not callable(generator) or (isinstance(generator, type) and not issubclass(generator, CallbackSet)):
        raise TypeError(
            f"a callback is made by a CallbackSet class, or by a function that returns one, not {generator!r}"
        )


def _check_text(**texts: Any) -> None:
    for name, text in texts.items():
        if not isinstance(text, str):
            raise TypeError(f"the {name} of a callback is a string, not {text!r}")
    if not texts["id"]:
        raise ValueError("the id of a callback must not be empty")


def _checked_packages(packages: Any, id: str) -> tuple[str, ...]:
    listed = isinstance(packages, Iterable) and not isinstance(packages, str)
    if not listed or not all(isinstance(name, str) for name in packages):
        raise TypeError(f"callback {id!r}: packages is a list of names of packages, not {packages!r}")
    return tuple(packages)


def _checked_params(param_set: ParamSet, generator: Generator, id: str) -> ParamSet:
    accepted = params_of(generator)
    for name in param_set:
        if name in _RESERVED:
            raise ValueError(f"callback {id!r}: no parameter can be called {name!r}: {_RESERVED[name]}")
        if name not in accepted and not accepted.open:
            raise ValueError(f"callback {id!r}: the generator has no parameter {name!r}{did_you_mean(name, accepted)}")
    return param_set


def _default_id(generator: Any) -> str:
    if isinstance(generator, type):
        return default_id(generator)
    parameter = inspect.signature(generator).parameters.get("id")
    if parameter is not None and isinstance(parameter.default, str):
        return parameter.default
    name = getattr(generator, "__name__", "<lambda>")
    if name == "<lambda>":
        raise ValueError("a function without a name does not say what its callbacks are called: give an id")
    return str(name)


def _dotted_name(generator: Any) -> str:
    described = generator if hasattr(generator, "__qualname__") else type(generator)
    return f"{described.__module__}.{described.__qualname__}"
