"""Sharpness-aware minimisation: the gradient is taken where the loss is about worst nearby."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from ...core.callback import Callback
from ...core.context import Context
from ...core.record import evolve
from ...derivatives.losses import loss_function
from ..checks import check_flag, check_number
from .clipping import check_optimizer, gradients

_BEFORE_CLIPPING = -200.0


def sam(rho: float = 0.05, adaptive: bool = False, id: str = "sam") -> Callback:
    """Takes the gradient of every batch at ``params + rho * grad / norm(grad)`` instead of at the parameters.

    It replaces the gradients in ``after_backward``, before all that looks at or clips them (weight -200); any optimizer
    then steps from the parameters as they were. The second evaluation is on the same batch, with the same dropout and
    in training mode; what it does to buffers (BatchNorm's statistics) is dropped, ``last_loss`` and the outputs are
    those of the first. A step costs two.

    Args:
        rho: how far away, as a norm over all trainable parameters as one vector.
        adaptive: whether distances are relative to the size of every parameter's elements (ASAM); ``rho`` is then about
            ten times as large.
        id: the name of the callback, unique in a loop.

    Raises:
        TypeError, ValueError: an argument that can't work; in `init`: an optimizer that evaluates the gradients itself,
            or a loop that accumulates gradients, whose windows are of gradients at other places.

    Resuming:
        It keeps no state: what it does to a batch depends on the context of that batch alone.

    Foret et al., "Sharpness-aware minimization for efficiently improving generalization", 2020; Kwon et al., "ASAM",
    2021.

    >>> import functional_loop as fl
    >>> from functional_loop.callbacks.gradients.sam import sam
    >>> from functional_loop.examples.digits import loop
    >>> ctx = fl.train(fl.init(fl.evolve(loop(), callbacks=[sam(0.05)])), steps=3)
    """
    check_number("sam", "rho", rho, least=0)
    check_flag("sam", "adaptive", adaptive)

    def check(ctx: Context) -> tuple[()]:
        if ctx.loop.accumulate > 1:
            raise ValueError("sam: gradients of a window (accumulate > 1) are of several places; use larger batches")
        return check_optimizer(ctx)

    def move_away(ctx: Context) -> Context:
        grads = gradients(ctx)
        direction = {name: grad * ctx.params[name].abs() for name, grad in grads.items()} if adaptive else grads
        factor = rho / (get_total_norm(list(direction.values())) + 1e-12)
        if adaptive:
            direction = {name: part * ctx.params[name].abs() for name, part in direction.items()}
        away = {name: ctx.params[name] + factor * part for name, part in direction.items()}
        return evolve(ctx, grads=_gradients_at(ctx, away))

    return Callback(
        id,
        init=check,
        kind="sam",
        weight=_BEFORE_CLIPPING,
        settings={"rho": rho, "adaptive": adaptive},
        vectorises=False,
        after_backward=move_away,
    )


def _gradients_at(ctx: Context, params: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.enable_grad():
        leaves = {name: param.detach().requires_grad_() for name, param in params.items()}
        loss = loss_function(ctx, ctx.batch, training=True)(leaves)
        return dict(zip(leaves, torch.autograd.grad(loss, tuple(leaves.values())), strict=True))
