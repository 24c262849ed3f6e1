"""Hooks of which it can be seen in their code that they return the context that they are given."""

from __future__ import annotations

import dis
import inspect
from functools import lru_cache
from types import CodeType, FunctionType, MethodType
from typing import Any

from .mentions import mentions_of


def only_looks_on(hook: Any) -> bool:
    """Whether it can be seen in the code of a hook that it returns the context that it is given, whatever it does.

    >>> only_looks_on(print), only_looks_on(lambda ctx: ctx)
    (False, True)
    """
    if isinstance(hook, MethodType):
        return isinstance(hook.__func__, FunctionType) and _gives_back(hook.__func__.__code__, 1)
    if not isinstance(hook, FunctionType):
        return False
    if (made_with := vars(hook).get("made_with")) is not None:  # by `when`, `every` or `compose`
        return all(map(only_looks_on, made_with.get("hooks", [made_with.get("hook")])))
    return _gives_back(hook.__code__, 0)


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
    return not any(name in mentions_of(each).written for each in code.co_consts if isinstance(each, CodeType))


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else ()
