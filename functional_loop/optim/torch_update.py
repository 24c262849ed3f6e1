"""Any `torch.optim` class as a pure update: a private instance steps on copies."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from ..core.copies import tree_was_written

Tensors: TypeAlias = dict[str, Tensor]
State: TypeAlias = dict[str, Any]
Closure: TypeAlias = Callable[[Tensors], tuple[Tensor, Tensors]]


class Updater(Protocol):
    """The update of an optimizer, planned for some parameters."""

    def __call__(
        self, grads: Tensors, state: State, params: Tensors, closure: Closure | None = None
    ) -> tuple[Tensors, State]:
        """New parameters and state; see `Optimizer.update`."""

    def release(self) -> None:
        """Let go of the tensors of the last update."""


class TorchUpdate:
    """The update of any optimizer class as a pure function, by means of one private instance.

    The instance keeps no tensor between two updates, unless a `TorchCarry` lets it. What a step adds to the groups, or
    changes in them, is part of the state; a class that keeps anything elsewhere is refused at its first step.

    Args:
        instance: the private optimizer; its groups hold the parameters of ``groups`` in that order.
        groups: names of the parameters of every group.
        needs_closure: the step moves all parameters, and evaluates the network itself.
    """

    def __init__(self, instance: torch.optim.Optimizer, groups: Sequence[Sequence[str]], needs_closure: bool) -> None:
        self.instance = instance
        self._groups = groups
        self._needs_closure = needs_closure
        self._flags = [copied(without_params(group)) for group in instance.param_groups]
        self.is_probed = needs_closure
        self.release()

    def __call__(
        self, grads: Tensors, state: State, params: Tensors, closure: Closure | None = None
    ) -> tuple[Tensors, State]:
        if self.is_probed:
            return self._update(grads, state, params, closure)
        before = attributes(self.instance)
        done = self._update(grads, state, params, closure)
        self._probe(before, done, lambda: self._update(grads, state, params, closure))
        return done

    def _update(self, grads: Tensors, state: State, params: Tensors, closure: Closure | None) -> tuple[Tensors, State]:
        try:
            copies = self.lend(grads, state, params)
            if self._needs_closure:
                self._step_with(closure, params, copies)
            else:
                set_gradients(copies, grads)
                self.instance.step()
            return self._take_back(state, params, copies)
        finally:
            self.release()

    def _probe(self, before: State, done: tuple[Tensors, State], again: Callable[[], tuple[Tensors, State]]) -> None:
        """Step again where attributes have changed, which is to make no difference, nor to change them further.

        Raises:
            ValueError: it does.
        """
        once = attributes(self.instance)
        if tree_was_written(once, before):
            repeated = again()
            twice = attributes(self.instance)
            changed = [name for name in twice if name not in once or tree_was_written(twice[name], once[name])]
            if not changed and tree_was_written(repeated, done):
                changed = [name for name in once if name not in before or tree_was_written(once[name], before[name])]
            if changed:
                raise ValueError(
                    f"{type(self.instance).__name__} keeps a state in its attribute {changed[0]!r}, outside of state "
                    "and param_groups, so that a run could not go on where it has stopped: keep it in self.state[p] of "
                    "a parameter, or in a group"
                )
        self.is_probed = True

    def lend(self, grads: Tensors, state: State, params: Tensors) -> Tensors:
        """Fill the instance with copies, returned, of the parameters that a step may move, and of their state."""
        self.release()
        copies = {
            name: params[name].detach().clone().requires_grad_()
            for names in self._groups
            for name in names
            if self._needs_closure or name in grads
        }
        for group, names, flags in zip(self.instance.param_groups, self._groups, self._flags, strict=True):
            members = group["params"]
            # In place, because LBFGS holds a second reference to the list.
            members[:] = [copies[name] for name in names if name in copies]
            # At no time without its parameters: an interrupt in here is to leave an instance that can be released.
            for key in group.keys() - flags.keys() - {"params"}:
                del group[key]
            group.update(copied(flags))
            if flags.get("fused"):
                _check_slots(state["slots"], copies, [name for name in names if name in copies])
        fill(self.instance, state, copies)
        return copies

    def _step_with(self, closure: Closure | None, params: Tensors, copies: Tensors) -> None:
        if closure is None:
            name = type(self.instance).__name__
            raise TypeError(f"{name} evaluates the network itself: update(grads, state, params, closure)")

        def evaluate() -> Tensor:
            # Copies again, because the step goes on to write to its own ones.
            here = params | {name: copy.detach().clone() for name, copy in copies.items()}
            loss, grads = closure(here)
            set_gradients(copies, grads)
            return loss

        self.instance.step(evaluate)  # type: ignore[arg-type]

    def _take_back(self, state: State, params: Tensors, copies: Tensors) -> tuple[Tensors, State]:
        slots = state["slots"] | self.slots_of(copies)
        for copy in copies.values():
            copy.grad = None
            copy.requires_grad_(False)
        return params | copies, {"groups": self.groups_of(self.instance.param_groups), "slots": slots}

    def slots_of(self, params: Tensors) -> State:
        """The slots of ``params``, which the instance holds, by name.

        Raises:
            ValueError: the instance keeps others.
        """
        held, ours = self.instance.state, set(map(id, params.values()))
        if other := [key for key in held if id(key) not in ours]:
            kind = type(self.instance).__name__
            raise ValueError(
                f"{kind} keeps a state that is of no parameter, under {other[0]!r}: keep it in self.state[p] of one, "
                "or in a group"
            )
        return {name: dict(held[param]) for name, param in params.items() if param in held}

    def groups_of(self, groups: Sequence[dict[str, Any]]) -> list[State]:
        """What is state of groups of the instance."""
        kind = type(self.instance).__name__
        return [values_of(group, flags, kind) for group, flags in zip(groups, self._flags)]

    def release(self) -> None:
        self.instance.state = defaultdict(dict)
        for group in self.instance.param_groups:
            group["params"].clear()


def set_gradients(params: Tensors, grads: Tensors) -> None:
    """Give every parameter its own copy of its gradient (some kernels write to gradients), or none.

    Raises:
        ValueError: a gradient is not of the shape, dtype or device of its parameter.
    """
    for name, param in params.items():
        grad = grads.get(name)
        if grad is None:
            param.grad = None
            continue
        for what in ("shape", "dtype", "device"):
            if getattr(grad, what) != getattr(param, what):
                raise ValueError(
                    f"the gradient of {name!r} has {what} {getattr(grad, what)}, "
                    f"but the parameter {getattr(param, what)}"
                )
        param.grad = grad.detach().clone() if grad.is_sparse else like(param, grad)


def _check_slots(slots: State, params: Tensors, names: Sequence[str]) -> None:
    """Fused kernels read and write memory without a look at shapes.

    Raises:
        ValueError: a slot has not the shape that torch gives it.
    """
    for name in names:
        for key, value in slots.get(name, {}).items():
            expected = torch.Size() if key == "step" else params[name].shape
            if isinstance(value, Tensor) and value.shape != expected:
                raise ValueError(f"the slot {key!r} of {name!r} has shape {value.shape}, and not {expected}")


def like(param: Tensor, value: Tensor) -> Tensor:
    """A copy of ``value`` with the strides of ``param``, as torch makes gradients and slots; fused kernels need it."""
    if value.is_sparse or value.stride() == param.stride():
        return value.detach().clone()
    return torch.empty_like(param, dtype=value.dtype, device=value.device, requires_grad=False).copy_(value.detach())


def fill(instance: torch.optim.Optimizer, state: State, params: Tensors) -> None:
    """Put copies of hyperparameters and slots of ``state`` into ``instance``, which holds ``params``."""
    for group, values in zip(instance.param_groups, state["groups"], strict=True):
        for key, value in values.items():
            value = copied(value)
            group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
    for name, param in params.items():
        if name in state["slots"]:
            instance.state[param] = {
                key: like(param, value) if isinstance(value, Tensor) and value.shape == param.shape else copied(value)
                for key, value in state["slots"][name].items()
            }


def numbers_of(group: dict[str, Any]) -> dict[str, Any]:
    """The hyperparameters of a group that are numbers, tensors, or lists of them; the others are flags."""
    return {key: plain(value) for key, value in without_params(group).items() if is_number(value)}


def values_of(group: dict[str, Any], flags: dict[str, Any], kind: str) -> dict[str, Any]:
    """What of a group is state: its numbers, and what is not as in ``flags``, those of a group that made no step.

    Raises:
        TypeError: it can't be saved.
    """
    found = {}
    for key, value in without_params(group).items():
        if key in flags and is_number(value):
            found[key] = plain(value)
        elif key not in flags or tree_was_written(value, flags[key]):
            found[key] = _kept(value, f"{kind} has put {value!r} into its groups under {key!r}, which can't be saved")
    return found


def _kept(value: Any, refusal: str) -> Any:
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _kept(each, refusal) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_kept(each, refusal) for each in value)
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (Real, Tensor)):
        return plain(value)
    raise TypeError(refusal)


_OF_TORCH = ("state", "param_groups")


def attributes(instance: torch.optim.Optimizer) -> State:
    """Copies of the attributes of an optimizer, but for its state, its groups, and the hooks of torch."""
    own = {
        key: value for key, value in vars(instance).items() if key not in _OF_TORCH and not key.startswith("_optimi")
    }
    members = {id(param) for group in instance.param_groups for param in group["params"]}
    return {key: _snapshot(value, members) for key, value in own.items()}


def _snapshot(value: Any, members: set[int]) -> Any:
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, Tensor):
        return "a parameter" if id(value) in members else value.detach().clone()
    if isinstance(value, dict):
        return {key: _snapshot(each, members) for key, each in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return [_snapshot(each, members) for each in value]
    return value


def without_params(group: dict[str, Any]) -> dict[str, Any]:
    """The hyperparameters of a group."""
    return {key: value for key, value in group.items() if key != "params"}


def is_number(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) > 0 and all(map(is_number, value))
    return isinstance(value, (Real, Tensor)) and not isinstance(value, bool)


def plain(value: Any) -> Any:
    """``value`` with builtin numbers, lists for tuples, and copies for tensors."""
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, Tensor):
        return value.detach().clone()
    return int(value) if isinstance(value, Integral) else float(value)


def copied(value: Any) -> Any:
    """A copy of nested containers and the tensors in them."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copied(each) for each in value)
    return value
