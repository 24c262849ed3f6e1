"""Gradients of every row of a batch, and what they tell about the noise of the mean."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.batch import Batch, as_batch, to_device
from ..core.context import Context, check_context
from ..core.record import leaves_with_paths, tree_map
from ..core.rng import fold_in, step_seed
from ..engine.template import template
from .losses import Forward, Tensors, trainable_params


def per_sample_gradients(
    ctx: Context, batch: Batch | tuple[Any, Any], *, training: bool = False, chunk_size: int | None = None
) -> Tensors:
    """The gradient of the loss of every row alone, by parameter: tensors of shape ``(rows, *parameter)``.

    The loss is evaluated on batches of one row by `torch.func.vmap`. For a loss that is a mean over rows, and a network
    that does not mix them, the mean of these gradients is the gradient of the batch.

    Args:
        batch: a `Batch` or a pair ``(x, y)`` of tensors, or tuples or dicts of tensors, whose first axis is the rows.
        training: whether the network is in training mode; every row then has dropout of its own, a function of the
            seed and of ``ctx.global_step``.
        chunk_size: rows at a time, to bound the memory of the activations; by default all. What a row draws depends on
            it.

    Raises:
        ValueError: a network that mixes rows or keeps running statistics (BatchNorm) in training mode; there are no
            trainable parameters, or no rows.

    >>> import functional_loop as fl
    >>> from functional_loop.examples.digits import loop
    >>> ctx = fl.init(loop(), seed=0)
    >>> batch, _ = next(loop().train.fetch(seed=0, epoch=1, start=0, state=()))
    >>> fl.per_sample_gradients(ctx, batch, chunk_size=16)["0.weight"].shape
    torch.Size([64, 32, 1, 3, 3])
    """
    check_context(ctx, "per_sample_gradients")
    if training:
        check_rows_are_separate(template(ctx.loop), "per_sample_gradients")
    if not ctx.trainable:
        raise ValueError("per_sample_gradients: no parameter is trainable, see ctx.trainable")
    forward, batch = Forward(ctx), to_device(as_batch(batch), ctx.loop.device)
    rows = _count_rows(batch)
    if chunk_size is not None and (type(chunk_size) is not int or chunk_size < 1):
        raise ValueError(f"per_sample_gradients: chunk_size must be a positive integer or None, not {chunk_size!r}")
    params, place = trainable_params(ctx), step_seed(ctx.seed, ctx.global_step)

    def of_rows(start: int, end: int) -> Tensors:
        def loss(params: Tensors, x: Any, y: Any) -> Tensor:
            row = tree_map(lambda tensor: tensor.unsqueeze(0), (x, y))
            return forward({**ctx.params, **params}, ctx.buffers, Batch(*row), training, seed)[0]

        seed = fold_in(place, "rows", start)
        x, y = tree_map(lambda tensor: tensor[start:end], (batch.x, batch.y))
        made: Tensors = torch.func.vmap(torch.func.grad(loss), (None, 0, 0), randomness="different")(params, x, y)
        return made

    size = rows if chunk_size is None else chunk_size
    with torch.no_grad():
        chunks = [of_rows(start, start + size) for start in range(0, rows, size)]
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in params}


def _count_rows(batch: Batch) -> int:
    rows = next(len(leaf) for _, leaf in leaves_with_paths(batch.x))
    if not rows:
        raise ValueError("per_sample_gradients: the batch has no rows")
    return rows


def check_rows_are_separate(module: nn.Module, owner: str) -> None:
    """Refuse networks in which, while training, a row has an effect on others, with a ValueError."""
    parts = [(name, part) for name, part in module.named_modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    for name, part in parts:
        raise ValueError(
            f"{owner}: {type(part).__name__} at {name or 'the root'!r} mixes the rows of a batch, so that no gradient "
            "is of one row alone; use GroupNorm or LayerNorm"
        )


def per_sample_norms(gradients: Tensors) -> Tensor:
    """The norm of every row's gradient, over all parameters as one vector, of shape ``(rows,)``.

    >>> per_sample_norms({"weight": torch.tensor([[3.0, 0.0], [0.0, 1.0]]), "bias": torch.tensor([4.0, 0.0])})
    tensor([5., 1.])
    """
    squares = [grad.flatten(1).square().sum(1) if grad.dim() > 1 else grad.square() for grad in gradients.values()]
    return torch.stack(squares).sum(0).sqrt()


def gradient_noise_scale(
    ctx: Context, batch: Batch | tuple[Any, Any], *, training: bool = False, chunk_size: int | None = None
) -> dict[str, Tensor]:
    """How noisy the gradient of one row is: the batch size about which larger batches stop to pay.

    Returns:
        ``noise_scale``: trace of the covariance of a row's gradient over the squared norm of the true gradient, the
        "simple noise scale"; ``variance`` and ``squared_norm``: the two, estimated without bias, scalar tensors. On
        few rows the estimate of ``squared_norm`` can be negative, and the noise scale with it: then the noise is larger
        than the batch can tell, and means over several batches of the two must be taken before the quotient.

    The arguments and errors are those of `per_sample_gradients`; at least two rows are needed (ValueError).

    McCandlish, Kaplan, Amodei, "An empirical model of large-batch training", 2018, equation 2.9 and appendix A.

    >>> import functional_loop as fl
    >>> from functional_loop.examples.digits import loop
    >>> ctx = fl.init(loop(), seed=0)
    >>> batch, _ = next(loop().train.fetch(seed=0, epoch=1, start=0, state=()))
    >>> sorted(fl.gradient_noise_scale(ctx, batch))
    ['noise_scale', 'squared_norm', 'variance']
    """
    gradients = per_sample_gradients(ctx, batch, training=training, chunk_size=chunk_size)
    rows = len(next(iter(gradients.values())))
    if rows < 2:
        raise ValueError("gradient_noise_scale needs at least two rows: one has no spread")
    of_rows = per_sample_norms(gradients).square().mean()
    of_mean = per_sample_norms({name: grad.mean(0, keepdim=True) for name, grad in gradients.items()}).square()[0]
    variance = (of_rows - of_mean) * rows / (rows - 1)
    squared_norm = of_mean - variance / rows
    return {"noise_scale": variance / squared_norm, "variance": variance, "squared_norm": squared_norm}
