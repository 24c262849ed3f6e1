"""What functions and objects reach besides their arguments (attributes, closures, globals), and what of it changes."""

from __future__ import annotations

import array
import contextvars
import functools
import itertools
import random
import struct
import sys
import types
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..compat import is_fake
from ..core.bits import bits
from ..core.record import tensor_bytes

DEEPEST, MOST = 8, 20_000
"""So far from a root, and so many things, are looked at."""

HASHED = 1 << 24
"""Of tensors up to so many bytes the values are looked at, of others whether they were written to."""

EVERYTHING = 1 << 62
"""To look at the values of all tensors."""

_LIBRARIES = frozenset({"torch", "numpy", "functional_loop", *sys.stdlib_module_names} - {"__main__"})
_HOOKS = {
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
}
_REGISTERED = ("_parameters", "_buffers", "_modules", *_HOOKS)
_OPAQUE = (types.ModuleType, types.BuiltinFunctionType, torch.dtype, torch.device, torch.layout, str, bytes, int, float)

_NAMESPACES = frozenset({"types", "argparse", "collections", "_thread"})
"""Modules of the standard library with classes whose objects hold what they are given in attributes."""

_CACHE: type = type(functools.lru_cache(len))

Children = Iterator[tuple[str, Any]]


def reachable(roots: Mapping[str, Any], own: Collection[int] = ()) -> Children:
    """All that can be reached from ``roots``, with its path in the notation of Python, the nearest first.

    Args:
        own: identities of modules whose parameters and buffers are left out, since they are those of a context.

    >>> def counting(seen):
    ...     return lambda y_hat, y: seen.append(len(y))
    >>> dict(reachable({"loss": counting([])}))["loss > seen"]
    []
    """
    todo = deque((path, value, 0) for path, value in roots.items())
    # Kept, so that nothing new gets the identity of what is gone.
    known: dict[int, Any] = {}
    while todo and len(known) < MOST:
        path, value, depth = todo.popleft()
        if id(value) in known and not isinstance(value, (int, float, str, bytes, type(None))):
            continue
        known[id(value)] = value
        yield path, value
        if depth < DEEPEST and not isinstance(value, (Tensor, *_OPAQUE)):
            todo.extend((name, child, depth + 1) for name, child in _children(path, value, own))


def _children(path: str, value: Any, own: Collection[int]) -> Children:
    match value:
        case nn.Module():
            yield from _of_module(path, value, own)
        case types.FunctionType():
            yield from _of_function(path, value)
        case types.MethodType():
            yield path, value.__self__
            yield path, value.__func__
        case functools.partial():
            yield path, value.func
            yield from ((f"{path} > argument {i}", each) for i, each in enumerate(value.args))
            yield from ((f"{path} > {name}", each) for name, each in value.keywords.items())
        case dict():
            yield from ((f"{path}[{key!r}]", each) for key, each in list(value.items()))
        case list() | tuple() | deque():
            yield from ((f"{path}[{i}]", each) for i, each in enumerate(list(value)))
        case set() | frozenset():
            yield from ((f"{path}{{{i}}}", each) for i, each in enumerate(list(value)))
        case types.GeneratorType():
            frame = value.gi_frame
            yield from ((f"{path} > {name}", each) for name, each in ({} if frame is None else frame.f_locals).items())
        case type():
            yield from _of_class(path, value)
        case weakref.ref():
            yield f"{path}()", value()
        case contextvars.ContextVar():
            yield f"{path}.get()", value.get(None)
        case _ if is_cache(value):
            yield f"{path}.__wrapped__", value.__wrapped__
        case _ if has_attributes(value):
            yield from attributes(path, value)
            yield from _of_class(path, type(value))


def has_attributes(value: Any) -> bool:
    """Whether the attributes of an object are its user's: those of library classes are not, but for bare namespaces."""
    module = type(value).__module__
    return isinstance(value, nn.Module) or module in _NAMESPACES or not is_library(module)


def is_cache(value: Any) -> bool:
    """Whether a function is one of `functools.lru_cache`, of code that is no library's."""
    return isinstance(value, _CACHE) and not is_library(value.__module__)


def _of_module(path: str, module: nn.Module, own: Collection[int]) -> Children:
    is_stock = is_library(type(module).__module__)
    for name, value in attributes(path, module, leave_out=_REGISTERED):
        if not (is_stock and name.removeprefix(f"{path}.").startswith("_")):
            yield name, value
    for kind, what in _HOOKS.items():
        for hook in vars(module).get(kind, {}).values():
            yield f"the {what} of {path}", hook
    if id(module) not in own:
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            yield f"{path}.{name}", tensor
    yield from ((f"{path}.{name}", child) for name, child in module._modules.items())
    yield from _of_class(path, type(module))


def _of_class(path: str, cls: type) -> Children:
    """What the methods of a class reach, and the values that it has itself."""
    for base in cls.__mro__:
        if is_library(base.__module__):
            continue
        for name, value in list(vars(base).items()):
            if isinstance(value, (classmethod, staticmethod)):
                value = value.__func__
            if isinstance(value, types.FunctionType):
                yield from _of_function(f"{path}.{name}", value)
            elif not name.startswith("__") and not isinstance(value, (property, types.MemberDescriptorType)):
                yield f"{base.__qualname__}.{name}", value


