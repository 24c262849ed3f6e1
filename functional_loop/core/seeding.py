"""Randomness of a network or a dataset: every call runs under its seed, in whatever generators it draws from."""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from typing import TypeVar
from weakref import WeakSet

import torch

from .draws import DrawWatch, is_costly, put_back, reseed, states
from .errors import region
from .rng import generators_lock, seeded, torch_generators, torch_seeded

R = TypeVar("R")


class Seeding:
    """Calls a function under seeds, and puts the states of the global generators back.

    To seed numpy and `random` costs as much as a small network or batch. It is done once the function has been seen to
    draw from them; the call in which it was seen is made again.

    Args:
        everything: do it from the start, for a function that can't be called twice.
        repeats: whether a call may be made again; if not, what it drew from numpy and `random` is put back, no more.
    """

    def __init__(self, everything: bool, repeats: bool = True) -> None:
        self.everything = everything
        self._repeats = repeats
        self._watch = DrawWatch()
        self._held: tuple[torch.Generator, ...] = ()
        self._holds_all = False

    def __reduce__(self) -> tuple[type[Seeding], tuple[bool, bool]]:
        return Seeding, (self.everything, self._repeats)

    def call(self, function: Callable[[], R], seed: int) -> R:
        """What ``function()`` returns, where all that it draws is a function of ``seed``."""
        if self._held and (self._holds_all or not self.everything):
            with generators_lock:
                for generator in self._held:
                    generator.manual_seed(seed)
                if self._holds_all:
                    reseed(seed)
                    return function()
                # If it is undone, the function drew, or other code did between two calls.
                if done := self._attempt(function):
                    return done[0]
        if not self.everything:
            with torch_seeded(seed):
                self._watch.look()
                if done := self._attempt(function):
                    return done[0]
            self.everything = True
        with seeded(seed):
            return function()

    def _attempt(self, function: Callable[[], R]) -> tuple[R] | tuple[()]:
        """What ``function()`` returns; nothing, and undone, if anything was drawn from numpy or `random`."""
        try:
            result = function()
        except Exception:
            # What it drew may be why it failed.
            if self._watch.put_back() and self._repeats:
                return ()
            raise
        except BaseException:
            self._watch.put_back()
            raise
        return () if self._watch.put_back() and self._repeats else (result,)

    @region
    def held(self) -> Generator[None]:
        """A region in which torch's generators are seeded by every call, and put back at the end only.

        That saves a tenth of a small network's step. No other code should draw from them between the calls. Where the
        function draws from numpy and `random` too, or looking whether it does is costly, so it is with those.
        """
        run = _Run()
        try:
            self._holds_all = self.everything or is_costly()
            with generators_lock:
                if not _runs:
                    _before.clear()
                    _before.update({g: partial(g.set_state, g.get_state()) for g in torch_generators()})
                if self._holds_all and None not in _before:
                    _before[None] = partial(put_back, states())
                _runs.add(run)
            self._watch.look()
            self._held = torch_generators()
            yield
        finally:
            self._held, self._holds_all = (), False
            with generators_lock:
                _runs.discard(run)
                if not _runs:
                    for set_back in _before.values():
                        set_back()
                    _before.clear()


class _Run:
    """One that holds the generators."""


_runs: WeakSet[_Run] = WeakSet()
"""Who holds the generators, in whatever thread: the last to let go puts them back as the first has found them. One that
an interrupt kept from letting go is gone with its frame."""
_before: dict[torch.Generator | None, Callable[[], object]] = {}
"""What puts back a generator of torch, or (``None``) those of numpy and `random`."""
