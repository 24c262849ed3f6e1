"""How the members of an ensemble are trained: all at once, or in turn."""

from __future__ import annotations

import warnings
from contextlib import suppress
from typing import Any

import attrs
import optree
from torch import nn

from ..core import measures
from ..core.context import Context
from ..core.record import evolve
from ..core.rng import seeded
from ..data.reader import TRAINING, VALIDATION
from ..engine.loop import Loop
from ..engine.network import FunctionalNetwork
from ..engine.step import autocast_off
from ..engine.template import with_loss
from .ensemble import going
from .member_optimizers import has_vectorised_form
from .members import MembersProgram
from .stacking import Members
from .trial import NotVectorisedError, found_of

_SLOW = (nn.modules.conv._ConvNd,)


@attrs.frozen
class Choice:
    """Whether the members are trained all at once, and if not, why."""

    vectorised: bool
    reason: str = ""

    def __str__(self) -> str:
        return "vectorised" if self.vectorised else f"in turn: {self.reason}"


def ensemble_mode(ctx: Context) -> str:
    """How `train` runs the members of a stacked context: ``"vectorised"``, or ``"in turn: "`` and the reason.

    With ``mode="auto"`` members are trained in turn where that is not slower (convolutions on the CPU) or where they
    can't be trained at once: optimizers other than SGD, Adam, AdamW and RMSprop, members whose states are of different
    forms, networks that ``torch.func.vmap`` can't run, or of which it makes something else than solo runs do. That is
    found out once for a loop: its first batch, in training and in validation, is computed for all members and by
    solo steps of two of them, and compared; a batch of another shape is, when it comes.

    Raises:
        ValueError: the context is not stacked, or its mode is ``"vectorised"`` and that can't be.

    >>> from functional_loop.examples.digits import loop
    >>> import functional_loop as fl
    >>> shared = loop()
    >>> fl.ensemble_mode(fl.stack([fl.init(shared, seed=seed) for seed in range(3)], mode="exact"))
    "in turn: mode='exact'"
    """
    if ctx.ensemble is None:
        raise ValueError("ensemble_mode takes a stacked context, made by stack(contexts)")
    return str(choose(ctx))


def choose(ctx: Context) -> Choice:
    """See `ensemble_mode`."""
    assert ctx.ensemble is not None
    if ctx.ensemble.mode == "exact":
        return Choice(False, "mode='exact'")
    demanded = ctx.ensemble.mode == "vectorised"
    ctx = going(ctx)
    reason = _obstacle(ctx) or ("" if demanded else _why_slower(ctx.loop)) or _tried(ctx)
    if reason and demanded:
        raise _refusal(reason)
    return Choice(not reason, reason)


def chosen(ctx: Context) -> Choice:
    """As `choose`, with a warning, once for a loop, if members turned out not to be their solo runs."""
    choice, found = choose(ctx), found_of(ctx.loop)
    if choice.reason == found.reason and not found.told:
        _warn(found.reason)
        found.told = True
    return choice


def take_turns(ctx: Context, error: NotVectorisedError) -> None:
    """Let the members be trained in turn from now on.

    Raises:
        ValueError: their mode is ``"vectorised"``.
    """
    fall_back(ctx, error)
    found_of(ctx.loop).reason = str(error)


def fall_back(ctx: Context, error: NotVectorisedError) -> None:
    """Warn of members that can't be computed at once.

    Raises:
        ValueError: their mode is ``"vectorised"``.
    """
    assert ctx.ensemble is not None
    if ctx.ensemble.mode == "vectorised":
        raise _refusal(str(error)) from error
    _warn(str(error))


def _refusal(reason: str) -> ValueError:
    return ValueError(
        f"mode='vectorised': the members of this ensemble can't be trained at once: {reason}. mode='exact' trains "
        "them in turn, mode='auto' does so where it must"
    )


def _warn(reason: str) -> None:
    warnings.warn(
        f"mode='auto': the members of an ensemble are computed in turn, because {reason}. mode='exact' asks for that",
        UserWarning,
        stacklevel=2,
    )


def _obstacle(ctx: Context) -> str:
    cls = ctx.loop.optimizer.cls
    if not has_vectorised_form(ctx.loop.optimizer):
        return f"{cls.__name__} has no vectorised form (SGD, Adam, AdamW and RMSprop have)"
    for name in ("params", "buffers", "trainable", "accumulated", "measures", "batch"):
        if _has_members(getattr(ctx, name)):
            return f"ctx.{name} is not of the same form in all members"
    if _has_members(ctx.optimizer_state["slots"]):
        return "the optimizer has made steps in some members and none in others"
    return ""


def _has_members(tree: Any) -> bool:
    return any(isinstance(leaf, Members) for leaf in optree.tree_leaves(tree, none_is_leaf=True))


def _why_slower(loop: Loop) -> str:
    if loop.device.type != "cpu":
        return ""
    slow = next((part for part in with_loss(loop).modules() if isinstance(part, _SLOW)), None)
    return f"{type(slow).__name__} of several members at once is slower on the CPU" if slow is not None else ""


def _tried(ctx: Context) -> str:
    """Why the first batches can't be computed for all members at once; tried once for a loop."""
    found = found_of(ctx.loop)
    if not (found.begun or found.reason):
        # What fails in a solo step too is for the run to tell, which says where.
        with suppress(Exception):
            try:
                _try(ctx)
            except NotVectorisedError as error:
                found.note(error)
        found.begun = True
    return found.reason


def _try(ctx: Context) -> None:
    loop = ctx.loop
    if FunctionalNetwork(with_loss(loop)).writes:
        raise NotVectorisedError("the network writes to its parameters (max_norm)")
    ctx = evolve(ctx, epoch=max(ctx.epoch, 1), step=0, step_valid=0)
    program = MembersProgram(ctx, compiles=False)
    try:
        with seeded(0), autocast_off(loop.device.type):
            if (batch := program.first_batch(TRAINING)) is not None:
                program.gradients(ctx, ctx.params, ctx.buffers, batch)
            if loop.valid is not None and (batch := program.first_batch(VALIDATION)) is not None:
                program.outputs(ctx, batch, measures.need_loss(loop.measures_valid))
    finally:
        program.close()
