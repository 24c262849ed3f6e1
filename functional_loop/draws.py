"""Notices draws from the global generators of `random` and numpy, for less than a microsecond."""

from __future__ import annotations

import ctypes
import random
import sys
from typing import Any

Reading = tuple[Any, ...] | None
"""Numbers that change with every draw; ``None`` where they can't be read without copying the whole state."""


class DrawWatch:
    """Remembers the states of `random` and numpy, and says whether somebody drew from them since.

    Their states are 2.5 kB each and take some 40 µs to copy. A draw moves a counter, so that it is enough to look at
    the counters, and to copy the states when they have moved.
    """

    def __init__(self) -> None:
        self._reading: Reading = None
        self._states: tuple[Any, Any] = (None, None)

    def look(self) -> None:
        """Remember the states as they are now."""
        reading = _read()
        if reading is None or reading != self._reading:
            self._states = _states()
            numpy_state = self._states[1]
            # numpy hands out the second of two normal draws without moving its counter.
            self._reading = None if numpy_state is not None and numpy_state["has_gauss"] else reading

    def has_moved(self) -> bool:
        """Whether anything was drawn since `look`."""
        if self._reading is not None:
            return _read() != self._reading
        return repr(_states()) != repr(self._states)

    def put_back(self) -> bool:
        """Put the states back as `look` found them, if anything was drawn since; whether anything was."""
        if not self.has_moved():
            return False
        python_state, numpy_state = self._states
        random.setstate(python_state)
        if numpy_state is not None:
            sys.modules["numpy"].random.set_state(numpy_state)
        return True


def _states() -> tuple[Any, Any]:
    numpy = sys.modules.get("numpy")
    return random.getstate(), numpy.random.get_state(legacy=False) if numpy is not None else None


def _python_counter(generator: random.Random) -> Any:
    """CPython's ``RandomObject``: position and first word of the state follow the object's header."""
    counter = (ctypes.c_uint32 * 2).from_address(id(generator) + object.__basicsize__)
    return memoryview(counter).cast("B").cast("I")


def _layout_is_known() -> bool:
    if sys.implementation.name != "cpython":
        return False
    generator = random.Random(1)
    counter = _python_counter(generator)
    before = counter[0]
    generator.random()
    return (before, counter[0]) == (624, 2)


_GLOBAL: random.Random = random._inst
_COUNTER = _python_counter(_GLOBAL) if _layout_is_known() else None
_numpy_known: tuple[Any, Any] = (None, None)
"""numpy's global generator, and the words of its state: the key, and the position in it."""


def _read() -> Reading:
    global _numpy_known
    if _COUNTER is None:
        return None
    if (numpy := sys.modules.get("numpy")) is None:
        return _COUNTER[0], _COUNTER[1], _GLOBAL.gauss_next  # type: ignore[attr-defined]
    generator = numpy.random.get_bit_generator()
    known, words = _numpy_known
    if generator is not known:
        if type(generator) is not numpy.random.MT19937:
            return None
        words = memoryview((ctypes.c_uint32 * 625).from_address(generator.ctypes.state_address)).cast("B").cast("I")
        _numpy_known = generator, words
    return _COUNTER[0], _COUNTER[1], _GLOBAL.gauss_next, generator, words[624], words[0]  # type: ignore[attr-defined]
