"""The learners: training, continuation and what takes part in it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import functional_loop as fl
from functional_loop.callbacks import history
from functional_loop.callbacks.control.checkpoint import CallbackSetCheckpoint
from functional_loop.callbacks.objects.callback_set import CallbackSet
from functional_loop.learner import TorchClassifier, TorchRegressor
from tests.learners import FEATURES, ROWS, X, Y, classifier, data, noisy, same


def test_it_trains_the_loop_that_one_would_write_by_hand() -> None:
    learner = classifier(seed=5, callbacks=[history()]).fit(X, Y)
    x, y = torch.tensor(X, dtype=torch.float32), torch.tensor(np.searchsorted(np.unique(Y), Y))
    loop = fl.Loop(
        lambda: noisy(FEATURES, 3),
        nn.functional.cross_entropy,
        fl.optimizer(torch.optim.AdamW),
        train=fl.batches(x, y, batch_size=8, shuffle=True),
        epochs=3,
    )
    ctx = fl.train(fl.init(loop, seed=5))
    assert fl.tree_equal(dict(learner.model_.network.state_dict()), dict(fl.to_module(ctx).state_dict()))
    expected = fl.predict(ctx, x, batch_size=8).softmax(1).numpy()
    assert np.array_equal(learner.predict_proba(X), expected)
    assert np.array_equal(learner.predict(X), np.unique(Y)[expected.argmax(1)])


def test_learners_learn() -> None:
    x, y = data(200)
    assert TorchClassifier().fit(x, y).score(x, y) > 0.9
    assert TorchRegressor().fit(x, x @ [1.0, -2.0, 0.5]).score(x, x @ [1.0, -2.0, 0.5]) > 0.9


@settings(max_examples=8)
@given(first=st.integers(1, 3), more=st.lists(st.integers(1, 2), min_size=1, max_size=2), validate=st.booleans())
def test_more_epochs_are_the_same_as_having_trained_longer(first: int, more: list[int], validate: bool) -> None:
    arguments: dict[str, Any] = {"validate": 0.25 if validate else None, "callbacks": ["history"]}
    whole = classifier(**arguments, epochs=first + sum(more)).fit(X, Y)
    parts = classifier(**arguments, epochs=first).fit(X, Y)
    for epochs in more:
        parts.partial_fit(X, Y, epochs=epochs)
    assert same(parts, whole)
    assert parts.model_.epochs == first + sum(more)


def test_best_weights_that_were_brought_back_do_not_change_what_follows() -> None:
    arguments: dict[str, Any] = {"validate": 0.25, "patience": 50}
    whole = classifier(**arguments, epochs=9).fit(X, Y)
    assert same(classifier(**arguments, epochs=7).fit(X, Y).partial_fit(X, Y, epochs=2), whole)


def test_what_early_stopping_ended_is_taken_up_again_when_asked() -> None:
    learner = classifier(validate=0.25, patience=1, min_delta=10.0, epochs=30).fit(X, Y)
    assert learner.model_.epochs == 2
    assert learner.partial_fit(X, Y, epochs=5).model_.epochs == 3


def test_partial_fit_starts_a_run_and_goes_on_with_other_data() -> None:
    x, y = data(60, seed=1)
    learner = classifier()
    for chunk in (slice(0, 20), slice(20, 46), slice(46, 60)):
        learner.partial_fit(x[chunk], y[chunk], classes=["yes", "no", "perhaps"])
    assert learner.model_.epochs == 3
    assert learner.classes_.tolist() == ["no", "perhaps", "yes"]


def test_partial_fit_refuses_labels_it_was_not_told_of() -> None:
    learner = classifier().partial_fit(X, Y)
    with pytest.raises(ValueError, match="y has the label 'maybe', which is not among the classes"):
        learner.partial_fit(X, ["maybe"] * ROWS)
    with pytest.raises(ValueError, match=r"classes are \['no', 'yes'\], and were \['no', 'perhaps', 'yes'\]"):
        learner.partial_fit(X, Y, classes=["no", "yes"])


def test_a_hyperparameter_that_is_set_takes_effect_in_the_next_partial_fit_and_others_go_on() -> None:
    def halve(ctx: fl.Context) -> fl.Context:
        return ctx.with_hyperparameters(lr=ctx.optimizer_state["groups"][0]["lr"] / 2)

    def groups() -> dict[str, Any]:
        found: dict[str, Any] = learner.model_.final["optimizer"]["groups"][0]
        return found

    schedule = fl.Callback("schedule", epoch_end=halve)
    learner = classifier(optimizer=fl.optimizer(torch.optim.SGD, lr=0.8), epochs=2, callbacks=[schedule]).fit(X, Y)
    assert (groups()["lr"], groups()["momentum"]) == (0.2, 0)
    learner.set_params(optimizer__momentum=0.5).partial_fit(X, Y)
    assert (groups()["lr"], groups()["momentum"]) == (0.1, 0.5)
    learner.set_params(optimizer__lr=4.0).partial_fit(X, Y)
    assert (groups()["lr"], groups()["momentum"]) == (2.0, 0.5)


def test_a_continuation_with_another_network_is_refused() -> None:
    learner = classifier(network=lambda n_features, n_outputs: nn.Linear(n_features, n_outputs)).fit(X, Y)
    with pytest.raises(fl.StateDictError, match="missing here"):
        learner.set_params(network=noisy).partial_fit(X, Y)


def test_a_fit_that_broke_off_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    def break_off(ctx: fl.Context) -> fl.Context:
        if ctx.global_step == 5:
            raise KeyboardInterrupt
        return ctx

    saving = CallbackSetCheckpoint(tmp_path, every_steps=1)
    learner = classifier(callbacks=["history", saving], resume=tmp_path, validate=0.25)
    breaking = fl.Callback("break", batch_begin=break_off)
    with pytest.raises(KeyboardInterrupt):
        classifier(callbacks=["history", saving, breaking], resume=tmp_path, validate=0.25).fit(X, Y)
    assert fl.CheckpointStore(tmp_path).steps() == [1, 2, 3, 4]
    whole = classifier(callbacks=["history"], validate=0.25).fit(X, Y)
    assert same(learner.fit(X, Y), whole)
    assert same(learner.fit(X, Y), whole)
    with pytest.raises(fl.StateDictError, match="train/content"):
        learner.fit(X + 1, Y)


def test_the_seed_decides_and_nothing_else_is_drawn_or_moved() -> None:
    def state() -> tuple[Any, ...]:
        return (
            torch.get_rng_state().tolist(),
            np.random.get_state(legacy=False)["state"]["key"].tolist(),
            random.getstate(),
        )

    before = state()
    learner = classifier(seed="random", validate=0.25).fit(X, Y)
    learner.predict(X)
    assert state() == before
    assert same(classifier(seed=learner.model_.seed, validate=0.25).fit(X, Y), learner)
    torch.manual_seed(12)
    assert same(classifier(seed=learner.model_.seed, validate=0.25).fit(X, Y), learner)
    assert not same(classifier(seed=learner.model_.seed + 1, validate=0.25).fit(X, Y), learner)


def test_workers_and_evaluation_change_no_bit() -> None:
    plain = classifier().fit(X, Y).model_.network.state_dict()
    for arguments in ({"num_workers": 1}, {"measures_train": ["accuracy"], "eval_freq": 2, "callbacks": ["history"]}):
        other = classifier(**arguments).fit(X, Y).model_.network.state_dict()
        assert fl.tree_equal(dict(other), dict(plain))


def test_threads_are_those_asked_for_during_a_fit_and_as_before_after_it() -> None:
    seen: list[int] = []

    def look(ctx: fl.Context) -> fl.Context:
        seen.append(torch.get_num_threads())
        return ctx

    def fail(ctx: fl.Context) -> fl.Context:
        raise RuntimeError("as told")

    before = torch.get_num_threads()
    classifier(num_threads=before + 1, callbacks=[fl.Callback("look", begin=look)]).fit(X, Y).predict(X)
    assert seen == [before + 1]
    with pytest.raises(RuntimeError, match="as told"):
        classifier(num_threads=before + 1, callbacks=[fl.Callback("fail", begin=fail)]).fit(X, Y)
    assert torch.get_num_threads() == before


def test_early_stopping_watches_the_first_measure_and_brings_the_best_weights_back() -> None:
    learner = classifier(validate=data(seed=3), patience=2, epochs=40, seed=1).set_params(optimizer__lr=0.5)
    learner.fit(X, Y)
    slot = learner.model_.callbacks["early_stopping"]
    assert slot["measure"] == "cross_entropy"
    assert learner.model_.epochs == slot["best_epoch"] + 2 < 40
    assert fl.tree_equal(dict(learner.model_.network.named_parameters()), _as_parameters(slot["params"]))
    shorter = classifier(validate=data(seed=3), epochs=slot["best_epoch"], seed=1).set_params(optimizer__lr=0.5)
    assert np.array_equal(shorter.fit(X, Y).predict_proba(X), learner.predict_proba(X))


def _as_parameters(tensors: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(tensor) for name, tensor in tensors.items()}


def test_scores_are_those_of_scikit_learn() -> None:
    valid = data(40, seed=7)
    learner = classifier(validate=valid, measures_train=["accuracy"]).fit(X, Y)
    assert learner.model_.scores_valid["accuracy"] == learner.score(*valid)
    assert learner.model_.scores_train.keys() == {"accuracy"}
    targets = X @ np.ones((FEATURES, 2))
    regressor = TorchRegressor(epochs=2, validate=(X, targets), measures_valid=["mae", "r2"]).fit(X, targets)
    assert regressor.model_.scores_valid["r2"] == pytest.approx(regressor.score(X, targets), abs=1e-5)
    assert regressor.model_.scores_valid["mae"] == pytest.approx(
        np.abs(regressor.predict(X) - targets).mean(), rel=1e-5
    )


def test_a_ratio_validates_with_its_share_of_every_class() -> None:
    class CallbackSetLook(CallbackSet):
        def on_begin(self) -> None:
            rows.extend([self.ctx.task_train, self.ctx.task_valid])

    rows: list[Any] = []
    labels = np.repeat(["a", "b"], [16, 8])
    classifier(validate=0.25, callbacks=[CallbackSetLook]).fit(X, labels)
    train, valid = (part.tensors for part in rows)
    assert (len(train[0]), len(valid[0])) == (18, 6)
    assert (train[1].bincount().tolist(), valid[1].bincount().tolist()) == ([12, 6], [4, 2])
    assert torch.equal(torch.cat([train[0], valid[0]]).sort(0).values, torch.tensor(X).float().sort(0).values)


def test_object_callbacks_know_the_learner_and_are_copied_for_every_fit() -> None:
    class CallbackSetKnowing(CallbackSet):
        epochs = 0

        def on_epoch_end(self) -> None:
            self.epochs += 1
            known.append((self.ctx.learner, len(self.ctx.task_train), self.ctx.task_valid))
            assert self.ctx.prediction_encoder(torch.eye(3)).tolist() == ["no", "perhaps", "yes"]

        def state_dict(self) -> Any:
            return {"epochs": self.epochs}

        def load_state_dict(self, state_dict: Any) -> None:
            self.epochs = state_dict["epochs"]

    known: list[Any] = []
    mine = CallbackSetKnowing()
    learner = classifier(callbacks=[mine])
    for _ in range(2):
        assert learner.fit(X, Y).model_.callbacks["knowing"] == {"epochs": 3}
    assert known == [(learner, ROWS, None)] * 6
    assert (mine.epochs, mine.ctx, dict(mine.environment)) == (0, None, {})


def test_a_module_given_as_network_is_the_start_and_stays_as_it_is() -> None:
    module = noisy(FEATURES, 3)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    learner = classifier(network=module).fit(X, Y)
    assert fl.tree_equal(dict(module.state_dict()), before)
    assert not fl.tree_equal(dict(learner.model_.network.state_dict()), before)
    untrained = classifier(network=module, epochs=0).fit(X, Y)
    assert fl.tree_equal(dict(untrained.model_.network.state_dict()), before)
