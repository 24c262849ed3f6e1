"""The parameters of the learners: by name, in searches, and refused where they can't work."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

import functional_loop as fl
from functional_loop.callbacks import history
from functional_loop.callbacks.control.checkpoint import CallbackSetCheckpoint
from functional_loop.callbacks.control.early_stopping import early_stopping
from functional_loop.callbacks.objects.callback_set import CallbackSet
from functional_loop.callbacks.registry.descriptor import TorchCallback
from functional_loop.learner import TorchClassifier, TorchRegressor
from tests.learners import same

X = np.random.default_rng(0).normal(size=(24, 3))
Y = X.argmax(1)


def adjustable(n_features: int, n_outputs: int, width: int, depth: int = 1) -> nn.Module:
    layers = [nn.Linear(n_features, width), *(nn.Linear(width, width) for _ in range(depth - 1))]
    return nn.Sequential(*layers, nn.Linear(width, n_outputs))


class Net(nn.Linear):
    def __init__(self, n_features: int, n_outputs: int) -> None:
        super().__init__(n_features, n_outputs)


def test_parameters_of_the_parts_are_parameters_of_the_learner() -> None:
    params = TorchClassifier(optimizer=fl.optimizer(torch.optim.SGD, lr=0.5), callbacks=["history"]).get_params()
    assert (params["network__hidden"], params["network__dropout"]) == ((100,), 0.0)
    assert (params["optimizer__lr"], params["optimizer__momentum"]) == (0.5, 0)
    assert params["loss__label_smoothing"] == 0.0
    assert params["callbacks__history"] == "history"
    assert not {"network__n_outputs", "network__input_shape", "optimizer__params", "loss__input"} & params.keys()


def test_what_is_set_is_what_is_got_and_used() -> None:
    learner = TorchClassifier(adjustable, optimizer=torch.optim.SGD, epochs=1)
    new = {"network__width": 7, "network__depth": 2, "optimizer__lr": 0.25, "loss__label_smoothing": 0.1, "epochs": 2}
    assert learner.set_params(**new) is learner
    params = learner.get_params()
    assert {name: params[name] for name in new} == new
    learner.fit(X, Y)
    assert [p.shape[0] for p in learner.model_.network.parameters() if p.dim() > 1] == [7, 7, 3]
    assert learner.model_.final["optimizer"]["groups"][0]["lr"] == 0.25
    plain = clone(learner).set_params(loss=None).fit(X, Y)
    assert not np.array_equal(plain.predict_proba(X), learner.predict_proba(X))


def test_an_optimizer_keeps_its_groups_when_a_hyperparameter_is_set() -> None:
    groups = [{"params": "*.bias", "weight_decay": 0.0}]
    learner = TorchClassifier(optimizer=fl.optimizer(torch.optim.AdamW, lr=0.1, groups=groups), epochs=1)
    learner.set_params(optimizer__lr=0.2).fit(X, Y)
    found = learner.model_.final["optimizer"]["groups"]
    assert [(group["lr"], group["weight_decay"]) for group in found] == [(0.2, 0.0), (0.2, 0.01)]


def test_setting_changes_nothing_that_was_given() -> None:
    given: dict[str, Any] = {
        "network": functools.partial(adjustable, width=3),
        "optimizer": fl.optimizer(torch.optim.SGD, lr=0.1),
        "callbacks": [TorchCallback(early_stopping, values={"patience": 3})],
    }
    TorchClassifier(**given).set_params(
        network__width=5,
        optimizer__lr=0.7,
        callbacks__early_stopping__patience=9,
        callbacks__early_stopping__min_delta=1.0,
    )
    assert given["network"].keywords == {"width": 3}
    assert given["optimizer"].hyperparameters == {"lr": 0.1}
    assert dict(given["callbacks"][0].values) == {"patience": 3}


def test_callbacks_are_reached_by_their_ids(tmp_path: Path) -> None:
    checkpoint = TorchCallback(CallbackSetCheckpoint, id="checkpoint")
    learner = TorchClassifier(epochs=2, callbacks=[history(), checkpoint])
    learner.set_params(callbacks__checkpoint__path=tmp_path, callbacks__checkpoint__keep_last=1).fit(X, Y)
    assert learner.get_params()["callbacks__checkpoint__path"] == tmp_path
    assert fl.CheckpointStore(tmp_path).steps() == [2]
    learner.set_params(callbacks__checkpoint=history("other")).fit(X, Y)
    assert learner.model_.callbacks.keys() == {"history", "other"}


def test_callbacks_of_every_kind_can_be_given() -> None:
    class CallbackSetCounting(CallbackSet):
        n = 0

        def on_epoch_end(self) -> None:
            self.n += 1

        def state_dict(self) -> Any:
            return {"n": self.n}

    class CallbackSetOther(CallbackSetCounting):
        pass

    kinds = [
        "history",
        fl.Callback("pure"),
        CallbackSetCounting(),
        CallbackSetOther,
        TorchCallback(history, id="again"),
    ]
    learner = TorchClassifier(epochs=2, callbacks=kinds).fit(X, Y)
    assert learner.model_.callbacks.keys() == {"history", "counting", "other", "again"}
    assert learner.model_.callbacks["counting"] == {"n": 2}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("optimizer__lrr", "invalid parameter 'lrr' of optimizer .*; did you mean 'lr'"),
        ("network__hiden", "invalid parameter 'hiden' of network .*; did you mean 'hidden'"),
        ("network__n_outputs", "invalid parameter 'n_outputs' of network"),
        ("callbacks__histori__id", "there is no callback 'histori' in callbacks; did you mean 'history'"),
        ("callbacks__history__x", "invalid parameter 'x' of callback"),
        ("optimiser__lr", "'optimiser' has no parameters; did you mean 'optimizer'"),
        ("epoch", "Invalid parameter 'epoch' for estimator"),
    ],
)
def test_misspelt_parameters_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TorchClassifier(callbacks=["history"]).set_params(**{name: 1})


def test_a_callback_that_is_made_already_has_no_parameters_to_set() -> None:
    with pytest.raises(TypeError, match="callback 'history' is made already, so that 'id' can't be set"):
        TorchClassifier(callbacks=[history()]).set_params(callbacks__history__id="x")


def test_a_clone_is_unfitted_and_trains_to_the_same_bits() -> None:
    learner = TorchClassifier(functools.partial(adjustable, width=4), epochs=2, callbacks=["history", history("b")])
    learner.set_params(optimizer__lr=0.1).fit(X, Y)
    copy = clone(learner)
    assert not hasattr(copy, "model_")
    assert fl.tree_equal(copy.fit(X, Y).model_.final, learner.model_.final)


def test_searches_and_pipelines_reach_everything() -> None:
    pipeline = make_pipeline(StandardScaler(), TorchClassifier(epochs=3, validate=0.25))
    grid = {
        "torchclassifier__optimizer__lr": np.logspace(-3, -1, 2),
        "torchclassifier__network__hidden": np.array([4, 8]),
        "torchclassifier__epochs": np.arange(1, 3),
        "torchclassifier__patience": np.array([1]),
    }
    search = GridSearchCV(pipeline, grid, cv=2, error_score="raise").fit(X, Y)
    assert search.best_params_.keys() == grid.keys()
    assert (
        search.best_estimator_[-1].model_.final["optimizer"]["groups"][0]["lr"]
        in grid["torchclassifier__optimizer__lr"]
    )
    scores = cross_val_score(TorchRegressor(epochs=1), X, X[:, 0], cv=3)
    assert np.array_equal(scores, cross_val_score(TorchRegressor(epochs=1), X, X[:, 0], cv=3))


@pytest.mark.parametrize(
    "network",
    [
        adjustable(3, 3, 4),
        functools.partial(adjustable, width=4),
        lambda n_features, n_outputs: nn.Linear(n_features, n_outputs),
        lambda input_shape, n_outputs, **_: nn.Linear(*input_shape, n_outputs),
        lambda: nn.Linear(3, 3),
        Net,
    ],
)
def test_networks_are_modules_or_made_of_the_shape_they_ask_for(network: Any) -> None:
    assert TorchClassifier(network, epochs=1).fit(X, Y).predict_proba(X).shape == (24, 3)


@pytest.mark.parametrize(
    "loss",
    [nn.CrossEntropyLoss, nn.CrossEntropyLoss(), nn.functional.cross_entropy, functools.partial(nn.CrossEntropyLoss)],
)
def test_losses_are_functions_modules_or_classes(loss: Any) -> None:
    usual = TorchClassifier(epochs=1).fit(X, Y)
    assert same(TorchClassifier(epochs=1, loss=loss).fit(X, Y), usual)


def test_a_sampler_is_made_of_the_training_data() -> None:
    def of_class_0(data: Any) -> Any:
        return (data.tensors[1] == 0).nonzero().flatten()

    seen: list[Tensor] = []

    def look(ctx: fl.Context) -> fl.Context:
        seen.append(ctx.batch.y)
        return ctx

    TorchClassifier(sampler=of_class_0, epochs=1, callbacks=[fl.Callback("look", batch_end=look)]).fit(X, Y)
    assert sum(map(len, seen)) == (Y == 0).sum()
    assert not torch.cat(seen).any()
    in_order = TorchClassifier(sampler=torch.utils.data.SequentialSampler, epochs=1).fit(X, Y)
    unshuffled = TorchClassifier(shuffle=False, epochs=1).fit(X, Y)
    assert np.array_equal(in_order.predict_proba(X), unshuffled.predict_proba(X))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"network": 3}, TypeError, "network is an nn.Module, or a class or function"),
        ({"network": adjustable}, TypeError, r"what its argument 'width' is; .*set_params\(network__width=...\)"),
        ({"network": lambda n_feature: nn.Linear(3, 3)}, TypeError, "'n_feature' is; did you mean 'n_features'"),
        ({"network": lambda: nn.Linear(3, 2)}, ValueError, r"output is of shape \[24, 2\], .* it must be \[24, 3\]"),
        ({"loss": 3}, TypeError, "loss is a function"),
        ({"optimizer": "adam"}, TypeError, "takes a subclass of torch.optim.Optimizer"),
        ({"epochs": -1}, ValueError, "epochs must be an integer"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"validate": 0.25, "batch_size_predict": 0}, ValueError, "batch_size_predict must be an integer"),
        ({"device": "quantum"}, ValueError, "no device 'quantum'"),
        ({"seed": "chance"}, TypeError, "seed is an integer or 'random', not 'chance'"),
        ({"seed": "random", "resume": "runs"}, ValueError, "resume needs the seed of the run"),
        ({"num_threads": 0}, ValueError, "num_threads must be an integer of at least 1, not 0"),
        ({"eval_freq": 0}, ValueError, "eval_freq must be an integer"),
        ({"measures_train": ["acuracy"]}, ValueError, "no measure 'acuracy'; did you mean 'accuracy'"),
        ({"measures_valid": "accuracy"}, TypeError, "measures_valid is a list of measures"),
        ({"validate": 0.01}, ValueError, r"validate: 0.01 of so few rows \(24 of 3 kinds\) is none of them"),
        ({"validate": 1.5}, ValueError, r"validate is None, a ratio between 0 and 1, or a pair \(X, y\), not 1.5"),
        ({"patience": 3}, ValueError, "patience: early stopping needs validation data; set validate"),
        ({"validate": 0.25, "patience": 0}, ValueError, "patience must be an integer of at least 1"),
        ({"callbacks": "history"}, TypeError, "callbacks is a list of callbacks, not 'history'"),
        ({"callbacks": ["histori"]}, KeyError, "no callback 'histori'; did you mean 'history'"),
        ({"callbacks": ["history", "history"]}, ValueError, "more than one of the id 'history'"),
        ({"num_workers": -1}, ValueError, "num_workers must be an int of at least 0"),
        ({"drop_last": 1}, TypeError, "drop_last must be True or False"),
        ({"shuffle": "yes"}, TypeError, "shuffle must be True or False"),
    ],
)
def test_arguments_that_can_not_work_are_refused_by_name(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        TorchClassifier(**{"epochs": 1, **arguments}).fit(X, Y)


def test_data_that_can_not_work_is_refused() -> None:
    learner = TorchClassifier(epochs=1)
    for x, y, message in [
        (X, None, "requires y"),
        (X, X[:, 0], "Unknown label type"),
        (X, Y[:-1], "inconsistent numbers of samples"),
        (X[:, 0], Y, "Expected 2D array"),
        (np.where(X > 1, np.nan, X), Y, "contains NaN"),
    ]:
        with pytest.raises(ValueError, match=message):
            learner.fit(x, y)
    with pytest.raises(ValueError, match="epochs must be an integer of at least 1, not 0"):
        learner.partial_fit(X, Y, epochs=0)
