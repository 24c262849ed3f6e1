"""A guard against losses that are NaN or infinite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.callback import Callback
from ...core.context import Context
from ...core.record import evolve
from ...ensembles.vmap_rules import is_any, is_of_members
from ..checks import check_choice, check_integer

_BEFORE_CLIPPING = -50.0


def terminate_on_nan(every: int = 1, action: str = "raise", id: str = "terminate_on_nan") -> Callback:
    """Stops training at a batch whose loss is NaN or infinite, before its gradients reach the parameters.

    To look at the loss waits for the device: nothing on a CPU, a synchronisation per look on an accelerator. With
    ``every=n`` a bad batch is found up to ``n - 1`` updates late.

    Args:
        every: looks at every ``every``-th batch of the run.
        action: ``"raise"`` stops at once with a FloatingPointError; `context_of` the error is the boundary before the
            batch, with parameters that are sound if ``every`` is 1. ``"terminate"`` ends the run in order: the rest
            of the epoch runs without updates, and no other epoch follows, so that scores, checkpoints and the hooks of
            ``end`` get the parameters from before the batch; the callback's state is ``{"step": 0-d int64 tensor}``,
            the number of the batch in the run, 0 where there was none. In an ensemble only members whose own loss is
            bad terminate, and ``"raise"`` stops all.
        id: the name of the slot, unique in a loop.

    Raises:
        ValueError: an argument that can't work.
        FloatingPointError: while training, see ``action``.

    Resuming:
        ``"raise"`` keeps no state. A run that was terminated is over: it trains no further epoch.

    Mirrors Keras's ``TerminateOnNaN``.

    >>> import functional_loop as fl
    >>> from functional_loop.callbacks.control.terminate_on_nan import terminate_on_nan
    >>> from functional_loop.examples.digits import loop
    >>> diverging = fl.evolve(loop(lr=1e30), callbacks=[terminate_on_nan(action="terminate")])
    >>> fl.train(fl.init(diverging)).epoch
    1
    """
    check_integer("terminate_on_nan", "every", every, least=1)
    check_choice("terminate_on_nan", "action", action, ("raise", "terminate"))

    def complain(ctx: Context) -> Context:
        if ctx.global_step % every == 0 and is_any(bad := _is_bad(ctx)):
            what = "loss of a member is NaN or infinite" if is_of_members(bad) else f"loss is {loss(ctx)}"
            raise FloatingPointError(
                f"the {what}; context_of(error) is the context before this batch, from where training can "
                "go on with other settings, such as a smaller learning rate or clipped gradients"
            )
        return ctx

    def terminate(ctx: Context) -> Context:
        step = ctx.callbacks[id]["step"]
        if ctx.global_step % every == 0:
            step = torch.where((step == 0) & _is_bad(ctx), ctx.global_step, step)
        found = step > 0
        if not is_any(found):
            return ctx
        if not is_of_members(found):
            return evolve(ctx.with_callback_state(id, {"step": step}), terminate=True, grads={})
        # The others update: what these had before is put back in batch_end.
        held = {"params": ctx.params, "slots": ctx.optimizer_state["slots"]}
        return evolve(ctx.with_callback_state(id, {"step": step, "held": held}), terminate=found)

    def put_back(ctx: Context) -> Context:
        slot = ctx.callbacks[id]
        if "held" not in slot:
            return ctx
        held, found = slot["held"], slot["step"] > 0
        slots = _where(found, held["slots"], ctx.optimizer_state["slots"])
        return evolve(
            ctx.with_callback_state(id, {"step": slot["step"]}),
            params=_where(found, held["params"], ctx.params),
            optimizer_state={**ctx.optimizer_state, "slots": slots},
        )

    if action == "raise":
        return Callback(id, kind="terminate_on_nan", weight=_BEFORE_CLIPPING, after_backward=complain)
    return Callback(
        id,
        init=lambda ctx: {"step": torch.tensor(0, device=ctx.loop.device)},
        weight=_BEFORE_CLIPPING,
        kind="terminate_on_nan",
        settings={"every": every, "action": action},
        after_backward=terminate,
        batch_end=put_back,
    )


def loss(ctx: Context) -> float:
    """The loss of the batch at hand; waits for the device."""
    assert isinstance(ctx.last_loss, Tensor)
    return ctx.last_loss.item()


def _is_bad(ctx: Context) -> Tensor:
    assert isinstance(ctx.last_loss, Tensor)
    return ~ctx.last_loss.isfinite()


def _where(condition: Tensor, old: Any, new: Any) -> Any:
    """The tensors of ``old`` where ``condition`` holds, and zeros, as an optimizer starts with, where it has none."""
    if isinstance(new, dict):
        return {name: _where(condition, old.get(name, {}), value) for name, value in new.items()}
    return torch.where(condition, old if isinstance(old, Tensor) else torch.zeros_like(new), new)
