"""A span of batches by one compiled graph: what came out of it goes into it again."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..core.batch import Batch
from ..core.context import Context
from ..core.rng import step_seed
from ..engine.span import Span, is_unobserved
from ..engine.step import StepInputs, Tensors
from .program import CompiledStep, Ran


class _Place(NamedTuple):
    """What changes from batch to batch."""

    params: Tensors
    buffers: Tensors
    optimizer_state: Any
    ran: Ran | None
    """The last step, where it was made by a graph: what came out of it counts, and not the fields above."""
    loss: Any
    measures: Any
    data: Any
    batches: int


class CompiledSpan(Span):
    """Trains by `CompiledStep.run_on`, which looks up nothing by name."""

    def __init__(self, step: CompiledStep, ctx: Context) -> None:
        super().__init__(step, ctx)
        self._compiled = step
        state = ctx.optimizer_state
        self._place = _Place(ctx.params, ctx.buffers, state, None, ctx.last_loss, ctx.measures, ctx.data, 0)

    @staticmethod
    def can_train(step: CompiledStep, ctx: Context) -> bool:
        return is_unobserved(ctx) and step.at_once

    @property
    def batches(self) -> int:
        return self._place.batches

    def context(self) -> Context:
        place, (params, buffers, optimizer_state) = self._place, self._state()
        changes = {"params": params, "buffers": buffers, "optimizer_state": optimizer_state}
        return self._context(place.batches, **changes, last_loss=place.loss, measures=place.measures, data=place.data)

    def _train(self, batch: Batch, data: Any, probe: bool) -> None:
        self._doing = "in the compiled step, between 'batch_begin' and 'batch_end'"
        place, start = self._place, self._start
        seed = step_seed(start.seed, start.global_step + place.batches + 1)
        ran = self._compiled.run_on(place.ran, batch, place.optimizer_state, seed) if place.ran is not None else None
        params, buffers, optimizer_state = place.params, place.buffers, place.optimizer_state
        if ran is None:
            params, buffers, optimizer_state = self._state()
            given = StepInputs(params, buffers, start.trainable, batch, optimizer_state, seed, probe)
            ran = self._compiled.run(given)
        if ran is not None:
            loss, y_hats = self._compiled.loss_and_outputs(ran)
        else:
            found, optimizer_state = self._compiled.eagerly(given)
            params, buffers, loss, y_hats = found.params, found.buffers, found.loss, found.y_hats
        running = self._measured(place.measures, y_hats, batch, loss)
        self._place = _Place(params, buffers, optimizer_state, ran, loss, running, data, place.batches + 1)

    def _state(self) -> tuple[Tensors, Tensors, Any]:
        """Parameters, buffers and the optimizer's state."""
        place = self._place
        if place.ran is None:
            return place.params, place.buffers, place.optimizer_state
        return self._compiled.after(place.ran, place.params, place.optimizer_state)[:3]
