"""What the code of functions and classes mentions and writes to."""

from __future__ import annotations

import dis
import hashlib
import inspect
import sys
import sysconfig
from collections.abc import Iterable
from contextlib import suppress
from functools import cache, lru_cache
from types import CodeType, FunctionType, MethodType
from typing import Any

import attrs

from .reachable import is_library

_CHANGES = frozenset({"add", "append", "appendleft", "clear", "discard", "extend", "insert", "pop", "popleft"})
_CHANGES |= {"remove", "setdefault", "update"}
_CLOCKS = frozenset({"time", "perf_counter", "monotonic", "process_time", "now", "today", "utcnow", "default_timer"})

DEEPEST = 4
"""So many functions that call one another are looked at."""


@attrs.frozen
class Mentions:
    """What code mentions: names and strings; which global variables it reads; what it binds or writes to: attributes
    and variables that are not its own; which containers it may change; whether it mentions a clock."""

    names: frozenset[str] = frozenset()
    globals: frozenset[str] = frozenset()
    rebound: frozenset[str] = frozenset()
    changed: frozenset[str] = frozenset()
    clocks: bool = False

    def __or__(self, other: Mentions) -> Mentions:
        return Mentions(
            self.names | other.names,
            self.globals | other.globals,
            self.rebound | other.rebound,
            self.changed | other.changed,
            self.clocks or other.clocks,
        )

    @property
    def writes_in_place(self) -> bool:
        """Whether it calls a function of a name as those have that write to tensors."""
        return any(map(_is_in_place, self.names))

    def writes_to(self, name: str, value: Any) -> bool:
        """Whether the code writes to a variable or an attribute, so that it is state and no setting."""
        return name in self.rebound or (name in self.changed and isinstance(value, (list, dict, set)))


def _module_of(thing: Any) -> str:
    """Where a class or function was defined; `functools.wraps` gives a function the name of another module."""
    return str(thing.__globals__.get("__name__") if isinstance(thing, FunctionType) else thing.__module__)


def is_of_library(thing: Any) -> bool:
    """Whether a function or class is of a package whose version a state dict tells, or of Python."""
    return is_library(_module_of(thing))


def is_installed(thing: Any) -> bool:
    """Whether a function or class is of a package that was installed, and not of the program itself."""
    module = _module_of(thing)
    return is_library(module) or _is_installed(module.partition(".")[0])


def name_of(thing: Any) -> str:
    """The dotted name of a function or class of a library; of another one the name in its module, because files of
    scripts are renamed, and have another name where they are run.

    >>> import torch
    >>> name_of(torch.nn.functional.mse_loss)
    'torch.nn.functional.mse_loss'
    """
    name = str(getattr(thing, "__qualname__", type(thing).__qualname__))
    return f"{thing.__module__}.{name}" if is_of_library(thing) and thing.__module__ != "builtins" else name


@cache
def _is_installed(package: str) -> bool:
    file = getattr(sys.modules.get(package), "__file__", None)
    return file is not None and file.startswith((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))


@lru_cache(maxsize=4096)
def mentions_of(code: CodeType) -> Mentions:
    """What a piece of code mentions, and the functions in it.

    >>> def count(ctx): seen.append(ctx.epoch)
    >>> mentions = mentions_of(count.__code__)
    >>> sorted(mentions.names), sorted(mentions.changed)
    (['append', 'epoch', 'seen'], ['seen'])
    """
    names, read, rebound, changed, loaded = set(code.co_names), set[str](), set[str](), set[str](), set[str]()
    before: Any = None
    for instruction in dis.get_instructions(code):
        kind, name = instruction.opname, instruction.argval
        if kind in ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL") or (
            kind in ("STORE_DEREF", "DELETE_DEREF") and name in code.co_freevars
        ):
            rebound.add(name)
        elif kind in ("STORE_SUBSCR", "DELETE_SUBSCR"):
            # Which container it is, is not told by the instruction.
            changed |= loaded
        elif kind.startswith("LOAD_") and isinstance(name, str):
            if isinstance(before, str) and name in _CHANGES:
                changed.add(before)
            elif isinstance(before, str) and _is_in_place(name):
                rebound.add(before)
            loaded.add(name)
            if kind == "LOAD_GLOBAL":
                read.add(name)
        before = name
    names |= {constant for constant in code.co_consts if isinstance(constant, str)}
    clocks = not _CLOCKS.isdisjoint(code.co_names)
    made = Mentions(frozenset(names), frozenset(read), frozenset(rebound), frozenset(changed), clocks)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            made |= mentions_of(constant)
    return made


