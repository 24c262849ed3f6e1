"""Training of a stacked context: `train`, `iterate` and `train_step` for the members of an ensemble."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from typing import Any

from ..batch_stages import run_hook
from ..context import Context
from ..errors import attach_context, keeping_stop_iteration, telling_of_stop_iteration
from ..leaving import Call, run_exit, run_resume
from ..loop import Loop
from ..record import evolve
from ..stages import Callback
from ..step import autocast_off
from ..walk import Walk
from .compiled_members import CompiledMembersStep
from .ensemble import check_no_skipping, combine_contexts, own, split_context
from .member_hooks import BATCH_STAGES, check_batch_hooks
from .member_step import MembersStep
from .mode import chosen, take_turns
from .trial import NotVectorisedError
from .walk import Crew, walk_vectorised


def iterate_members(ctx: Context) -> Generator[Context]:
    """Every boundary context after ``ctx``; see `iterate`."""
    with telling_of_stop_iteration(), closing(_run(ctx, None)) as runs:
        for run in runs:
            yield run.context()


def train_members(ctx: Context, steps: int | None) -> Context:
    """See `train`; ``steps`` are those of the members that still train."""
    goal = math.inf if steps is None else ctx.global_step + steps
    with keeping_stop_iteration(), closing(_run(ctx, goal)) as runs:
        for run in runs:
            if run.crew.live.global_step == goal and run.crew.live.stage == "batch_end":
                break
        return run.context()


STRIDE = 20
"""So many batches of a member are trained at a time, where no hook observes the boundaries between them."""


class InTurn:
    """The members one after the other, as solo runs.

    Args:
        stop: as that of `Walk`.

    Attributes:
        live: a member that still trains, or one of those that have finished.
    """

    def __init__(self, ctx: Context, stop: float | None) -> None:
        assert ctx.ensemble is not None
        looks = any(set(c.hooks) & set(BATCH_STAGES) for c in ctx.loop.callbacks if c.whole)
        self._stop = None if looks else stop
        self._ensemble, self._loop = ctx.ensemble, ctx.loop
        loop = _without_whole(ctx.loop)
        self._members = [evolve(own(member), loop=loop) for member in split_context(ctx)]

    @property
    def live(self) -> Context:
        return next((ctx for ctx in self._members if ctx.stage != "end"), self._members[0])

    def context(self) -> Context:
        """The stacked context of all members."""
        return combine_contexts([evolve(ctx, loop=self._loop) for ctx in self._members], self._ensemble)

    def walk(self) -> Iterator[None]:
        """Take all members to the next boundary that may be observed, again and again."""
        walks = {i: Walk(ctx) for i, ctx in enumerate(self._members) if ctx.stage != "end"}
        with ExitStack() as opened:
            for boundaries in walks.values():
                boundaries.open()
                opened.callback(boundaries.close)
            while walks:
                stop = None if self._stop is None else min(self._stop, self.live.global_step + STRIDE)
                for boundaries in walks.values():
                    boundaries.stop = stop
                    boundaries.advance()
                self._members = [walks[i].ctx if i in walks else ctx for i, ctx in enumerate(self._members)]
                walks = {i: boundaries for i, boundaries in walks.items() if boundaries.ctx.stage != "end"}
                yield


def _without_whole(loop: Loop) -> Loop:
    """The loop of a member: callbacks that are for all members together have no hooks in it."""
    if not any(callback.whole for callback in loop.callbacks):
        return loop
    silent = [Callback(c.id, init=c.init, kind=c.kind) if c.whole else c for c in loop.callbacks]
    return evolve(loop, callbacks=silent).sharing(loop)


class Run:
    """Members that are trained, and the callbacks that are for all of them together.

    Attributes:
        slots: the states of these callbacks.
    """

    def __init__(self, ctx: Context, crew: Crew | InTurn) -> None:
        self.crew = crew
        self.loop = ctx.loop
        ordered = sorted(ctx.loop.callbacks, key=lambda callback: callback.order)
        self._whole = [callback for callback in ordered if callback.whole]
        first = split_context(ctx)[0].callbacks if self._whole else {}
        self.slots: dict[str, Any] = {c.id: first[c.id] for c in self._whole if c.init is not None}

    def context(self) -> Context:
        """The stacked context of all members."""
        return self._with_slots(self.crew.context())

    def run_hooks(self, before: str) -> None:
        """Run the hooks that are for all members together, of the stage that is complete."""
        stage = self.crew.live.stage
        for callback in self._whole:
            if stage in callback.hooks:
                glance = callback.volatile and stage in BATCH_STAGES
                given = self._with_slots(self.crew.live) if glance else self.context()
                given = evolve(given, loop=self.loop, stage=before, running=stage)
                made = run_hook(stage, callback.id, callback.hooks[stage], given)
                if callback.id in self.slots:
                    self.slots[callback.id] = made.callbacks[callback.id]

    def _with_slots(self, ctx: Context) -> Context:
        return evolve(ctx, callbacks={**ctx.callbacks, **self.slots}) if self.slots else ctx


def _run(ctx: Context, stop: float | None) -> Generator[Run]:
    """The members after every boundary of those that still train; the last is that after which all have finished.

    Boundaries of batches before the ``stop``-th of the run may be left out.
    """
    if ctx.stage == "end":
        return
    check_no_skipping(ctx.loop)
    crew, boundaries, step = _start(ctx, stop)
    before, run = ctx.stage, Run(ctx, crew)
    try:
        if ctx.stage != "":
            _resume(run.context())
        while True:
            try:
                if not _advance(run, boundaries, before):
                    break
            except NotVectorisedError as error:
                take_turns(ctx, error)
                run.crew = turns = InTurn(run.context(), stop)
                boundaries = turns.walk()
                continue
            before = run.crew.live.stage
            yield run
    except GeneratorExit as error:
        attach_context(error, last := run.context())
        _exit(last, None)
        raise
    except BaseException as error:
        attach_context(error, last := run.context())
        _exit(last, error)
        raise
    else:
        _exit(run.context(), None)
    finally:
        if step is not None:
            step.release()


def _advance(run: Run, boundaries: Iterator[object], before: str) -> bool:
    """Go from the boundary of ``before`` to the next one; whether there was one."""
    with autocast_off(run.loop.device.type):
        if next(boundaries, _DONE) is _DONE:
            return False
        run.run_hooks(before)
        return True


_DONE = object()


def _start(ctx: Context, stop: float | None) -> tuple[Crew | InTurn, Iterator[object], MembersStep | None]:
    if chosen(ctx).vectorised:
        check_batch_hooks(ctx)
        step = CompiledMembersStep(ctx.loop) if ctx.loop.compile else MembersStep(ctx.loop)
        crew = Crew(ctx)
        return crew, walk_vectorised(step, crew), step
    turns = InTurn(ctx, stop)
    return turns, turns.walk(), None


def _resume(ctx: Context) -> None:
    for member in split_context(evolve(ctx, loop=_without_whole(ctx.loop))):
        run_resume(member)
    for callback in ctx.loop.callbacks:
        if callback.whole and callback.resume is not None:
            run_hook("resume", callback.id, callback.resume, ctx)


def _exit(ctx: Context, reason: BaseException | None) -> None:
    hooks = ctx.loop.hooks["exit"]
    whole = {callback.id for callback in ctx.loop.callbacks if callback.whole}
    members = split_context(ctx) if hooks else []
    calls: list[Call] = [(id, hook, given) for id, hook in hooks for given in ([ctx] if id in whole else members)]
    run_exit(ctx, reason, calls)
