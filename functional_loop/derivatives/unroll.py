"""Training as a differentiable function: gradients of what comes out with respect to what went in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as checkpointed

from ..core.batch import Batch, as_batch, to_device
from ..core.context import Context, check_boundary
from ..core.record import evolve, tree_map
from ..core.rng import seeded, step_seed
from ..engine.step import Step
from ..purity.probe import probed
from .losses import Forward, trainable_params
from .unrolled_optimizers import differentiable_update

Tensors = dict[str, Tensor]


def unroll(
    ctx: Context,
    batches: Iterable[Batch | tuple[Any, Any]],
    *,
    truncate: int | None = None,
    checkpoint: bool = False,
) -> Context:
    """Train on ``batches`` with a graph: the context after them, differentiable in ``ctx``.

    Gradients reach the parameters, buffers, optimizer state and hyperparameters of ``ctx`` (those that are tensors, as
    in ``ctx.with_hyperparameters(lr=torch.tensor(0.1, requires_grad=True))``), and the batches. It works under autograd
    and within `torch.func.grad` and `torch.func.vmap`. ``last_loss`` has a graph as well.

    The numbers are those of `train_step`, but for rounding, dropout included. No stages run, and callbacks see nothing.
    BatchNorm's running statistics have no gradient in torch; a parameter that the loss does not depend on has the
    gradient zero. To train on from the result, take `detached` of it.

    Args:
        batches: a `Batch` or a pair ``(x, y)`` per step.
        truncate: gradients reach back through the last so many steps only; the ones before cost no memory.
        checkpoint: keep the state at about √T of T steps alone and compute the rest anew while going back, for memory
            O(√T) and twice the time. For autograd (``backward``, `torch.autograd.grad`) only, not for `torch.func`.

    Raises:
        ValueError: an optimizer other than SGD, Adam and AdamW, a loop with ``accumulate`` > 1, a ``truncate`` below 1,
            or a context from inside a stage.

    Maclaurin et al., "Gradient-based hyperparameter optimization through reversible learning", 2015; Chen et al.,
    "Training deep nets with sublinear memory cost", 2016.

    >>> import functional_loop as fl
    >>> x = torch.linspace(-1, 1, 8).unsqueeze(1)
    >>> loop = fl.Loop(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss, fl.optimizer(torch.optim.SGD, lr=0.1),
    ...                train=fl.batches(x, 2 * x, batch_size=4), epochs=1)
    >>> lr = torch.tensor(0.1, requires_grad=True)
    >>> ctx = fl.unroll(fl.init(loop).with_hyperparameters(lr=lr), [(x, 2 * x)] * 3)
    >>> slope, = torch.autograd.grad(fl.loss_function(ctx, (x, 2 * x))(ctx.params), lr)
    >>> bool(slope < 0)
    True
    """
    check_boundary(ctx, "unroll")
    loop = ctx.loop
    if loop.accumulate > 1:
        raise ValueError("unroll makes an update for every batch, but the loop has accumulate > 1: use larger batches")
    if truncate is not None and (type(truncate) is not int or truncate < 1):
        raise ValueError(f"unroll: truncate must be a positive integer or None, not {truncate!r}")
    steps = _Steps(ctx, checkpoint)
    todo = [to_device(as_batch(batch), loop.device) for batch in batches]
    _probe(ctx, todo)
    split = max(0, len(todo) - truncate) if truncate is not None else 0
    if split:
        with torch.no_grad():
            before = steps(ctx, todo[:split])
        groups = ctx.optimizer_state["groups"]
        ctx = detached(before)
        ctx = evolve(ctx, optimizer_state={**ctx.optimizer_state, "groups": groups})
    return _in_segments(steps, ctx, todo[split:]) if checkpoint else steps(ctx, todo[split:])


def _probe(ctx: Context, batches: Sequence[Batch]) -> None:
    """Look once, by an ordinary step, whether a step depends on more than its context; not inside of transforms."""
    loop = ctx.loop
    real = batches and all(map(_has_memory, (*ctx.params.values(), batches[0].x)))
    if not real or "training" in probed(loop).done:
        return
    step, seed = Step(loop), step_seed(ctx.seed, ctx.global_step + 1)
    step.gradients(detached(ctx).params, detached(ctx).buffers, ctx.trainable, batches[0], seed, probe=True)


def _has_memory(tree: Any) -> bool:
    """Whether tensors are real ones: those of `torch.func` have no memory of their own."""
    try:
        tree_map(Tensor.data_ptr, tree)
    except RuntimeError:
        return False
    return True


def detached(ctx: Context) -> Context:
    """The context without graphs, to train on from or to save after `unroll`.

    >>> import functional_loop as fl
    >>> from functional_loop.examples.digits import loop
    >>> ctx = fl.init(loop()).with_hyperparameters(lr=torch.tensor(0.1, requires_grad=True))
    >>> fl.detached(ctx).optimizer_state["groups"][0]["lr"]
    tensor(0.1000)
    """
    made: Context = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, ctx)
    return made


def _in_segments(steps: _Steps, ctx: Context, batches: Sequence[Batch]) -> Context:
    """All steps, of which only the contexts between segments of about √T are kept."""
    size = max(1, math.isqrt(len(batches)))
    for start in range(0, len(batches), size):
        segment = batches[start : start + size]
        # Every step seeds its own randomness.
        ctx = checkpointed(steps, ctx, segment, use_reentrant=False, preserve_rng_state=False)
    return ctx


class _Steps:
    """Successive steps with a graph.

    Args:
        autograd: take the gradients of a step by `torch.autograd.grad`, which `torch.utils.checkpoint` can compute
            anew, and not by `torch.func.grad`, which composes with other transforms.
    """

    def __init__(self, ctx: Context, autograd: bool) -> None:
        self._forward = Forward(ctx)
        self._update = differentiable_update(ctx.loop.optimizer, ctx.params)
        self._gradients = _by_autograd if autograd else _by_func

    def __call__(self, ctx: Context, batches: Sequence[Batch]) -> Context:
        for batch in batches:
            ctx = self._step(ctx, batch)
        return ctx

    def _step(self, ctx: Context, batch: Batch) -> Context:
        seed = step_seed(ctx.seed, ctx.global_step + 1)

        def loss(moving: Tensors) -> tuple[Tensor, Tensors]:
            loss, _, buffers = self._forward({**ctx.params, **moving}, ctx.buffers, batch, True, None)
            return loss, buffers

        # Hooks of gradients may draw too.
        with seeded(seed):
            grads, value, buffers = self._gradients(loss, trainable_params(ctx))
        params, optimizer_state = self._update(grads, ctx.optimizer_state, ctx.params)
        return evolve(
            ctx,
            params=params,
            buffers=buffers,
            optimizer_state=optimizer_state,
            step=ctx.step + 1,
            global_step=ctx.global_step + 1,
            last_loss=value,
        )


Loss = Callable[[Tensors], tuple[Tensor, Tensors]]


def _by_func(loss: Loss, params: Tensors) -> tuple[Tensors, Tensor, Tensors]:
    grads, (value, buffers) = torch.func.grad_and_value(loss, has_aux=True)(params)
    return grads, value, buffers


def _by_autograd(loss: Loss, params: Tensors) -> tuple[Tensors, Tensor, Tensors]:
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = {name: p if p.requires_grad else p.detach().requires_grad_() for name, p in params.items()}
        value, buffers = loss(leaves)
        grads = torch.autograd.grad(value, tuple(leaves.values()), create_graph=again, materialize_grads=True)
    return dict(zip(leaves, grads, strict=True)), value, buffers
