"""skorch: ``NeuralNetClassifier.fit``; no rows are kept back for validation, so that all train on the same."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import torch
from skorch import NeuralNetClassifier

from .measure import BATCH_SIZE, LEARNING_RATE, measure, network, rows, updates


def fit(epochs: int, **options: Any) -> Callable[[], int]:
    x, y = rows()
    net = NeuralNetClassifier(
        network,
        criterion=torch.nn.CrossEntropyLoss,
        optimizer=torch.optim.AdamW,
        lr=LEARNING_RATE,
        batch_size=BATCH_SIZE,
        iterator_train__shuffle=True,
        max_epochs=epochs,
        train_split=None,
        **options,
    )

    def run() -> int:
        with contextlib.redirect_stdout(io.StringIO()):
            net.fit(x, y)
        return updates(net.optimizer_)

    return run


if __name__ == "__main__":
    measure(
        {
            "default": fit,
            'leanest: callbacks="disable", verbose=0': lambda epochs: fit(epochs, callbacks="disable", verbose=0),
        }
    )
