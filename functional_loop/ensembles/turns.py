"""The program that trains the members of an ensemble one after the other, as solo runs."""

from __future__ import annotations

from ..core.beside import share
from ..core.callback import Callback
from ..core.context import Context
from ..core.record import evolve
from ..data.reader import Reader
from ..engine.loop import Loop
from ..engine.solo import SoloProgram
from ..purity.probe import probed
from .ensemble import combine_contexts, own, split_context

STRIDE = 20
"""So many batches of a member are trained at a time, where no hook observes the boundaries between them."""


class TurnsProgram:
    """Takes the solo programs of all members to the same boundary.

    After an error all members are at the last boundary that all have reached.
    """

    def __init__(self, ctx: Context) -> None:
        assert ctx.ensemble is not None
        self.loop, self._ensemble = ctx.loop, ctx.ensemble
        loop = without_whole(ctx.loop)
        self._members = [evolve(own(member), loop=loop) for member in split_context(ctx)]
        self._programs = {
            i: SoloProgram(member).open() for i, member in enumerate(self._members) if member.stage != "end"
        }

    @property
    def live(self) -> Context:
        return next((ctx for ctx in self._members if ctx.stage != "end"), self._members[0])

    def context(self) -> Context:
        return combine_contexts([evolve(ctx, loop=self.loop) for ctx in self._members], self._ensemble)

    @property
    def strayed(self) -> bool:
        return False

    def retire(self) -> bool:
        leaving = [i for i, program in self._programs.items() if program.retire()]
        self._arrive()
        for i in leaving:
            self._programs.pop(i).close()
        return not self._programs

    def stage(self, stage: str) -> None:
        for program in self._programs.values():
            program.stage(stage)
        self._arrive()

    def read(self, part: str) -> _Readers:
        return _Readers(part, {i: program.read(part) for i, program in self._programs.items()})

    def train(self, readers: _Readers, stop: float | None) -> bool:
        stop = None if stop is None else min(stop, self.live.global_step + STRIDE)
        trained = []
        for i, program in self._programs.items():
            trained.append(program.train(readers.of[i], stop))
            if program.strayed:
                readers.of[i].close()
                readers.of[i] = program.read(readers.part)
        self._arrive()
        return any(trained)

    def validate(self, readers: _Readers) -> bool:
        evaluated = [program.validate(readers.of[i]) for i, program in self._programs.items()]
        self._arrive()
        return any(evaluated)

    def check_read(self, part: str) -> None:
        for program in self._programs.values():
            program.check_read(part)

    def close(self) -> None:
        for program in self._programs.values():
            program.close()

    def _arrive(self) -> None:
        """Let all members be where their programs are."""
        for i, program in self._programs.items():
            self._members[i] = program.live


class _Readers:
    """The readers of all members that still train."""

    def __init__(self, part: str, of: dict[int, Reader]) -> None:
        self.part, self.of = part, of

    def close(self) -> None:
        for reader in self.of.values():
            reader.close()


def without_whole(loop: Loop) -> Loop:
    """The loop of a member: callbacks that are for all members together have no hooks in it."""
    if not any(callback.whole for callback in loop.callbacks):
        return loop
    silent = [Callback(c.id, init=c.init, kind=c.kind) if c.whole else c for c in loop.callbacks]
    made = evolve(loop, callbacks=silent)
    probed(loop)
    share(made, loop, "probed", "template", "modes")
    return made
