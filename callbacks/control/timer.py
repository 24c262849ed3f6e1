"""A limit on the time that a run may take."""

from __future__ import annotations

from typing import Any

import torch

from ...ensembles.vmap_rules import is_any
from ..logs.clock import Stopwatch, seconds_of
from ..objects.callback_set import CallbackSet


class CallbackSetTimer(CallbackSet):
    """Ends training when it has taken ``max_time``, summed over all processes that have trained the run.

    Training ends where ``terminate`` is looked at: after the epoch in which the time is up. Time is counted between the
    beginning and the end of a call of ``train`` or ``iterate``; what a consumer of ``iterate`` does with a context in
    between counts too. An ensemble ends when the time of one of its members is up.

    Args:
        max_time: seconds, or a text such as ``"1h30m"`` of days (``d``), hours, minutes and seconds.
        id: the name of the slot, unique in a loop.

    Raises:
        ValueError: ``max_time`` is not a positive duration.

    Resuming:
        The seconds so far are kept with the run (state ``{"elapsed"}``, volatile: not in the digest), up to the last
        batch. A run that it ended is over; one that shall go on after all is continued from a context of before the
        last epoch's end, or from ``evolve(ctx, terminate=False)``.

    >>> import functional_loop as fl
    >>> from functional_loop.callbacks.control.timer import CallbackSetTimer
    >>> from functional_loop.examples.digits import loop
    >>> hurried = fl.evolve(loop(epochs=9), callbacks=[CallbackSetTimer(max_time=1e-3)])
    >>> fl.train(fl.init(hurried)).epoch
    1
    """

    volatile = True
    vectorises = True

    def __init__(self, max_time: float | str, id: str | None = None) -> None:
        try:
            self.max_time = seconds_of(max_time)
        except ValueError as error:
            raise ValueError(f"timer: max_time {error}") from None
        self._id = id
        self._watch = Stopwatch()

    def on_begin(self) -> None:
        self._watch = Stopwatch()
        self._watch.start()

    def on_batch_end(self) -> None:
        # The members of an ensemble may bring different times.
        if is_any(torch.as_tensor(self._watch.look() >= self.max_time)):
            self.ctx.terminate = True

    def on_batch_valid_end(self) -> None:
        self.on_batch_end()

    def on_exit(self) -> None:
        self._watch.stop()

    def state_dict(self) -> dict[str, Any]:
        return {"elapsed": self._watch.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._watch.seconds = state_dict["elapsed"]


timer = CallbackSetTimer
