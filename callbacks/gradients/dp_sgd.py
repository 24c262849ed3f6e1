"""Differential privacy: gradients of single rows are clipped, and noise is added to their sum."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...core.callback import Callback
from ...core.context import Context
from ...core.record import did_you_mean, evolve
from ...core.rng import fold_in
from ...derivatives.per_sample import check_rows_are_separate, per_sample_gradients, per_sample_norms
from ...engine.template import template
from ..checks import check_integer, check_number
from ..registry.packages import require
from .clipping import check_optimizer

_BEFORE_ALL = -300.0


def dp_sgd(
    max_grad_norm: float,
    noise_multiplier: float,
    chunk_size: int | None = None,
    id: str = "dp_sgd",
) -> Callback:
    """Makes the gradients of every batch differentially private.

    In ``after_backward``, before all other callbacks (weight -300), the gradients become the sum over rows of the
    gradient of each, scaled down to a norm of at most ``max_grad_norm``, plus normal noise of standard deviation
    ``noise_multiplier * max_grad_norm``, over the number of rows. The loss must be a mean over rows. The gradients of
    the rows are computed beside those of the batch, with dropout of their own in every row.

    Only the parameters are private: the losses and the scores in the context are not. The noise is a function of the
    seed, so that runs resume exactly: keep the seed secret, and take one that can't be guessed. `dp_epsilon` tells how
    much privacy is left. Hyperparameters and the choice of a run by its scores leak too.

    Args:
        max_grad_norm: the largest norm of the gradient of a row, over all parameters as one vector.
        noise_multiplier: of the noise, in units of ``max_grad_norm``.
        chunk_size: rows at a time, to bound memory; see `per_sample_gradients`.
        id: the name of the slot, unique in a loop.

    Raises:
        ValueError: an argument that can't work; in `init`: BatchNorm, an optimizer that evaluates the gradients itself,
            or a loop that accumulates gradients.

    Resuming:
        The number of steps made is part of the context, and the noise of a step a function of its place.

    Abadi et al., "Deep learning with differential privacy", 2016.

    >>> import functional_loop as fl
    >>> from torch import nn
    >>> from functional_loop.callbacks.gradients.dp_sgd import dp_sgd
    >>> from functional_loop.examples.digits import loop
    >>> network = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    >>> private = fl.evolve(loop(), network=network, callbacks=[dp_sgd(1.0, noise_multiplier=1.1)])
    >>> fl.train(fl.init(private), steps=3).callbacks["dp_sgd"]
    {'steps': 3}
    """
    check_number("dp_sgd", "max_grad_norm", max_grad_norm, least=0)
    check_number("dp_sgd", "noise_multiplier", noise_multiplier, least=0)
    if chunk_size is not None:
        check_integer("dp_sgd", "chunk_size", chunk_size, least=1)

    def start(ctx: Context) -> dict[str, int]:
        check_optimizer(ctx)
        check_rows_are_separate(template(ctx.loop), "dp_sgd")
        if ctx.loop.accumulate > 1:
            raise ValueError(
                "dp_sgd: the noise is for one batch, not for a window (accumulate > 1): use larger batches"
            )
        return {"steps": 0}

    def make_private(ctx: Context) -> Context:
        gradients = per_sample_gradients(ctx, ctx.batch, training=True, chunk_size=chunk_size)
        factors = (max_grad_norm / per_sample_norms(gradients).clamp(min=1e-12)).clamp(max=1.0)
        generator = torch.Generator().manual_seed(fold_in(ctx.seed, f"noise of {id}", ctx.global_step))

        def private(grad: Tensor) -> Tensor:
            noise = torch.randn(grad.shape[1:], generator=generator, dtype=grad.dtype).to(grad.device)
            total: Tensor = torch.tensordot(factors, grad, dims=1)
            return (total + noise_multiplier * max_grad_norm * noise) / len(grad)

        steps = {"steps": ctx.callbacks[id]["steps"] + 1}
        grads = {name: private(grad) for name, grad in gradients.items()}
        return evolve(ctx.with_callback_state(id, steps), grads=grads)

    return Callback(
        id,
        init=start,
        kind="dp_sgd",
        weight=_BEFORE_ALL,
        settings={"max_grad_norm": max_grad_norm, "noise_multiplier": noise_multiplier, "chunk_size": chunk_size},
        source=noise_multiplier,
        vectorises=False,
        after_backward=make_private,
    )


def dp_epsilon(ctx: Context, delta: float, id: str = "dp_sgd") -> float:
    """The ε of the (ε, δ)-differential privacy of the parameters in ``ctx``, by the Rényi accountant of Opacus.

    It counts every step as one of a batch to which every row belongs with probability ``batch_size / rows``,
    independently (Poisson sampling), as most reports do. Batches of shuffled rows are not quite that, and what is known
    to hold for them is weaker.

    Args:
        delta: usually well below one over the number of rows.
        id: of the callback.

    Raises:
        ImportError: Opacus is not installed (the extra ``dp``).
        KeyError: the loop has no such callback.
        ValueError: the number of rows is not known, or they are drawn with replacement, or ``delta`` is not between 0
            and 1.

    Mironov, Talwar, Zhang, "Rényi differential privacy of the sampled Gaussian mechanism", 2019.
    """
    check_number("dp_epsilon", "delta", delta, least=0, most=1)
    if id not in ctx.callbacks:
        raise KeyError(f"no callback {id!r} in this loop{did_you_mean(id, ctx.callbacks)}")
    steps, noise = ctx.callbacks[id]["steps"], next(c.source for c in ctx.loop.callbacks if c.id == id)
    data = ctx.loop.train.fingerprint()
    if data.get("weighted") or data.get("bootstrap"):
        raise ValueError("dp_epsilon: rows that are drawn with replacement are in the data more than once")
    rows, batch_size = (data.get(name) for name in ("length", "batch_size"))
    if rows is None or batch_size is None:
        raise ValueError("dp_epsilon: the number of rows, or of rows in a batch, of the training data is not known")
    if not steps or not noise:
        return 0.0 if not steps else math.inf
    require("opacus", "dp_epsilon")
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(noise, min(1.0, batch_size / rows), steps)]
    return float(accountant.get_epsilon(delta))
