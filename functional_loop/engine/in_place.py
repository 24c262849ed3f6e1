"""A span of batches whose tensors are written to in place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import setitem
from typing import Any, NamedTuple

from torch import Tensor

from ..core.batch import Batch
from ..core.context import Context
from ..core.rng import step_seed
from ..data.reader import Item
from ..optim.torch_carry import carry_of
from .span import Span, is_unobserved
from .step import Differentiated, Step, Tensors


class _Place(NamedTuple):
    """What else changes from batch to batch."""

    buffers: Tensors
    loss: Any
    measures: Any
    data: Any
    batches: int


class InPlaceSpan(Span):
    """Trains on copies of the tensors of a context, which leave it when nothing is written to them any more."""

    def __init__(self, step: Step, ctx: Context) -> None:
        super().__init__(step, ctx)
        self._trainable = ctx.trainable
        self._carry = carry_of(step.updater, ctx.params, ctx.optimizer_state, ctx.trainable)
        self._place = [_Place(ctx.buffers, ctx.last_loss, ctx.measures, ctx.data, 0)]
        self._leaves: Tensors = {}
        self._wanted: tuple[Tensor, ...] = ()

    @staticmethod
    def can_train(step: Step, ctx: Context) -> bool:
        in_turns = step.network.writes or step.optimizer.needs_closure
        return step.in_place and not in_turns and is_unobserved(ctx)

    @property
    def batches(self) -> int:
        return self._place[0].batches

    def context(self) -> Context:
        place, (params, optimizer_state) = self._place[0], self._carry.tensors(apart=True)
        return self._context(
            place.batches,
            params=params,
            buffers=place.buffers,
            optimizer_state=optimizer_state,
            last_loss=place.loss,
            measures=place.measures,
            data=place.data,
        )

    def run(self, take: Callable[[], Item | None], stop: float) -> None:
        # The network has the tensors of its last call.
        self._step.network.release()
        self._carry.own()
        super().run(take, stop)

    def _train(self, batch: Batch, data: Any, probe: bool) -> None:
        place = self._place[0]
        self._doing = "in the network or the loss, between 'batch_begin' and 'after_backward'"
        loss, outputs, buffers, grads = self._gradients(place, batch, probe)
        loss = self._own(loss)
        running = self._measured(place.measures, outputs, batch, loss)
        # The graph holds on to the parameters.
        del outputs
        self._doing = "in the optimizer, between 'after_backward' and 'batch_end'"
        there = _Place(buffers, loss, running, data, place.batches + 1)
        if self._carry.step(grads, partial(setitem, self._place, 0, there)):
            self._leaves = {}

    def _gradients(self, place: _Place, batch: Batch, probe: bool) -> Differentiated:
        step, trainable, start = self._step, self._trainable, self._start
        if not self._leaves:
            self._leaves = step.leaves(self._carry.tensors()[0], trainable)
            self._wanted = tuple(self._leaves[name] for name in trainable)
            self._written = frozenset(leaf.untyped_storage().data_ptr() for leaf in self._wanted)
        seed = step_seed(start.seed, start.global_step + place.batches + 1)
        return step.differentiate(self._leaves, self._wanted, place.buffers, batch, seed, probe)
