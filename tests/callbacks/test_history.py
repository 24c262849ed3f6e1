"""The history: one row for every epoch that has scores."""

from __future__ import annotations

import pytest
import torch

import functional_loop as fl
from functional_loop.callbacks import history
from functional_loop.callbacks.logs.history import to_frame


def make_loop(**options: object) -> fl.Loop:
    x = torch.arange(12.0).unsqueeze(1)
    error = fl.measure("error", torch.nn.functional.mse_loss, minimize=True)
    arguments = {
        "epochs": 4,
        "measures_train": [error],
        "valid": fl.batches(x, x, batch_size=6),
        "measures_valid": [error],
        "callbacks": [history()],
        **options,
    }
    return fl.Loop(
        lambda: torch.nn.Linear(1, 1),
        torch.nn.functional.mse_loss,
        fl.optimizer(torch.optim.SGD, lr=0.001),
        train=fl.batches(x, 2 * x, batch_size=4, shuffle=True),
        **arguments,  # type: ignore[arg-type]
    )


def test_rows_are_the_scores_of_every_epoch() -> None:
    expected = [
        {
            "epoch": ctx.epoch,
            "train.error": dict(ctx.last_scores_train)["error"],
            "valid.error": dict(ctx.last_scores_valid)["error"],
        }
        for ctx in fl.iterate(fl.init(make_loop()))
        if ctx.stage == "epoch_end"
    ]
    assert fl.train(fl.init(make_loop())).callbacks["history"] == expected


def test_epochs_without_scores_have_no_row() -> None:
    rows = fl.train(fl.init(make_loop(epochs=5, eval_freq=2))).callbacks["history"]
    assert [row["epoch"] for row in rows] == [2, 4, 5]


def test_without_validation_there_are_training_scores_alone() -> None:
    rows = fl.train(fl.init(make_loop(valid=None, measures_valid=[]))).callbacks["history"]
    assert all(set(row) == {"epoch", "train.error"} for row in rows)


def test_every_place_to_resume_from_gives_the_same_rows() -> None:
    loop = make_loop()
    whole = fl.train(fl.init(loop))
    for ctx in fl.iterate(fl.init(loop)):
        resumed = fl.train(fl.load_state_dict(fl.init(make_loop()), fl.state_dict(ctx)))
        assert resumed.callbacks == whole.callbacks


def test_an_earlier_context_keeps_its_rows() -> None:
    contexts = [ctx for ctx in fl.iterate(fl.init(make_loop())) if ctx.stage == "epoch_end"]
    assert [len(ctx.callbacks["history"]) for ctx in contexts] == [1, 2, 3, 4]


def test_two_histories_have_slots_of_their_own() -> None:
    ctx = fl.train(fl.init(make_loop(callbacks=[history(), history("again")])))
    assert ctx.callbacks["again"] == ctx.callbacks["history"]
    assert ctx.callbacks["again"] is not ctx.callbacks["history"]


def test_rows_become_a_data_frame() -> None:
    pytest.importorskip("pandas")
    ctx = fl.train(fl.init(make_loop()))
    rows = ctx.callbacks["history"]
    assert to_frame(ctx).to_dict("records") == rows == to_frame(rows).to_dict("records")
    assert list(to_frame(fl.init(make_loop())).columns) == ["epoch"]
    with pytest.raises(KeyError, match="no callback 'histroy' in this loop; did you mean 'history'"):
        to_frame(ctx, "histroy")