def mentions_of_function(function: FunctionType, known: tuple[FunctionType, ...] = ()) -> Mentions:
    """What a function, the functions beside it and those of the program that it calls mention."""
    made = mentions_of(function.__code__)
    beside = [function.__globals__.get(name) for name in made.globals]
    for cell in function.__closure__ or ():
        with suppress(ValueError):
            beside.append(cell.cell_contents)
    for other in beside:
        if isinstance(other, FunctionType) and other not in known and len(known) < DEEPEST:
            made |= Mentions() if is_installed(other) else mentions_of_function(other, (*known, function))
    return made


@lru_cache(maxsize=4096)
def _gives_back(code: CodeType, position: int) -> bool:
    """Whether whatever code returns is its argument at a position."""
    if code.co_argcount <= position or code.co_flags & inspect.CO_GENERATOR or mentions_of(code).writes_in_place:
        return False
    name, before = code.co_varnames[position], ("", None)
    for instruction in dis.get_instructions(code):
        kind, of = instruction.opname, instruction.argval
        if kind.startswith(("STORE_FAST", "STORE_DEREF", "DELETE_FAST")) and name in (of, *_tuple(of)):
            return False
        if kind.startswith("RETURN"):
            loads = before[0].startswith(("LOAD_FAST", "LOAD_DEREF")) and name == (before[1], *_tuple(before[1]))[-1]
            if kind != "RETURN_VALUE" or instruction.is_jump_target or not loads:
                return False
        before = kind, of
    return not any(name in mentions_of(each).rebound for each in code.co_consts if isinstance(each, CodeType))


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else ()


def only_looks_on(hook: Any) -> bool:
    """Whether it can be seen in the code of a hook that it returns the context that it is given, whatever it does.

    >>> only_looks_on(print), only_looks_on(lambda ctx: ctx)
    (False, True)
    """
    if isinstance(hook, MethodType):
        return isinstance(hook.__func__, FunctionType) and _gives_back(hook.__func__.__code__, 1)
    if not isinstance(hook, FunctionType):
        return False
    if "of_hooks" in vars(hook):  # made by `when`, `every` or `compose`
        return all(map(only_looks_on, vars(hook)["of_hooks"]))
    return _gives_back(hook.__code__, 0)


def scope_of(function: FunctionType) -> str:
    """The function that a function was made in."""
    return name_of(function).rpartition(".<locals>.")[0]


def _is_in_place(method: str) -> bool:
    return method.endswith("_") and not method.endswith("__") and method not in ("requires_grad_", "_")


def methods_of(cls: type) -> dict[str, FunctionType]:
    """The functions of a class and of its bases, those of libraries left out."""
    found: dict[str, FunctionType] = {}
    for base in cls.__mro__:
        for name, member in vars(base).items() if not is_of_library(base) else ():
            function = getattr(member, "fget", None) or getattr(member, "__func__", member)
            if isinstance(function, FunctionType):
                found.setdefault(name, function)
    return found


@lru_cache(maxsize=1024)
def mentions_of_class(cls: type) -> Mentions:
    """What the methods mention; what ``__init__`` binds is not bound anew."""
    made = Mentions()
    for name, function in methods_of(cls).items():
        mentions = mentions_of(function.__code__)
        if name == "__init__":
            mentions = attrs.evolve(mentions, rebound=frozenset(), changed=frozenset())
        made |= mentions
    return made


def hash_of_code(functions: Iterable[FunctionType]) -> dict[str, str]:
    """A hash of what functions do, the same in every process of one version of Python, by that version."""
    digest = hashlib.sha256()
    for function in functions:
        digest.update(repr(_canonical(function.__code__)).encode("utf-8", "surrogatepass"))
    return {f"python{sys.version_info[0]}.{sys.version_info[1]}": digest.hexdigest()[:16]}


def _canonical(constant: Any) -> Any:
    """Code without the lines and files that it stands in, and sets in a fixed order."""
    if isinstance(constant, CodeType):
        constants = [_canonical(each) for each in constant.co_consts]
        return (constant.co_code, constants, constant.co_names, constant.co_freevars, constant.co_varnames)
    if isinstance(constant, frozenset):
        return sorted(repr(_canonical(each)) for each in constant)
    return [_canonical(each) for each in constant] if isinstance(constant, tuple) else constant
