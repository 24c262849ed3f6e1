"""The loss of a batch as a function of the parameters, for transforms: gradients, curvature, unrolled training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from ..core.batch import Batch, as_batch, to_device
from ..core.context import Context, check_context
from ..core.rng import seeded, step_seed
from ..engine.network import outer_name
from ..engine.template import with_loss
from ..ensembles.ensemble import of_one_run

Tensors = dict[str, Tensor]
LossFunction = Callable[[Tensors], Tensor]


def loss_function(ctx: Context, batch: Batch | tuple[Any, Any], *, training: bool = False) -> LossFunction:
    """The loss of ``batch`` as a pure function of the trainable parameters, with all else as in ``ctx``.

    It can be given to `torch.func` (``grad``, ``jvp``, ``vmap``), or called under autograd, any number of times
    differentiable. Whatever the network does to its buffers is dropped.

    Args:
        batch: a `Batch` or a pair ``(x, y)``.
        training: whether the network is in training mode; what it draws is then what it draws in the step
            ``ctx.global_step``, so that a hook of ``after_backward`` gets the loss of that step.

    >>> import functional_loop as fl
    >>> from functional_loop.examples.digits import loop
    >>> ctx = fl.init(loop(), seed=0)
    >>> batch, _ = next(loop().train.fetch(seed=0, epoch=1, start=0, state=()))
    >>> f = fl.loss_function(ctx, batch)
    >>> grads = torch.func.grad(f)(fl.trainable_params(ctx))
    >>> grads.keys() == ctx.params.keys()
    True
    """
    check_context(ctx, "loss_function")
    run, batch = Forward(ctx), to_device(as_batch(batch), ctx.loop.device)
    seed = step_seed(ctx.seed, ctx.global_step)

    def loss(params: Tensors) -> Tensor:
        return run({**ctx.params, **params}, ctx.buffers, batch, training, seed)[0]

    return loss


def trainable_params(ctx: Context) -> Tensors:
    """The parameters that are updated, by name."""
    return {name: ctx.params[name] for name in ctx.trainable}


class Forward:
    """Network and loss of a loop as one function of tensors, which keeps the graph."""

    def __init__(self, ctx: Context) -> None:
        self._loop = of_one_run(ctx, "the loss").loop
        self._module = with_loss(ctx.loop).copied()
        self._names = {
            outer_name(name): name for name, _ in (*self._module.named_parameters(), *self._module.named_buffers())
        }

    def __call__(
        self, params: Tensors, buffers: Tensors, batch: Batch, training: bool, seed: int | None
    ) -> tuple[Tensor, Any, Tensors]:
        """The loss, the outputs and the new buffers; without a ``seed`` under that of the caller."""
        loop = self._loop
        self._module.train(training)
        # The network writes to the buffers that it is given, and the dict has them afterwards.
        given = params | {name: buffer.clone() for name, buffer in buffers.items()}
        tensors = {self._names[name]: tensor for name, tensor in given.items()}
        under = nullcontext() if seed is None else seeded(seed)
        with under, torch.autocast(loop.device.type, loop.autocast, enabled=loop.autocast is not None):
            loss, outputs = functional_call(self._module, tensors, (batch.x, batch.y))
        return loss, outputs, {name: tensors[self._names[name]] for name in buffers}
