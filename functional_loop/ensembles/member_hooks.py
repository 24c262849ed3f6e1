"""Hooks on a stacked context: once for all members, or for every member."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..core.callback import Callback, Hook
from ..core.context import Context
from ..core.errors import noting
from ..core.hook_seeds import OF_BATCHES
from ..core.record import evolve
from ..engine.hooks import hooks_of, run_hook
from .ensemble import combine_contexts, split_context
from .foreach_rules import ForeachApart
from .stacking import Known, Members, flatten, vectorised


def run_member_hooks(stage: str, ctx: Context) -> Context:
    """What the hooks of ``stage`` make of a stacked context."""
    hooks = [(id, hook) for id, hook in hooks_of(ctx.loop).of[stage] if not callback_of(ctx, id).whole]
    if not hooks:
        return ctx
    assert ctx.ensemble is not None
    once = stage in OF_BATCHES and ctx.ensemble.batch_hooks == "vectorised"
    ctx = evolve(ctx, running=stage)
    if once:
        for id, hook in hooks:
            ctx = _once_for_all(stage, id, hook, ctx)
        return ctx
    return for_every_member(ctx, [_of_stage(stage, id, hook) for id, hook in hooks])


def callback_of(ctx: Context, id: str) -> Callback:
    return next(callback for callback in ctx.loop.callbacks if callback.id == id)


def check_batch_hooks(ctx: Context) -> None:
    """Refuse callbacks that would have to run once for all members, and can't.

    Raises:
        TypeError: there is one.
    """
    assert ctx.ensemble is not None
    if ctx.ensemble.batch_hooks == "each":
        return
    for stage in OF_BATCHES:
        for callback in (callback_of(ctx, id) for id, _ in ctx.loop.hooks[stage]):
            if what := "" if callback.whole else _obstacle(callback, ctx.loop.check_pure):
                raise TypeError(
                    f"callback {callback.id!r} {what}, which can't run once for all members of an ensemble at "
                    f"{stage!r}: stack(contexts, batch_hooks='each') runs it for every member, at the cost of a call "
                    "each"
                )


def _obstacle(callback: Callback, check_pure: bool) -> str:
    if not callback.vectorises:
        return "is an object" if hasattr(callback.source, "load_state_dict") else "needs Python values"
    return "is watched by check_pure" if check_pure else ""


def for_every_member(ctx: Context, functions: Sequence[Callable[[Context], Context]]) -> Context:
    """The functions, one after the other, on the context of every member."""
    assert ctx.ensemble is not None
    known: Known = {}
    members = split_context(ctx, known)
    for function in functions:
        for i, member in enumerate(members):
            with noting(lambda i=i: f"in member {i} of an ensemble"):  # type: ignore[misc]
                members[i] = function(member)
    return combine_contexts(members, ctx.ensemble, known)


def _of_stage(stage: str, id: str, hook: Hook) -> Callable[[Context], Context]:
    return lambda ctx: hooks_of(ctx.loop).run_one(stage, id, hook, ctx)


def _once_for_all(stage: str, id: str, hook: Hook, ctx: Context) -> Context:
    assert ctx.ensemble is not None
    members = ctx.ensemble.members

    def say() -> str:
        return (
            f"while it ran once for all {members} members, under torch.func.vmap. A hook that needs "
            "Python values (.item(), if, float()) or random numbers can't: stack(contexts, batch_hooks='each') runs "
            "it for every member, at the cost of a call each"
        )

    alone, draws = evolve(ctx, ensemble=None), hooks_of(ctx.loop).seeds.watch()
    draws.look()
    with noting(say), ForeachApart():
        after = vectorised(lambda member: run_hook(stage, id, hook, member, of_all=True), (alone,), members)
        if draws.put_back():
            raise RuntimeError(f"callback {id!r} drew a number from numpy or random at stage {stage!r}, once for all")
    return _with_terminating(evolve(_as_numbers(alone, after), ensemble=ctx.ensemble))


def _as_numbers(before: Context, after: Context) -> Context:
    """Numbers of the members that the hook has seen as tensors are numbers again."""
    old, structure = flatten(before)
    new, new_structure = flatten(after)
    if new_structure != structure or not any(isinstance(value, Members) for value in old):
        return after
    for i, (value, made) in enumerate(zip(old, new, strict=True)):
        if isinstance(value, Members) and isinstance(made, Tensor) and made.dim() == 1:
            new[i] = Members(tuple(made.tolist()))
    numbers: Context = structure.unflatten(new)
    return numbers


def _with_terminating(ctx: Context) -> Context:
    """``terminate`` of every member, where a hook has made it a tensor."""
    asked: Any = ctx.terminate
    if not isinstance(asked, Tensor):
        return ctx
    assert ctx.ensemble is not None
    terminating = frozenset(i for i, terminate in enumerate(asked.tolist()) if terminate)
    ensemble = evolve(ctx.ensemble, terminating=ctx.ensemble.terminating | terminating)
    return evolve(ctx, terminate=False, ensemble=ensemble)
