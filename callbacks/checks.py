"""Checks of the arguments that callbacks are made with."""

from __future__ import annotations

import math
from typing import Any


def check_integer(owner: str, name: str, value: Any, least: int) -> None:
    """Refuse anything but an integer of at least ``least`` with a ValueError.

    >>> check_integer("early_stopping", "patience", 0, least=1)
    Traceback (most recent call last):
    ValueError: early_stopping: patience must be an integer of at least 1, not 0
    """
    if type(value) is not int or value < least:
        raise ValueError(f"{owner}: {name} must be an integer of at least {least}, not {value!r}")


def check_number(owner: str, name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> None:
    """Refuse anything but an int or float from ``least`` to ``most`` with a ValueError; NaN is refused too.

    >>> check_number("ema", "decay", 1.5, least=0, most=1)
    Traceback (most recent call last):
    ValueError: ema: decay must be a number from 0 to 1, not 1.5
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        limits = f" from {least} to {most}" if most < math.inf else f" of at least {least}"
        raise ValueError(f"{owner}: {name} must be a number{limits if least > -math.inf else ''}, not {value!r}")


def check_numbers(owner: str, name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> None:
    """`check_number`, also for a list with a number for every parameter group."""
    for number in value if isinstance(value, (list, tuple)) else [value]:
        check_number(owner, name, number, least, most)


def check_functions(owner: str, name: str, value: Any) -> None:
    """Refuse anything but a function, or a list with one for every parameter group, with a TypeError."""
    for function in value if isinstance(value, (list, tuple)) else [value]:
        if not callable(function):
            raise TypeError(f"{owner}: {name} must be a function of the step, not {function!r}")


def check_flag(owner: str, name: str, value: Any) -> None:
    """Refuse anything but true and false with a TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"{owner}: {name} is True or False, not {value!r}")


def check_choice(owner: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse anything but one of ``choices`` with a ValueError."""
    if value not in choices:
        raise ValueError(f"{owner}: {name} is {' or '.join(map(repr, choices))}, not {value!r}")
