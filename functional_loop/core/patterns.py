"""Patterns of parameter names: shell globs, predicates, or several of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from .record import did_you_mean

Pattern: TypeAlias = str | Callable[[str], bool]
Patterns: TypeAlias = Pattern | Sequence[Pattern]


def matches(patterns: Patterns, name: str) -> bool:
    """Whether ``name`` matches the pattern, or one of the patterns.

    A string is a shell glob (`fnmatch.fnmatchcase`) of the whole dotted name; a function says itself.

    >>> matches("b.*", "b.weight"), matches("b.*", "bn.weight")
    (True, False)
    >>> matches(["*.bias", lambda name: name.startswith("head.")], "head.weight")
    True
    """
    return any(_matches(pattern, name) for pattern in listed(patterns))


def select(patterns: Patterns, names: Iterable[str], what: str = "pattern") -> list[str]:
    """The names that match, in the order of ``names``.

    Raises:
        TypeError: a pattern is neither a string nor a function.
        ValueError: a pattern matches no name; ``what`` tells in the message where the pattern comes from.

    >>> select("*.bias", ["0.weight", "0.bias", "2.weight", "2.bias"])
    ['0.bias', '2.bias']
    >>> select("0.wieght", ["0.weight", "0.bias"])
    Traceback (most recent call last):
    ValueError: the pattern '0.wieght' matches no parameter; did you mean '0.weight'?
    """
    names = list(names)
    for pattern in listed(patterns):
        if not any(_matches(pattern, name) for name in names):
            shown, hint = (
                (repr(pattern), did_you_mean(pattern, names))
                if isinstance(pattern, str)
                else (getattr(pattern, "__name__", repr(pattern)), did_you_mean("", names))
            )
            raise ValueError(f"the {what} {shown} matches no parameter{hint}")
    return [name for name in names if matches(patterns, name)]


def check_patterns(patterns: object, what: str) -> None:
    """Refuse anything but a string, a function or a list or tuple of them with a TypeError."""
    if isinstance(patterns, (list, tuple)) and patterns:
        for pattern in patterns:
            _check_pattern(pattern, what)
    else:
        _check_pattern(patterns, what)


def _check_pattern(pattern: object, what: str) -> None:
    if not (isinstance(pattern, str) or callable(pattern)):
        raise TypeError(
            f"{what} must be a pattern of parameter names such as '*.bias', a list of patterns, "
            f"or a function of the name that returns true or false, not {pattern!r}"
        )


def listed(patterns: Patterns) -> Sequence[Pattern]:
    """One pattern or several as several."""
    return [patterns] if isinstance(patterns, str) or callable(patterns) else patterns


def _matches(pattern: Pattern, name: str) -> bool:
    return fnmatchcase(name, pattern) if isinstance(pattern, str) else bool(pattern(name))
