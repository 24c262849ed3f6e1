"""A stretch of batches whose tensors are written to in place."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from operator import call, setitem
from typing import Any, NamedTuple

from torch import Tensor

from ..batch import Batch
from ..context import Context
from ..lending import clone_tree
from ..reading import Item
from ..rng import fold_in
from ..step import Differentiated, Step, Tensors
from .fast_update import FastUpdate, with_others
from .kernels import Write
from .mover import Mover
from .stretch import Stretch, is_unobserved

# Called with a function of no arguments.
_call: Any = call


class _Place(NamedTuple):
    """What changes from batch to batch."""

    params: Tensors
    """Parameters that no mover has."""
    slots: dict[str, Any]
    """Slots that no mover has."""
    movers: list[Mover]
    """By parameter group: what moves the others; none where kernels will not do."""
    buffers: Tensors
    loss: Any
    measures: Any
    data: Any
    batches: int


class InPlaceStretch(Stretch):
    """Trains on copies of the tensors of a context, which leave it when nothing is written to them any more.

    What a step writes, it writes in one row of calls into torch that no signal can come between.
    """

    def __init__(self, step: Step, ctx: Context) -> None:
        super().__init__(step, ctx)
        assert isinstance(step.updater, FastUpdate)
        self._updater = step.updater
        self._values = ctx.optimizer_state["groups"]
        self._trainable = ctx.trainable
        params, slots = dict(ctx.params), {name: dict(own) for name, own in ctx.optimizer_state["slots"].items()}
        self._place = [_Place(params, slots, [], ctx.buffers, ctx.last_loss, ctx.measures, ctx.data, 0)]
        self._order = list(params)
        self._leaves: Tensors = {}
        self._wanted: tuple[Tensor, ...] = ()
        self._missing: list[int] = []
        self._joins = False
        self._positions: list[list[int] | None] = []

    @staticmethod
    def can_train(step: Step, ctx: Context) -> bool:
        return (
            is_unobserved(ctx) and isinstance(step.updater, FastUpdate) and not step.at_once and not step.network.writes
        )

    @property
    def batches(self) -> int:
        return self._place[0].batches

    def context(self) -> Context:
        place, params, slots = self._place[0], *self._merged(apart=True)
        return self._context(
            self.batches,
            params=params,
            buffers=place.buffers,
            optimizer_state={"groups": self._values, "slots": slots},
            last_loss=place.loss,
            measures=place.measures,
            data=place.data,
        )

    def run(self, take: Callable[[], Item | None], stop: float) -> None:
        # One by one, so that each original is freed at once where nothing else has the context. The network has those
        # of its last call.
        self._step.network.release()
        params, slots = self._place[0].params, self._place[0].slots
        for name in params.keys() & self._trainable:
            params[name] = params[name].detach().clone()
        for own in slots.values():
            for key in own:
                own[key] = clone_tree(own[key])
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
        self._update(grads, buffers, loss, running, data, place.batches + 1)

    def _gradients(self, place: _Place, batch: Batch, probe: bool) -> Differentiated:
        step, trainable, start = self._step, self._trainable, self._start
        if not self._leaves:
            self._leaves = step.leaves(self._merged()[0], trainable)
            self._wanted = tuple(self._leaves[name] for name in trainable)
            self._written = frozenset(leaf.untyped_storage().data_ptr() for leaf in self._wanted)
        seed = fold_in(start.seed, "step", start.global_step + place.batches + 1)
        return step.differentiate(self._leaves, self._wanted, place.buffers, batch, seed, probe)

    def _update(self, grads: Sequence[Tensor | None], *done: Any) -> None:
        """Move parameters and slots, and be at the place whose last fields are ``done``."""
        with self._updater.no_grad:
            place = self._place[0]
            missing = [i for i, grad in enumerate(grads) if grad is None]
            # To put tensors together is no gain for a single step.
            joins = place.batches > 0
            if not place.movers or missing != self._missing or joins != self._joins:
                place = self._arranged(missing, joins)
            row = self._row(place, grads)
            if row is not None:
                there = _Place(place.params, place.slots, place.movers, *done)
                deque(map(_call, [*row, partial(setitem, self._place, 0, there)]), maxlen=0)
        if row is None:
            self._update_generically(grads, *done)

    def _arranged(self, missing: list[int], joins: bool) -> _Place:
        """The same place, with movers for what has a gradient, if kernels can move all of it."""
        params, slots = self._merged()
        groups = list(zip(self._updater.groups, self._values))
        absent = {self._trainable[i] for i in missing}
        positions = {name: i for i, name in enumerate(self._trainable) if name not in absent}
        names = [[name for name in group.layouts if name in positions] for group, _ in groups]
        movers: list[Mover] = []
        for (group, values), own in zip(groups, names):
            columns = group.columns(own, values, slots, params)
            if columns is None:
                movers = []
                break
            movers.append(group.mover(own, values, columns, joins))
        # A tensor that is kept here too would keep the memory of what it was.
        for mover in movers:
            for name in mover.names:
                del params[name]
                if name in slots and mover.keys:
                    slots[name] = {key: value for key, value in slots[name].items() if key not in mover.keys}
        self._missing, self._joins = missing, joins
        indices = [[positions[name] for name in own] for own in names]
        everything = list(range(len(self._trainable)))
        self._positions = [None if own == everything else own for own in indices]
        # The network is to see what the movers move.
        self._leaves = {}
        return self._place[0]._replace(params=params, slots=slots, movers=movers)

    def _row(self, place: _Place, grads: Any) -> list[Write] | None:
        """Calls that move all, ``None`` where kernels will not do."""
        if not place.movers:
            return None
        row: list[Write] = []
        for group, mover, positions in zip(self._updater.groups, place.movers, self._positions):
            own = group.row(mover, grads if positions is None else [grads[i] for i in positions])
            if own is None:
                return None
            row += own
        return row

    def _update_generically(self, grads: Sequence[Tensor | None], *done: Any) -> None:
        params, slots = self._merged()
        found = {name: grad for name, grad in zip(self._trainable, grads) if grad is not None}
        params, state = self._updater.generic(found, {"groups": self._values, "slots": slots}, params)
        self._place[0] = _Place(params, state["slots"], [], *done)
        self._leaves = {}

    def _merged(self, apart: bool = False) -> tuple[Tensors, dict[str, Any]]:
        """All parameters, and the slots of all that have any, by name; each has memory of its own if ``apart``."""
        place = self._place[0]
        params, slots = dict(place.params), dict(place.slots)
        for mover in place.movers:
            moved, made = mover.by_name(apart)
            params |= moved
            slots |= with_others(made, slots)
        return {name: params[name] for name in self._order}, slots
