"""Keras on torch: ``Model.fit`` of Keras layers with the Keras AdamW."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

import keras

from .measure import BATCH_SIZE, LEARNING_RATE, measure, rows


def fit(epochs: int, verbose: Any = "auto", **options: Any) -> Callable[[], int]:
    x, y = (tensor.numpy() for tensor in rows())
    layers = keras.layers
    relu = [layers.Dense(64, activation="relu") for _ in range(2)]
    model = keras.Sequential([keras.Input((20,)), *relu, layers.Dense(2)])
    optimizer = keras.optimizers.AdamW(LEARNING_RATE, weight_decay=0.01)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, **options)

    def run() -> int:
        model.fit(x, y, batch_size=BATCH_SIZE, epochs=epochs, verbose=verbose)
        return int(optimizer.iterations)

    return run


if __name__ == "__main__":
    measure({"default": fit, "leanest: verbose=0": lambda epochs: fit(epochs, verbose=0)})
