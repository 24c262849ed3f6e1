"""Consecutive batches that no hook observes: no intermediate `Context` is built."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import measures
from ..core.batch import Batch, to_device
from ..core.context import Context, after
from ..core.errors import add_note
from ..core.hook_seeds import BATCH_STAGES
from ..core.outputs import map_outputs
from ..core.record import evolve
from ..data.reader import Item
from .hooks import place_of
from .step import Step


class Span(ABC):
    """Trains batch after batch from a context on.

    At any time, also after an error or an interrupt in the middle of a step, `context` is the boundary after the last
    batch that was done.
    """

    def __init__(self, step: Step, ctx: Context) -> None:
        self._step = step
        self._start = evolve(ctx, params={}, buffers={}, optimizer_state={}, last_loss=(), measures={}, data=())
        self._doing = ""
        self._written: frozenset[int] = frozenset()
        """Where the storages are to which it writes."""

    @property
    @abstractmethod
    def batches(self) -> int:
        """How many batches are done."""

    @abstractmethod
    def context(self) -> Context:
        """The boundary after the last batch that was done."""

    @abstractmethod
    def _train(self, batch: Batch, data: Any, probe: bool) -> None:
        """Do one more batch, with ``ctx.data`` after it."""

    def run(self, take: Callable[[], Item | None], stop: float) -> None:
        """Train the batches that ``take`` gives, up to the ``stop``-th of the run."""
        left, device = stop - self._start.global_step, self._start.loop.device
        probe = True
        try:
            with torch.enable_grad(), self._step.seeding.held():
                while self.batches < left:
                    self._doing = "while reading the training data"
                    if (item := take()) is None:
                        break
                    self._train(to_device(item.batch, device), item.data, probe)
                    probe = False
        except BaseException as error:
            add_note(error, f"{self._doing} ({place_of(self._start, step=self.batches + 1)})")
            raise

    def _context(self, batches: int, **changes: Any) -> Context:
        start = self._start
        if not batches:
            return evolve(start, **changes)
        step, global_step = start.step + batches, start.global_step + batches
        return after(start, "batch_end", step=step, global_step=global_step, **changes)

    def _measured(self, running: Any, outputs: Any, batch: Batch, loss: Any) -> Any:
        """Accumulators of the training scores after one more batch."""
        chosen = self._start.loop.measures_train
        if not chosen or running["train"] == ():
            return running
        self._doing = "in the training scores"
        y_hats, loss = map_outputs(self._own, outputs), loss.detach()
        return {**running, "train": measures.accumulate(chosen, running["train"], y_hats, batch.y, batch.x, loss)}

    def _own(self, made: Any) -> Any:
        """What the network or the loss made, without its graph, and in memory that the span does not write to."""
        if not isinstance(made, Tensor):
            return made
        made = made.detach()
        is_plain = type(made) is Tensor and made.layout is torch.strided
        if is_plain and made.untyped_storage().data_ptr() not in self._written:
            return made
        return made.clone()


def is_unobserved(ctx: Context) -> bool:
    """Whether the batches after ``ctx`` can be a span: no hook looks, none is skipped, each is a step."""
    loop = ctx.loop
    return (
        loop.accumulate == 1
        and not any(loop.hooks[stage] for stage in BATCH_STAGES["train"])
        and not any(number > ctx.global_step for number in loop.skipped(ctx.callbacks))
    )
