"""Scores of an epoch: the same as computed on all predictions at once, however the run was cut."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import functional_loop as fl
from functional_loop.core import measures
from tests.sample_loops import data, make_loop, mean_absolute, recorder


def total(name: str = "total") -> fl.Measure:
    return fl.measure(
        name,
        init=lambda: {"sum": torch.zeros((), dtype=torch.float64), "rows": 0},
        update=lambda state, y_hat, y: {
            "sum": state["sum"] + (y_hat - y).sum().double(),
            "rows": state["rows"] + len(y),
        },
        compute=lambda state: state["sum"] / state["rows"],
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"id": "epoch", "fn": max}, ValueError, "can't be named 'epoch'"),
        ({"id": "", "fn": max}, ValueError, "can't be named ''"),
        ({"id": 3, "fn": max}, TypeError, "a string, not 3"),
        ({"id": "a"}, TypeError, "measure 'a': give either fn or all of init, update and compute"),
        ({"id": "a", "fn": max, "init": dict}, TypeError, "give either fn or all of"),
        ({"id": "a", "init": dict, "update": max}, TypeError, "give either fn or all of"),
        ({"id": "a", "fn": 3}, TypeError, "measure 'a': fn must be a function, not 3"),
        ({"id": "a", "init": dict, "update": max, "compute": 3}, TypeError, "compute must be a function, not 3"),
        ({"id": "a", "fn": max, "minimize": "no"}, TypeError, "minimize is True, False or None, not 'no'"),
        ({"id": "a", "fn": max, "minimize": 1}, TypeError, "minimize is True, False or None, not 1"),
    ],
)
def test_wrong_measures_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fl.measure(**arguments)


sizes = st.lists(st.integers(1, 4), min_size=1, max_size=40)


def chunks_of(sizes: list[int], collect: list[fl.Measure]) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Accumulators after batches of these sizes, and all their rows."""
    y_hat = torch.arange(2.0 * sum(sizes)).reshape(-1, 2)
    y = -y_hat.flip(0)
    state = measures.start(collect)
    for a, b in zip(y_hat.split(sizes), y.split(sizes), strict=True):
        state = measures.accumulate(collect, state, a, b)
    return state, y_hat, y


@given(sizes)
def test_a_whole_epoch_measure_sees_all_rows_in_order(sizes: list[int]) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def look(y_hat: Tensor, y: Tensor) -> float:
        seen.append((y_hat, y))
        return 2.5

    collect = [fl.measure("look", look)]
    state, y_hat, y = chunks_of(sizes, collect)
    assert measures.scores(collect, state) == {"look": 2.5}
    assert fl.tree_equal(seen[0], (y_hat, y))


@given(sizes)
def test_predictions_of_n_batches_are_at_most_log_n_chunks(sizes: list[int]) -> None:
    state, y_hat, _ = chunks_of(sizes, [fl.measure("a", mean_absolute), fl.measure("b", mean_absolute), total()])
    chunks = state["predictions"]
    assert len(chunks) == bin(len(sizes)).count("1")
    assert sum(len(chunk["y_hat"]) for chunk in chunks) == len(y_hat)


@given(sizes)
def test_a_mergeable_measure_keeps_no_predictions(sizes: list[int]) -> None:
    state, y_hat, y = chunks_of(sizes, [total()])
    assert state["predictions"] == []
    assert set(state["states"]["total"]) == {"sum", "rows"}
    assert measures.scores([total()], state)["total"] == ((y_hat - y).double().sum() / len(y)).item()


@given(sizes)
def test_earlier_accumulators_stay_as_they_were(sizes: list[int]) -> None:
    collect = [fl.measure("a", mean_absolute), total()]
    states = [measures.start(collect)]
    copies = [fl.tree_map(lambda leaf: leaf, states[0])]
    for size in sizes:
        batch = torch.full((size, 2), float(len(states)))
        states.append(measures.accumulate(collect, states[-1], batch, -batch))
        copies.append(fl.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, states[-1]))
    assert fl.tree_equal(states, copies)


