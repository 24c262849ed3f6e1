"""Hypergradients: learning rate and weight decay, learnt by the gradient of the validation loss through training.

    python -m functional_loop.examples.hypergradient

Maclaurin, Duvenaud, Adams, "Gradient-based hyperparameter optimization through reversible learning", 2015.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import functional_loop as fl


def loop() -> fl.Loop:
    """Ridge regression by stochastic gradient descent: 40 rows of 30 features, of which three matter."""
    with fl.seeded(0):
        x = torch.randn(80, 30, dtype=torch.float64)
        y = x[:, :3].sum(1, keepdim=True) + torch.randn(80, 1, dtype=torch.float64)
    return fl.Loop(
        nn.Linear(30, 1).double(),
        nn.functional.mse_loss,
        fl.optimizer(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=1e-3),
        train=fl.batches(x[:40], y[:40], batch_size=20, shuffle=True),
        valid=fl.batches(x[40:], y[40:], batch_size=40),
        epochs=1,
    )


def validation_loss(ctx: fl.Context, log_lr: Tensor, log_decay: Tensor, steps: int = 40) -> Tensor:
    """The loss on the validation data after training with such hyperparameters, differentiable in both.

    Only about √steps of the states on the way are kept.

    >>> ctx = fl.init(loop(), seed=0)
    >>> logs = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (-4.0, -3.0)]
    >>> torch.autograd.gradcheck(lambda *logs: validation_loss(ctx, *logs), logs, rtol=1e-6, atol=1e-6)
    True
    """
    source, valid = ctx.loop.train, ctx.loop.valid
    assert valid is not None
    epochs = range(1, steps // len(source) + 1)
    batches = [batch for epoch in epochs for batch, _ in source.fetch(ctx.seed, epoch, 0, ())]
    ctx = ctx.with_hyperparameters(lr=log_lr.exp(), weight_decay=log_decay.exp())
    after = fl.unroll(ctx, batches, checkpoint=True)
    held_out, _ = next(valid.fetch(ctx.seed, 1, 0, ()))
    return fl.loss_function(after, held_out)(after.params)


def main() -> None:
    """Twenty steps of descent in the hyperparameters."""
    ctx = fl.init(loop(), seed=0)
    logs = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (-6.0, -7.0)]
    adam = torch.optim.Adam(logs, lr=0.2)
    for i in range(21):
        adam.zero_grad()
        loss = validation_loss(ctx, logs[0], logs[1])
        torch.autograd.backward(loss)
        if i % 5 == 0:
            lr, decay = (log.exp().item() for log in logs)
            print(f"step {i:>2}: validation loss {loss.item():.4f} with lr {lr:.4f}, weight decay {decay:.4f}")
        adam.step()


if __name__ == "__main__":
    main()
