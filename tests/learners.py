"""Learners, and data for them, that several test files share."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

import functional_loop as fl
from functional_loop.learner import TorchClassifier, TorchEstimator

FEATURES, ROWS = 3, 24


def data(rows: int = ROWS, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(seed).normal(size=(rows, FEATURES))
    return x, np.array(["no", "perhaps", "yes"])[x.argmax(1)]


X, Y = data()


def noisy(n_features: int, n_outputs: int) -> nn.Module:
    """Dropout and BatchNorm: what it becomes depends on every batch before."""
    return nn.Sequential(nn.Linear(n_features, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, n_outputs))


def classifier(**arguments: Any) -> TorchClassifier:
    return TorchClassifier(**{"network": noisy, "epochs": 3, "batch_size": 8, "device": "cpu", **arguments})


def same(a: TorchEstimator, b: TorchEstimator) -> Any:
    """Whether two learners hold the same bits, whatever their parts are called."""
    states = [(without_fingerprint(each.model_.final), without_fingerprint(each.model_.last_epoch)) for each in (a, b)]
    return fl.tree_equal(*states)


def without_fingerprint(state: Any) -> Any:
    return {name: value for name, value in state.items() if name != "fingerprint"} if state else state
