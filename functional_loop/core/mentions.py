"""What the code of functions and classes reads, calls and writes to, and whose code it is."""

from __future__ import annotations

import dis
import hashlib
import sys
import sysconfig
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from functools import cache, cached_property, lru_cache
from types import CodeType, FunctionType, ModuleType
from typing import Any

import attrs

from ..purity.reachable import is_library

DEEPEST = 4
"""So many functions that call one another are looked at."""

_CHANGES = frozenset({"add", "append", "appendleft", "clear", "discard", "extend", "insert", "pop", "popleft"})
_CHANGES |= {"remove", "setdefault", "update"}
_CLOCKS = frozenset({"time", "perf_counter", "monotonic", "process_time", "now", "today", "utcnow", "default_timer"})
_BY_NAME = frozenset({"setattr", "delattr", "__setattr__", "__delattr__", "__dict__", "vars"})
_CACHED: type = type(cache(len))
_SUBSCRIPTS = ("STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE")


@attrs.frozen
class Mentions:
    """What code mentions.

    Args:
        names: all names, and strings.
        globals: the global variables that it reads.
        written: the variables that are not its own, attributes and tensors that it binds or writes to.
        changed: what it calls methods of that change a list, dict or set.
        clocks: whether it mentions a clock.
    """

    names: frozenset[str] = frozenset()
    globals: frozenset[str] = frozenset()
    written: frozenset[str] = frozenset()
    changed: frozenset[str] = frozenset()
    clocks: bool = False

    def __or__(self, other: Mentions) -> Mentions:
        pairs = zip(attrs.astuple(self), attrs.astuple(other), strict=True)
        return Mentions(*(one | another for one, another in pairs))

    @property
    def writes_in_place(self) -> bool:
        """Whether it calls a function of a name as those have that write to tensors."""
        return any(map(_is_in_place, self.names))

    def writes_to(self, name: str, value: Any) -> bool:
        """Whether the code writes to a variable or an attribute, so that it is state and no setting."""
        return name in self.written or (name in self.changed and isinstance(value, (list, dict, set, deque)))


@lru_cache(maxsize=4096)
def mentions_of(code: CodeType) -> Mentions:
    """What a piece of code mentions, and the functions in it.

    >>> def count(ctx): seen.append(ctx.epoch)
    >>> mentions = mentions_of(count.__code__)
    >>> sorted(mentions.names), sorted(mentions.changed)
    (['append', 'epoch', 'seen'], ['seen'])
    """
    words = {constant for constant in code.co_consts if isinstance(constant, str)}
    read, written, changed = set[str](), set[str](), set[str]()
    instructions = [each for each in dis.get_instructions(code) if each.opname != "NOP"]
    for i, instruction in enumerate(instructions):
        kind, name = instruction.opname, instruction.argval
        before = instructions[i - 1].argval if i else None
        if kind in ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL") or (
            kind in ("STORE_DEREF", "DELETE_DEREF") and name in code.co_freevars
        ):
            written.add(name)
        elif kind in _SUBSCRIPTS:
            stored = _container(instructions[:i], depth=-1 if kind == "STORE_SLICE" else 0)
            written, changed = written | stored, changed | stored
        elif kind.startswith("LOAD_") and isinstance(name, str) and isinstance(before, str):
            if name in _CHANGES:
                changed.add(before)
            elif _is_in_place(name):
                written.add(before)
        if kind == "LOAD_GLOBAL":
            read.add(name)
    if not _BY_NAME.isdisjoint(code.co_names):
        written |= words
    clocks = not _CLOCKS.isdisjoint(code.co_names)
    names = frozenset(words.union(code.co_names))
    made = Mentions(names, frozenset(read), frozenset(written), frozenset(changed), clocks)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            made |= mentions_of(constant)
    return made


def _container(before: list[dis.Instruction], depth: int) -> set[str]:
    """The name of what is written to by subscript: it is on the stack below the subscript."""
    kinds = [instruction.opname for instruction in before]
    if kinds[-1] == "SWAP":  # `x[i] += 1`, which copies both
        before = before[: max(i for i in range(len(kinds)) if kinds[i : i + 2] == ["COPY", "COPY"])]
    for instruction in reversed(before):
        if depth == 1 and instruction.opname.startswith("LOAD_") and isinstance(instruction.argval, str):
            return {instruction.argval}
        depth += dis.stack_effect(instruction.opcode, instruction.arg, jump=False)
    return set()


