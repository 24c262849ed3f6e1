"""Parameters and the state of an optimizer in memory of their own, which steps move in place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from functools import partial
from operator import call, setitem
from typing import Any, NamedTuple

from torch import Tensor

from ..core.copies import clone_tree
from .fast_update import FastUpdate, with_others
from .kernels import Write
from .mover import Mover
from .torch_update import State, Tensors

# Called with a function of no arguments.
_call: Any = call


def in_one_go(calls: Sequence[Write]) -> None:
    """Make calls that go directly into C, between which no signal can come."""
    deque(map(_call, calls), maxlen=0)


def replace_by_copies(params: Tensors, slots: State, trainable: tuple[str, ...]) -> None:
    """Put copies of trainable parameters and of slots in their place, tensor by tensor."""
    for name in params.keys() & trainable:
        params[name] = params[name].detach().clone()
    for own in slots.values():
        for key in own:
            own[key] = clone_tree(own[key])


class Carry(ABC):
    """What an optimizer moves from batch to batch.

    At any time, also after an error or an interrupt in the middle of a step, `tensors` are those after the last step
    that was completed.
    """

    @abstractmethod
    def own(self) -> None:
        """Copy all that steps will write to, tensor by tensor, each original being let go of at once."""

    @abstractmethod
    def tensors(self, apart: bool = False) -> tuple[Tensors, State]:
        """All parameters, and the optimizer's state.

        Args:
            apart: each has memory of its own.
        """

    @abstractmethod
    def step(self, grads: Sequence[Tensor | None], then: Write) -> bool:
        """Move all by the gradients of the trainable parameters, and call ``then`` when that is complete.

        Returns:
            Whether other tensors than before are moved, so that the network must be shown them.
        """


class _Held(NamedTuple):
    params: Tensors
    """Parameters that no mover has."""
    slots: State
    """Slots that no mover has."""
    movers: list[Mover]
    """By parameter group: what moves the others; none where kernels will not do."""


class FastCarry(Carry):
    """Moves by the kernels of a `FastUpdate`, and by its generic update where they will not do."""

    def __init__(self, update: FastUpdate, params: Tensors, state: State, trainable: tuple[str, ...]) -> None:
        self._update, self._groups, self._trainable = update, state["groups"], trainable
        slots = {name: dict(own) for name, own in state["slots"].items()}
        self._held = [_Held(dict(params), slots, [])]
        self._order = list(params)
        self._missing: list[int] = []
        self._steps = 0
        self._joins = False
        self._positions: list[list[int] | None] = []

    def own(self) -> None:
        params, slots, _ = self._held[0]
        replace_by_copies(params, slots, self._trainable)

    def tensors(self, apart: bool = False) -> tuple[Tensors, State]:
        params, slots, movers = self._held[0]
        params, slots = dict(params), dict(slots)
        for mover in movers:
            moved, made = mover.by_name(apart)
            params |= moved
            slots |= with_others(made, slots)
        return {name: params[name] for name in self._order}, {"groups": self._groups, "slots": slots}

    def step(self, grads: Sequence[Tensor | None], then: Write) -> bool:
        with self._update.no_grad:
            held, missing = self._held[0], [i for i, grad in enumerate(grads) if grad is None]
            # To put tensors together is no gain for a single step.
            joins = self._steps > 0
            arranges = not held.movers or missing != self._missing or joins != self._joins
            if arranges:
                held = self._arranged(missing, joins)
            row = self._row(held, grads)
            if row is not None:
                in_one_go([*row, partial(setitem, self._held, 0, held), then])
        if row is None:
            self._step_generically(grads, then)
        self._steps += 1
        return arranges or row is None

    def _arranged(self, missing: list[int], joins: bool) -> _Held:
        """What is held, with movers for what has a gradient, if kernels can move all of it."""
        params, state = self.tensors()
        slots = state["slots"]
        groups = list(zip(self._update.groups, self._groups))
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
        return _Held(params, slots, movers)

    def _row(self, held: _Held, grads: Any) -> list[Write] | None:
        """Calls that move all, ``None`` where kernels will not do."""
        if not held.movers:
            return None
        row: list[Write] = []
        for group, mover, positions in zip(self._update.groups, held.movers, self._positions):
            own = group.row(mover, grads if positions is None else [grads[i] for i in positions])
            if own is None:
                return None
            row += own
        return row

    def _step_generically(self, grads: Sequence[Tensor | None], then: Write) -> None:
        params, state = self.tensors()
        found = {name: grad for name, grad in zip(self._trainable, grads) if grad is not None}
        params, state = self._update.generic(found, state, params)
        in_one_go([partial(setitem, self._held, 0, _Held(params, state["slots"], [])), then])
