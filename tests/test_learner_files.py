"""Learners as files: every bit, no pickle, and a refusal of what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.exceptions import NotFittedError

import functional_loop as fl
from functional_loop.learner import TorchClassifier, TorchRegressor
from tests.learners import FEATURES, ROWS, X, Y, classifier, noisy, same


def test_save_and_load_keep_every_bit_and_the_way_on(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"validate": 0.25, "callbacks": ["history"], "patience": 5}
    learner = classifier(**arguments).fit(X, Y)
    learner.save(tmp_path / "model.safetensors")
    loaded = classifier(**arguments).load(tmp_path / "model.safetensors")
    assert same(loaded, learner)
    assert fl.tree_equal(dict(loaded.model_.network.state_dict()), dict(learner.model_.network.state_dict()))
    assert (loaded.classes_.tolist(), loaded.classes_.dtype) == (learner.classes_.tolist(), learner.classes_.dtype)
    assert np.array_equal(loaded.predict_proba(X), learner.predict_proba(X))
    assert loaded.model_.callbacks["history"] == learner.model_.callbacks["history"]
    assert same(loaded.partial_fit(X, Y, epochs=2), learner.partial_fit(X, Y, epochs=2))


def test_frozen_parameters_are_frozen_in_a_loaded_network(tmp_path: Path) -> None:
    module = noisy(FEATURES, 3)
    module[0].requires_grad_(False)
    learner = classifier(network=module, epochs=1).fit(X, Y)
    learner.save(tmp_path / "model")
    for fitted in (learner, classifier().load(tmp_path / "model")):
        frozen = {name for name, p in fitted.model_.network.named_parameters() if not p.requires_grad}
        assert frozen == {"0.weight", "0.bias"}


@pytest.mark.parametrize("shape", [(), (1,), (2,)])
def test_regressors_predict_targets_of_the_shape_they_saw(shape: tuple[int, ...], tmp_path: Path) -> None:
    targets = np.ones((ROWS, *shape))
    learner = TorchRegressor(epochs=1).fit(X, targets)
    assert learner.predict(X[:5]).shape == (5, *shape)
    learner.save(tmp_path / "model")
    assert np.array_equal(TorchRegressor().load(tmp_path / "model").predict(X), learner.predict(X))
    with pytest.raises(ValueError, match="y has rows of shape"):
        learner.partial_fit(X, np.ones((ROWS, 3)))


@pytest.mark.parametrize("labels", [[0, 5], [1.0, 2.0], [False, True], ["a", "b"]])
def test_labels_of_any_type_come_back_from_a_file(labels: list[Any], tmp_path: Path) -> None:
    learner = classifier(epochs=1).fit(X, np.array(labels)[(X[:, 0] > 0).astype(int)])
    learner.save(tmp_path / "model")
    loaded = classifier().load(tmp_path / "model")
    assert loaded.classes_.tolist() == labels
    assert loaded.predict(X).dtype == learner.predict(X).dtype


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with pytest.raises(NotFittedError):
        classifier().save(path)
    classifier(epochs=1).fit(X, Y).save(path)
    with pytest.raises(fl.StateDictError, match="does not hold a regressor"):
        TorchRegressor().load(path)
    with pytest.raises(fl.StateDictError, match=r"1\.weight: .* in what was saved"):
        TorchClassifier().load(path)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(fl.CheckpointError, match="damaged"):
        classifier().load(path)
