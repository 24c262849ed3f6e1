"""Monitors of norms: how large gradients and parameters are, epoch by epoch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from ...core.callback import Callback
from ...core.context import Context
from ..checks import check_number
from .clipping import gradients
from .windows import updates

_BEFORE_CLIPPING = -100.0


def grad_norm(norm_type: float = 2.0, id: str = "grad_norm") -> Callback:
    """Keeps the norm of the gradients, over all of them as one vector, in ``ctx.callbacks[id]["rows"]``.

    A row is ``{"epoch": int, "mean": float, "max": float, "last": float}`` over the updates of an epoch. The norm is
    that of the gradients as they are made, before they are clipped (weight -100); nothing waits for the device until
    the epoch ends. ``ctx.callbacks[id]["last"]`` is the norm of the last update, a scalar tensor.

    Args:
        norm_type: which p-norm, from 1 to infinity.
        id: the name of the slot, unique in a loop.

    Raises:
        ValueError: ``norm_type`` can't work.

    Resuming:
        The rows and the running sums are part of the context: the row of an interrupted epoch is that of the whole.

    Mirrors what `torch.nn.utils.clip_grad_norm_` returns.

    >>> import functional_loop as fl
    >>> from functional_loop.callbacks.gradients.monitors import grad_norm
    >>> from functional_loop.examples.digits import loop
    >>> ctx = fl.train(fl.init(fl.evolve(loop(epochs=2), callbacks=[grad_norm()])))
    >>> [sorted(row) for row in ctx.callbacks["grad_norm"]["rows"]]
    [['epoch', 'last', 'max', 'mean'], ['epoch', 'last', 'max', 'mean']]
    """
    check_number("grad_norm", "norm_type", norm_type, least=1)

    def norm(ctx: Context) -> Tensor:
        return get_total_norm(list(gradients(ctx).values()), norm_type)

    return _monitor(id, "grad_norm", norm_type, "after_backward", norm, weight=_BEFORE_CLIPPING)


def param_norm(norm_type: float = 2.0, id: str = "param_norm") -> Callback:
    """Keeps the norm of the parameters, over all of them as one vector, in ``ctx.callbacks[id]["rows"]``.

    A row is ``{"epoch": int, "mean": float, "max": float, "last": float}`` over the updates of an epoch, each norm
    taken after its update; nothing waits for the device until the epoch ends. ``ctx.callbacks[id]["last"]`` is the
    norm after the last update, a scalar tensor.

    Args:
        norm_type: which p-norm, from 1 to infinity.
        id: the name of the slot, unique in a loop.

    Raises:
        ValueError: ``norm_type`` can't work.

    Resuming:
        The rows and the running sums are part of the context: the row of an interrupted epoch is that of the whole.

    Mirrors `torch.nn.utils.get_total_norm` of the parameters.

    >>> import functional_loop as fl
    >>> from functional_loop.callbacks.gradients.monitors import param_norm
    >>> from functional_loop.examples.digits import loop
    >>> ctx = fl.train(fl.init(fl.evolve(loop(epochs=1), callbacks=[param_norm()])))
    >>> [row["epoch"] for row in ctx.callbacks["param_norm"]["rows"]]
    [1]
    """
    check_number("param_norm", "norm_type", norm_type, least=1)

    def norm(ctx: Context) -> Tensor:
        return get_total_norm(list(ctx.params.values()), norm_type)

    return _monitor(id, "param_norm", norm_type, "batch_end", norm, weight=0.0)


def _monitor(
    id: str, kind: str, norm_type: float, stage: str, value: Callable[[Context], Tensor], weight: float
) -> Callback:
    def observe(ctx: Context) -> Context:
        if not updates(ctx):
            return ctx
        slot, last = ctx.callbacks[id], value(ctx)
        first = slot["count"] == 0
        return ctx.with_callback_state(
            id,
            {
                "count": slot["count"] + 1,
                "last": last,
                "sum": last if first else slot["sum"] + last,
                "max": last if first else torch.maximum(slot["max"], last),
                "rows": slot["rows"],
            },
        )

    def finish(ctx: Context) -> Context:
        slot = ctx.callbacks[id]
        if slot["count"] == 0:
            return ctx
        mean, largest, last = slot["sum"].item() / slot["count"], slot["max"].item(), slot["last"].item()
        row = {"epoch": ctx.epoch, "mean": mean, "max": largest, "last": last}
        return ctx.with_callback_state(id, {**slot, "count": 0, "rows": [*slot["rows"], row]})

    start = {"count": 0, "last": (), "sum": (), "max": (), "rows": []}
    hooks: Any = {stage: observe}
    settings = {"norm_type": norm_type}
    return Callback(id, init=lambda ctx: start, weight=weight, kind=kind, settings=settings, epoch_end=finish, **hooks)
