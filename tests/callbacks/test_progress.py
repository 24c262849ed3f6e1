"""Progress: lines for people, a bar where there is a terminal, and the time of all runs together."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import functional_loop as fl
from functional_loop.callbacks.logs import clock, displays
from functional_loop.callbacks.logs.displays import describe_place, share_done
from functional_loop.callbacks.logs.progress import CallbackSetProgress
from tests.callbacks.laws import holds_for
from tests.sample_loops import counter, data, full_loop, make_loop, raising

SECONDS_PER_BATCH = 10.0


class Terminal(io.StringIO):
    """A standard output that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])
    return now


def in_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make standard output a terminal; not as a fixture, because pytest changes it after those."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    return terminal


def shown(now: list[float], progress: CallbackSetProgress | None = None, **changes: Any) -> fl.Loop:
    """Every training batch takes ten seconds, and there are three in an epoch."""

    def pass_time(ctx: fl.Context) -> fl.Context:
        now[0] += SECONDS_PER_BATCH
        return ctx

    slow = fl.Callback("slow", batch_begin=pass_time)
    return full_loop(**{"callbacks": [slow, counter(), progress or CallbackSetProgress()], **changes})


def test_a_line_for_every_epoch_and_one_for_the_end(now: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    contexts = [ctx for ctx in fl.iterate(fl.init(shown(now))) if ctx.stage == "epoch_end"]
    expected = [
        f"epoch {ctx.epoch}/2  train error {ctx.last_scores_train['error']:.4f}  "  # type: ignore[call-overload]
        f"valid error {ctx.last_scores_valid['error']:.4f}  loss {ctx.last_loss.item():.4f}  {time}"  # type: ignore[call-overload, union-attr]
        for ctx, time in zip(contexts, ("30.0 s", "1 min 00 s"), strict=True)
    ]
    assert capsys.readouterr().out.splitlines() == [*expected, "finished after 2 epochs, 1 min 00 s"]


def test_epochs_without_scores_and_loops_without_measures(now: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    fl.train(fl.init(shown(now, CallbackSetProgress(digits=1), eval_freq=2)))
    fl.train(fl.init(make_loop(callbacks=[CallbackSetProgress()], epochs=1)))
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"epoch 1/2  loss \d\.\d  30\.0 s", lines[0])
    assert re.fullmatch(r"epoch 2/2  train error \d\.\d  valid error \d\.\d  loss \d\.\d  1 min 00 s", lines[1])
    assert re.fullmatch(r"epoch 1/1  loss \d\.\d{4}  0\.0 s", lines[3])
    assert lines[4] == "finished after 1 epoch, 0.0 s"


def test_a_long_epoch_has_lines_in_between(
    now: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(displays, "_SECONDS_BETWEEN_LINES", 15.0)
    fl.train(fl.init(shown(now, epochs=1)))
    first, *_ = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"epoch 1/1  step 2/3  loss \d\.\d{4}  0\.1 batches/s", first)


def test_time_adds_up_over_restarts(now: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    ctx = fl.train(fl.init(shown(now)), steps=4)
    now[0] += 1000
    ctx = fl.train(fl.load_state_dict(fl.init(shown(now)), fl.state_dict(ctx)))
    assert ctx.callbacks["progress"] == {"elapsed": 6 * SECONDS_PER_BATCH}
    assert capsys.readouterr().out.splitlines()[-1] == "finished after 2 epochs, 1 min 00 s (20.0 s of it in this run)"


def test_runs_in_turns_have_a_time_each(now: list[float]) -> None:
    loop = shown(now)
    for a, b in zip(fl.iterate(fl.init(loop, 1)), fl.iterate(fl.init(loop, 2)), strict=True):
        assert a.callbacks["progress"]["elapsed"] == a.global_step * SECONDS_PER_BATCH
        assert b.callbacks["progress"]["elapsed"] == b.global_step * SECONDS_PER_BATCH


def test_the_laws(tmp_path: Path, now: list[float]) -> None:
    holds_for(lambda: shown(now), tmp_path)


def test_the_callback_is_no_part_of_the_run(now: list[float]) -> None:
    ctx = fl.train(fl.init(full_loop(callbacks=[counter(), CallbackSetProgress()])))
    assert fl.digest(ctx) == fl.digest(fl.train(fl.init(full_loop())))


def test_a_terminal_shows_a_bar_below_the_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = in_terminal(monkeypatch)
    fl.train(fl.init(full_loop(callbacks=[CallbackSetProgress()])))
    text = terminal.getvalue()
    assert "\x1b[" in text
    assert re.search(r"epoch \d/2  step \d/3|epoch 0/2  step 0/3", text)
    for line in ("epoch 1/2  train error", "epoch 2/2  train error", "finished after 2 epochs"):
        assert line in text


def test_a_terminal_gets_plain_lines_if_asked_for_or_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = in_terminal(monkeypatch)
    fl.train(fl.init(full_loop(callbacks=[CallbackSetProgress(live=False)])))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    fl.train(fl.init(full_loop(callbacks=[CallbackSetProgress()])))
    assert "\x1b" not in terminal.getvalue()
    assert terminal.getvalue().count("finished after 2 epochs") == 2


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = in_terminal(monkeypatch)
    monkeypatch.setenv("TERM", "dumb")
    fl.train(fl.init(full_loop(callbacks=[CallbackSetProgress()])))
    assert "\x1b" not in terminal.getvalue()
    assert "finished after 2 epochs" in terminal.getvalue()


@pytest.mark.parametrize("live", [True, False])
def test_the_display_is_gone_when_a_run_is_left(monkeypatch: pytest.MonkeyPatch, live: bool) -> None:
    terminal = in_terminal(monkeypatch)
    progress = CallbackSetProgress(live=live)
    loop = full_loop(callbacks=[progress, raising("after_backward", RuntimeError("boom"))])
    with pytest.raises(RuntimeError, match="boom"):
        fl.train(fl.init(loop))
    assert progress._display is None
    # The cursor is visible again.
    assert ("\x1b[?25l" in terminal.getvalue()) is live
    assert terminal.getvalue().rfind("\x1b[?25h") >= terminal.getvalue().rfind("\x1b[?25l")
    ctx = fl.train(fl.init(full_loop(callbacks=[progress])), steps=1)
    assert progress._display is None
    fl.train_step(ctx, (data(3)[0], data(3)[1]))


def test_what_a_live_bar_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="callback 'progress' needs rich, which is not installed: pip install"):
        CallbackSetProgress(live=True)


def test_the_share_done_grows_from_nothing_to_all() -> None:
    loop = full_loop()
    shares = [share_done(ctx) for ctx in fl.iterate(fl.init(loop))]
    assert shares == sorted(shares)  # type: ignore[type-var]
    assert (shares[0], shares[-1]) == (0, 1)
    assert share_done(fl.train(fl.init(full_loop(epochs=0)))) == 0


def test_data_of_unknown_length(capsys: pytest.CaptureFixture[str]) -> None:
    class Stream:
        def __iter__(self) -> Any:
            x, y = data(3)
            return iter([(x, y), (x, y)])

    loop = make_loop(train=fl.batches(Stream()), callbacks=[CallbackSetProgress(live=False)])
    ctx = fl.train(fl.init(loop))
    assert share_done(ctx) is None
    assert describe_place(ctx) == "epoch 2/2  step 2"
    assert "epoch 2/2  loss" in capsys.readouterr().out


@pytest.mark.parametrize("digits", [-1, 1.5, True, "2"])
def test_bad_digits_are_refused(digits: Any) -> None:
    with pytest.raises(ValueError, match="progress: digits must be an integer of at least 0"):
        CallbackSetProgress(digits)


def test_bad_live_is_refused() -> None:
    with pytest.raises(TypeError, match="progress: live is True or False, not 'yes'"):
        CallbackSetProgress(live="yes")  # type: ignore[arg-type]
