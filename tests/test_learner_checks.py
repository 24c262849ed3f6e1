"""scikit-learn's own suite for estimators; no check is left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from functional_loop.learner import TorchClassifier, TorchRegressor

# Rows predicted one by one are the same to the last bit in whatever company, as one check asks of float64 predictions.
LEARNERS = [
    learner(epochs=15, batch_size=16, batch_size_predict=1).set_params(optimizer__lr=0.01)
    for learner in (TorchClassifier, TorchRegressor)
]


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@parametrize_with_checks(LEARNERS)
def test_the_checks_of_scikit_learn(estimator: Any, check: Callable[[Any], None]) -> None:
    check(estimator)
