"""Notices draws from the global generators of `random` and numpy, for less than a microsecond."""

from __future__ import annotations

import ctypes
import random
import struct
import sys
from typing import Any

Reading = tuple[Any, ...] | None
"""Numbers that change with every draw; ``None`` where they can't be read without copying the whole state."""


class DrawWatch:
    """Remembers the states of `random` and numpy, and says whether they have been drawn from since.

    Their states are 2.5 kB each and take some 80 µs to copy. A draw moves a counter, so that it is enough to look at
    the counters, and to copy the states when they have moved.
    """

    def __init__(self) -> None:
        self._reading: Reading = None
        self._states: tuple[Any, Any] = (None, None)

    def look(self) -> None:
        """Remember the states as they are now."""
        reading = _read()
        if reading is None or reading != self._reading:
            self._states = states()
            self._reading = reading

    def has_moved(self) -> bool:
        """Whether anything was drawn since `look`."""
        if self._reading is not None:
            return bool(_read() != self._reading)
        return have_moved(self._states)

    def put_back(self) -> bool:
        """Put the states back as `look` found them, if anything was drawn since; whether anything was."""
        if not self.has_moved():
            return False
        put_back(self._states)
        return True


def states() -> tuple[Any, Any]:
    """Those of the global generators of `random` and numpy."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), numpy.random.get_state(legacy=False) if numpy is not None else None


def have_moved(before: tuple[Any, Any]) -> bool:
    """Whether `states` are others than ``before``."""
    return bool(_comparable(states()) != _comparable(before))


def put_back(before: tuple[Any, Any]) -> None:
    """Put `states` back."""
    python_state, numpy_state = before
    random.setstate(python_state)
    if numpy_state is not None:
        sys.modules["numpy"].random.set_state(numpy_state)


def is_costly() -> bool:
    """Whether to look takes a copy of 2.5 kB or more, because the layout of a generator is not known."""
    numpy = sys.modules.get("numpy")
    return _read() is None and (numpy is None or type(numpy.random.get_bit_generator()) is numpy.random.MT19937)


def reseed(seed: int) -> None:
    """Let `random` and numpy start from ``seed``, from 0 to 2**32 - 1."""
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed)


def _comparable(state: Any) -> Any:
    """A state with bytes for arrays, whose ``==`` is no truth value."""
    if isinstance(state, dict):
        return {key: _comparable(value) for key, value in state.items()}
    if isinstance(state, tuple):
        return tuple(map(_comparable, state))
    return state.tobytes() if hasattr(state, "tobytes") else state


def _words(address: int, number: int) -> Any:
    """Memory as 32-bit words; a memoryview is read faster than what `ctypes` makes."""
    return memoryview((ctypes.c_uint32 * number).from_address(address)).cast("B").cast("I")


def _python_words(generator: random.Random) -> Any:
    """CPython's ``RandomObject``: position and first word of the state follow the object's header."""
    return _words(id(generator) + object.__basicsize__, 2)


def _find_python(generator: Any) -> Any:
    """Position and first word of the state of ``generator``; ``None`` where a trial finds another layout."""
    if sys.implementation.name != "cpython" or type(generator) is not random.Random:
        return None
    trial = random.Random(1)
    words = _python_words(trial)
    before = words[0]
    trial.random()
    return _python_words(generator) if (before, *words) == (624, 2, trial.getstate()[1][0]) else None


def _find_numpy(numpy: Any, generator: Any) -> tuple[Any, Any]:
    """The state of numpy's global generator as words, the key and the position in it; and the normal number that it
    keeps, as whether there is one, and the number. ``None`` for both where a trial finds another layout.
    """
    owner: Any = getattr(numpy.random.get_state, "__self__", None)
    if type(generator) is not numpy.random.MT19937 or type(owner) is not numpy.random.RandomState:
        return None, None
    own = type(generator)(1)
    trial, words = type(owner)(own), _numpy_words(own)
    trial.standard_normal()
    state = trial.get_state(legacy=False)
    kept = ctypes.string_at(id(trial), type(trial).__basicsize__).find(struct.pack("=d", state["gauss"])) - 8
    found = kept >= 0 and (words[624], words[0]) == (state["state"]["pos"], state["state"]["key"][0])
    if not found or list(flag := _words(id(trial) + kept, 1)) != [1]:
        return None, None
    trial.standard_normal()
    return (_numpy_words(generator), _words(id(owner) + kept, 4)) if list(flag) == [0] else (None, None)


def _numpy_words(generator: Any) -> Any:
    return _words(generator.ctypes.state_address, 625)


_GLOBAL: Any = getattr(random.getstate, "__self__", None)
_python = _find_python(_GLOBAL)
_numpy: tuple[Any, Any, Any] = (None, None, None)
"""numpy's global generator, and what `_find_numpy` finds of it."""


def _read() -> Reading:
    global _numpy
    if _python is None:
        return None
    if (numpy := sys.modules.get("numpy")) is None:
        return _python[0], _python[1], _GLOBAL.gauss_next
    generator = numpy.random.get_bit_generator()
    known, words, kept = _numpy
    if generator is not known:
        words, kept = _find_numpy(numpy, generator)
        _numpy = generator, words, kept
    if words is None:
        return None
    # Of two normal numbers that are made together, the second is handed out without moving the position.
    return _python[0], _python[1], _GLOBAL.gauss_next, generator, words[624], words[0], kept[0], kept[2]
