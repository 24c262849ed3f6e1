"""A `torch.optim` instance that steps in place, on tensors that no context references."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain
from operator import attrgetter, is_, setitem
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .carry import Carry, FastCarry, in_one_go, replace_by_copies
from .fast_update import FastUpdate
from .kernels import Write
from .torch_update import State, Tensors, TorchUpdate, copied, without_params

_is_sparse = attrgetter("is_sparse")


class _Saved(NamedTuple):
    """What an instance held before a step."""

    held: list[Any]
    """The parameters, and all values of their slots and of the groups, as objects."""
    live: list[Tensor]
    """The tensors among parameters and slots."""
    tensors: list[Tensor]
    """Copies of these."""
    slots: State
    groups: list[State]
    is_plain: bool
    """Whether no value of a group can be written to."""


class TorchCarry(Carry):
    """Steps the private instance of a `TorchUpdate` in place: it keeps its tensors from step to step.

    A step of Python code can be interrupted or fail half-way, so that all is copied before it; a copy of some tensors
    into memory that is there costs little beside the Python of a step.
    """

    def __init__(self, update: TorchUpdate, params: Tensors, state: State, trainable: tuple[str, ...]) -> None:
        self._update, self._trainable = update, trainable
        self._order = list(params)
        self._params: Tensors
        """Those that the instance has not."""
        self._state: State
        """That of these, and hyperparameters before the first step of the instance."""
        self._own: Tensors
        """Those that the instance has; none before its first step."""
        self._saved: _Saved | None
        self._put(params, state)
        self._grads: list[Tensor] = []
        """Memory for the gradients of these."""
        self._is_saved = [False]
        """Whether the tensors saved are those to go back to: a step has begun and is not complete."""

    def own(self) -> None:
        replace_by_copies(self._params, self._state["slots"], self._trainable)

    def tensors(self, apart: bool = False) -> tuple[Tensors, State]:
        if not self._own:
            return {name: self._params[name] for name in self._order}, self._state
        saved = self._saved if self._is_saved[0] else None
        held = list(self._own.values()) if saved is None else saved.tensors
        params = self._params | {name: value.detach() for name, value in zip(self._own, held)}
        slots = self._update.slots_of(self._own) if saved is None else self._saved_slots(saved)
        groups = self._update.groups_of(self._update.instance.param_groups if saved is None else saved.groups)
        return {name: params[name] for name in self._order}, {"groups": groups, "slots": self._state["slots"] | slots}

    def step(self, grads: Sequence[Tensor | None], then: Write) -> bool:
        found = {name: grad for name, grad in zip(self._trainable, grads) if grad is not None}
        sparse = any(map(_is_sparse, found.values()))
        if sparse or not self._update.is_probed or found.keys() != self._own.keys():
            return self._step_out_of_place(found, then)
        with torch.no_grad():
            self._save([found[name] for name in self._own])
        self._update.instance.step()
        in_one_go([partial(setitem, self._is_saved, 0, False), then])
        return False

    def _step_out_of_place(self, grads: Tensors, then: Write) -> bool:
        """A step on copies, other copies of which the instance keeps after it."""
        params, state = self.tensors()
        self._put(params, state)
        params, state = self._update(grads, state, params)
        in_one_go([self._putting(params, state), then])
        if self._update.is_probed:
            own = self._update.lend(grads, state, params)
            # Some kernels write to gradients.
            self._grads = [torch.empty_like(param) for param in own.values()]
            self._own = own
            # What the instance has is not to be kept here too.
            for name in own:
                self._params.pop(name)
                self._state["slots"].pop(name, None)
        return True

    def _put(self, params: Tensors, state: State) -> None:
        self._putting(params, state)()

    def _putting(self, params: Tensors, state: State) -> Write:
        """A call after which the tensors are these, and the instance has none."""
        state = {**state, "slots": {name: dict(own) for name, own in state["slots"].items()}}
        return partial(self.__dict__.update, {"_params": dict(params), "_state": state, "_own": {}, "_saved": None})

    def _save(self, grads: list[Tensor]) -> None:
        """Copy all that a step writes to, and give the instance copies of the gradients."""
        instance = self._update.instance
        self._is_saved[0] = False
        own, states = self._own.values(), instance.state.values()
        values = (*map(dict.values, states), *map(dict.values, instance.param_groups))
        held, saved = [*own, *chain.from_iterable(values)], self._saved
        if saved is not None and saved.is_plain and len(held) == len(saved.held) and all(map(is_, held, saved.held)):
            torch._foreach_copy_([*saved.tensors, *self._grads], [*saved.live, *grads])
        else:
            slots = self._update.slots_of(self._own)
            live = [*own, *(v for each in slots.values() for v in each.values() if isinstance(v, Tensor))]
            groups = [copied(without_params(group)) for group in instance.param_groups]
            is_plain = not any(isinstance(v, (Tensor, list, dict)) for group in groups for v in group.values())
            torch._foreach_copy_(self._grads, grads)
            self._saved = _Saved(held, live, [t.detach().clone() for t in live], slots, groups, is_plain)
        for param, grad in zip(own, self._grads):
            param.grad = grad
        self._is_saved[0] = True

    def _saved_slots(self, saved: _Saved) -> dict[str, State]:
        following = iter(saved.tensors[len(self._own) :])
        return {
            name: {key: next(following) if isinstance(value, Tensor) else value for key, value in own.items()}
            for name, own in saved.slots.items()
        }


def carry_of(updater: Any, params: Tensors, state: State, trainable: tuple[str, ...]) -> Carry:
    """What ``updater`` moves in place, starting from a context's tensors."""
    kind = FastCarry if isinstance(updater, FastUpdate) else TorchCarry
    return kind(updater, params, state, trainable)
