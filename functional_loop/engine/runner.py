"""The grammar of the stages: a state machine that can be entered after any of them."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any, Protocol

from ..core.context import Context
from ..data.reader import TRAINING, VALIDATION
from .step import autocast_off


class Program(Protocol):
    """How batches become contexts: what a `Runner` asks for, stage by stage.

    A program is made of a context, and is at the boundary after it. Every method takes it to a later boundary.
    """

    @property
    def live(self) -> Context:
        """The last boundary; of an ensemble, that of members that still train."""

    def context(self) -> Context:
        """The last boundary of all."""

    def retire(self) -> bool:
        """Run ``end`` for what has terminated or trained for all its epochs; whether nothing trains any more."""

    def stage(self, stage: str) -> None:
        """Do what belongs to a stage between batches, and run its hooks."""

    def read(self, part: str) -> Any:
        """A reader of the rest of the epoch, to be closed; ``part`` is `TRAINING` or `VALIDATION`."""

    def train(self, reader: Any, stop: float | None) -> bool:
        """Train on the next batch, or on as many as no hook observes; whether there was any.

        Args:
            stop: the number of the last of these batches, in the run; ``None`` if each is observed.
        """

    def validate(self, reader: Any) -> bool:
        """Evaluate the next batch; whether there was one."""

    @property
    def strayed(self) -> bool:
        """Whether the last batch led to a place from which it takes another reader to read on."""

    def check_read(self, part: str) -> None:
        """Refuse an epoch whose batches can't have been all."""

    def enter(self) -> None:
        """Run the ``resume`` hooks, where the run was begun before."""

    def close(self) -> None:
        """Let go of all but the last boundary."""

    def leave(self, reason: BaseException | None) -> None:
        """Run the ``exit`` hooks; ``reason`` is the error for which the run is left."""


class Runner:
    """Takes a program from boundary to boundary.

    Args:
        stop: the number of the batch, in the run, after which the context will be observed; the contexts of other
            batches only hooks see. ``None`` if every boundary is observed.
    """

    def __init__(self, program: Program, stop: float | None = None) -> None:
        self.program = program
        self._stop = stop
        self._loop = program.live.loop
        self._boundaries = self._grammar()

    def advance(self) -> bool:
        """Go to the next boundary that may be observed; whether there was one."""
        with autocast_off(self._loop.device.type):
            return next(self._boundaries, False)

    def close(self) -> None:
        """Let go of the data and of the program's tensors."""
        self._boundaries.close()
        self.program.close()

    def _grammar(self) -> Generator[bool]:
        program, loop = self.program, self._loop
        if program.live.stage == "":
            yield self._reach("begin")
        while True:
            if program.live.stage in ("begin", "epoch_end"):
                if program.retire():
                    yield True
                    return
                yield self._reach("epoch_begin")
            if program.live.stage in ("epoch_begin", "batch_end"):
                yield from self._batches(TRAINING, lambda reader: program.train(reader, self._stop))
                yield self._reach("before_valid")
            if program.live.stage != "valid_end" and loop.valid is not None and loop.evaluates(program.live.epoch):
                yield from self._batches(VALIDATION, program.validate)
                yield self._reach("valid_end")
            yield self._reach("epoch_end")

    def _reach(self, stage: str) -> bool:
        self.program.stage(stage)
        return True

    def _batches(self, part: str, advance: Callable[[Any], bool]) -> Generator[bool]:
        """All batches that are left of an epoch."""
        reading = True
        while reading:
            with closing(self.program.read(part)) as reader:
                while reading := advance(reader):
                    yield True
                    if self.program.strayed:
                        break
        self.program.check_read(part)
