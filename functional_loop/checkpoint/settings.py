"""What functions, modules and objects were made with, as plain values that are the same in every process."""

from __future__ import annotations

import enum
import functools
import inspect
import numbers
import operator
import os
import re
import sys
import types
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from ..core.hashes import hash_of
from ..core.mentions import (
    DEEPEST,
    Mentions,
    hash_of_code,
    is_installed,
    is_of_library,
    mentions_of,
    mentions_of_class,
    mentions_of_function,
    methods_of,
    name_of,
    running_methods,
    variables_of,
)
from ..data.samples import spread
from ..purity.reachable import attributes
from .values import (
    INNERMOST,
    NAMESPACES,
    PLAIN,
    arguments,
    as_dict,
    bounded,
    derived,
    is_data,
    is_of_program,
    key_of,
    some_of,
    text_of,
    told_plain,
    told_tensor,
)

CODE = "code()"
"""The key of a hash of code; no variable can be named so."""

MOST = 5000
"""So many things are looked at, and so many values of one."""

_NOTHING = Mentions()
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_OF_MODULES = frozenset(vars(nn.Module()))
_OF_OPERATOR = (operator.itemgetter, operator.attrgetter, operator.methodcaller)


def settings_of(value: Any, *, known: Iterable[Any] = ()) -> Any:
    """What ``value`` was made with.

    A setting is a value that code reads and does not write. Numbers and words stand for themselves, tensors and arrays
    for a hash, of large ones that of a sample. Of a function there are its name, a hash of its code, and the variables
    that it reads: of functions around it, globals, defaults. Of a module and of an object there are its class and its
    attributes, but for those that methods write to while they run; of an object of an installed package only what its
    constructor took. All else is known by its class alone, and paths, dates, clocks and devices by being that.

    Args:
        known: objects that are told of elsewhere.

    >>> def scaled(factor):
    ...     return lambda y_hat, y: factor * (y_hat - y).abs().mean()
    >>> settings_of(scaled(2.0))["factor"]
    2.0
    """
    return _Reader(known).read(value)


def structure_of(network: nn.Module) -> dict[str, Any]:
    """The class and the arguments of every part of a network, by its path; of the whole ``"."``; and no values.

    >>> structure_of(nn.Sequential(nn.Dropout(0.3)))["0"]["p"]
    0.3
    """
    return _Reader(network.modules()).read_network(network)


def settings_of_all(parts: Mapping[str, Any], *, known: Iterable[Any] = ()) -> dict[str, Any]:
    """The settings of several functions; what one of them writes to is no setting of the others."""
    functions = [value for value in parts.values() if isinstance(value, types.FunctionType)]
    owner = functools.reduce(Mentions.__or__, map(mentions_of_function, functions), _NOTHING)
    reader = _Reader(known)
    return {part: reader.read(value, owner) for part, value in parts.items()}


