"""How fast a run trains."""

from __future__ import annotations

from typing import Any

from ...core.context import first_output
from ..objects.callback_set import CallbackSet
from .clock import Stopwatch


class CallbackSetThroughput(CallbackSet):
    """Measures rows and batches per second of training, validation left out.

    State: ``{"rows", "batches", "seconds"}`` of the epoch at hand, and ``"rows_per_second"``, ``"batches_per_second"``
    of the last epoch that was trained to its end; ``None`` before there is one. Time runs from one batch to the next,
    with reading the data and with other callbacks; a GPU is not waited for. In an ensemble they are the rows of each
    member: all together make as many times more as there are.

    Args:
        id: the name of the slot, unique in a loop.

    Resuming:
        The counts are kept with the run (volatile: not in the digest), so that the figures of an epoch that was
        interrupted are those of its batches; the time in between does not count.

    >>> import functional_loop as fl
    >>> from functional_loop.callbacks.logs.throughput import CallbackSetThroughput
    >>> from functional_loop.examples.digits import loop
    >>> ctx = fl.train(fl.init(fl.evolve(loop(epochs=1), callbacks=[CallbackSetThroughput()])))
    >>> ctx.callbacks["throughput"]["rows_per_second"] > 100
    True
    """

    volatile = True
    vectorises = True

    def __init__(self, id: str | None = None) -> None:
        self._id = id
        self._reset()

    def _reset(self) -> None:
        self.rows_per_second: float | None = None
        self.batches_per_second: float | None = None
        self._start_epoch()

    def _start_epoch(self) -> None:
        self._rows = self._batches = 0
        self._watch = Stopwatch()

    def on_begin(self) -> None:
        self._reset()
        self._watch.start()

    def on_epoch_begin(self) -> None:
        self._start_epoch()
        self._watch.start()

    def on_batch_end(self) -> None:
        self._watch.look()
        self._batches += 1
        self._rows += len(first_output(self.ctx.context.batch.x))

    def on_before_valid(self) -> None:
        seconds = max(self._watch.seconds, 1e-9)
        self.rows_per_second = self._rows / seconds
        self.batches_per_second = self._batches / seconds

    def state_dict(self) -> dict[str, Any]:
        return {
            "rows": self._rows,
            "batches": self._batches,
            "seconds": self._watch.seconds,
            "rows_per_second": self.rows_per_second,
            "batches_per_second": self.batches_per_second,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rows, self._batches = state_dict["rows"], state_dict["batches"]
        self._watch.seconds = state_dict["seconds"]
        self.rows_per_second = state_dict["rows_per_second"]
        self.batches_per_second = state_dict["batches_per_second"]


throughput = CallbackSetThroughput
