"""Ensembles: the contexts of several runs as one stacked context, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs
from torch import Tensor

from ..core.context import Context, Ensemble, Place, check_boundary
from ..core.record import evolve, tree_map
from .stacking import Known, Members, combine, split

if TYPE_CHECKING:
    from ..engine.loop import Loop

MODES = ("auto", "vectorised", "exact")
BATCH_HOOKS = ("vectorised", "each")

_PLACE = ("epoch", "step", "step_valid", "global_step", "stage", "terminate")
_SCORES = ("last_scores_train", "last_scores_valid")


def stack(contexts: Sequence[Context], mode: str = "auto", batch_hooks: str = "vectorised") -> Context:
    """Several runs of one loop as one context, in which every tensor has a leading axis of members.

    `train`, `iterate`, `validate`, `predict`, `state_dict`, `digest` and `CheckpointStore` take it as any other; the
    members may differ in seed (and so in initialisation, order of the data, dropout), in hyperparameters and in state.
    Hyperparameters and scores that are not the same for all are float64 tensors of shape ``(members,)``, other values
    (``ctx.seed``, say) are `Members`. A member that terminates runs its ``end`` and changes no more; ``ctx.epoch``,
    ``ctx.stage`` and the like are those of the members that still train.

    **How hooks run.** At the stages of an epoch every hook runs for every member as in a solo run, which costs a call
    per member. At the stages of a batch a hook runs once for all, under ``torch.func.vmap``: written with tensor
    operations it means the same, and one that needs Python values, like every object callback, is refused.

    Args:
        contexts: boundary contexts of one and the same `Loop`, at the same place in it, or finished.
        mode: ``"vectorised"`` trains all members in one tensor program, whose losses are those of solo runs up to
            rounding, with the random numbers of solo runs; a network for which that fails is refused. ``"exact"``
            trains them in turn, and gives every member the bits of its solo run. ``"auto"`` is vectorised where that
            can work and is not slower, and goes on in turn, with a warning, from a batch on for which it does not
            work; `ensemble_mode` says which, and why.
        batch_hooks: ``"each"`` runs hooks for every member at the stages of a batch too, at the cost of a call per
            member and batch.

    Raises:
        TypeError: something else than contexts.
        ValueError: no contexts, stacked ones, other loops, different places, a mode that does not exist, or a loop that
            passes batches over (``skip_batches``, `rollback`).

    >>> from functional_loop.examples.digits import loop
    >>> import functional_loop as fl
    >>> shared = loop()
    >>> ctx = fl.stack([fl.init(shared, seed=seed) for seed in range(3)])
    >>> ctx
    Context(epoch=0, step=0, global_step=0, stage='', seed=Members(0, 1, 2), members=3)
    >>> fl.digest(fl.unstack(ctx)[1]) == fl.digest(fl.init(shared, seed=1))
    True
    """
    contexts = list(contexts)
    if not contexts:
        raise ValueError("stack: there is no context to stack")
    for name, value, known in (("mode", mode, MODES), ("batch_hooks", batch_hooks, BATCH_HOOKS)):
        if value not in known:
            raise ValueError(f"stack: {name} is one of {', '.join(map(repr, known))}, not {value!r}")
    for ctx in contexts:
        check_boundary(ctx, "stack")
    _check_alike(contexts)
    return combine_contexts([own(ctx) for ctx in contexts], Ensemble(mode, batch_hooks, ends=()))


def unstack(ctx: Context) -> list[Context]:
    """The contexts of the members, as ordinary ones with tensors of their own; a solo context is one member.

    >>> from functional_loop.examples.digits import loop
    >>> import functional_loop as fl
    >>> ctx = fl.train(fl.stack([fl.init(made, seed=0) for made in [loop()] * 2]), steps=3)
    >>> [member.global_step for member in fl.unstack(ctx)]
    [3, 3]
    """
    if ctx.ensemble is None:
        return [ctx]
    return [own(member) for member in split_context(ctx)]


def one_member(ctx: Context, member: int | None, function: str) -> Context:
    """The context of one member, with views of the stacked tensors; a solo context is that itself."""
    if ctx.ensemble is None:
        if member is not None:
            raise ValueError(f"{function}: member={member} is for stacked contexts, and this is one of a single run")
        return ctx
    if member is None:
        raise ValueError(f"{function}: the context has {ctx.ensemble.members} members; say which, with member=")
    if not -ctx.ensemble.members <= member < ctx.ensemble.members:
        raise IndexError(f"{function}: there is no member {member}; members are 0 to {ctx.ensemble.members - 1}")
    return split_context(ctx)[member]


def of_one_run(ctx: Context, function: str) -> Context:
    """``ctx``, which must not be a stacked one."""
    if ctx.ensemble is not None:
        raise ValueError(f"{function} takes the context of one run, and this is stacked: take one of unstack(ctx)")
    return ctx


def check_no_skipping(loop: Loop) -> None:
    """Refuse a loop that passes batches over, which the members of an ensemble can't do, with a ValueError."""
    skipping = ["skip_batches"] if loop.skip_batches else []
    skipping += [f"callback {callback.id!r}" for callback in loop.callbacks if callback.skips is not None]
    if skipping:
        raise ValueError(f"{skipping[0]} of the Loop passes batches over, which the members of an ensemble can't do")


