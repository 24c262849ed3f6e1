"""MAML: an initialisation from which a few steps of training are enough, learnt by gradients through these steps.

    python -m functional_loop.examples.maml

Finn, Abbeel, Levine, "Model-agnostic meta-learning for fast adaptation of deep networks", 2017, section 5.1: sine waves
of random amplitude and phase, of which ten points are known.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import functional_loop as fl

Tensors = dict[str, Tensor]


def loop(lr: float = 0.01) -> fl.Loop:
    """The inner loop: a small network, trained by plain gradient descent on the points of one sine wave."""
    with fl.seeded(0):
        network = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
    unused = torch.zeros(1, 1)
    return fl.Loop(
        network, nn.functional.mse_loss, fl.optimizer(torch.optim.SGD, lr=lr), fl.batches(unused, unused), epochs=1
    )


def tasks(n: int, seed: int, points: int = 10) -> tuple[Tensor, Tensor]:
    """``n`` sine waves, each at ``points`` places to train on and as many to test with: ``[n, 2, points, 1]``."""
    with fl.seeded(fl.fold_in(seed, "tasks")):
        amplitude, phase = 0.1 + 4.9 * torch.rand(n, 1, 1, 1), math.pi * torch.rand(n, 1, 1, 1)
        x = 10 * torch.rand(n, 2, points, 1) - 5
    return x, amplitude * torch.sin(x - phase)


def adapted_loss(ctx: fl.Context, params: Tensors, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """The loss on the second half of a task after training on its first half from ``params``."""
    after = fl.unroll(fl.evolve(ctx, params=params), [(x[0], y[0])] * steps)
    return fl.loss_function(after, (x[1], y[1]))(after.params)


def meta_train(ctx: fl.Context, iterations: int, steps: int = 1, n: int = 25) -> fl.Context:
    """``ctx`` with parameters from which ``steps`` steps of training do well on average.

    >>> ctx = fl.init(loop(), seed=0)
    >>> x, y = tasks(100, seed=-1)
    >>> def mean_loss(ctx):
    ...     losses = torch.func.vmap(lambda x, y: adapted_loss(ctx, ctx.params, x, y, 5))(x, y)
    ...     return losses.mean().item()
    >>> mean_loss(meta_train(ctx, 100)) < mean_loss(ctx)
    True
    """
    adam = fl.optimizer(torch.optim.Adam, lr=0.002)
    params, state = ctx.params, adam.init(ctx.params)

    def mean_loss(params: Tensors, x: Tensor, y: Tensor) -> Tensor:
        losses: Tensor = torch.func.vmap(lambda x, y: adapted_loss(ctx, params, x, y, steps))(x, y)
        return losses.mean()

    for i in range(iterations):
        grads = torch.func.grad(mean_loss)(params, *tasks(n, fl.fold_in(ctx.seed, "iteration", i)))
        params, state = adam.update(grads, state, params)
    return fl.evolve(ctx, params=params)


def main() -> None:
    """Compare a learnt initialisation with a random one, after up to ten steps on new sine waves."""
    start = fl.init(loop(), seed=0)
    learnt = meta_train(start, 2000)
    x, y = tasks(200, seed=-1)
    for steps in (0, 1, 5, 10):
        means = [
            torch.func.vmap(lambda x, y: adapted_loss(ctx, ctx.params, x, y, steps))(x, y).mean().item()
            for ctx in (start, learnt)
        ]
        print(f"after {steps:>2} steps: random {means[0]:.3f}, learnt {means[1]:.3f}")


if __name__ == "__main__":
    main()
