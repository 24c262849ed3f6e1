"""Poutyne: ``Model.fit_generator`` over a loader."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from poutyne import Model

from .measure import adamw, loader, measure, network, updates


def fit(epochs: int, **options: Any) -> Callable[[], int]:
    module, batches = network(), loader()
    optimizer = adamw(module)
    model = Model(module, optimizer, F.cross_entropy)

    def run() -> int:
        model.fit_generator(batches, epochs=epochs, **options)
        return updates(optimizer)

    return run


if __name__ == "__main__":
    measure({"default": fit, "leanest: verbose=False": lambda epochs: fit(epochs, verbose=False)})
