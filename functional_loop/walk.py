"""The grammar of the stages: a state machine that can be entered after any of them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TypeVar

from . import measures
from .batch_stages import boundary_after, place_of, train_batch, valid_batch
from .context import Context
from .errors import noting
from .fast.compiled import CompiledStep
from .fast.compiled_stretch import CompiledStretch
from .fast.in_place import InPlaceStretch
from .fast.stretch import Item, Stretch
from .record import evolve
from .step import Step, autocast_off

T = TypeVar("T")


class Walk:
    """The grammar of the stages, entered after ``ctx.stage``.

    Args:
        ctx: where to start.
        stop: the number of the batch, in the run, after which somebody will look at the context; the contexts of other
            batches nobody sees but hooks. ``None`` if every boundary is looked at. It can be moved on at a boundary.
    """

    def __init__(self, ctx: Context, stop: float | None = None) -> None:
        self._ctx = ctx
        self._stretch: Stretch | None = None
        self._loop = ctx.loop
        self.stop = stop
        self._boundaries = self._grammar()

    @property
    def ctx(self) -> Context:
        """The last boundary."""
        return self._ctx if self._stretch is None else self._stretch.context()

    def advance(self) -> bool:
        """Go to the next boundary that somebody may look at; whether there was one."""
        with autocast_off(self._loop.device.type):
            return next(self._boundaries, False)

    def open(self) -> None:
        """Get hold of the loop's tensor program."""
        self._step = self._loop.borrow_step()

    def close(self) -> None:
        """Let go of the data, and give the tensor program back."""
        self._ctx, self._stretch = self.ctx, None
        self._boundaries.close()
        self._loop.return_step(self._step)

    def _grammar(self) -> Generator[bool]:
        if self.ctx.stage == "":
            yield self._reach("begin", self.ctx)
        while True:
            if self.ctx.stage in ("begin", "epoch_end"):
                if self.ctx.terminate or self.ctx.epoch >= self._loop.epochs:
                    yield self._reach("end", self.ctx)
                    return
                yield self._reach("epoch_begin", _next_epoch(self.ctx))
            if self.ctx.stage in ("epoch_begin", "batch_end"):
                yield from self._train_batches()
                yield self._reach("before_valid", _score_train(self.ctx))
            if self.ctx.stage == "valid_end":
                yield self._reach("epoch_end", self.ctx)
            elif self._loop.valid is not None and self._loop.evaluates(self.ctx.epoch):
                yield from self._valid_batches()
                yield self._reach("valid_end", _score_valid(self.ctx))
            else:
                yield self._reach("epoch_end", evolve(self.ctx, last_scores_valid=()))

    def _reach(self, stage: str, ctx: Context) -> bool:
        """Run the hooks of ``stage``, and be at its boundary."""
        self._ctx = boundary_after(stage, ctx)
        return True

    def _train_batches(self) -> Generator[bool]:
        source, epoch = self._loop.train, self.ctx.epoch
        if self.ctx.step == source.length:
            return
        batches = source.fetch(self.ctx.seed, epoch, self.ctx.step, self.ctx.data)
        items: Iterator[Item]
        if source.length is None and self._loop.accumulate > 1:
            items = _mark_last(batches)
        else:
            items = ((item, i == source.length) for i, item in enumerate(batches, self.ctx.step + 1))
        if self.stop is not None and (kind := _kind_of_stretch(self._step, self._ctx)) is not None:
            yield from self._train_stretches(kind, items)
        else:
            went_back = yield from self._train_each(items)
            if went_back:
                # To read on from there is what a resume does.
                if isinstance(batches, Generator):
                    batches.close()
                yield from self._train_batches()
                return
        if self.ctx.step == 0:
            raise ValueError(f"the training data gave no batch in epoch {epoch}")

    def _train_stretches(self, kind: type[Stretch], items: Iterator[Item]) -> Generator[bool]:
        """All batches of the epoch, stop by stop."""
        ended = False
        while not ended:
            assert self.stop is not None
            stop = self.stop
            self._stretch = kind(self._step, self._ctx)
            # Its tensors are to be freed as the stretch copies them.
            del self._ctx
            self._stretch.run(items, stop)
            self._ctx, done, self._stretch = self._stretch.context(), self._stretch.batches, None
            if done:
                yield True
            ended = self._ctx.global_step != stop or self._ctx.step == self._loop.train.length

    def _train_each(self, items: Iterator[Item]) -> Generator[bool, None, bool]:
        """Batch by batch, until a hook goes back to an earlier context; whether one did."""
        probe = True
        while (item := _next(items, lambda: f"training data ({place_of(self.ctx, step=1)})")) is not None:
            (batch, data), last = item
            number = self.ctx.global_step + 1
            self._ctx = train_batch(self._step, self.ctx, batch, data, last, probe)
            yield True
            if self.ctx.global_step != number:
                return True
            probe = False
        return False

    def _valid_batches(self) -> Iterator[bool]:
        source = self._loop.valid
        assert source is not None
        if self.ctx.step_valid == source.length:
            return
        batches = source.fetch(self.ctx.seed, self.ctx.epoch, self.ctx.step_valid, ())
        while (item := _next(batches, lambda: f"validation data ({place_of(self.ctx, step_valid=1)})")) is not None:
            self._ctx = valid_batch(self._step, self.ctx, item[0])
            yield True


def _kind_of_stretch(step: Step, ctx: Context) -> type[Stretch] | None:
    if InPlaceStretch.can_train(step, ctx):
        return InPlaceStretch
    return CompiledStretch if isinstance(step, CompiledStep) and CompiledStretch.can_train(step, ctx) else None


def _next_epoch(ctx: Context) -> Context:
    loop = ctx.loop
    running = measures.start(loop.measures_train) if loop.evaluates(ctx.epoch + 1) else ()
    # A window that train_step left open does not reach into this epoch.
    return evolve(ctx, epoch=ctx.epoch + 1, step=0, accumulated=(), measures={"train": running, "valid": ()})


def _mark_last(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Every item, and whether it is the last: reads one item ahead."""
    iterator = iter(items)
    for item in iterator:
        for following in iterator:
            yield item, False
            item = following
        yield item, True


def _next(items: Iterator[T], place: Callable[[], str]) -> T | None:
    with noting(lambda: f"while reading the {place()}"):
        return next(items, None)


def _score_train(ctx: Context) -> Context:
    running = ctx.measures["train"]
    with noting(lambda: f"in the training scores ({place_of(ctx)})"):
        scores = measures.scores(ctx.loop.measures_train, running) if running != () else ()
    return evolve(ctx, last_scores_train=scores, measures={**ctx.measures, "train": ()})


def _score_valid(ctx: Context) -> Context:
    with noting(lambda: f"in the validation scores ({place_of(ctx)})"):
        running = ctx.measures["valid"] if ctx.step_valid else measures.start(ctx.loop.measures_valid)
        scores = measures.scores(ctx.loop.measures_valid, running)
    return evolve(ctx, last_scores_valid=scores, measures={**ctx.measures, "valid": ()})
