"""The validation measure that a callback watches."""

from __future__ import annotations

from typing import Any

from ...core.measures import Measure
from ...core.record import did_you_mean
from ...engine.loop import Loop


def watched(owner: str, loop: Loop, measure: str | None) -> Measure:
    """The measure of that id among the ``measures_valid`` of ``loop``; the first of them for ``None``.

    Args:
        owner: the name of the callback, for messages.

    Raises:
        ValueError: there is no validation data, no such measure, or neither high nor low is better.
    """
    if loop.valid is None:
        raise ValueError(f"{owner} needs validation data: give the Loop valid=batches(...)")
    if not loop.measures_valid:
        raise ValueError(f"{owner} needs a score to watch: give the Loop measures_valid=[measure(...)]")
    known = {m.id: m for m in loop.measures_valid}
    name = next(iter(known)) if measure is None else measure
    if name not in known:
        raise ValueError(f"{owner}: there is no validation measure {name!r}{did_you_mean(name, known)}")
    if known[name].minimize is None:
        raise ValueError(
            f"{owner}: nothing says whether a low or a high {name!r} is better: "
            f"measure({name!r}, ..., minimize=True) or minimize=False"
        )
    return known[name]


def check_measure(owner: str, measure: Any) -> None:
    """Refuse anything but the id of a measure, or ``None``, with a TypeError."""
    if measure is not None and not isinstance(measure, str):
        raise TypeError(f"{owner}: measure is the id of a validation measure or None, not {measure!r}")
