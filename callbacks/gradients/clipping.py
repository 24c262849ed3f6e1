"""Gradient clipping, between the backward pass and the update."""

from __future__ import annotations

from torch import Tensor
from torch.nn.utils import get_total_norm

from ...core.callback import Callback
from ...core.context import Context
from ...core.record import evolve
from ..checks import check_flag, check_number
from .windows import updates


def clip_grad_norm(
    max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False, id: str = "clip_grad_norm"
) -> Callback:
    """Scales all gradients down together where their total norm is larger than ``max_norm``.

    It changes what the optimizer gets, in ``after_backward``: with ``Loop(accumulate=k)`` the mean over a window, once
    that is complete.

    Args:
        max_norm: the largest norm, over all gradients as one vector.
        norm_type: which p-norm, from 1 to infinity.
        error_if_nonfinite: whether a norm that is NaN or infinite is a RuntimeError; to look costs a synchronisation
            with the device.
        id: the name of the callback, unique in a loop.

    Raises:
        ValueError: an argument that can't work; in `init`: an optimizer that evaluates the gradients itself.

    Resuming:
        It keeps no state: what it does to a batch depends on the gradients of that batch alone.

    Mirrors `torch.nn.utils.clip_grad_norm_`, bit for bit.

    >>> import torch, functional_loop as fl
    >>> from functional_loop.callbacks.gradients.clipping import clip_grad_norm
    >>> from functional_loop.examples.digits import loop
    >>> ctx = fl.train(fl.init(fl.evolve(loop(), callbacks=[clip_grad_norm(1.0)])), steps=3)
    """
    check_number("clip_grad_norm", "max_norm", max_norm, least=0)
    check_number("clip_grad_norm", "norm_type", norm_type, least=1)
    check_flag("clip_grad_norm", "error_if_nonfinite", error_if_nonfinite)

    def clip(ctx: Context) -> Context:
        if not updates(ctx):
            return ctx
        grads = gradients(ctx)
        norm = get_total_norm(list(grads.values()), norm_type, error_if_nonfinite)
        factor = (float(max_norm) / (norm + 1e-6)).clamp(max=1.0)
        return evolve(ctx, grads={name: grad * factor for name, grad in grads.items()})

    settings = {"max_norm": max_norm, "norm_type": norm_type, "error_if_nonfinite": error_if_nonfinite}
    return Callback(id, init=check_optimizer, kind="clip_grad_norm", settings=settings, after_backward=clip)


def clip_grad_value(clip_value: float, id: str = "clip_grad_value") -> Callback:
    """Clamps every element of the gradients to the range from ``-clip_value`` to ``clip_value``.

    It changes what the optimizer gets, in ``after_backward``: with ``Loop(accumulate=k)`` the mean over a window, once
    that is complete.

    Args:
        clip_value: the largest absolute value.
        id: the name of the callback, unique in a loop.

    Raises:
        ValueError: an argument that can't work; in `init`: an optimizer that evaluates the gradients itself.

    Resuming:
        It keeps no state: what it does to a batch depends on the gradients of that batch alone.

    Mirrors `torch.nn.utils.clip_grad_value_`, bit for bit.

    >>> import functional_loop as fl
    >>> from functional_loop.callbacks.gradients.clipping import clip_grad_value
    >>> from functional_loop.examples.digits import loop
    >>> ctx = fl.train(fl.init(fl.evolve(loop(), callbacks=[clip_grad_value(0.01)])), steps=3)
    """
    check_number("clip_grad_value", "clip_value", clip_value, least=0)

    def clip(ctx: Context) -> Context:
        if not updates(ctx):
            return ctx
        return evolve(ctx, grads={n: grad.clamp(-clip_value, clip_value) for n, grad in gradients(ctx).items()})

    settings = {"clip_value": clip_value}
    return Callback(id, init=check_optimizer, kind="clip_grad_value", settings=settings, after_backward=clip)


def gradients(ctx: Context) -> dict[str, Tensor]:
    """The gradients in the order of the parameters, in which torch sums their norms."""
    grads = ctx.grads or {}
    return {name: grads[name] for name in ctx.params if name in grads}


def check_optimizer(ctx: Context) -> tuple[()]:
    """The initial state, which is none; that there is one makes clipping a part of what a run is."""
    if ctx.loop.optimizer.needs_closure:
        raise ValueError(
            f"{ctx.loop.optimizer.cls.__name__} evaluates the gradients itself, several times in a step, where no "
            "callback can clip them: use another optimizer, or no clipping"
        )
    return ()
