"""The stages of one batch, written once over what a program computes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..core import measures
from ..core.batch import Batch, BatchSource, copied, to_device
from ..core.context import Context, after
from ..core.errors import add_note, noting
from ..core.hook_seeds import Kind
from ..core.measures import Measure
from ..core.record import evolve
from ..data.reader import CALLED, TRAINING, VALIDATION, Item, check_epoch_done, check_validated, without_validation
from .hooks import check_grads, hooks_of, place_of
from .step import Gradients, Tensors

Chosen = Sequence[Measure]
Again = Callable[[Tensors, Tensors], Gradients]


class BatchProgram(ABC):
    """A `Program` with one live context, whose batches are taken one by one.

    Subclasses say how tensors are computed, hooks are run and scores are made: for one run, or for all members of an
    ensemble at once.

    Args:
        ctx: a boundary.

    Attributes:
        of: whose step it is, for notes of errors.
        at_once: whether gradients and update are one computation, `whole`, which no hook divides.
    """

    of = ""
    at_once = False

    def __init__(self, ctx: Context) -> None:
        self.loop, self._hooks = ctx.loop, hooks_of(ctx.loop)
        self._live: Context | None = ctx
        self._probe = True

    # What is computed.

    @abstractmethod
    def gradients(self, ctx: Context, params: Any, buffers: Any, batch: Batch, probe: bool) -> Gradients:
        """Loss, outputs, new buffers and gradients of a batch at these parameters and buffers."""

    @abstractmethod
    def update(
        self, ctx: Context, params: Any, buffers: Any, grads: Any, loss: Tensor, again: Again
    ) -> tuple[Any, Any, Any]:
        """New parameters, optimizer state and buffers; ``again(params, buffers)`` evaluates the batch anew."""

    def whole(self, ctx: Context, batch: Batch, probe: bool) -> tuple[Gradients, Any]:
        """`gradients`, with the new parameters, and the new optimizer state, of a program that is ``at_once``."""
        raise NotImplementedError

    @abstractmethod
    def outputs(self, ctx: Context, batch: Batch, with_loss: bool) -> tuple[Any, Any]:
        """Outputs in evaluation mode, and the loss if wanted; what they draw is a function of the place."""

    @abstractmethod
    def reader(self, source: BatchSource, part: str, start: int) -> Any:
        """A reader of the epoch of a source at hand, after ``start`` of its batches."""

    @abstractmethod
    def hooked(self, stage: str, ctx: Context, seeds: bool) -> Context:
        """What the hooks of a stage make of ``ctx``."""

    @abstractmethod
    def start(self, chosen: Chosen) -> Any:
        """Accumulators of measures before the first batch."""

    @abstractmethod
    def measured(self, chosen: Chosen, running: Any, batch: Batch, y_hats: Any, loss: Any) -> Any:
        """Accumulators after one more batch."""

    @abstractmethod
    def scores(self, chosen: Chosen, running: Any) -> Any:
        """Scores by measure id."""

    # What a Runner asks for.

    @property
    def live(self) -> Context:
        assert self._live is not None
        return self._live

    def context(self) -> Context:
        return self.live

    @property
    def strayed(self) -> bool:
        return False

    def retire(self) -> bool:
        if not (self.live.terminate or self.live.epoch >= self.loop.epochs):
            return False
        self.stage("end")
        return True

    def stage(self, stage: str) -> None:
        ctx = self.live
        if stage == "epoch_begin":
            running = self.start(self.loop.measures_train) if self.loop.evaluates(ctx.epoch + 1) else ()
            ctx = evolve(ctx, epoch=ctx.epoch + 1, step=0, measures={"train": running, "valid": ()})
        elif stage == "before_valid":
            ctx = self._scored(ctx, TRAINING)
        elif stage == "valid_end":
            ctx = self._scored(evolve(ctx, data=without_validation(ctx.data)), VALIDATION)
        elif stage == "epoch_end" and ctx.stage == "before_valid":
            ctx = evolve(ctx, last_scores_valid=())
        self._live = after(self.hooked(stage, ctx, seeds=True), stage)

    def read(self, part: str) -> Any:
        self._probe = True
        if part == TRAINING:
            return self.reader(self.loop.train, part, self.live.step)
        assert self.loop.valid is not None
        return self.reader(self.loop.valid, part, self.live.step_valid)

    def check_read(self, part: str) -> None:
        (check_epoch_done if part == TRAINING else check_validated)(self.live)

    def train(self, reader: Any, stop: float | None) -> bool:
        if (item := self._next(reader, TRAINING)) is None:
            return False
        self._live = self.train_batch(self.live, item, self._probe)
        self._probe = False
        return True

    def validate(self, reader: Any) -> bool:
        if (item := self._next(reader, VALIDATION)) is None:
            return False
        ctx = self.live
        self._live = self._batch("valid", lambda seeds: self._validated(ctx, item, seeds))
        return True

    def evaluated(self, ctx: Context, batch: Batch, with_loss: bool) -> tuple[Any, Any]:
        """`outputs`, with errors that say where."""
        what = "network or the loss" if with_loss else "network"
        with noting(lambda: f"in the {what}, in evaluation mode{self.of} ({place_of(ctx)})"):
            return self.outputs(ctx, batch, with_loss)

    def train_batch(self, ctx: Context, item: Item, probe: bool) -> Context:
        """The boundary after ``batch_end`` of one batch.

        Args:
            probe: look, at some cost, for what is wrong with the network and the loss.
        """
        return self._batch("train", lambda seeds: self._trained(ctx, item, probe, seeds))

    def _batch(self, kind: Kind, run: Callable[[bool], Context]) -> Context:
        """``run(seeds)``, where ``seeds`` says whether all hooks of the batch are seeded."""
        return run(True)

    def _next(self, reader: Any, part: str) -> Item | None:
        place = {"step": 1} if part == TRAINING else {"step_valid": 1}
        with noting(lambda: f"while reading the {CALLED[part]} ({place_of(self.live, **place)})"):
            item: Item | None = reader.take()
            return item

    def _trained(self, ctx: Context, item: Item, probe: bool, seeds: bool) -> Context:
        loop, hooks, doing = self.loop, self._hooks.of, ""
        ctx = evolve(
            ctx,
            batch=to_device(item.batch, loop.device),
            data=item.data,
            step=ctx.step + 1,
            global_step=ctx.global_step + 1,
        )
        try:
            if hooks["batch_begin"]:
                ctx = self.hooked("batch_begin", ctx, seeds)
            batch = self._for_network(ctx, "train")
            changes: dict[str, Any] = {}
            if self.at_once:
                doing = "in the compiled step, between 'batch_begin' and 'batch_end'"
                found, changes["optimizer_state"] = self.whole(ctx, batch, probe)
                grads, sums, updates = found.grads, (), False
            else:
                doing = "in the network or the loss, between 'batch_begin' and 'after_backward'"
                found = self.gradients(ctx, ctx.params, ctx.buffers, batch, probe)
                grads, sums, updates = self._window(ctx, found.grads, item.last)
            doing = f"in the {_SCORES[TRAINING]}"
            changes |= {
                "params": found.params,
                "buffers": found.buffers,
                "y_hats": found.y_hats,
                "last_loss": found.loss,
                "grads": grads,
                "accumulated": sums,
                "measures": self._with_measured(ctx, TRAINING, found.y_hats, found.loss),
            }
            doing = ""
            if hooks["after_backward"] and not self.at_once:
                ctx, changes = self.hooked("after_backward", evolve(ctx, **changes), seeds), {}
                check_grads(ctx)
            if updates:
                doing = "in the optimizer, between 'after_backward' and 'batch_end'"
                changes |= self._updated(ctx, changes)
                doing = ""
            if hooks["batch_end"]:
                ctx, changes = self.hooked("batch_end", evolve(ctx, **changes), seeds), {}
            return after(ctx, "batch_end", **changes)
        except BaseException as error:
            if doing:
                add_note(error, f"{doing}{self.of} ({place_of(ctx)})")
            raise

    def _window(self, ctx: Context, grads: Tensors, last: bool) -> tuple[Any, Any, bool]:
        """Gradients as hooks see them, sums of the window if it stays open, and whether the optimizer steps."""
        if self.loop.accumulate == 1:
            return grads, (), True
        skipped = self.loop.skipped(ctx.callbacks)
        passed = sum(ctx.global_step - ctx.step < number < ctx.global_step for number in skipped)
        position = (ctx.step - passed - 1) % self.loop.accumulate + 1
        sums = _add(ctx.accumulated, grads, ctx.trainable, sparse=self.loop.optimizer.needs_sparse)
        mean = sums if position == 1 else {name: total / position for name, total in sums.items()}
        updates = last or position == self.loop.accumulate
        return mean, () if updates else sums, updates

    def _updated(self, ctx: Context, changes: dict[str, Any]) -> dict[str, Any]:
        params, buffers, grads, loss = (
            changes[name] if name in changes else getattr(ctx, name)
            for name in ("params", "buffers", "grads", "last_loss")
        )

        def again(params: Any, buffers: Any) -> Gradients:
            return self.gradients(ctx, params, buffers, self._for_network(ctx, "train"), False)

        params, optimizer_state, buffers = self.update(ctx, params, buffers, grads, loss, again)
        return {"params": params, "optimizer_state": optimizer_state, "buffers": buffers}

    def _validated(self, ctx: Context, item: Item, seeds: bool) -> Context:
        loop, hooks, chosen = self.loop, self._hooks.of, self._chosen(VALIDATION)
        running = self.start(chosen) if ctx.stage == "before_valid" else ctx.measures[VALIDATION]
        ctx = evolve(
            ctx,
            batch=to_device(item.batch, loop.device),
            data=item.data,
            step_valid=ctx.step_valid + 1,
            measures={**ctx.measures, VALIDATION: running},
        )
        if hooks["batch_valid_begin"]:
            ctx = self.hooked("batch_valid_begin", ctx, seeds)
        y_hats, loss = self.evaluated(ctx, self._for_network(ctx, "valid"), measures.need_loss(chosen))
        with self._scoring(ctx, VALIDATION):
            changes = {"y_hats": y_hats, "measures": self._with_measured(ctx, VALIDATION, y_hats, loss)}
        if hooks["batch_valid_end"]:
            ctx, changes = self.hooked("batch_valid_end", evolve(ctx, **changes), seeds), {}
        return after(ctx, "batch_valid_end", **changes)

    def _chosen(self, part: str) -> Chosen:
        return self.loop.measures_train if part == TRAINING else self.loop.measures_valid

    def _scoring(self, ctx: Context, part: str) -> noting:
        """A region in which scores are made, whose errors say so."""
        return noting(lambda: f"in the {_SCORES[part]}{self.of} ({place_of(ctx)})")

    def _with_measured(self, ctx: Context, part: str, y_hats: Any, loss: Any) -> Any:
        running = ctx.measures[part]
        if not (chosen := self._chosen(part)) or running == ():
            return ctx.measures
        return {**ctx.measures, part: self.measured(chosen, running, ctx.batch, y_hats, loss)}

    def _scored(self, ctx: Context, part: str) -> Context:
        running = ctx.measures[part]
        scores = ()
        if running != ():
            with self._scoring(ctx, part):
                scores = self.scores(self._chosen(part), running)
        return evolve(ctx, measures={**ctx.measures, part: ()}, **{f"last_scores_{part}": scores})

    def _for_network(self, ctx: Context, kind: Kind) -> Batch:
        """The batch, or a copy where hooks may see it or run again on it: a network may write to its input."""
        return copied(ctx.batch) if kind in self._hooks.seeds.hooked else ctx.batch


_SCORES = {TRAINING: "training scores", VALIDATION: "validation scores"}


def _add(sums: Tensors | tuple[()], grads: Tensors, trainable: tuple[str, ...], sparse: bool) -> Tensors:
    # A sum grows by the rows of every batch, unless it is dense.
    grads = {name: grad.to_dense() if grad.is_sparse and not sparse else grad for name, grad in grads.items()}
    if not sums:
        return grads
    # A parameter frozen within the window drops out of it.
    kept = {name: total for name, total in sums.items() if name in trainable}
    return {**kept, **{name: kept[name] + grad if name in kept else grad for name, grad in grads.items()}}
