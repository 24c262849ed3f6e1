"""What a person sees while a loop trains: lines of text, and on a terminal a bar below them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ...core.context import Context
from ...ensembles.stacking import Members, combine

if TYPE_CHECKING:
    from rich.console import Console, Group

_SECONDS_BETWEEN_LINES = 30.0


class Display(Protocol):
    """Shows the last context that it was given, and lines of text."""

    def show(self, ctx: Context) -> None: ...
    def say(self, line: str) -> None: ...
    def close(self) -> None: ...


class LineDisplay:
    """Lines alone; between those that it is told, one for every half minute of training."""

    def __init__(self, ctx: Context) -> None:
        self._speed = Speed(ctx)
        self._due = time.monotonic() + _SECONDS_BETWEEN_LINES

    def show(self, ctx: Context) -> None:
        if time.monotonic() > self._due:
            self.say("  ".join([describe_place(ctx), *describe_loss(ctx), self._speed.describe(ctx)]))

    def say(self, line: str) -> None:
        print(line, flush=True)
        self._due = time.monotonic() + _SECONDS_BETWEEN_LINES

    def close(self) -> None: ...


class LiveDisplay:
    """A bar, drawn by a thread of its own, below lines that stay.

    To show a context is one assignment: contexts are values, so the thread can look at the latest one whenever it
    draws, and reads the loss only then.

    Args:
        ctx: where the run starts.
        console: rich's console.
        below: makes a line below the bar.
    """

    def __init__(self, ctx: Context, console: Console, below: Callable[[], str] = str) -> None:
        from rich.live import Live

        self._ctx = ctx
        self._below = below
        self._speed = Speed(ctx)
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=5, transient=True)
        self._live.start()

    def show(self, ctx: Context) -> None:
        self._ctx = ctx

    def say(self, line: str) -> None:
        self._live.console.print(line, soft_wrap=True)

    def close(self) -> None:
        self._live.stop()

    def _render(self) -> Group:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        ctx, done = self._ctx, share_done(self._ctx)
        bar = ProgressBar(total=None, width=30, pulse=True) if done is None else ProgressBar(1.0, done, width=30)
        line = Table.grid(padding=(0, 2))
        line.add_row(describe_place(ctx), bar, *describe_loss(ctx), self._speed.describe(ctx))
        return Group(line, Text(self._below()))


class Speed:
    """Batches per second over the last few looks at a context."""

    def __init__(self, ctx: Context) -> None:
        self._looks = deque([(time.monotonic(), ctx.global_step)], maxlen=20)

    def describe(self, ctx: Context) -> str:
        self._looks.append((time.monotonic(), ctx.global_step))
        (start, first), (now, last) = self._looks[0], self._looks[-1]
        return f"{(last - first) / max(now - start, 1e-9):.1f} batches/s"


def share_done(ctx: Context) -> float | None:
    """How much of the run is done, from 0 to 1; ``None`` where the data does not say how long an epoch is."""
    length = ctx.loop.train.expected_length
    if length is None:
        return None
    done = max(ctx.epoch - 1, 0) * length + ctx.step
    # What a loader says of its length is an estimate.
    return min(done / max(ctx.loop.epochs * length, 1), 1.0)


def describe_place(ctx: Context) -> str:
    """Epoch and step, out of how many."""
    length = ctx.loop.train.expected_length
    step = f"step {ctx.step}" + (f"/{length}" if length is not None and ctx.step <= length else "")
    validating = ["validating"] if ctx.step_valid else []
    return "  ".join([f"epoch {ctx.epoch}/{ctx.loop.epochs}", step, *describe_members(ctx), *validating])


def describe_members(ctx: Context) -> list[str]:
    """How many members of an ensemble still train."""
    return [] if ctx.ensemble is None else [f"{ctx.ensemble.ends.count(None)} members"]


def describe_loss(ctx: Context, digits: int = 4) -> list[str]:
    return [] if isinstance(ctx.last_loss, tuple) else [f"loss {format_scores(ctx.last_loss, digits)}"]


def describe_scores(ctx: Context, digits: int = 4) -> list[str]:
    """Every score of the epoch."""
    parts = (("train", ctx.last_scores_train), ("valid", ctx.last_scores_valid))
    return [
        f"{part} {id} {format_scores(score, digits)}" for part, found in parts for id, score in _scores(found).items()
    ]


def _scores(found: Any) -> dict[str, Any]:
    """Scores by id; those members of an ensemble count that have any."""
    if isinstance(found, Members):
        found = combine([scores for scores in found if scores != ()], numbers=True)
    return dict(found)


def format_scores(score: Any, digits: int = 4) -> str:
    """A score; of several members the mean, and the range where they differ.

    >>> format_scores(torch.tensor([0.5, 1.0])), format_scores(0.25)
    ('0.7500 (0.5000 to 1.0000)', '0.2500')
    """
    values = torch.as_tensor(score, dtype=torch.float64)
    least, largest = (format_score(v.item(), digits) for v in (values.min(), values.max()))
    mean = format_score(values.mean().item(), digits)
    return mean if least == largest else f"{mean} ({least} to {largest})"


def format_score(score: float, digits: int = 4) -> str:
    """So many decimals, or digits of a number for which decimals are too few or too many.

    >>> format_score(0.98765), format_score(0.0000123), format_score(123456.0), format_score(0.0), format_score(0.5, 2)
    ('0.9877', '1.230e-05', '1.235e+05', '0.0000', '0.50')
    """
    plain = score == 0 or 10.0**-digits <= abs(score) < 1e4 or score != score
    return f"{score:.{digits}f}" if plain else f"{score:.{max(digits - 1, 0)}e}"
