"""Accelerate: the loop by hand, with what ``Accelerator.prepare`` returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from .measure import adamw, loader, measure, network, updates


def default(epochs: int) -> Callable[[], int]:
    accelerator = Accelerator(cpu=True)
    model = network()
    plain = adamw(model)
    model, optimizer, batches = accelerator.prepare(model, plain, loader())
    return _loop(epochs, accelerator, model, optimizer, batches, plain)


def leanest(epochs: int) -> Callable[[], int]:
    """Batches need no preparation on one device."""
    accelerator = Accelerator(cpu=True)
    model = network()
    plain = adamw(model)
    model, optimizer = accelerator.prepare(model, plain)
    return _loop(epochs, accelerator, model, optimizer, loader(), plain)


def _loop(
    epochs: int, accelerator: Accelerator, model: Any, optimizer: Any, batches: Any, plain: torch.optim.Optimizer
) -> Callable[[], int]:
    def run() -> int:
        model.train()
        for _ in range(epochs):
            for x, y in batches:
                optimizer.zero_grad()
                accelerator.backward(F.cross_entropy(model(x), y))
                optimizer.step()
        return updates(plain)

    return run


if __name__ == "__main__":
    measure({"default": default, "leanest: the loader not prepared": leanest})
