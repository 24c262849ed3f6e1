"""What a person sees while a loop trains: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from typing import Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..core.context import Context
from ..engine.signals import Signals
from .report import format_score

_SECONDS_BETWEEN_LINES = 30.0


class Progress(Protocol):
    """A display of the last context that it was shown; a context manager around the training."""

    def show(self, ctx: Context) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *error: object) -> None: ...


def progress(console: Console, ctx: Context, signals: Signals) -> Progress:
    """The display that suits ``console``, of a run that starts at ``ctx``."""
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveProgress(console, ctx, signals)
    return PlainProgress(console, ctx)


class Speed:
    """Batches per second over the last few looks at a context."""

    def __init__(self, ctx: Context) -> None:
        self._looks = deque([(time.monotonic(), ctx.global_step)], maxlen=20)

    def __call__(self, ctx: Context) -> float:
        now = time.monotonic()
        self._looks.append((now, ctx.global_step))
        start, step = self._looks[0]
        return (ctx.global_step - step) / max(now - start, 1e-9)


class PlainProgress:
    """A line for every epoch, and for every half minute of a long one."""

    def __init__(self, console: Console, ctx: Context) -> None:
        self._console = console
        self._speed = Speed(ctx)
        self._due = time.monotonic() + _SECONDS_BETWEEN_LINES

    def show(self, ctx: Context) -> None:
        ends = ctx.stage == "epoch_end"
        if ends or (ctx.stage == "batch_end" and time.monotonic() > self._due):
            words = [f"epoch {ctx.epoch}/{ctx.loop.epochs}", *describe_scores(ctx)] if ends else [describe_place(ctx)]
            words += [describe_loss(ctx), f"{self._speed(ctx):.1f} batches/s"]
            self._console.print("  ".join(words), soft_wrap=True)
            self._due = time.monotonic() + _SECONDS_BETWEEN_LINES

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class LiveProgress:
    """A bar and the latest scores, drawn by a thread of their own.

    To show a context is one assignment: contexts are values, so the thread can look at the latest one whenever it
    draws, and reads the loss only then.
    """

    def __init__(self, console: Console, ctx: Context, signals: Signals) -> None:
        self._ctx = ctx
        self._signals = signals
        self._scores: list[str] = []
        self._speed = Speed(ctx)
        self._live = Live(
            console=console, get_renderable=self._render, refresh_per_second=5, transient=True, redirect_stderr=False
        )

    def show(self, ctx: Context) -> None:
        self._ctx = ctx

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def _render(self) -> Group:
        ctx = self._ctx
        self._scores = describe_scores(ctx) or self._scores
        line = Table.grid(padding=(0, 2))
        line.add_row(describe_place(ctx), _bar(ctx), describe_loss(ctx), f"{self._speed(ctx):.1f} batches/s")
        stopping = "stopping after this batch; Ctrl-C again stops at once" if self._signals.received else ""
        return Group(line, Text(stopping or "  ".join(self._scores), style="yellow" if stopping else "dim"))


def _bar(ctx: Context) -> ProgressBar:
    """How much of the run is done; a pulse where the data does not say how long an epoch is."""
    length = ctx.loop.train.expected_length
    if length is None:
        return ProgressBar(total=None, width=30, pulse=True)
    done = max(ctx.epoch - 1, 0) * length + ctx.step
    total = max(ctx.loop.epochs * length, 1)
    # What a loader says of its length is an estimate.
    return ProgressBar(total=total, completed=min(done, total), width=30)


def describe_place(ctx: Context) -> str:
    """Epoch and step, out of how many."""
    length = ctx.loop.train.expected_length
    step = f"step {ctx.step}" + (f"/{length}" if length is not None and ctx.step <= length else "")
    return f"epoch {ctx.epoch}/{ctx.loop.epochs}  {step}" + ("  validating" if ctx.step_valid else "")


def describe_loss(ctx: Context) -> str:
    return "" if isinstance(ctx.last_loss, tuple) else f"loss {format_score(ctx.last_loss.item())}"


def describe_scores(ctx: Context) -> list[str]:
    """Every score of the last epoch that has any."""
    parts = (("train", ctx.last_scores_train), ("valid", ctx.last_scores_valid))
    return [f"{part} {name} {format_score(score)}" for part, scores in parts for name, score in dict(scores).items()]
