"""A guard against losses that are NaN or infinite."""

from __future__ import annotations

import math

from torch import Tensor

from ..context import Context
from ..record import evolve
from ..stages import Callback
from .checks import check_choice, check_integer


def terminate_on_nan(every: int = 1, action: str = "raise", id: str = "terminate_on_nan") -> Callback:
    """Stops training at a batch whose loss is NaN or infinite, before its gradients reach the parameters.

    To look at the loss waits for the device: nothing on a CPU, a synchronisation per look on an accelerator. With
    ``every=n`` a bad batch is found up to ``n - 1`` updates late.

    Args:
        every: looks at every ``every``-th batch of the run.
        action: ``"raise"`` stops at once with a FloatingPointError; `context_of` the error is the boundary before the
            batch, with parameters that are sound if ``every`` is 1. ``"terminate"`` ends the run in order: the rest
            of the epoch runs without updates, and no other epoch follows, so that scores, checkpoints and the hooks of
            ``end`` get the parameters from before the batch; the step is kept as the callback's state.
        id: the name of the slot, unique in a loop.

    Raises:
        ValueError: an argument that can't work.
        FloatingPointError: while training, see ``action``.

    Resuming:
        ``"raise"`` keeps no state. A run that was terminated is over: it trains no further epoch.

    Mirrors Keras's ``TerminateOnNaN``.

    >>> import functional_loop as fl
    >>> from functional_loop.callbacks.terminate_on_nan import terminate_on_nan
    >>> from functional_loop.examples.digits import loop
    >>> diverging = fl.evolve(loop(lr=1e30), callbacks=[terminate_on_nan(action="terminate")])
    >>> fl.train(fl.init(diverging)).epoch
    1
    """
    check_integer("terminate_on_nan", "every", every, least=1)
    check_choice("terminate_on_nan", "action", action, ("raise", "terminate"))

    def is_bad(ctx: Context) -> bool:
        return ctx.global_step % every == 0 and not math.isfinite(loss(ctx))

    def complain(ctx: Context) -> Context:
        if is_bad(ctx):
            raise FloatingPointError(
                f"the loss is {loss(ctx)}; context_of(error) is the context before this batch, from where training can "
                "go on with other settings, such as a smaller learning rate or clipped gradients"
            )
        return ctx

    def terminate(ctx: Context) -> Context:
        found = ctx.callbacks[id]["step"] is not None
        if not found and is_bad(ctx):
            found, ctx = True, evolve(ctx.with_callback_state(id, {"step": ctx.global_step}), terminate=True)
        return evolve(ctx, grads={}) if found else ctx

    if action == "raise":
        return Callback(id, kind="terminate_on_nan", after_backward=complain)
    return Callback(id, init=lambda ctx: {"step": None}, kind="terminate_on_nan", after_backward=terminate)


def loss(ctx: Context) -> float:
    """The loss of the batch at hand; waits for the device."""
    assert isinstance(ctx.last_loss, Tensor)
    return ctx.last_loss.item()
