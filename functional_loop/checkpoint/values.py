"""Values of settings: which are told, and how, the same in every process."""

from __future__ import annotations

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
from itertools import islice
from typing import Any

from torch import Tensor, nn

from ..core.hashes import hash_of
from ..core.mentions import is_installed, is_of_library

INNERMOST, LONGEST = 30, 200
"""So deep within each other are values looked at; of more of them than this a hash is told."""

PLAIN = (type(None), bool, int, float, str)
NAMESPACES = ("Namespace", "SimpleNamespace")
_METHODS = (types.FunctionType, classmethod, staticmethod)
_DATA = (*PLAIN, complex, bytes, enum.Enum, Tensor, nn.Module, functools.partial, types.FunctionType)
_LABEL = re.compile(r"[/\\]|\d{4}-\d\d|\d\d:\d\d|\d{8}|[0-9a-f]{12}")
"""What strings have that say where and when something is written: paths, dates, times and random numbers."""


def kind_of(tensor: Tensor) -> str:
    """Dtype and shape of a tensor, such as ``float32[4, 3]``."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def told_tensor(tensor: Tensor) -> str:
    plain = type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and not tensor.is_meta
    return f"{kind_of(tensor)} {hash_of(tensor)[:16]}" if plain else kind_of(tensor)


def told_plain(value: Any, clocks: bool) -> Any:
    """A word or a number, but for one that is a time: seconds since 1970, or many digits where there are clocks."""
    if isinstance(value, str):
        if len(value) > 1000:
            return f"{len(value)} characters {hash_of(some_of(value))[:16]}"
        return "a path or date" if _LABEL.search(value) else str.__str__(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return "a time" if clocks and value > 1e9 else int(value)
    if (1e9 < value < 4e9 and value % 1) or (clocks and len(repr(float(value))) > 12):
        return "a time"
    return float(value) if math.isfinite(value) else repr(float(value))


def some_of(value: Any) -> Any:
    """Of long text or bytes characters at equal distances."""
    return value[:: -(-len(value) // (1 << 20)) or 1]


def is_of_program(value: Any) -> bool:
    """Whether a global variable may be a setting: no module, and no object that is not made of data, of a package."""
    if isinstance(value, types.ModuleType):
        return not is_installed(value)
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
        return True
    return is_data(value) or not is_installed(type(value))


def is_data(value: Any, depth: int = 0) -> bool:
    """Whether a value is made of numbers, words, arrays and functions alone."""
    if depth > INNERMOST or value is os.environ:
        return depth > INNERMOST
    if isinstance(value, Mapping):
        return all(is_data(each, depth + 1) for each in islice(value.values(), LONGEST))
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(is_data(each, depth + 1) for each in islice(value, LONGEST))
    return isinstance(value, _DATA) or type(value).__name__ in (*NAMESPACES, "ndarray")


def derived(cls: type) -> Iterable[str]:
    """The attributes of objects that are no arguments: of bases in libraries, fields of no argument, cached values."""
    for base in cls.__mro__:
        for name, member in vars(base).items():
            cached = hasattr(type(member), "__get__") and not isinstance(member, _METHODS)
            if is_of_library(base) or (cached and not hasattr(type(member), "__set__")):
                yield name
    fields = [*getattr(cls, "__dataclass_fields__", {}).values(), *getattr(cls, "__attrs_attrs__", ())]
    yield from (field.name for field in fields if not field.init)


def arguments(cls: type) -> set[str]:
    try:
        return set(inspect.signature(cls).parameters)
    except (TypeError, ValueError):
        return set()


def bounded(made: Any, length: int) -> Any:
    """What was made, or a hash of it where it is long."""
    return made if length <= LONGEST else f"{length} values {hash_of_tree(made)}"


def as_dict(made: Any, name: str) -> dict[str, Any]:
    return made if isinstance(made, dict) else {name: made}


def key_of(made: Any) -> str:
    return made if isinstance(made, str) else text_of(made)


def text_of(made: Any) -> str:
    return json.dumps(made, sort_keys=True, default=str)


def hash_of_tree(tree: Any) -> str:
    """A hash of plain values."""
    return hashlib.sha256(text_of(tree).encode("utf-8", "surrogatepass")).hexdigest()[:16]