class _Reader:
    def __init__(self, known: Iterable[Any] = ()) -> None:
        self._around = [id(each) for each in known]
        self._innermost = len(self._around) + INNERMOST
        self._left = MOST
        self._calls = 0

    def read(self, value: Any, owner: Mentions = _NOTHING) -> Any:
        """
        Args:
            owner: what the code mentions that has the value: of a configuration what is used counts.
        """
        if isinstance(value, PLAIN) and not isinstance(value, enum.Enum):
            return told_plain(value, owner.clocks)
        if id(value) in self._around:
            return "itself"
        if not self._left or len(self._around) >= self._innermost:
            return name_of(type(value))
        self._left -= 1
        self._around.append(id(value))
        try:
            return self._read(value, owner)
        except Exception:  # whatever an object does that is looked at
            return name_of(type(value))
        finally:
            self._around.pop()

    def _read(self, value: Any, owner: Mentions) -> Any:
        match value:
            case bytes() | bytearray() | memoryview():
                return f"{len(value)} bytes {hash_of(bytes(some_of(value)))[:16]}"
            case torch.dtype() | torch.layout() | torch.Size() | range() | slice() | timedelta():
                return str(value)
            case re.Pattern():
                return value.pattern
            case enum.Enum():
                return f"{name_of(type(value))}.{value.name}"
            case os.PathLike():
                return "a path or date"
            case Tensor():
                return told_tensor(value)
            case nn.Module():
                return self.read_network(value) | {"values": hash_of([*value.parameters(), *value.buffers()])}
            case functools.partial():
                return self._read_partial(value, owner)
            case types.MethodType():
                method = Mentions(names=frozenset({value.__func__.__name__}))
                return {**as_dict(self.read(value.__self__, owner | method), "self"), "def": name_of(value)}
            case types.FunctionType():
                return self._read_function(value, owner)
            case types.BuiltinFunctionType():
                return {"def": name_of(value)}
            case type() if is_installed(value):
                return name_of(value)
            case type():
                return self._read_class(value, owner, mentions_of_class(value))
            case types.ModuleType():
                used = {name: each for name, each in vars(value).items() if name in owner.names}
                used = {name: each for name, each in sorted(used.items()) if is_of_program(each)}
                return self._read_all(used, owner)
            case set() | frozenset():
                some = value if len(value) <= MOST else ()
                return bounded(sorted((self.read(each, owner) for each in some), key=text_of), len(value))
            case dict() | types.MappingProxyType():
                return self._read_dict(value, owner)
            case list() | tuple():
                return bounded([self.read(value[i], owner) for i in spread(len(value), MOST)], len(value))
        if isinstance(value, _OF_OPERATOR):
            return {"def": name_of(type(value)), "args": self.read(value.__reduce__()[1])}
        if type(value).__name__ in NAMESPACES:
            return self._read_dict({n: v for n, v in vars(value).items() if not owner.writes_to(n, v)}, owner)
        if type(value).__module__.partition(".")[0] == "numpy" or hasattr(type(value), "__array_interface__"):
            return self._read_array(value, owner)
        if isinstance(value, numbers.Number):
            return str(value)
        if "__wrapped__" in getattr(value, "__dict__", {}):
            return self.read(inspect.unwrap(value), owner)
        if isinstance(value, Mapping) and is_installed(type(value)) and is_data(value):
            return self._read_dict(value, owner)
        return self._read_object(value, owner)

    def _read_all(self, found: Mapping[str, Any], owner: Mentions) -> dict[str, Any]:
        """The settings among variables or attributes."""
        return {name: self.read(each, owner) for name, each in found.items() if not owner.writes_to(name, each)}

    def _read_array(self, value: Any, owner: Mentions) -> Any:
        if getattr(value, "shape", None) == () and hasattr(value, "item"):
            return self.read(value.item(), owner)
        if hasattr(value, "tobytes"):
            return f"{getattr(value, 'dtype', '')}{list(getattr(value, 'shape', ()))} {hash_of(value)[:16]}"
        if callable(value) and hasattr(value, "__name__"):
            return {"def": name_of(value)}
        return str(value) if type(value).__name__.endswith("DType") else name_of(type(value))

    def _read_dict(self, value: Mapping[Any, Any], owner: Mentions) -> Any:
        used = [key for key in value if key in owner.names] if all(type(key) is str for key in value) else []
        keys = used or list(value)
        some = {key_of(self.read(key := keys[i])): value[key] for i in spread(len(keys), MOST)}
        return bounded({key: self.read(each, owner) for key, each in some.items()}, len(keys))

    def _read_partial(self, value: Any, owner: Mentions) -> dict[str, Any]:
        args = {"args": [self.read(each, owner) for each in value.args]} if value.args else {}
        keywords = {name: self.read(each, owner) for name, each in value.keywords.items()}
        return {**as_dict(self.read(value.func, owner), "def"), **args, **keywords}

    def _read_function(self, function: types.FunctionType, owner: Mentions) -> dict[str, Any]:
        if "made_with" in vars(function):  # by `when`, `every` or `compose`
            return self._read_all(vars(function)["made_with"], owner)
        if is_of_library(function) and hasattr(function, "__wrapped__"):
            return dict(self.read(inspect.unwrap(function), owner))
        made = {"def": name_of(function), **_code([function])}
        if self._calls <= DEEPEST or function.__closure__:
            self._calls += 1
            made |= self._read_variables(function, owner | mentions_of_function(function))
            self._calls -= 1
        return made

    def _read_variables(self, function: types.FunctionType, owner: Mentions) -> dict[str, Any]:
        """The variables that it reads: defaults, globals, those of functions around it."""
        code, defaults = function.__code__, function.__defaults__ or ()
        names = code.co_varnames[: code.co_argcount]
        found = dict(zip(names[len(names) - len(defaults) :], defaults, strict=True)) | (function.__kwdefaults__ or {})
        if not is_installed(function):
            found |= {name: value for name, value in vars(function).items() if name != "__wrapped__"}
            scope, read = function.__globals__, sorted(mentions_of(code).globals)
            found |= {name: scope[name] for name in read if name in scope and is_of_program(scope[name])}
        return self._read_all(found | variables_of(function), owner)

    def read_network(self, module: nn.Module) -> dict[str, Any]:
        """The parts of a network by their paths; a part that is in another mode than the whole says so."""
        parts = dict(module.named_modules())
        hooks = [hook for part in parts.values() for kind in _HOOKS for hook in vars(part)[kind].values()]
        classes = dict.fromkeys(map(type, parts.values()))
        wholes = [mentions_of_function(hook) for hook in hooks if isinstance(hook, types.FunctionType)]
        owner = functools.reduce(Mentions.__or__, [*wholes, *map(mentions_of_class, classes)], _NOTHING)
        called = [mentions_of_class(cls, owner.names.intersection(methods_of(cls))) for cls in classes]
        owner = functools.reduce(Mentions.__or__, called, owner)
        made = {path or ".": self._read_module(part, owner) for path, part in parts.items()}
        for path, part in parts.items():
            if part.training is not module.training:
                made[path]["training"] = part.training
        return made

    def _read_module(self, module: nn.Module, owner: Mentions) -> dict[str, Any]:
        cls = type(module)
        hidden = _OF_MODULES | ({name for name in vars(module) if name.startswith("_")} if is_installed(cls) else set())
        found = {name: each for name, each in vars(module).items() if name not in hidden}
        made = self._read_attributes(module, found, owner, _NOTHING)
        for kind in _HOOKS:
            own = [h for h in vars(module)[kind].values() if type(h) is not types.FunctionType or not is_installed(h)]
            made |= {kind: [self.read(hook, owner) for hook in own]} if own else {}
        return made

    def _read_object(self, value: Any, owner: Mentions) -> Any:
        cls: type = type(value)
        found = {name.removeprefix("."): each for name, each in attributes("", value)}
        called = owner.names.intersection(methods := methods_of(cls))
        if cls.__module__.partition(".")[0] in sys.stdlib_module_names - {"__main__"}:
            found = {}
        elif is_installed(cls):
            found = {name: each for name, each in found.items() if name.lstrip("_") in arguments(cls)}
            found = {name: each for name, each in found.items() if is_of_library(cls) or is_data(each)}
        else:
            hidden = {*derived(cls)}
            found = {name: each for name, each in found.items() if name not in hidden}
            if not running_methods(cls, called):
                # A configuration, of which what is used counts; or it is not known what is called.
                used = {name: each for name, each in found.items() if name in owner.names}
                found, called = (used, called) if used else (found, frozenset(methods))
        own = mentions_of_class(cls, called)
        return self._read_attributes(value, found, owner, own) if found or methods else name_of(cls)

    def _read_attributes(self, thing: Any, found: dict[str, Any], owner: Mentions, own: Mentions) -> dict[str, Any]:
        made = self._read_class(type(thing), owner, own, without=getattr(thing, "__dict__", {}))
        return made | self._read_all(found, own | attrs.evolve(owner, names=frozenset()))

    def _read_class(self, cls: type, owner: Mentions, own: Mentions, without: Iterable[str] = ()) -> dict[str, Any]:
        """The name, the variables that methods read, the values that it has itself, and a hash of the code."""
        methods = dict(sorted(methods_of(cls).items()))
        made: dict[str, Any] = {"class": name_of(cls)}
        for name, method in methods.items():
            if name != "__init__" and not is_installed(method):
                for variable, setting in self._read_variables(method, own).items():
                    made[variable if made.get(variable, setting) == setting else f"{name}.{variable}"] = setting
        hidden, used, values = {*methods, *without}, own.names | owner.names, dict[str, Any]()
        for base in reversed(cls.__mro__):
            values |= {} if is_installed(base) else vars(base)
        values = {n: v for n, v in values.items() if n in used and n not in hidden and not n.startswith("__")}
        made |= self._read_all({name: each for name, each in values.items() if is_of_program(each)}, own)
        return made | _code(methods.values())


def _code(functions: Iterable[types.FunctionType]) -> dict[str, Any]:
    own = [function for function in functions if not is_of_library(function)]
    return {CODE: hash_of_code(own)} if own else {}
