"""The timer: a limit on the time of a run, however often it is interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import functional_loop as fl
from functional_loop.callbacks.control.timer import CallbackSetTimer
from functional_loop.callbacks.logs import clock
from tests.callbacks.laws import holds_for
from tests.sample_loops import counter, full_loop

SECONDS_PER_BATCH = 10.0


@pytest.fixture(autouse=True)
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])
    return now


def timed(now: list[float], max_time: float | str, epochs: int = 5) -> fl.Loop:
    """Every training batch takes ten seconds, and there are three in an epoch."""

    def pass_time(ctx: fl.Context) -> fl.Context:
        now[0] += SECONDS_PER_BATCH
        return ctx

    slow = fl.Callback("slow", batch_begin=pass_time)
    return full_loop(callbacks=[slow, counter(), CallbackSetTimer(max_time)], epochs=epochs)


@pytest.mark.parametrize(("max_time", "epochs"), [("1s", 1), (30, 1), (30.1, 2), ("1m", 2), ("1m1s", 3), ("1d", 5)])
def test_training_ends_after_the_epoch_in_which_the_time_is_up(
    now: list[float], max_time: float | str, epochs: int
) -> None:
    ctx = fl.train(fl.init(timed(now, max_time)))
    assert (ctx.epoch, ctx.stage) == (epochs, "end")


def test_time_adds_up_over_restarts_and_pauses_do_not_count(now: list[float]) -> None:
    ctx = fl.init(timed(now, "1m1s"))
    while ctx.stage != "end":
        ctx = fl.train(fl.load_state_dict(fl.init(timed(now, "1m1s")), fl.state_dict(ctx)), steps=1)
        now[0] += 1000
    assert ctx.epoch == 3
    assert ctx.callbacks["timer"]["elapsed"] == 9 * SECONDS_PER_BATCH


def test_one_object_trains_in_pieces_too(now: list[float]) -> None:
    ctx = fl.init(timed(now, "1m1s"))
    while ctx.stage != "end":
        ctx = fl.train(ctx, steps=2)
        now[0] += 1000
    assert ctx.epoch == 3


def test_going_back_gives_the_earlier_time(now: list[float]) -> None:
    early = fl.train(fl.init(timed(now, "1d")), steps=2)
    fl.train(early)
    assert fl.train(early, steps=1).callbacks["timer"]["elapsed"] == 3 * SECONDS_PER_BATCH


def test_runs_in_turns_have_a_time_each(now: list[float]) -> None:
    loop = timed(now, "1d")
    runs = [fl.iterate(fl.init(loop, seed)) for seed in (1, 2)]
    for _ in range(3):
        next(runs[0])
    for a, b in zip(*runs, strict=False):
        assert a.callbacks["timer"]["elapsed"] == a.global_step * SECONDS_PER_BATCH
        assert b.callbacks["timer"]["elapsed"] == b.global_step * SECONDS_PER_BATCH
    assert a.stage == "end" != b.stage


def test_a_new_run_starts_at_zero(now: list[float]) -> None:
    used = CallbackSetTimer("1d")
    for _ in range(2):
        ctx = fl.train(
            fl.init(full_loop(callbacks=[used, fl.Callback("s", batch_begin=lambda ctx: pass_time(ctx, now))]))
        )
        assert ctx.callbacks["timer"]["elapsed"] == 6 * SECONDS_PER_BATCH


def pass_time(ctx: fl.Context, now: list[float]) -> fl.Context:
    now[0] += SECONDS_PER_BATCH
    return ctx


def test_a_run_that_it_ended_is_over(now: list[float]) -> None:
    ctx = fl.train(fl.init(timed(now, 1)))
    assert fl.train(fl.load_state_dict(fl.init(timed(now, 1)), fl.state_dict(ctx))).epoch == 1


def test_it_can_be_continued_on_purpose(now: list[float]) -> None:
    *_, epoch_end, _ = fl.iterate(fl.init(timed(now, 1)))
    longer = fl.load_state_dict(fl.init(timed(now, "1d")), fl.state_dict(epoch_end))
    assert fl.train(fl.evolve(longer, terminate=False)).epoch == 5


def test_the_time_is_no_part_of_the_digest(now: list[float]) -> None:
    def run(max_time: str) -> fl.Context:
        now[0] += 0.1
        return fl.train(fl.init(timed(now, max_time)), steps=2)

    assert fl.digest(run("1d")) == fl.digest(run("2d"))


def test_the_laws(tmp_path: Path, now: list[float]) -> None:
    holds_for(lambda: timed(now, "1d", epochs=2), tmp_path)


@pytest.mark.parametrize("max_time", ["1 week", 0, None])
def test_bad_durations_are_refused_by_name(max_time: Any) -> None:
    with pytest.raises(ValueError, match="timer: max_time must be a positive number"):
        CallbackSetTimer(max_time)