def _check_alike(contexts: list[Context]) -> None:
    check_no_skipping(contexts[0].loop)
    for callback in contexts[0].loop.callbacks:
        if getattr(callback.source, "for_one_run", False):
            raise ValueError(
                f"stack: callback {callback.id!r} writes what one run makes, and can't be in an ensemble; a history "
                "keeps the scores of every member, and a checkpoint saves all of them"
            )
    going = [(i, ctx) for i, ctx in enumerate(contexts) if ctx.stage != "end"]
    for i, ctx in enumerate(contexts):
        if ctx.ensemble is not None:
            raise ValueError(f"stack: context {i} is a stacked one: stack(unstack(a) + unstack(b)) joins ensembles")
        if ctx.loop is not contexts[0].loop:
            raise ValueError(f"stack: context {i} is of another Loop than context 0; members of an ensemble share one")
    for i, ctx in going:
        first, here = (place_of(c) for c in (going[0][1], ctx))
        if attrs.evolve(here, terminate=False) != attrs.evolve(first, terminate=False):
            raise ValueError(
                f"stack: contexts that still train must be at the same place; context {going[0][0]} is at {first}, "
                f"context {i} at {here}: train(ctx, steps=...) brings them there"
            )


def place_of(ctx: Context) -> Place:
    return Place(*(getattr(ctx, name) for name in _PLACE))


def member_seeds(ctx: Context) -> list[int]:
    """The seed of every member of a stacked context."""
    assert ctx.ensemble is not None
    seed: Any = ctx.seed
    return list(seed) if isinstance(seed, Members) else [seed] * ctx.ensemble.members


def combine_contexts(members: Sequence[Context], ensemble: Ensemble, known: Known | None = None) -> Context:
    """The stacked context of members, run as ``ensemble`` says; ``known`` is from `split_context`."""
    going = [ctx for ctx in members if ctx.stage != "end"]
    here = place_of(going[0] if going else max(members, key=lambda ctx: ctx.global_step))
    here = attrs.evolve(here, terminate=all(ctx.terminate for ctx in going or members))
    ends = tuple(place_of(ctx) if ctx.stage == "end" else None for ctx in members)
    terminating = frozenset(i for i, ctx in enumerate(members) if ctx in going and ctx.terminate)
    changes = {name: getattr(here, name) for name in _PLACE}
    for name in _FIELDS:
        changes[name] = _combined(name, [getattr(ctx, name) for ctx in members], known)
    return evolve(
        members[0],
        ensemble=attrs.evolve(ensemble, ends=ends, terminating=frozenset() if here.terminate else terminating),
        **changes,
    )


def going(ctx: Context) -> Context:
    """The stacked context of the members that still train; of all if none does."""
    assert ctx.ensemble is not None
    if all(end is None for end in ctx.ensemble.ends):
        return ctx
    return combine_contexts([c for c in split_context(ctx) if c.stage != "end"] or split_context(ctx), ctx.ensemble)


def ended(ctx: Context) -> Context:
    """The stacked context after ``end`` with the ends of all members noted, who were all going before."""
    assert ctx.ensemble is not None
    ensemble, here = ctx.ensemble, place_of(ctx)
    terminate = [ctx.terminate or i in ensemble.terminating for i in range(ensemble.members)]
    ends = tuple(attrs.evolve(here, terminate=asked) for asked in terminate)
    return evolve(ctx, terminate=all(terminate), ensemble=attrs.evolve(ensemble, ends=ends, terminating=frozenset()))


def _combined(name: str, values: list[Any], known: Known | None) -> Any:
    if name == "optimizer_state":
        groups = combine([value["groups"] for value in values], known, numbers=True)
        return {"groups": groups, "slots": combine([value["slots"] for value in values], known)}
    if name == "trainable":
        return values[0] if all(value == values[0] for value in values) else Members(tuple(values))
    return combine(values, known, numbers=name in _SCORES)


def split_context(ctx: Context, known: Known | None = None) -> list[Context]:
    """The contexts of the members, with views of the stacked tensors."""
    ensemble = ctx.ensemble
    assert ensemble is not None
    columns = {name: _split(name, getattr(ctx, name), ensemble.members, known) for name in _FIELDS}
    members = []
    for i, end in enumerate(ensemble.ends):
        changes = {name: column[i] for name, column in columns.items()}
        place = end or attrs.evolve(place_of(ctx), terminate=ctx.terminate or i in ensemble.terminating)
        members.append(evolve(ctx, ensemble=None, **changes, **{name: getattr(place, name) for name in _PLACE}))
    return members


def _split(name: str, value: Any, members: int, known: Known | None) -> list[Any]:
    if name == "optimizer_state":
        groups = split(value["groups"], members, known, numbers=True)
        slots = split(value["slots"], members, known)
        return [{"groups": g, "slots": s} for g, s in zip(groups, slots, strict=True)]
    return split(value, members, known, numbers=name in _SCORES)


def own(ctx: Context) -> Context:
    """The context with tensors that share no memory with others."""
    copied: Context = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, ctx)
    return copied


_NAMES = [field.name for field in attrs.fields(Context)]  # type: ignore[arg-type]
_FIELDS = tuple(name for name in _NAMES if name not in ("loop", "ensemble", *_PLACE))
