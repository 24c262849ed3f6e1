"""What functions, modules and objects were made with, as plain values that are the same in every process."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import inspect
import json
import math
import os
import re
import types
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from .hashes import hash_of
from .mentions import (
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
    scope_of,
)
from .reachable import attributes

_NOTHING = Mentions()
CODE = "code()"
"""The key of a hash of code; no variable can be named so."""

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_OF_MODULES = frozenset(vars(nn.Module()))
_LABEL = re.compile(r"[/\\]|\d{4}-\d\d|\d\d:\d\d|\d{8}|[0-9a-f]{12}")
"""What strings have that say where and when something is written: paths, dates, times and random numbers."""


def settings_of(value: Any, *, known: Iterable[Any] = ()) -> Any:
    """What ``value`` was made with.

    Numbers and words stand for themselves, tensors and arrays for a hash, of large ones that of a sample. Of a function
    there are its name, a hash of its code, and the variables that it reads: of functions around it, globals, defaults.
    Of a module and of an object there are its class and its attributes, but for those that its own methods write to,
    which are state and no settings; of an object of an installed package only what its constructor took. All else is
    known by its class alone, and paths, dates and clocks by being that.

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
    return _Reader().read_network(network)


def settings_of_all(parts: Mapping[str, Any], *, known: Iterable[Any] = ()) -> dict[str, Any]:
    """The settings of several functions of one maker, whose variables are taken together."""
    return _Reader(known).read_all(parts)


def hash_of_tree(tree: Any) -> str:
    """A hash of plain values."""
    return hashlib.sha256(_text(tree).encode("utf-8", "surrogatepass")).hexdigest()[:16]


