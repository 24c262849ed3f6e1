from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

import functional_loop as fl
from functional_loop.callbacks.schedules.lr_plateau import lr_reduce_on_plateau
from tests.callbacks.laws import holds_for
from tests.callbacks.torch_schedules import GROUPS, rates
from tests.sample_loops import data, full_loop, make_loop, mean_absolute
from tests.strategies import examples

SCORES = st.lists(st.sampled_from([0.0, 1.0, 1.00005, 1.2, 3.0, math.nan, math.inf]), min_size=1, max_size=8)


def scripted(scores: list[float], minimize: bool, *callbacks: fl.Callback, eval_freq: int = 1) -> fl.Loop:
    """A loop whose validation score in the n-th evaluation is the n-th of ``scores``."""

    def say(ctx: fl.Context) -> fl.Context:
        return fl.evolve(ctx, last_scores_valid={"error": scores[ctx.epoch // eval_freq - 1]})

    return full_loop(
        epochs=len(scores) * eval_freq,
        eval_freq=eval_freq,
        measures_valid=[fl.measure("error", mean_absolute, minimize=minimize)],
        callbacks=[fl.Callback("script", valid_end=say), *callbacks],
        optimizer=fl.optimizer(torch.optim.AdamW, lr=0.05, groups=GROUPS),
    )


@given(
    SCORES,
    st.booleans(),
    st.fixed_dictionaries(
        {
            "factor": st.sampled_from([0.5, 0.1, 0.0]),
            "patience": st.integers(0, 2),
            "threshold": st.sampled_from([0.0, 1e-4, 0.3]),
            "threshold_mode": st.sampled_from(["rel", "abs"]),
            "cooldown": st.integers(0, 2),
            "min_lr": st.sampled_from([0.0, 0.04, [0.1, 0.01, 0.2]]),
            "eps": st.sampled_from([1e-8, 0.02]),
        }
    ),
)
@examples(0.5)
def test_rates_are_those_of_torch(scores: list[float], minimize: bool, arguments: dict[str, Any]) -> None:
    start = fl.init(scripted(scores, minimize, lr_reduce_on_plateau(**arguments)))
    torchs = fl.to_optimizer(start, fl.to_module(start))
    scheduler = lr_scheduler.ReduceLROnPlateau(torchs, "min" if minimize else "max", **arguments)
    expected = []
    for score in scores:
        scheduler.step(score)
        expected.append([group["lr"] for group in torchs.param_groups])
    assert [rates(ctx) for ctx in fl.iterate(start) if ctx.stage == "epoch_end"] == expected


def test_epochs_that_do_not_evaluate_do_not_count() -> None:
    reduce = lr_reduce_on_plateau(0.5, patience=1)
    start = fl.init(scripted([1.0, 1.0, 1.0], True, reduce, eval_freq=2))
    assert [rates(ctx)[0] for ctx in fl.iterate(start) if ctx.stage == "epoch_end"] == [0.3] * 5 + [0.15]


def test_it_watches_the_measure_it_is_told() -> None:
    measures = [fl.measure("rows", lambda y_hat, y: len(y)), fl.measure("error", mean_absolute, minimize=True)]
    ctx = fl.train(fl.init(full_loop(measures_valid=measures, callbacks=[lr_reduce_on_plateau(measure="error")])))
    assert ctx.callbacks["lr_reduce_on_plateau"]["settings"]["measure"] == "error"


def test_it_resumes_anywhere_and_its_forks_do_not_mix(tmp_path: Path) -> None:
    holds_for(lambda: full_loop(epochs=3, callbacks=[lr_reduce_on_plateau(0.5, patience=0, threshold=0.5)]), tmp_path)


def test_a_run_that_watched_another_measure_is_refused() -> None:
    measures = [fl.measure(id, mean_absolute, minimize=True) for id in ("a", "b")]
    first = full_loop(measures_valid=measures, callbacks=[lr_reduce_on_plateau()])
    second = attrs.evolve(first, callbacks=[lr_reduce_on_plateau(measure="b")])
    ctx = fl.train(fl.init(first), steps=2)
    with pytest.raises(fl.StateDictError, match="measure: 'a' in what was saved, 'b' here"):
        fl.train(fl.load_state_dict(fl.init(second), fl.state_dict(ctx)))


def test_a_loop_that_gives_it_nothing_to_watch_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match="lr_reduce_on_plateau needs validation data"):
        fl.init(make_loop(callbacks=[lr_reduce_on_plateau()]))
    with pytest.raises(ValueError, match="lr_reduce_on_plateau needs a score to watch"):
        fl.init(make_loop(valid=fl.batches(*data(3)), callbacks=[lr_reduce_on_plateau()]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"factor": 1}, ValueError, "factor must be below 1"),
        ({"factor": -0.1}, ValueError, "factor must be a number from 0 to 1"),
        ({"patience": -1}, ValueError, "patience must be an integer of at least 0"),
        ({"threshold": math.nan}, ValueError, "threshold must be a number"),
        ({"threshold_mode": "relative"}, ValueError, "threshold_mode is 'rel' or 'abs', not 'relative'"),
        ({"cooldown": 0.5}, ValueError, "cooldown must be an integer"),
        ({"min_lr": [0.1, -1]}, ValueError, "min_lr must be a number of at least 0, not -1"),
        ({"eps": None}, ValueError, "eps must be a number"),
        ({"measure": 1}, TypeError, "measure is the id of a validation measure"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"lr_reduce_on_plateau: {message}"):
        lr_reduce_on_plateau(**arguments)
