"""Throughput: rows and batches per second of training alone."""

from __future__ import annotations

from pathlib import Path

import pytest

import functional_loop as fl
from functional_loop.callbacks.logs import clock
from functional_loop.callbacks.logs.throughput import CallbackSetThroughput
from tests.callbacks.laws import holds_for
from tests.sample_loops import ROWS, full_loop


@pytest.fixture(autouse=True)
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])
    return now


def timed(now: list[float]) -> fl.Loop:
    """A training batch takes one second in the first epoch, two in the second; a validation batch a thousand."""

    def train(ctx: fl.Context) -> fl.Context:
        now[0] += ctx.epoch
        return ctx

    def validate(ctx: fl.Context) -> fl.Context:
        now[0] += 1000
        return ctx

    slow = fl.Callback("slow", batch_begin=train, batch_valid_begin=validate)
    return full_loop(callbacks=[slow, CallbackSetThroughput()])


def figures(ctx: fl.Context) -> tuple[float, float]:
    slot = ctx.callbacks["throughput"]
    return slot["rows_per_second"], slot["batches_per_second"]


def test_validation_does_not_count(now: list[float]) -> None:
    contexts = [ctx for ctx in fl.iterate(fl.init(timed(now))) if ctx.stage == "epoch_end"]
    assert list(map(figures, contexts)) == [(ROWS / 3, 1.0), (ROWS / 6, 0.5)]


def test_nothing_is_known_before_an_epoch_is_over(now: list[float]) -> None:
    ctx = fl.train(fl.init(timed(now)), steps=2)
    assert figures(ctx) == (None, None)
    assert ctx.callbacks["throughput"]["batches"] == 2
    assert ctx.callbacks["throughput"]["seconds"] == 2.0


def test_an_interrupted_epoch_has_the_figures_of_an_uninterrupted_one(now: list[float]) -> None:
    ctx = fl.init(timed(now))
    while ctx.stage != "end":
        ctx = fl.train(fl.load_state_dict(fl.init(timed(now)), fl.state_dict(ctx)), steps=1)
        now[0] += 1000
    assert figures(ctx) == (ROWS / 6, 0.5)


def test_going_back_gives_the_earlier_figures(now: list[float]) -> None:
    loop = timed(now)
    contexts = [ctx for ctx in fl.iterate(fl.init(loop)) if ctx.stage == "epoch_end"]
    assert figures(fl.train(contexts[0], steps=1)) == (ROWS / 3, 1.0)


def test_the_laws(tmp_path: Path, now: list[float]) -> None:
    holds_for(lambda: timed(now), tmp_path)
