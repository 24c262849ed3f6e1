"""The tensor work of a training step and nothing else: the floor under every loop."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .workloads import Loss


def train(
    model: nn.Module,
    loss_fn: Loss,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    epochs: int,
) -> None:
    """Train ``model`` in place by the kernel of ``AdamW(fused=True)``, whose hyperparameters are the optimizer's.

    A step swaps the parameters into the module, calls it and the loss, takes gradients, and calls the kernel.
    """
    model.train()
    params: list[Tensor] = list(model.parameters())
    slots = [(m._parameters, key, p) for m in model.modules() for key, p in m._parameters.items()]
    means = [torch.zeros_like(p) for p in params]
    squares = [torch.zeros_like(p) for p in params]
    step = torch.tensor(0.0)
    steps = [step] * len(params)
    group = optimizer.param_groups[0]
    beta1, beta2 = group["betas"]
    kernel = {
        "amsgrad": False,
        "lr": group["lr"],
        "beta1": beta1,
        "beta2": beta2,
        "weight_decay": group["weight_decay"],
        "eps": group["eps"],
        "maximize": False,
    }
    for _ in range(epochs):
        for x, y in batches:
            for container, key, param in slots:
                container[key] = param
            grads = torch.autograd.grad(loss_fn(model(x), y), params)
            step += 1
            with torch.no_grad():
                # The kernel ignores strides.
                torch._fused_adamw_(params, [g.contiguous() for g in grads], means, squares, [], steps, **kernel)
