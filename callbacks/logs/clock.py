"""Time: a stopwatch that goes on over restarts, and durations as people write them."""

from __future__ import annotations

import math
import re
import time

_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
_DURATION = re.compile("".join(rf"(?:(\d+(?:\.\d+)?){unit})?" for unit in _UNITS))


class Stopwatch:
    """Adds up the time for which it runs; at first it stands still at zero.

    Attributes:
        seconds: the time up to the last look; may be set, to go on from another time.

    >>> watch = Stopwatch()
    >>> watch.start()
    >>> watch.seconds, watch.look() > 0
    (0.0, True)
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._mark: float | None = None

    def start(self) -> None:
        """Run on from now; the time since the last look is not counted."""
        self._mark = time.monotonic()

    def look(self) -> float:
        """The seconds up to now."""
        if self._mark is not None:
            now = time.monotonic()
            self.seconds += now - self._mark
            self._mark = now
        return self.seconds

    def stop(self) -> None:
        self.look()
        self._mark = None


def seconds_of(duration: float | str) -> float:
    """A duration in seconds.

    Args:
        duration: a number of seconds, or a text such as ``"1h30m"`` of days, hours, minutes and seconds.

    Raises:
        ValueError: it is neither, or not positive.

    >>> seconds_of("1h30m"), seconds_of("1.5d"), seconds_of(90)
    (5400.0, 129600.0, 90.0)
    """
    seconds = -1.0
    if isinstance(duration, str):
        if found := _DURATION.fullmatch(duration.replace(" ", "")):
            parts = zip(found.groups(), _UNITS.values(), strict=True)
            seconds = sum(float(number) * unit for number, unit in parts if number)
    elif type(duration) in (int, float):
        seconds = float(duration)
    if not 0 < seconds < math.inf:
        raise ValueError(f"must be a positive number of seconds or a text such as '1h30m', not {duration!r}")
    return seconds


def in_words(seconds: float) -> str:
    """A duration for people.

    >>> in_words(4.25), in_words(83), in_words(7384), in_words(90000)
    ('4.2 s', '1 min 23 s', '2 h 03 min', '1 d 01 h')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
    if seconds < 86400:
        return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"
    return f"{seconds // 86400:.0f} d {seconds % 86400 // 3600:02.0f} h"
