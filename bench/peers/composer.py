"""Composer: ``Trainer.fit`` of a ``ComposerModel``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from composer import Trainer
from composer.models import ComposerClassifier, ComposerModel

from .measure import adamw, loader, measure, network, updates


class Plain(ComposerModel):  # type: ignore[misc]
    """Without metrics."""

    def __init__(self) -> None:
        super().__init__()
        self.module = network()

    def forward(self, batch: Any) -> torch.Tensor:
        return self.module(batch[0])  # type: ignore[no-any-return]

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return F.cross_entropy(outputs, batch[1])


def default(epochs: int) -> Callable[[], int]:
    return _fit(ComposerClassifier(network(), num_classes=2), epochs)


def leanest(epochs: int) -> Callable[[], int]:
    return _fit(Plain(), epochs, progress_bar=False)


def _fit(model: Any, epochs: int, **options: Any) -> Callable[[], int]:
    optimizer = adamw(model)
    trainer = Trainer(
        model=model,
        train_dataloader=loader(),
        optimizers=optimizer,
        max_duration=f"{epochs}ep",
        device="cpu",
        **options,
    )

    def run() -> int:
        trainer.fit()
        return updates(optimizer)

    return run


if __name__ == "__main__":
    measure({"default": default, "leanest: no metrics, progress_bar=False": leanest})
