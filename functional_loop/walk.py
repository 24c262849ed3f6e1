"""The grammar of the stages: a state machine that can be entered after any of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from itertools import count

from . import measures
from .batch_stages import boundary_after, place_of, train_batch, valid_batch
from .context import Context
from .errors import noting
from .fast.compiled import CompiledStep
from .fast.compiled_stretch import CompiledStretch
from .fast.in_place import InPlaceStretch
from .fast.stretch import Stretch
from .reading import TRAINING, VALIDATION, Item, Reader, check_epoch_done, check_validated, without_validation
from .record import evolve
from .step import Step, autocast_off


class Walk:
    """The grammar of the stages, entered after ``ctx.stage``.

    Args:
        ctx: where to start.
        stop: the number of the batch, in the run, after which the context will be observed; the contexts of other
            batches only hooks see. ``None`` if every boundary is looked at. It can be moved on at a boundary.
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
        """Go to the next boundary that may be observed; whether there was one."""
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
        ctx = self.ctx
        with closing(Reader(self._loop.train, TRAINING, ctx.seed, ctx.epoch, ctx.step, ctx.data)) as reader:
            # Not to keep the memory of a context that is not referenced elsewhere.
            del ctx
            if self.stop is not None and (kind := _kind_of_stretch(self._step, self._ctx)) is not None:
                went_back = yield from self._train_stretches(kind, reader)
            else:
                went_back = yield from self._train_each(reader)
        if went_back:
            # To read on from there is what a resume does.
            yield from self._train_batches()
        else:
            check_epoch_done(self.ctx)

    def _train_stretches(self, kind: type[Stretch], reader: Reader) -> Generator[bool, None, bool]:
        """All batches of the epoch, stop by stop."""
        while not reader.ended:
            assert self.stop is not None
            stop = self.stop
            self._stretch = kind(self._step, self._ctx)
            # Its tensors are to be freed as the stretch copies them.
            del self._ctx
            self._stretch.run(reader.take, stop)
            self._ctx, done, self._stretch = self._stretch.context(), self._stretch.batches, None
            if done:
                yield True
        return False

    def _train_each(self, reader: Reader) -> Generator[bool, None, bool]:
        """Batch by batch, until a hook goes back to an earlier context; whether one did."""
        probe, ahead = True, deque[Item]()
        while (item := self._next(reader, ahead)) is not None:
            number = self.ctx.global_step + 1
            self._ctx = train_batch(self._step, self.ctx, item.batch, item.data, item.last, probe)
            yield True
            if self.ctx.global_step != number:
                return True
            probe = False
        return False

    def _next(self, reader: Reader, ahead: deque[Item]) -> Item | None:
        """The next batch; the last of the epoch if those after it, which go to ``ahead``, are all passed over."""

        def take() -> Item | None:
            return _take(reader, lambda: f"training data ({place_of(self.ctx, step=1 + len(ahead))})")

        item = ahead.popleft() if ahead else take()
        if item is None or item.last or self._loop.accumulate == 1:
            return item
        skipped, number = self._loop.skipped(self.ctx.callbacks), self.ctx.global_step + 1
        for i in count():
            if number + i + 1 not in skipped:
                return item
            if i == len(ahead) and (following := take()) is not None:
                ahead.append(following)
            if i == len(ahead) or ahead[i].last:
                return item._replace(last=True)
        raise AssertionError

    def _valid_batches(self) -> Iterator[bool]:
        source, ctx = self._loop.valid, self.ctx
        assert source is not None
        with closing(Reader(source, VALIDATION, ctx.seed, ctx.epoch, ctx.step_valid, ctx.data)) as reader:
            # Not to keep the memory of a context that is not referenced elsewhere.
            del ctx
            while (item := _take(reader, lambda: f"validation data ({place_of(self.ctx, step_valid=1)})")) is not None:
                self._ctx = valid_batch(self._step, self.ctx, item.batch, item.data)
                yield True
        check_validated(self.ctx)


def _kind_of_stretch(step: Step, ctx: Context) -> type[Stretch] | None:
    if InPlaceStretch.can_train(step, ctx):
        return InPlaceStretch
    return CompiledStretch if isinstance(step, CompiledStep) and CompiledStretch.can_train(step, ctx) else None


def _next_epoch(ctx: Context) -> Context:
    loop = ctx.loop
    running = measures.start(loop.measures_train) if loop.evaluates(ctx.epoch + 1) else ()
    return evolve(ctx, epoch=ctx.epoch + 1, step=0, measures={"train": running, "valid": ()})


def _take(reader: Reader, place: Callable[[], str]) -> Item | None:
    with noting(lambda: f"while reading the {place()}"):
        return reader.take()


def _score_train(ctx: Context) -> Context:
    running = ctx.measures["train"]
    with noting(lambda: f"in the training scores ({place_of(ctx)})"):
        scores = measures.scores(ctx.loop.measures_train, running) if running != () else ()
    return evolve(ctx, last_scores_train=scores, measures={**ctx.measures, "train": ()})


def _score_valid(ctx: Context) -> Context:
    with noting(lambda: f"in the validation scores ({place_of(ctx)})"):
        scores = measures.scores(ctx.loop.measures_valid, ctx.measures["valid"])
    running = {**ctx.measures, "valid": ()}
    return evolve(ctx, last_scores_valid=scores, measures=running, data=without_validation(ctx.data))
