"""Lightning: ``Trainer.fit`` of a ``LightningModule``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning
import torch
import torch.nn.functional as F

from .measure import adamw, loader, measure, network, updates


class Module(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def training_step(self, batch: Any, batch_index: int) -> torch.Tensor:
        x, y = batch
        return F.cross_entropy(self.network(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self)


def fit(epochs: int, **options: Any) -> Callable[[], int]:
    module, batches = Module(), loader()
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", **options)

    def run() -> int:
        trainer.fit(module, batches)
        return updates(trainer.optimizers[0])

    return run


if __name__ == "__main__":
    measure({"default": fit, "leanest: barebones=True": lambda epochs: fit(epochs, barebones=True)})
