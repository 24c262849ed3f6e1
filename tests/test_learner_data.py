"""What learners can be fitted to, and that they leave it as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from functional_loop.learner import TorchClassifier, TorchRegressor
from tests.learners import ROWS, X, Y, classifier, same


class Writing(nn.Module):
    """Writes to its input and to its buffer, also when it is evaluated."""

    calls: Tensor

    def __init__(self, n_features: int, n_outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(n_features, n_outputs)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x.mul_(2)) + self.calls.new_tensor([0.0, 1.0, 0.0]) * self.calls


def test_nothing_is_written_to_the_data_or_by_a_prediction() -> None:
    x = X.astype(np.float32)
    learner = classifier(network=Writing, validate=(x, Y)).fit(x, Y)
    first = learner.predict_proba(x)
    assert np.array_equal(learner.predict_proba(x), first)
    assert np.array_equal(x, X.astype(np.float32))


@pytest.mark.parametrize("make", [np.asarray, np.ndarray.tolist, torch.tensor, np.asfortranarray])
def test_data_may_be_arrays_lists_or_tensors(make: Callable[[Any], Any]) -> None:
    assert same(classifier().fit(make(X), Y), classifier().fit(X, Y))
    targets = TorchRegressor(epochs=1).fit(make(X), make(X[:, 0]))
    assert np.array_equal(targets.predict(make(X)), targets.predict(X))


def test_data_may_be_frames_whose_columns_are_remembered(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(X, columns=["a", "b", "c"])
    learner = classifier().fit(frame, pandas.Series(Y))
    assert np.array_equal(learner.predict(frame), classifier().fit(X, Y).predict(X))
    learner.save(tmp_path / "model")
    loaded = classifier().load(tmp_path / "model")
    assert loaded.feature_names_in_.tolist() == ["a", "b", "c"]
    with pytest.raises(ValueError, match="feature names"):
        loaded.predict(frame[["c", "b", "a"]])


def test_rows_may_have_several_dimensions() -> None:
    pictures = X[:, :, None, None].repeat(4, 2).repeat(4, 3)
    convolutions = lambda n_features, n_outputs: nn.Sequential(  # noqa: E731
        nn.Conv2d(n_features, 4, 3), nn.Flatten(), nn.Linear(16, n_outputs)
    )
    for network in (convolutions, TorchClassifier().network):
        learner = classifier(network=network).fit(pictures, Y)
        assert learner.predict_proba(pictures).shape == (ROWS, 3)
        with pytest.raises(ValueError, match=r"rows of shape \(3, 4, 3\)"):
            learner.predict(pictures[:, :, :, :3])


class Restless(nn.Linear):
    """Random, also when it is evaluated."""

    def __init__(self, n_features: int, n_outputs: int) -> None:
        super().__init__(n_features, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.randn(())


def test_predictions_are_a_function_of_the_model_alone() -> None:
    learner = classifier(network=Restless).fit(X, Y)
    before = torch.get_rng_state()
    first = learner.predict_proba(X)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    assert np.array_equal(learner.predict_proba(X), first)


def test_predictions_are_made_in_evaluation_mode() -> None:
    learner = classifier().fit(X, Y)
    first = learner.predict_proba(X)
    learner.model_.network.train()
    assert np.array_equal(learner.predict_proba(X), first)
