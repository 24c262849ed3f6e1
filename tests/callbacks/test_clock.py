"""Time: what was measured before counts, what lies between two runs does not."""

from __future__ import annotations

from typing import Any

import pytest

from functional_loop.callbacks.logs import clock
from functional_loop.callbacks.logs.clock import Stopwatch, in_words, seconds_of


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of the clock, for a test to change."""
    now = [1000.0]
    monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])
    return now


def test_a_stopwatch_counts_while_it_runs(now: list[float]) -> None:
    watch = Stopwatch()
    now[0] += 5
    assert watch.look() == 0
    watch.start()
    now[0] += 5
    assert watch.seconds == 0
    assert watch.look() == watch.seconds == 5
    now[0] += 2
    watch.stop()
    now[0] += 100
    assert watch.look() == 7
    watch.start()
    now[0] += 1
    assert watch.look() == 8


def test_a_stopwatch_goes_on_from_another_time(now: list[float]) -> None:
    watch = Stopwatch()
    watch.seconds = 60.0
    now[0] += 5
    assert watch.look() == 60
    watch.start()
    now[0] += 5
    watch.seconds = 10.0
    now[0] += 1
    assert watch.look() == 16


@pytest.mark.parametrize(
    ("duration", "seconds"),
    [
        (1, 1.0),
        (0.5, 0.5),
        ("90s", 90.0),
        ("1h30m", 5400.0),
        ("1d 2h 3m 4.5s", 93784.5),
        ("1.5h", 5400.0),
        ("0.1s", 0.1),
    ],
)
def test_durations(duration: float | str, seconds: float) -> None:
    assert seconds_of(duration) == seconds


@pytest.mark.parametrize(
    "duration", ["", "0s", "1h30", "30m1h", "-1s", "1 week", 0, -1, True, None, float("nan"), float("inf")]
)
def test_what_is_no_duration_is_refused(duration: Any) -> None:
    with pytest.raises(ValueError, match="a text such as '1h30m'"):
        seconds_of(duration)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "0.0 s"),
        (59.9, "59.9 s"),
        (60, "1 min 00 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 00 min"),
        (90061, "1 d 01 h"),
    ],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
