"""Runs stage hooks: under their seeds, with checks of what they return, and with errors that name them."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..core.beside import beside
from ..core.callback import Hook
from ..core.context import Context, run_as
from ..core.errors import add_note
from ..core.hook_seeds import OF_BATCHES, HookSeeds
from ..core.place import check_not_moved
from ..core.plain import check_plain
from ..core.record import did_you_mean, evolve
from ..core.stages import STAGES
from ..purity.check import checked
from .loop import Loop


class StageHooks:
    """The hooks of a loop as they run: in order, watched where ``check_pure`` is set, each under its seed."""

    def __init__(self, loop: Loop) -> None:
        self._callbacks = [checked(c) if loop.check_pure else c for c in loop.callbacks]
        by_id = {callback.id: callback for callback in self._callbacks}
        self.of = {stage: [(id, by_id[id].hooks[stage]) for id, _ in loop.hooks[stage]] for stage in STAGES}
        self.of["resume"] = [(id, hook) for id, _ in loop.hooks["resume"] if (hook := by_id[id].resume) is not None]
        observers = frozenset(callback.id for callback in loop.callbacks if not callback.replays)
        self.seeds = HookSeeds(self.of, observers, loop.check_pure)

    def run(self, stage: str, ctx: Context, seeds: bool = True) -> Context:
        """What the hooks of ``stage`` make of ``ctx``, one after the other.

        Args:
            seeds: whether all are called under their seeds, or only those that are known to draw.
        """
        if not (hooks := self.of[stage]):
            return ctx
        ctx = evolve(ctx, running=stage)
        seeded = seeds or self.seeds.observers or self.seeds.drawing
        for id, hook in hooks:
            ctx = self.run_one(stage, id, hook, ctx, seeds) if seeded else run_hook(stage, id, hook, ctx)
        return ctx

    def run_one(self, stage: str, id: str, hook: Hook, ctx: Context, seeds: bool = True) -> Context:
        """What one hook makes of ``ctx``, under its seed."""
        return run_hook(stage, id, partial(self.seeds.call, stage, id, hook, seeds=seeds), ctx)

    def initial(self, ctx: Context) -> dict[str, Any]:
        """The states with which callbacks start, by id; of those that keep any."""
        makers = {c.id: c.init for c in self._callbacks if c.init is not None}
        return {id: self.seeds.call("init", id, make, ctx, seeds=True) for id, make in makers.items()}


def hooks_of(loop: Loop) -> StageHooks:
    return beside(loop, "hooks", lambda: StageHooks(loop))


def run_hook(stage: str, id: str, hook: Hook, ctx: Context, of_all: bool = False) -> Context:
    """What one hook makes of ``ctx``, which may be that of all members; its errors say which it was.

    Raises:
        TypeError, ValueError: it returns no context, one at another place, or states that could not be saved.
    """
    try:
        result = run_as(id, hook, ctx)
        if not isinstance(result, Context):
            raise TypeError(f"a hook must return a Context (for example evolve(ctx, ...)), not {type(result).__name__}")
        if result is not ctx and stage not in ("exit", "resume"):
            check_not_moved(ctx, result, stage, of_all)
            if result.callbacks is not ctx.callbacks:
                _check_slots(ctx, result, stage)
    except BaseException as error:
        add_note(error, f"in callback {id!r} at stage {stage!r} ({place_of(ctx)})")
        raise
    return result


def _check_slots(before: Context, after: Context, stage: str) -> None:
    """Refuse states of callbacks that could not be saved. A state that changes at every batch is looked at in the first
    batches of an epoch, since its form hardly changes later; saving looks at all.

    Raises:
        TypeError: one is no plain tree.
        ValueError: there are states of other callbacks than before.
    """
    if before.callbacks.keys() != after.callbacks.keys():
        names = sorted(before.callbacks.keys() ^ after.callbacks.keys(), key=str)
        raise ValueError(f"ctx.callbacks has one state for each callback of the loop, and can't gain or lose {names}")
    if stage in OF_BATCHES and (before.step_valid or before.step) > 2:
        return
    for id, slot in after.callbacks.items():
        if slot is not before.callbacks[id]:
            check_plain(slot, f"the state of callback {id!r}")


def check_grads(ctx: Context) -> None:
    """Refuse what hooks of ``after_backward`` left in ``ctx.grads`` if it is no dict of gradients by name."""
    if not isinstance(ctx.grads, dict):
        kind = type(ctx.grads).__name__
        raise TypeError(f"a hook of 'after_backward' left {kind} in ctx.grads, which is a dict by name")
    for name in ctx.grads.keys() - ctx.params.keys():
        raise ValueError(f"a hook of 'after_backward' left {name!r} in ctx.grads{did_you_mean(name, ctx.params)}")


def place_of(ctx: Context, step: int = 0, step_valid: int = 0) -> str:
    """The place of a context in words, so many steps further."""
    step, step_valid = ctx.step + step, ctx.step_valid + step_valid
    return f"epoch {ctx.epoch}, step {step}" + (f", validation step {step_valid}" if step_valid else "")
