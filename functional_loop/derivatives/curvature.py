"""The curvature of the loss: products with its Hessian, and the directions in which it bends most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.batch import Batch
from ..core.context import Context
from ..core.rng import fold_in
from .losses import Tensors, loss_function, trainable_params

Product = Callable[[Tensors], Tensors]


def hessian_vector_product(
    ctx: Context, batch: Batch | tuple[Any, Any], vector: Tensors, *, training: bool = False
) -> Tensors:
    """The Hessian of the loss of ``batch`` in the trainable parameters, times ``vector``; the matrix is never made.

    Args:
        vector: a tensor for every trainable parameter, of its shape.
        training: see `loss_function`.

    Raises:
        ValueError: ``vector`` has other names than the trainable parameters.

    Pearlmutter, "Fast exact multiplication by the Hessian", 1994.

    >>> import functional_loop as fl
    >>> x = torch.tensor([[1.0], [2.0]])
    >>> loop = fl.Loop(torch.nn.Linear(1, 1, bias=False), torch.nn.functional.mse_loss,
    ...                fl.optimizer(torch.optim.SGD), train=fl.batches(x, x), epochs=1)
    >>> fl.hessian_vector_product(fl.init(loop), (x, x), {"weight": torch.ones(1, 1)})
    {'weight': tensor([[5.]])}
    """
    if vector.keys() != trainable_params(ctx).keys():
        raise ValueError(
            f"the vector is for {sorted(vector)}, but the trainable parameters are {sorted(ctx.trainable)}"
        )
    return _product(ctx, batch, training)(vector)


def _product(ctx: Context, batch: Batch | tuple[Any, Any], training: bool) -> Product:
    # Reverse over reverse: forward mode knows fewer operators.
    gradient = torch.func.grad(loss_function(ctx, batch, training=training))
    pull_back = torch.func.vjp(gradient, trainable_params(ctx))[1]

    def product(vector: Tensors) -> Tensors:
        (result,) = pull_back(vector)
        return {name: tensor.detach() for name, tensor in result.items()}

    return product


def top_eigenvalues(
    ctx: Context,
    batches: Sequence[Batch | tuple[Any, Any]],
    k: int = 1,
    *,
    steps: int = 30,
    training: bool = False,
) -> tuple[Tensor, list[Tensors]]:
    """The ``k`` largest eigenvalues of the Hessian of the mean loss of ``batches``, and their eigenvectors.

    By the method of Lanczos with full reorthogonalisation, which needs ``steps`` Hessian-vector products with every
    batch, and keeps as many vectors of the size of the parameters, in float64. The start is a function of ``ctx.seed``.
    With as many steps as there are parameters the result is exact; more than 30 are rarely needed for the first few
    eigenvalues.

    Returns:
        The eigenvalues, a float64 tensor of shape ``(k,)``, largest first (fewer where the start vector lies in a
        smaller invariant subspace), and of each a dict of tensors by parameter, of norm 1.

    Raises:
        ValueError: no batches, or not ``1 <= k <= steps``.

    Lanczos, 1950; Ghorbani, Krishnan, Xiao, "An investigation into neural net optimization via Hessian eigenvalue
    density", 2019.

    >>> import functional_loop as fl
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    >>> loop = fl.Loop(torch.nn.Linear(2, 1, bias=False), torch.nn.functional.mse_loss,
    ...                fl.optimizer(torch.optim.SGD), train=fl.batches(x, x[:, :1]), epochs=1)
    >>> values, vectors = fl.top_eigenvalues(fl.init(loop), [(x, x[:, :1])], k=2)
    >>> [round(value, 5) for value in values.tolist()]
    [9.0, 1.0]
    """
    if not batches:
        raise ValueError("top_eigenvalues needs at least one batch")
    if not 1 <= k <= steps:
        raise ValueError(f"top_eigenvalues: k must be from 1 to steps={steps}, not {k!r}")
    params = trainable_params(ctx)
    products = [_product(ctx, batch, training) for batch in batches]

    def mean_product(flat: Tensor) -> Tensor:
        vector = _shaped(flat, params)
        return torch.stack([_flat(product(vector)) for product in products]).mean(0)

    generator = torch.Generator().manual_seed(fold_in(ctx.seed, "lanczos"))
    size = sum(p.numel() for p in params.values())
    start = torch.randn(size, generator=generator, dtype=torch.float64)
    values, vectors = _lanczos(mean_product, start.to(ctx.loop.device), min(steps, size))
    order = values.argsort(descending=True)[:k]
    return values[order], [_shaped(vector, params) for vector in vectors[order]]


def _lanczos(product: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Ritz values ``(m,)`` and vectors ``(m, size)`` of a symmetric matrix, with ``m <= steps``."""
    basis, diagonal, beside = [start / start.norm()], [], []
    for _ in range(steps):
        image = product(basis[-1])
        diagonal.append(torch.dot(image, basis[-1]))
        known = torch.stack(basis)
        # Twice is enough against rounding.
        for _ in range(2):
            image = image - known.T @ (known @ image)
        norm = image.norm()
        if len(basis) == steps or norm <= 1e-10 * max(1.0, abs(diagonal[0].item())):
            break
        beside.append(norm)
        basis.append(image / norm)
    tridiagonal = torch.diag(torch.stack(diagonal))
    if beside:
        off = torch.diag(torch.stack(beside), 1)
        tridiagonal = tridiagonal + off + off.T
    values, small = torch.linalg.eigh(tridiagonal)
    return values, small.T @ torch.stack(basis)


def _flat(tensors: Tensors) -> Tensor:
    return torch.cat([tensor.flatten().double() for tensor in tensors.values()])


def _shaped(flat: Tensor, like: Tensors) -> Tensors:
    parts = torch.split(flat, [tensor.numel() for tensor in like.values()])
    return {n: part.reshape(t.shape).to(t.dtype) for part, (n, t) in zip(parts, like.items(), strict=True)}