class _Reader:
    """Reads settings; a variable that several functions share is told of once."""

    def __init__(self, known: Iterable[Any] = ()) -> None:
        self._around = [id(each) for each in known]
        self._given = len(self._around)
        self._cells: set[int] = set()
        self._functions: dict[types.FunctionType, dict[str, Any]] = {}

    def read(self, value: Any, owner: Mentions = _NOTHING) -> Any:
        """
        Args:
            owner: what the code mentions that has the value: of a large object (a configuration) what is used counts.
        """
        if value is None or type(value) in (bool, int):
            return value
        if type(value) is str:
            return "a path or date" if _LABEL.search(value) else value if len(value) <= 1000 else hash_of_tree(value)
        if type(value) is float:
            return _number(value, owner.clocks)
        if id(value) in self._around:
            return "itself"
        self._around.append(id(value))
        try:
            return self._read(value, owner)
        finally:
            self._around.pop()

    def _read(self, value: Any, owner: Mentions) -> Any:
        match value:
            case bytes() | bytearray() | memoryview():
                return hash_of_tree(bytes(value).hex())
            case torch.dtype() | torch.device() | torch.layout() | complex() | range() | slice() | torch.Size():
                return str(value)
            case enum.Enum():
                return f"{name_of(type(value))}.{value.name}"
            case os.PathLike():
                return "a path or date"
            case type():
                return name_of(value)
            case Tensor():
                return _tensor(value)
            case nn.Module():
                return self.read_network(value) | {"values": hash_of([*value.parameters(), *value.buffers()])}
            case functools.partial():
                return self._read_partial(value)
            case types.MethodType():
                return self._read_method(value)
            case types.FunctionType():
                return self._read_function(value)
            case types.BuiltinFunctionType():
                return {"def": name_of(value)}
            case set() | frozenset():
                return _bounded(sorted((self.read(each, owner) for each in value), key=_text))
            case Mapping() if value is not os.environ:
                return self._read_dict(value, owner)
            case list() | tuple() if not dataclasses.is_dataclass(value):
                return _bounded([self.read(each, owner) for each in value])
        if value is os.environ or isinstance(value, types.ModuleType):
            return name_of(type(value))
        if type(value).__name__ in ("Namespace", "SimpleNamespace"):
            return self._read_dict(vars(value), owner)
        if type(value).__module__.partition(".")[0] == "numpy" or hasattr(type(value), "__array_interface__"):
            return self._read_array(value, owner)
        if callable(value) and hasattr(value, "__wrapped__"):
            return self.read(inspect.unwrap(value))
        return self._read_object(value, owner)

    def read_all(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        functions = {part: value for part, value in parts.items() if isinstance(value, types.FunctionType)}
        owner = functools.reduce(Mentions.__or__, map(mentions_of_function, functions.values()), Mentions())
        made: dict[str, Any] = {}
        for part, value in parts.items():
            if part not in functions:
                made[part] = self.read(value)
                continue
            for name, setting in self._variables(value, owner).items():
                made[name if made.get(name, setting) == setting else f"{part}.{name}"] = setting
        return made | _code(functions.values())

    def read_network(self, module: nn.Module) -> dict[str, Any]:
        """The parts of a network by their paths; a part that is in another mode than the whole says so."""
        made = {path or ".": self._read_module(part) for path, part in module.named_modules()}
        for path, part in module.named_modules():
            if part.training is not module.training:
                made[path]["training"] = part.training
        return made

    def _read_module(self, module: nn.Module) -> dict[str, Any]:
        cls = type(module)
        made: dict[str, Any] = {"class": name_of(cls)}
        if not is_installed(cls) and (shown := module.extra_repr()) and " at 0x" not in shown:
            made["extra_repr"] = shown
        hidden = _OF_MODULES | ({name for name in vars(module) if name.startswith("_")} if is_installed(cls) else set())
        made |= self._attributes(module, {n: v for n, v in vars(module).items() if n not in hidden})
        for kind in _HOOKS:
            if hooks := [self.read(hook) for hook in vars(module)[kind].values() if not is_installed(hook)]:
                made[kind] = hooks
        return made

    def _read_array(self, value: Any, owner: Mentions) -> Any:
        if getattr(value, "shape", None) == () and hasattr(value, "item"):
            return self.read(value.item(), owner)
        if hasattr(value, "tobytes"):
            return f"{getattr(value, 'dtype', '')}{list(getattr(value, 'shape', ()))} {hash_of(value)[:16]}"
        return str(value) if type(value).__name__.endswith("DType") else name_of(type(value))

    def _read_dict(self, value: Mapping[Any, Any], owner: Mentions) -> Any:
        used = [key for key in value if key in owner.names] if all(isinstance(key, str) for key in value) else []
        return _bounded({_key(self.read(key)): self.read(value[key], owner) for key in used or value})

    def _read_partial(self, value: Any) -> dict[str, Any]:
        made = self.read(value.func)
        made = dict(made) if isinstance(made, dict) else {"def": made}
        if value.args:
            made["args"] = self.read(list(value.args))
        return made | {name: self.read(each) for name, each in value.keywords.items()}

    def _read_method(self, value: types.MethodType) -> dict[str, Any]:
        owner = value.__self__
        if isinstance(owner, type):
            return {"def": f"{name_of(owner)}.{value.__func__.__name__}"}
        made = self.read(owner)
        return {**(made if isinstance(made, dict) else {"self": made}), "def": name_of(value.__func__)}

    def _read_function(self, function: types.FunctionType) -> dict[str, Any]:
        if is_of_library(function) and hasattr(function, "__wrapped__"):
            return dict(self.read(inspect.unwrap(function)))
        if function not in self._functions:
            made = {"def": name_of(function), **_code([function])}
            if function.__closure__ or len(self._around) <= DEEPEST + self._given:
                made |= self._variables(function, mentions_of_function(function))
            self._functions[function] = made
        return self._functions[function]

    def _variables(self, function: types.FunctionType, owner: Mentions) -> dict[str, Any]:
        """The variables that it reads: of functions around it, defaults, globals; with those of functions beside it."""
        made: dict[str, Any] = {}
        for name, value in self._read_by(function).items():
            if owner.writes_to(name, value):
                continue
            if isinstance(value, types.FunctionType) and scope_of(value) == scope_of(function) != "":
                made |= {
                    n: v
                    for n, v in self._variables(value, owner | mentions_of_function(value)).items()
                    if n not in made
                }
                made |= {name: code} if (code := _code([value])) else {}
            else:
                made[name] = self.read(value, owner)
        return made

    def _read_by(self, function: types.FunctionType) -> dict[str, Any]:
        code, defaults = function.__code__, function.__defaults__ or ()
        names = code.co_varnames[: code.co_argcount]
        found = dict(zip(names[len(names) - len(defaults) :], defaults, strict=True)) | (function.__kwdefaults__ or {})
        if not is_installed(function):
            found |= {name: value for name, value in vars(function).items() if name != "__wrapped__"}
            scope, read = function.__globals__, sorted(mentions_of(code).globals)
            found |= {n: scope[n] for n in read if n in scope and _is_of_program(scope[n])}
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if name != "__class__" and id(cell) not in self._cells:
                self._cells.add(id(cell))
                with suppress(ValueError):  # not bound yet
                    found[name] = cell.cell_contents
        return found

    def _read_object(self, value: Any, owner: Mentions) -> Any:
        cls: type = type(value)
        found = {name.removeprefix("."): each for name, each in attributes("", value)}
        if is_installed(cls):
            found = {name: each for name, each in found.items() if name.lstrip("_") in _arguments(cls)}
            found = {name: each for name, each in found.items() if is_of_library(cls) or _is_data(each)}
        else:
            hidden = {name for base in cls.__mro__ if is_of_library(base) for name in vars(base)}
            if attrs.has(cls):
                hidden |= {field.name for field in attrs.fields(cls) if not field.init}
            found = {name: each for name, each in found.items() if name not in hidden}
        methods = [f for name, f in sorted(methods_of(cls).items()) if name != "__init__"]
        if not found and not methods:
            return name_of(cls)
        used = {} if is_installed(cls) else {name: each for name, each in found.items() if name in owner.names}
        return {"class": name_of(cls), **self._attributes(value, used or found)}

    def _attributes(self, thing: Any, found: dict[str, Any]) -> dict[str, Any]:
        """Those of its attributes that its methods do not write to, what these read, and a hash of their code."""
        cls: type = type(thing)
        own = mentions_of_class(cls)
        methods = sorted(methods_of(cls).items())
        made: dict[str, Any] = {}
        for name, function in methods:
            if name != "__init__" and not is_installed(function):
                made |= self._variables(function, own)
        found = {n: v for n, v in _of_class(cls, own).items() if n not in getattr(thing, "__dict__", {})} | found
        made |= {name: self.read(value, own) for name, value in found.items() if not own.writes_to(name, value)}
        return made | _code(function for _, function in methods)


def kind_of(tensor: Tensor) -> str:
    """Dtype and shape of a tensor, such as ``float32[4, 3]``."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _tensor(tensor: Tensor) -> str:
    plain = type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and not tensor.is_meta
    return f"{kind_of(tensor)} {hash_of(tensor)[:16]}" if plain else kind_of(tensor)


def _number(value: float, clocks: bool) -> Any:
    """A number, but for one that is a time: seconds since 1970, or many digits where there are clocks."""
    if (1e9 < value < 4e9 and value % 1) or (clocks and len(repr(value)) > 12):
        return "a time"
    return value if math.isfinite(value) else repr(value)


def _code(functions: Iterable[types.FunctionType]) -> dict[str, Any]:
    own = [function for function in functions if not is_of_library(function)]
    return {CODE: hash_of_code(own)} if own else {}


def _is_of_program(value: Any) -> bool:
    """Whether a global variable may be a setting, and is no module, class, or part of an installed package."""
    if isinstance(value, (types.ModuleType, types.BuiltinFunctionType, type)):
        return False
    if isinstance(value, types.FunctionType):
        return not is_installed(value)
    return isinstance(value, (Tensor, nn.Module)) or _is_data(value) or not is_installed(type(value))


def _is_data(value: Any) -> bool:
    """Whether a value is made of numbers, words and arrays alone."""
    if isinstance(value, Mapping) and value is not os.environ:
        return all(map(_is_data, value.values()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_data, value))
    named = type(value).__name__ in ("Namespace", "SimpleNamespace", "ndarray", "partial")
    return named or value is None or isinstance(value, (bool, int, float, str, bytes, enum.Enum, Tensor))


def _of_class(cls: type, own: Mentions) -> dict[str, Any]:
    """The values that a class and its bases have, and that its methods mention."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if not is_installed(base):
            found |= {name: value for name, value in vars(base).items() if name in own.names and _is_data(value)}
    return {name: value for name, value in found.items() if not name.startswith("__")}


def _arguments(cls: type) -> set[str]:
    try:
        return set(inspect.signature(cls).parameters)
    except (TypeError, ValueError):
        return set()


def _bounded(made: Any) -> Any:
    """What was made, or a hash of it where it is long."""
    return made if len(made) <= 200 else f"{len(made)} values {hash_of_tree(made)}"


def _key(made: Any) -> str:
    return made if isinstance(made, str) else _text(made)


def _text(made: Any) -> str:
    return json.dumps(made, sort_keys=True, default=str)