def _is_in_place(method: str) -> bool:
    return method.endswith("_") and not method.endswith("__") and method not in ("requires_grad_", "_")


def mentions_of_function(function: FunctionType, known: tuple[FunctionType, ...] = ()) -> Mentions:
    """What a function, the functions around and beside it and those of the program that it calls mention."""
    made = mentions_of(function.__code__)
    for other in (*variables_of(function).values(), *(function.__globals__.get(name) for name in made.globals)):
        if isinstance(other, FunctionType) and other not in known and len(known) < DEEPEST:
            made |= Mentions() if is_installed(other) else mentions_of_function(other, (*known, function))
    return made


def variables_of(function: FunctionType) -> dict[str, Any]:
    """The variables of the functions around it."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # not bound yet
            found[name] = cell.cell_contents
    return {name: value for name, value in found.items() if name != "__class__"}


def methods_of(cls: type) -> dict[str, FunctionType]:
    """The functions of a class and of its bases, those of libraries left out."""
    found: dict[str, FunctionType] = {}
    for name, function in _functions_of(cls):
        found.setdefault(name, function)
    return found


def _functions_of(cls: type) -> Iterator[tuple[str, FunctionType]]:
    """The functions of a class and of its bases, overridden ones too."""
    for base in cls.__mro__:
        members: dict[str, Any] = {} if is_of_library(base) else dict(vars(base))
        for name, member in members.items():
            match member:
                case property():
                    parts = [member.fget, member.fset]
                case classmethod() | staticmethod():
                    parts = [member.__func__]
                case cached_property():
                    parts = [member.func]
                case _:
                    parts = [getattr(member, "__wrapped__", None) if type(member) is _CACHED else member]
            yield from ((name, part) for part in parts if type(part) is FunctionType)


@lru_cache(maxsize=1024)
def mentions_of_class(cls: type, called: frozenset[str] = frozenset()) -> Mentions:
    """What the methods mention; what those write to that do not run does not count.

    Args:
        called: the names of methods that are called from elsewhere.
    """
    runs, made = running_methods(cls, called), Mentions()
    for name, function in _functions_of(cls):
        mentions = mentions_of(function.__code__)
        made |= mentions if name in runs else attrs.evolve(mentions, written=frozenset(), changed=frozenset())
    return made


def running_methods(cls: type, called: Collection[str] = ()) -> set[str]:
    """The methods that Python, torch or a loop calls, those in ``called``, and those that these call; not the ones that
    make, show or compare an object."""
    functions = [(name, function) for name, function in _functions_of(cls) if name not in _NOT_RUN]
    found = {name for name, _ in functions if name in called or name.startswith(("__", "on_")) or name in _RUN}
    while True:
        mentioned = {word for name, f in functions if name in found for word in mentions_of(f.__code__).names}
        if not (more := {name for name, _ in functions if name in mentioned} - found):
            return found
        found |= more


_RUN = ("forward", "state_dict", "load_state_dict")
_NOT_RUN = frozenset({*vars(object), "__new__", "__post_init__", "__attrs_init__", "__replace__"})


def _module_of(thing: Any) -> str:
    """Where a class or function was defined; `functools.wraps` gives a function the name of another module."""
    if isinstance(thing, ModuleType):
        return thing.__name__
    return str(thing.__globals__.get("__name__") if isinstance(thing, FunctionType) else thing.__module__)


def is_of_library(thing: Any) -> bool:
    """Whether a function, class or module is of a package whose version a state dict tells, or of Python."""
    return is_library(_module_of(thing))


def is_installed(thing: Any) -> bool:
    """Whether a function, class or module is of a package that was installed, and not of the program itself."""
    module = _module_of(thing)
    return is_library(module) or _is_installed(module.partition(".")[0])


@cache
def _is_installed(package: str) -> bool:
    file = getattr(sys.modules.get(package), "__file__", None)
    return file is not None and file.startswith((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))


def name_of(thing: Any) -> str:
    """The dotted name of a function or class of a library; of another one the name in its module, because files of
    scripts are renamed, and have another name where they are run.

    >>> import torch
    >>> name_of(torch.nn.functional.mse_loss)
    'torch.nn.functional.mse_loss'
    """
    name = getattr(thing, "__qualname__", None) or getattr(thing, "__name__", None) or type(thing).__qualname__
    module = getattr(thing, "__module__", None) or "builtins"
    return f"{module}.{name}" if is_library(module) and module != "builtins" else str(name)


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
