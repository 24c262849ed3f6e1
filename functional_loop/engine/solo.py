"""The program of one run: a step of its loop at a time, or consecutive batches in a span."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..compile.program import CompiledStep
from ..compile.span import CompiledSpan
from ..core import measures
from ..core.batch import Batch, BatchSource
from ..core.beside import beside
from ..core.context import Context, after
from ..core.errors import noting
from ..core.hook_seeds import Kind
from ..core.rng import evaluation_seed, step_seed
from ..data.reader import TRAINING, VALIDATION, Item, Reader
from .batch import Again, BatchProgram, Chosen
from .donation import give_back, take
from .exit import run_exit, run_resume
from .hooks import place_of
from .in_place import InPlaceSpan
from .loop import Loop
from .span import Span
from .step import Gradients, Step, StepInputs


class SoloProgram(BatchProgram):
    """Trains one run from a context on, with a step that it borrows from the loop while it is open."""

    _step: Step

    def __init__(self, ctx: Context) -> None:
        super().__init__(ctx)
        self._span: Span | None = None
        self._spans: type[Span] | None = None
        self._strayed = False

    def open(self) -> SoloProgram:
        """Borrow the step; `enter` does, too."""
        self._step = borrow_step(self.loop)
        self.at_once = self._step.at_once
        return self

    def gradients(self, ctx: Context, params: Any, buffers: Any, batch: Batch, probe: bool) -> Gradients:
        seed = step_seed(ctx.seed, ctx.global_step)
        return self._step.gradients(params, buffers, ctx.trainable, batch, seed, probe)

    def update(
        self, ctx: Context, params: Any, buffers: Any, grads: Any, loss: Tensor, again: Again
    ) -> tuple[Any, Any, Any]:
        return self._step.update(params, buffers, grads, ctx.optimizer_state, loss, again)

    def whole(self, ctx: Context, batch: Batch, probe: bool) -> tuple[Gradients, Any]:
        seed = step_seed(ctx.seed, ctx.global_step)
        given = StepInputs(ctx.params, ctx.buffers, ctx.trainable, batch, ctx.optimizer_state, seed, probe)
        assert isinstance(self._step, CompiledStep)
        return self._step.whole(given)

    def outputs(self, ctx: Context, batch: Batch, with_loss: bool) -> tuple[Any, Any]:
        seed = evaluation_seed(ctx.seed, ctx.epoch, ctx.step_valid)
        params = self._step.evaluation_params(ctx.params, ctx.optimizer_state)
        return self._step.evaluate(params, ctx.buffers, ctx.trainable, batch, seed, with_loss)

    def hooked(self, stage: str, ctx: Context, seeds: bool) -> Context:
        return self._hooks.run(stage, ctx, seeds)

    def start(self, chosen: Chosen) -> Any:
        return measures.start(chosen)

    def measured(self, chosen: Chosen, running: Any, batch: Batch, y_hats: Any, loss: Any) -> Any:
        return measures.accumulate(chosen, running, y_hats, batch.y, batch.x, loss)

    def scores(self, chosen: Chosen, running: Any) -> Any:
        return measures.scores(chosen, running)

    @property
    def live(self) -> Context:
        return super().live if self._span is None else self._span.context()

    @property
    def strayed(self) -> bool:
        return self._strayed

    def reader(self, source: BatchSource, part: str, start: int) -> Reader:
        self._strayed = False
        if part == TRAINING:
            self._spans = self._kind_of_span()
        return Reader(source, part, self.live.seed, self.live.epoch, start, self.live.data)

    def train(self, reader: Reader, stop: float | None) -> bool:
        if stop is not None and self._spans is not None:
            return self._train_span(self._spans, reader, stop)
        number = self.live.global_step + 1
        trained = super().train(reader, stop)
        # A hook has gone back to an earlier context; to read on from there is what a resume does.
        self._strayed = trained and self.live.global_step != number
        return trained

    def train_batch(self, ctx: Context, item: Item, probe: bool) -> Context:
        if ctx.global_step + 1 in self.loop.skipped(ctx.callbacks):
            return passed_over(ctx, item.data)
        return super().train_batch(ctx, item, probe)

    def use_up(self, item: Item) -> Context:
        """`train_batch` of the live context, whose tensors are let go of while they are copied; see `take`."""
        ctx = self.live
        if not InPlaceSpan.can_train(self._step, ctx):
            made = self.train_batch(ctx, item, probe=True)
            take(ctx)
            return made
        span = InPlaceSpan(self._step, take(ctx))
        try:
            span.run(iter([item, None]).__next__, math.inf)
        except BaseException:
            give_back(ctx, span.context())
            raise
        return span.context()

    def enter(self) -> None:
        self.open()
        if self.live.stage != "":
            run_resume(self.live)

    def leave(self, reason: BaseException | None) -> None:
        run_exit(self.live, reason)

    def close(self) -> None:
        self._live, self._span = self.live, None
        if hasattr(self, "_step"):
            return_step(self.loop, self._step)
            del self._step

    def _batch(self, kind: Kind, run: Callable[[bool], Context]) -> Context:
        return self._hooks.seeds.batch(kind, run)

    def _next(self, reader: Reader, part: str) -> Item | None:
        if part == VALIDATION or self.loop.accumulate == 1:
            return super()._next(reader, part)
        ctx = self.live
        with noting(lambda: f"while reading the training data ({place_of(ctx, step=1 + len(reader.ahead))})"):
            return reader.take_before(ctx.global_step + 1, self.loop.skipped(ctx.callbacks))

    def _kind_of_span(self) -> type[Span] | None:
        if InPlaceSpan.can_train(self._step, self.live):
            return InPlaceSpan
        compiled = isinstance(self._step, CompiledStep) and CompiledSpan.can_train(self._step, self.live)
        return CompiledSpan if compiled else None

    def _train_span(self, kind: type[Span], reader: Reader, stop: float) -> bool:
        if reader.ended:
            return False
        self._span = kind(self._step, self.live)
        # Its tensors are to be freed as the span copies them.
        self._live = None
        self._span.run(reader.take, stop)
        self._live, trained, self._span = self._span.context(), self._span.batches > 0, None
        return trained


def borrow_step(loop: Loop) -> Step:
    """A planned step for exclusive use; give it back to have the next run start at once."""
    ready = beside(loop, "steps", list[Step])
    try:
        return ready.pop()
    except IndexError:
        return CompiledStep(loop) if loop.compile else Step(loop)


def return_step(loop: Loop, step: Step) -> None:
    step.release()
    beside(loop, "steps", list[Step]).append(step)


def passed_over(ctx: Context, data: Any) -> Context:
    """The boundary after a batch that is skipped; ``data`` is ``ctx.data`` after it."""
    return after(ctx, "batch_end", step=ctx.step + 1, global_step=ctx.global_step + 1, data=data)