def test_training_scores_are_those_of_the_predictions_made_while_training() -> None:
    seen: list[tuple[str, Any]] = []
    look = recorder(seen, lambda ctx: {"y_hat": ctx.y_hat, "y": ctx.batch.y}, ("after_backward",))
    loop = make_loop(measures_train=[fl.measure("error", mean_absolute), total()], callbacks=[look])
    for ctx in fl.iterate(fl.init(loop)):
        if ctx.stage != "before_valid":
            continue
        state = measures.start([total()])
        for _, pair in seen:
            state = measures.accumulate([total()], state, pair["y_hat"], pair["y"])
        whole = {part: torch.cat([pair[part] for _, pair in seen]) for part in ("y_hat", "y")}
        assert ctx.last_scores_train == {
            "error": mean_absolute(**whole).item(),
            **measures.scores([total()], state),
        }
        seen.clear()


def test_scores_of_a_run_cut_anywhere_are_those_of_the_whole() -> None:
    x, y = data(3)
    collect = [fl.measure("error", mean_absolute), total()]
    loop = make_loop(measures_train=collect, measures_valid=collect, valid=fl.batches(x, y, batch_size=3), epochs=1)
    final = fl.train(fl.init(loop))
    for ctx in fl.iterate(fl.init(loop)):
        ended = fl.train(fl.load_state_dict(fl.init(loop), fl.state_dict(ctx)))
        assert ended.last_scores_train == final.last_scores_train
        assert ended.last_scores_valid == final.last_scores_valid


def test_scores_are_numbers() -> None:
    x, y = data(3)
    results: dict[str, Callable[..., Any]] = {
        "tensor": lambda y_hat, y: torch.tensor(1.5),
        "double": lambda y_hat, y: torch.tensor(1.5, dtype=torch.float64),
        "int": lambda y_hat, y: 2,
        "bool": lambda y_hat, y: torch.tensor(True),
        "nan": lambda y_hat, y: math.nan,
    }
    loop = make_loop(measures_valid=[fl.measure(name, fn) for name, fn in results.items()])
    scores = fl.validate(fl.init(loop), fl.batches(x, y))
    assert {type(score) for score in scores.values()} == {float}
    assert list(scores) == list(results)


@pytest.mark.parametrize(
    ("score", "error", "message"),
    [
        (torch.ones(3), ValueError, r"a score is one number, not a tensor of shape \[3\]: take its mean"),
        ("high", TypeError, "a score is a number or a tensor of one element, not 'high'"),
        (None, TypeError, "not None"),
    ],
    ids=["vector", "text", "nothing"],
)
def test_scores_that_are_no_numbers_are_refused(score: Any, error: type[Exception], message: str) -> None:
    whole = fl.measure("mine", lambda y_hat, y: score)
    mergeable = fl.measure("mine", init=int, update=lambda state, y_hat, y: state, compute=lambda state: score)
    for faulty in (whole, mergeable):
        with pytest.raises(error, match=message) as caught:
            fl.validate(fl.init(make_loop(measures_valid=[faulty])), fl.batches(*data(3)))
        assert "in measure 'mine'" in caught.value.__notes__


def test_dicts_of_targets_are_joined_too() -> None:
    x, y = data(3)
    look = fl.measure("rows", lambda y_hat, y: len(y["a"]) + len(y["b"][0]))
    loop = make_loop(
        train=fl.batches(x, {"a": y, "b": (y,)}, batch_size=4), loss=lambda y_hat, y: ((y_hat - y["a"]) ** 2).mean()
    )
    ctx = fl.train(fl.init(fl.evolve(loop, measures_train=[look])))
    assert ctx.last_scores_train == {"rows": 20.0}


def failing(*args: Any) -> Any:
    raise ZeroDivisionError("no")


@pytest.mark.parametrize(
    "faulty",
    [
        fl.measure("mine", failing),
        fl.measure("mine", init=dict, update=failing, compute=len),
        fl.measure("mine", init=dict, update=lambda state, y_hat, y: state, compute=failing),
    ],
    ids=["fn", "update", "compute"],
)
@pytest.mark.parametrize("which", ["measures_train", "measures_valid"])
def test_errors_of_a_measure_name_it_and_the_place(faulty: fl.Measure, which: str) -> None:
    source = make_loop().train
    loop = make_loop(**{which: [fl.measure("good", lambda y_hat, y: 1), faulty]}, valid=source)
    with pytest.raises(ZeroDivisionError) as caught:
        fl.train(fl.init(loop))
    notes = "\n".join(caught.value.__notes__)
    assert "measure 'mine'" in notes
    assert "epoch 1" in notes
    last = fl.context_of(caught.value)
    assert last is not None
    assert last.epoch == 1
    assert fl.digest(fl.load_state_dict(fl.init(loop), fl.state_dict(last))) == fl.digest(last)
