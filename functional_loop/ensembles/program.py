"""The program of an ensemble: its members at once or in turn, and the callbacks that are for all of them together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..core.context import Context
from ..core.hook_seeds import OF_BATCHES
from ..core.record import evolve
from ..engine.exit import Call, run_exit, run_resume
from ..engine.hooks import hooks_of
from .ensemble import check_no_skipping, split_context
from .member_hooks import check_batch_hooks
from .members import MembersProgram
from .mode import chosen, take_turns
from .trial import NotVectorisedError
from .turns import TurnsProgram, without_whole


class EnsembleProgram:
    """Trains the members at once where that works, else in turn, from whichever batch it does not work for.

    A callback that is for all members together runs after a stage is complete, on the stacked context of all; of what
    it returns its own state is kept.
    """

    def __init__(self, ctx: Context) -> None:
        check_no_skipping(ctx.loop)
        self.loop, self._hooks = ctx.loop, hooks_of(ctx.loop)
        if chosen(ctx).vectorised:
            check_batch_hooks(ctx)
            self._program: MembersProgram | TurnsProgram = MembersProgram(ctx)
        else:
            self._program = TurnsProgram(ctx)
        ordered = sorted(ctx.loop.callbacks, key=lambda callback: callback.order)
        self._whole = [callback for callback in ordered if callback.whole]
        first = split_context(ctx)[0].callbacks if self._whole else {}
        self._slots: dict[str, Any] = {c.id: first[c.id] for c in self._whole if c.init is not None}
        self._each = any(stage in callback.hooks for callback in self._whole for stage in OF_BATCHES)

    @property
    def live(self) -> Context:
        return self._program.live

    def context(self) -> Context:
        return self._with_slots(self._program.context())

    @property
    def strayed(self) -> bool:
        return False

    def retire(self) -> bool:
        before = self.live.stage
        if finished := self._program.retire():
            self._run_whole(before)
        return finished

    def stage(self, stage: str) -> None:
        before = self.live.stage
        self._program.stage(stage)
        self._run_whole(before)

    def read(self, part: str) -> _Reader:
        return _Reader(part, self._program.read(part))

    def train(self, reader: _Reader, stop: float | None) -> bool:
        # Callbacks of all members observe the batches that they have hooks for.
        stop = None if self._each else stop
        return self._advance(reader, lambda: self._program.train(reader.own, stop))

    def validate(self, reader: _Reader) -> bool:
        return self._advance(reader, lambda: self._program.validate(reader.own))

    def check_read(self, part: str) -> None:
        self._program.check_read(part)

    def enter(self) -> None:
        if self.live.stage == "":
            return
        ctx = self.context()
        for member in split_context(evolve(ctx, loop=without_whole(ctx.loop))):
            run_resume(member)
        for callback in self._whole:
            if callback.resume is not None:
                self._hooks.run_one("resume", callback.id, callback.resume, ctx)

    def leave(self, reason: BaseException | None) -> None:
        ctx, hooks = self.context(), self._hooks.of["exit"]
        whole = {callback.id for callback in self._whole}
        members = split_context(ctx) if hooks else []
        calls: list[Call] = [(id, hook, given) for id, hook in hooks for given in ([ctx] if id in whole else members)]
        run_exit(ctx, reason, calls)

    def close(self) -> None:
        self._program.close()

    def _advance(self, reader: _Reader, advance: Callable[[], bool]) -> bool:
        before = self.live.stage
        try:
            advanced = advance()
        except NotVectorisedError as error:
            take_turns(self.live, error)
            reader.close()
            self._program.close()
            self._program = TurnsProgram(self.context())
            reader.own = self._program.read(reader.part)
            advanced = advance()
        if advanced:
            self._run_whole(before)
        return advanced

    def _run_whole(self, before: str) -> None:
        """Run the hooks that are for all members together, of the stage that is complete."""
        stage = self.live.stage
        for callback in self._whole:
            if stage in callback.hooks:
                glance = callback.volatile and stage in OF_BATCHES
                given = self._with_slots(self.live) if glance else self.context()
                given = evolve(given, loop=self.loop, stage=before, running=stage)
                made = self._hooks.run_one(stage, callback.id, callback.hooks[stage], given)
                if callback.id in self._slots:
                    self._slots[callback.id] = made.callbacks[callback.id]

    def _with_slots(self, ctx: Context) -> Context:
        return evolve(ctx, callbacks={**ctx.callbacks, **self._slots}) if self._slots else ctx


class _Reader:
    """The reader of the program that trains at the time."""

    def __init__(self, part: str, own: Any) -> None:
        self.part, self.own = part, own

    def close(self) -> None:
        self.own.close()
