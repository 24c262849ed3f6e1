from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

import functional_loop as fl
from functional_loop.callbacks.control.early_stopping import early_stopping
from tests.callbacks.laws import holds_for
from tests.sample_loops import data, full_loop, make_loop, mean_absolute

NAN = math.nan


def scripted(scores: list[float], minimize: bool = True, **arguments: Any) -> fl.Loop:
    """A loop whose validation score in the n-th evaluation is the n-th of ``scores``."""

    def say(ctx: fl.Context) -> fl.Context:
        return fl.evolve(ctx, last_scores_valid={"error": scores[ctx.epoch // ctx.loop.eval_freq - 1]})

    loop = full_loop(
        epochs=len(scores),
        measures_valid=[fl.measure("error", mean_absolute, minimize=minimize)],
        callbacks=[fl.Callback("script", valid_end=say)],
    )
    return fl.evolve(loop, **arguments)


def with_stopping(loop: fl.Loop, *arguments: Any, **named: Any) -> fl.Loop:
    return attrs.evolve(loop, callbacks=[*loop.callbacks, early_stopping(*arguments, **named)])


def last_epoch(scores: list[float], *arguments: Any, minimize: bool = True, **named: Any) -> int:
    return fl.train(fl.init(with_stopping(scripted(scores, minimize), *arguments, **named))).epoch


@pytest.mark.parametrize(
    ("scores", "patience", "min_delta", "last"),
    [
        ([5, 4, 3, 2, 1], 1, 0.0, 5),
        ([5, 5, 5, 5, 5], 1, 0.0, 2),
        ([5, 6, 7, 8, 9], 3, 0.0, 4),
        ([5, 6, 4, 5, 6], 2, 0.0, 5),
        ([5, 4.5, 4, 3.5, 3], 2, 0.5, 5),
        ([5, 4.5, 4.75, 3, 3], 2, 0.5, 3),
        ([5, NAN, NAN, 4, 3], 2, 0.0, 3),
        ([NAN, NAN, 4, 3, 2], 3, 0.0, 5),
    ],
)
def test_it_stops_after_patience_evaluations_without_improvement(
    scores: list[float], patience: int, min_delta: float, last: int
) -> None:
    assert last_epoch(scores, patience, min_delta) == last
    negative = [-score for score in scores]
    assert last_epoch(negative, patience, min_delta, minimize=False) == last


def test_epochs_that_do_not_evaluate_do_not_count() -> None:
    loop = with_stopping(scripted([5, 5, 5, 5], eval_freq=2, epochs=8), patience=2)
    assert fl.train(fl.init(loop)).epoch == 6


def test_the_best_parameters_and_buffers_come_back() -> None:
    loop = scripted([5, 3, 4, 4, 1])
    plain = {ctx.epoch: ctx for ctx in fl.iterate(fl.init(loop)) if ctx.stage == "valid_end"}
    stopped = fl.train(fl.init(with_stopping(loop, patience=2)))
    assert stopped.epoch == 4
    assert fl.tree_equal((stopped.params, stopped.buffers), (plain[2].params, plain[2].buffers))
    slot = stopped.callbacks["early_stopping"]
    assert (slot["best_score"], slot["best_epoch"], slot["stagnation"]) == (3, 2, 2)


def test_the_best_weights_come_back_where_the_run_ends_by_itself() -> None:
    loop = scripted([5, 3, 4])
    best = next(ctx for ctx in fl.iterate(fl.init(loop)) if (ctx.epoch, ctx.stage) == (2, "valid_end"))
    assert fl.tree_equal(fl.train(fl.init(with_stopping(loop, patience=9))).params, best.params)


def test_without_restoring_the_last_weights_stay_and_none_are_kept() -> None:
    loop = scripted([5, 3, 4, 4, 4])
    ctx = fl.train(fl.init(with_stopping(loop, patience=2, restore_best_weights=False)))
    plain = fl.train(fl.init(attrs.evolve(loop, epochs=4)))
    assert fl.tree_equal(ctx.params, plain.params)
    assert ctx.callbacks["early_stopping"]["params"] == ()


def test_weights_are_restored_after_the_other_callbacks_of_the_end() -> None:
    def spoil(ctx: fl.Context) -> fl.Context:
        return fl.evolve(ctx, params=fl.tree_map(torch.zeros_like, ctx.params))

    loop = with_stopping(scripted([5, 3]), patience=9)
    spoiled = attrs.evolve(loop, callbacks=[*loop.callbacks, fl.Callback("spoil", end=spoil)])
    assert fl.tree_equal(fl.train(fl.init(spoiled)).params, fl.train(fl.init(loop)).params)


def test_it_watches_the_measure_it_is_told() -> None:
    measures = [fl.measure("rows", lambda y_hat, y: len(y)), fl.measure("error", mean_absolute, minimize=True)]
    loop = with_stopping(full_loop(measures_valid=measures), patience=2, measure="error")
    assert fl.init(loop).callbacks["early_stopping"]["measure"] == "error"


def test_it_resumes_anywhere_and_its_forks_do_not_mix(tmp_path: Path) -> None:
    holds_for(lambda: with_stopping(full_loop(epochs=4), patience=1, min_delta=0.05), tmp_path)
    holds_for(lambda: with_stopping(scripted([5, 3, 4, 4, 4]), patience=2), tmp_path / "scripted")


def test_a_run_that_it_ended_resumes_to_no_further_epoch() -> None:
    loop = with_stopping(scripted([5, 3, 4, 4, 4]), patience=2)
    *_, last, end = fl.iterate(fl.init(loop))
    longer = attrs.evolve(loop, epochs=50)
    resumed = list(fl.iterate(fl.load_state_dict(fl.init(longer), fl.state_dict(last))))
    assert [ctx.stage for ctx in resumed] == ["end"]
    assert fl.digest(resumed[0]) == fl.digest(end)


def test_a_run_that_watched_another_measure_is_refused_when_it_is_continued() -> None:
    measures = [fl.measure(id, mean_absolute, minimize=True) for id in ("a", "b")]

    def loop(measure: str) -> fl.Loop:
        return with_stopping(full_loop(measures_valid=measures), patience=2, measure=measure)

    ctx = fl.train(fl.init(loop("a")), steps=2)
    with pytest.raises(fl.StateDictError, match="measure: 'a' in what was saved, 'b' here"):
        fl.train(fl.load_state_dict(fl.init(loop("b")), fl.state_dict(ctx)))


def test_a_run_that_kept_no_weights_can_not_restore_any() -> None:
    def loop(restore: bool) -> fl.Loop:
        return with_stopping(full_loop(), patience=2, restore_best_weights=restore)

    ctx = fl.train(fl.init(loop(False)), steps=4)
    with pytest.raises(fl.StateDictError, match="no best weights to restore"):
        fl.train(fl.load_state_dict(fl.init(loop(True)), fl.state_dict(ctx)))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"patience": 0}, ValueError, "patience must be an integer of at least 1, not 0"),
        ({"patience": 1.5}, ValueError, "patience must be an integer"),
        ({"patience": True}, ValueError, "patience must be an integer"),
        ({"patience": 1, "min_delta": -0.1}, ValueError, "min_delta must be a number of at least 0, not -0.1"),
        ({"patience": 1, "min_delta": NAN}, ValueError, "min_delta must be a number"),
        ({"patience": 1, "restore_best_weights": 1}, TypeError, "restore_best_weights is True or False"),
        ({"patience": 1, "measure": 3}, TypeError, "measure is the id of a validation measure"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"early_stopping: {message}"):
        early_stopping(**arguments)


def test_a_loop_that_gives_it_nothing_to_watch_is_refused_before_training() -> None:
    x, y = data(3)
    directed, undirected = fl.measure("error", mean_absolute, minimize=True), fl.measure("rows", mean_absolute)
    valid = {"valid": fl.batches(x, y)}
    for arguments, message in [
        ({"measures_valid": [directed]}, "needs validation data"),
        (valid, "needs a score to watch"),
        (valid | {"measures_valid": [undirected]}, "a low or a high 'rows' is better"),
    ]:
        with pytest.raises(ValueError, match=message):
            fl.init(with_stopping(make_loop(**arguments), patience=1))
    with pytest.raises(ValueError, match="no validation measure 'eror'; did you mean 'error'"):
        fl.init(with_stopping(make_loop(**valid, measures_valid=[directed]), patience=1, measure="eror"))
