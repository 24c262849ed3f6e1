"""Ignite: an ``Engine`` run over a loader."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from ignite.engine import Engine, create_supervised_trainer

from .measure import adamw, loader, measure, network, updates


def default(epochs: int) -> Callable[[], int]:
    model, batches = network(), loader()
    optimizer = adamw(model)
    trainer = create_supervised_trainer(model, optimizer, F.cross_entropy)

    def run() -> int:
        trainer.run(batches, max_epochs=epochs)
        return updates(optimizer)

    return run


def leanest(epochs: int) -> Callable[[], int]:
    model, batches = network(), loader()
    optimizer = adamw(model)
    model.train()

    def step(engine: Engine, batch: Any) -> None:
        x, y = batch
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    trainer = Engine(step)

    def run() -> int:
        trainer.run(batches, max_epochs=epochs)
        return updates(optimizer)

    return run


if __name__ == "__main__":
    measure({"default": default, "leanest: Engine of a plain step": leanest})
