"""Going on in another loop than before: with more epochs, or with callbacks that are made in another way."""

from __future__ import annotations

from typing import Any

from ..core.context import Context
from ..core.errors import StateDictError, add_note
from ..core.patterns import Patterns
from ..core.record import evolve
from ..engine.loop import Loop
from ..ensembles.ensemble import stack, unstack
from .comparing import Difference


def going_on(ctx: Context) -> Context:
    """``ctx`` as its loop goes on from it; a context of which that is the end stays the same object.

    Raises:
        StateDictError: more epochs were begun than the loop has; or the run ended and its loop would go on, but what
            the callbacks did in ``end`` can't be undone.
    """
    if ctx.epoch > ctx.loop.epochs:
        raise StateDictError("the loop has fewer epochs than were begun:", [too_few_epochs(ctx.epoch, ctx.loop)])
    if ctx.stage != "end":
        return _taken_back(ctx) if ctx.terminate and ctx.ensemble is None else ctx
    if ctx.ensemble is not None:
        members = unstack(ctx)
        continued = [going_on(member) for member in members]
        if all(a is b for a, b in zip(members, continued, strict=True)):
            return ctx
        return stack(continued, ctx.ensemble.mode, ctx.ensemble.batch_hooks)
    before = _taken_back(ctx) if ctx.terminate else ctx
    if before.terminate or before.epoch >= ctx.loop.epochs:
        return ctx
    if ids := [c.id for c in ctx.loop.callbacks if "end" in c.hooks and c.decides]:
        raise StateDictError(
            f"this context is that of a run that ended after {ctx.epoch} epochs, and what {', '.join(map(repr, ids))} "
            f"did in its stage 'end' can't be undone: to go on to epoch {ctx.loop.epochs}, continue from the last "
            "'epoch_end', by resume(loop, path) from the folder of its checkpoints"
        )
    return evolve(before, stage="epoch_end" if ctx.epoch else "begin")


def too_few_epochs(begun: int, loop: Loop) -> str:
    return f"epochs: {begun} begun in what was saved, {loop.epochs} here"


def _taken_back(ctx: Context) -> Context:
    slots = reopened(ctx.loop, ctx.callbacks)
    return ctx if slots is None else evolve(ctx, terminate=False, callbacks={**ctx.callbacks, **slots})


def reopened(loop: Loop, slots: dict[str, Any]) -> dict[str, Any] | None:
    """The states that callbacks had before they ended the run, if none that ended it would end it now; or ``None``."""
    before = {}
    for callback in loop.callbacks:
        if callback.reopens is None or callback.id not in slots:
            continue
        state = callback.reopens(slots[callback.id])
        if state is None:
            return None
        if state is not slots[callback.id]:
            before[callback.id] = state
    return before or None


def misfits(ctx: Context) -> dict[str, StateDictError]:
    """What keeps callbacks from continuing with the states that they have in ``ctx``, by their ids."""
    found = {}
    for callback in ctx.loop.callbacks:
        if callback.fits is not None and (error := callback.fits(ctx)[0]) is not None:
            add_note(error, f"to continue in spite of that, load it with allow={_paths(callback.id, error)}")
            found[callback.id] = error
    return found


def check_fit(ctx: Context) -> None:
    """Refuse a context with which a callback can't continue.

    Raises:
        StateDictError: what keeps the callback from that is listed.
    """
    for error in misfits(ctx).values():
        raise error


def fitted(ctx: Context, allow: Patterns) -> Context:
    """``ctx``, in which callbacks go on from their states in spite of what is allowed; what is not, stays a misfit."""
    for callback in ctx.loop.callbacks if allow else ():
        if callback.fits is not None:
            error, without = callback.fits(ctx)
            if error and all(Difference(path, "").is_allowed(allow) for path in _paths(callback.id, error)):
                ctx = without
    return ctx


def _paths(id: str, error: StateDictError) -> list[str]:
    return [f"callbacks/{id}/{line.partition(':')[0]}" for line in error.differences]
