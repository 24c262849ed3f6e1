"""Progress of training, for people who watch."""

from __future__ import annotations

import importlib.util
from typing import Any

from ..checks import check_flag, check_integer
from ..objects.callback_set import CallbackSet
from ..registry.packages import require
from .clock import Stopwatch, in_words
from .displays import Display, LineDisplay, LiveDisplay, describe_loss, describe_members, describe_scores


class CallbackSetProgress(CallbackSet):
    """Prints a line of scores for every epoch, and in a terminal shows a bar.

    It tells how long training took, summed over all processes that have trained the run. Time is counted between the
    beginning and the end of a call of ``train`` or ``iterate``. Of an ensemble there is one line for all members, with
    the mean of every score and its range; the loss between epochs is that of the first member where members are
    trained in turn.

    Args:
        digits: how many digits of a score to print.
        live: whether to show a bar below the lines, which needs rich; by default where standard output is a terminal
            and rich is installed.
        id: the name of the slot, unique in a loop.

    Raises:
        ImportError: ``live=True``, and rich is not installed.
        ValueError: ``digits`` is not an integer of at least 0.
        TypeError: ``live`` is something else.

    Resuming:
        The seconds so far are kept with the run (state ``{"elapsed"}``, volatile: not in the digest), up to the last
        batch.

    Mirrors R's ``CallbackSetProgress`` (mlr3torch).

    >>> import functional_loop as fl
    >>> from functional_loop.callbacks.logs.progress import CallbackSetProgress
    >>> from functional_loop.examples.digits import loop
    >>> ctx = fl.train(fl.init(fl.evolve(loop(epochs=2), callbacks=[CallbackSetProgress(digits=2)])))
    epoch 1/2  train cross_entropy ...  valid accuracy 0...  loss ...  ... s
    epoch 2/2  train cross_entropy ...  valid accuracy 0...  loss ...  ... s
    finished after 2 epochs, ... s
    """

    volatile = True
    whole = True

    def __init__(self, digits: int = 4, live: bool | None = None, id: str | None = None) -> None:
        self._id = id
        check_integer(self.id, "digits", digits, least=0)
        if live is not None:
            check_flag(self.id, "live", live)
        if live:
            require("rich", f"callback {self.id!r}")
        self.digits = digits
        self.live = live
        self._watch = Stopwatch()
        self._before = 0.0
        self._display: Display | None = None

    def on_begin(self) -> None:
        self._watch = Stopwatch()
        self._before = 0.0
        self._watch.start()
        self._close()
        self._display = self._make_display()

    def on_batch_end(self) -> None:
        self._watch.look()
        if self._display is not None:
            self._display.show(self.ctx.context)

    def on_batch_valid_end(self) -> None:
        self.on_batch_end()

    def on_epoch_end(self) -> None:
        seconds = self._watch.look()
        if self._display is not None:
            ctx = self.ctx.context
            scores = [*describe_scores(ctx, self.digits), *describe_loss(ctx, self.digits)]
            place = "  ".join([f"epoch {ctx.epoch}/{ctx.loop.epochs}", *describe_members(ctx)])
            self._display.show(ctx)
            self._display.say("  ".join([place, *scores, in_words(seconds)]))

    def on_end(self) -> None:
        seconds = self._watch.look()
        if self._display is not None:
            epochs = f"{self.ctx.epoch} epoch" + ("" if self.ctx.epoch == 1 else "s")
            here = f" ({in_words(seconds - self._before)} of it in this run)" if self._before else ""
            self._display.say(f"finished after {epochs}, {in_words(seconds)}{here}")

    def on_exit(self) -> None:
        self._close()
        self._watch.stop()

    def state_dict(self) -> dict[str, Any]:
        return {"elapsed": self._watch.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = self._watch.seconds = state_dict["elapsed"]

    def _make_display(self) -> Display:
        ctx = self.ctx.context
        if self.live is False or importlib.util.find_spec("rich") is None:
            return LineDisplay(ctx)
        from rich.console import Console

        console = Console(highlight=False, markup=False, emoji=False)
        if self.live or (console.is_terminal and not console.is_dumb_terminal):
            return LiveDisplay(ctx, console)
        return LineDisplay(ctx)

    def _close(self) -> None:
        if self._display is not None:
            self._display.close()
        self._display = None


progress = CallbackSetProgress
