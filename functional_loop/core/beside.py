"""What is made of a Loop once in a process, and kept with it: modules, hooks with their seeds, steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from ..engine.loop import Loop

T = TypeVar("T")


def beside(loop: Loop, what: str, make: Callable[[], T]) -> T:
    """What ``make()`` returned for ``what`` when it was asked for first.

    >>> from functional_loop.examples.digits import loop
    >>> shared = loop()
    >>> beside(shared, "numbers", list) is beside(shared, "numbers", list)
    True
    """
    kept = loop.kept
    if what not in kept:
        kept[what] = make()
    made: T = kept[what]
    return made


def found_beside(loop: Loop, what: str) -> Any:
    """What was made for ``what``, or ``None``."""
    return loop.kept.get(what)


def share(loop: Loop, other: Loop, *names: str) -> None:
    """Let ``loop`` have what is kept beside ``other`` under these names."""
    loop.kept.update({name: made for name, made in other.kept.items() if name in names})
