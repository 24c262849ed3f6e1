"""How the members of an ensemble are trained: all at once, or in turn."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import attrs
import optree
from torch import nn

from ..context import Context
from ..draws import DrawWatch
from ..loop import Loop
from ..network import FunctionalNetwork
from ..record import evolve
from ..rng import seeded
from .member_optimizers import has_vectorised_form
from .member_step import MembersStep
from .stacking import Members
from .walk import Crew, train_inputs

_SLOW = (nn.modules.conv._ConvNd,)
_trials: WeakKeyDictionary[Loop, str] = WeakKeyDictionary()


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
    can't be trained at once: optimizers other than SGD, Adam, AdamW and RMSprop, networks that ``torch.func.vmap``
    can't run (found out on one batch), members whose states are of different forms.

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
    ctx = Crew(ctx).live
    reason = _obstacle(ctx) or ("" if demanded else _why_slower(ctx.loop)) or _trial(ctx)
    if reason and demanded:
        raise ValueError(
            f"mode='vectorised': the members of this ensemble can't be trained at once: {reason}. mode='exact' trains "
            "them in turn, mode='auto' does so where it must"
        )
    return Choice(not reason, reason)


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
    slow = next((part for part in loop.with_loss().modules() if isinstance(part, _SLOW)), None)
    return f"{type(slow).__name__} of several members at once is slower on the CPU" if slow is not None else ""


def _trial(ctx: Context) -> str:
    """Why one batch can't be computed for all members at once; tried once for a loop."""
    loop = ctx.loop
    if loop not in _trials:
        _trials[loop] = _try(ctx)
    return _trials[loop]


def _try(ctx: Context) -> str:
    if FunctionalNetwork(ctx.loop.with_loss()).writes:
        return "the network writes to its parameters (max_norm)"
    ctx = evolve(ctx, epoch=max(ctx.epoch, 1), step=0)
    step, draws = MembersStep(ctx.loop), DrawWatch()
    try:
        with seeded(0):
            batch, seeds = train_inputs(ctx)
            draws.look()
            step.gradients(ctx.params, ctx.buffers, ctx.trainable, batch, seeds)
            if draws.has_moved():
                return "the network draws random numbers from numpy or random"
    except Exception as error:
        return f"torch.func.vmap can't run it ({type(error).__name__}: {str(error).splitlines()[0][:200]})"
    finally:
        step.release()
    return ""