def _of_function(path: str, function: types.FunctionType) -> Children:
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        if name != "__class__" and (found := _content(cell)) is not _EMPTY:
            yield f"{path} > {name}", found
    yield from ((f"{path}.{name}", value) for name, value in vars(function).items())
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    yield from ((f"{path} > default {i}", value) for i, value in enumerate(defaults))
    if not is_library(function.__module__ or ""):
        for name in names_of(function):
            if name in function.__globals__:
                yield f"global {name}", function.__globals__[name]


_EMPTY = object()


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _EMPTY


def names_of(function: types.FunctionType) -> Iterator[str]:
    """The names of globals that a function may look up, and of attributes, which can't be told apart."""
    return _names(function.__code__)


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def attributes(path: str, value: Any, leave_out: Collection[str] = ()) -> Children:
    """The attributes of an object, those in slots too, by their paths."""
    slots = (name for cls in type(value).__mro__ for name in _as_names(vars(cls).get("__slots__", ())))
    own = getattr(value, "__dict__", {})
    for name in itertools.chain(list(own) if isinstance(own, dict) else (), slots):
        if name not in leave_out and name not in ("__dict__", "__weakref__"):
            found = own[name] if name in own else getattr(value, name, _EMPTY)
            if found is not _EMPTY:
                yield f"{path}.{name}", found


def _as_names(slots: str | Iterable[str]) -> Iterable[str]:
    return (slots,) if isinstance(slots, str) else slots


def is_library(module: str) -> bool:
    """Whether a module is one of torch, numpy, Python or this package."""
    return module.partition(".")[0] in _LIBRARIES


def state_of(roots: Mapping[str, Any], own: Collection[int] = (), most: int = HASHED) -> dict[str, Any]:
    """What is to be the same where nothing has changed, by path; of tensors up to ``most`` bytes, their values."""
    return {path: token(value, most) for path, value in reachable(roots, own)}


def token(value: Any, most: int = HASHED) -> Any:
    """Something that is equal for equal values, and small."""
    numpy = sys.modules.get("numpy")
    match value:
        case None | bool() | int() | str() | bytes():
            return type(value), value
        case float():
            return float, struct.pack("<d", value)
        case complex():
            return complex, struct.pack("<dd", value.real, value.imag)
        case Tensor():
            return _of_tensor(value, most)
        case torch.Generator():
            return bytes(value.get_state().numpy())
        case random.Random():
            return random.Random, hash(value.getstate())
        case dict() | list() | tuple() | set() | frozenset() | deque():
            return type(value), len(value)
        case bytearray() | memoryview() | array.array():
            return type(value), zlib.crc32(value)
        case _ if is_cache(value):
            return value.cache_info()[1:]
        case itertools.count():
            return repr(value)
        case types.GeneratorType():
            return None if value.gi_frame is None else value.gi_frame.f_lasti
        case types.FunctionType():
            return value.__code__
        case _ if numpy is not None and isinstance(value, numpy.ndarray):
            known = value.nbytes <= most and not value.dtype.hasobject
            return str(value.dtype), value.shape, zlib.crc32(value.tobytes()) if known else value.ctypes.data
        case _ if numpy is not None and isinstance(value, numpy.random.Generator):
            return repr(value.bit_generator.state)
        case _ if numpy is not None and isinstance(value, numpy.random.RandomState):
            return repr(value.get_state())
        case Iterator():
            hint: Callable[[], object] = getattr(value, "__length_hint__", _Unknown)
            return type(value), hint()
    return type(value)


class _Unknown:
    """Equal to no other: what can't be looked at may have changed."""


def _of_tensor(tensor: Tensor, most: int) -> Any:
    form = str(tensor.dtype), tuple(tensor.shape), str(tensor.device)
    if is_fake(tensor) or tensor.is_meta:
        return form
    if tensor.is_sparse:
        tensor = tensor.coalesce()
        return form, _of_tensor(tensor.indices(), most), _of_tensor(tensor.values(), most)
    if tensor.layout is not torch.strided or type(tensor) not in (Tensor, nn.Parameter):
        return form, tensor._version
    if tensor.numel() * tensor.element_size() > most:
        return form, tensor.data_ptr(), tensor._version
    return form, zlib.crc32(tensor_bytes(tensor)) if tensor.is_cpu else _sum_of_bits(tensor)


def _sum_of_bits(tensor: Tensor) -> int:
    """A checksum that is made on the device."""
    flat = bits(tensor)
    whole = len(flat) // 4 * 4
    parts = flat[:whole].view(torch.int32), flat[whole:]
    return sum(int(part.sum(dtype=torch.int64)) for part in parts)


def is_number(value: Any) -> bool:
    """Whether a value is one that is computed with: a number, or an array of them."""
    numpy = sys.modules.get("numpy")
    return isinstance(value, (int, float, complex)) or (numpy is not None and isinstance(value, numpy.ndarray))


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The paths at which two states differ, but for those in something that differs itself."""
    found: list[str] = []
    for path in sorted({**before, **after}, key=len):
        if before.get(path, _EMPTY) != after.get(path, _EMPTY) and not any(
            path.startswith((f"{one}[", f"{one}.")) for one in found
        ):
            found.append(path)
    return found


def is_without_values(tree: Any) -> bool:
    """Whether a tree has tensors of a dry run, which have a form and no memory."""
    return any(is_fake(value) for _, value in reachable({"tree": tree}))
