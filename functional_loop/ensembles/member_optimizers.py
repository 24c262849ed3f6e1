"""Optimizer updates of all members at once, also where every member has hyperparameters of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.record import evolve
from ..optim.optimizer import Optimizer
from ..optim.torch_update import State, Tensors, without_params
from .stacking import Members

Group = dict[str, Any]

_FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


def has_vectorised_form(optimizer: Optimizer) -> bool:
    """Whether the arithmetic of one step can be done for all members at once.

    >>> from functional_loop import optimizer
    >>> has_vectorised_form(optimizer(torch.optim.AdamW)), has_vectorised_form(optimizer(torch.optim.Rprop))
    (True, False)
    """
    return optimizer.cls in _RULES


class MembersUpdate:
    """The update of all members of an ensemble: parameters, gradients and slots have a leading member axis.

    Hyperparameters are numbers where all members agree, else tensors of shape ``(members,)``. SGD, Adam, AdamW and
    RMSprop work element by element, so that where all agree torch's own kernel updates all members as if they were one
    large tensor, fused wherever there is a fused one. Where they differ, it is done by the formulas of torch's classes.

    Args:
        params: parameters of all members, by name.
    """

    def __init__(self, optimizer: Optimizer, params: Tensors) -> None:
        self._names = optimizer.group_names(params)
        self._groups = list(map(without_params, optimizer._instance(_detached(params)).param_groups))
        self._rule = _RULES[optimizer.cls]
        self._kernel = _fused(optimizer, params).updater(params)
        self._last: tuple[Any, Any] = ((), ())

    def __call__(self, grads: Tensors, state: State, params: Tensors) -> tuple[Tensors, State]:
        members = len(next(iter(params.values())))
        slots = self._last[1] if state["slots"] is self._last[0] else _with_common_steps(state["slots"])
        if slots is not None and not any(differ(group) for group in state["groups"]):
            params, new = self._kernel(grads, {"groups": state["groups"], "slots": slots}, params, None)
            public = _with_steps_of_members(new["slots"], members)
            self._last = public, new["slots"]
            return params, {"groups": new["groups"], "slots": public}
        return self._by_formulas(grads, state, params)

    def _by_formulas(self, grads: Tensors, state: State, params: Tensors) -> tuple[Tensors, State]:
        new_params, new_slots = dict(params), dict(state["slots"])
        for members, flags, values in zip(self._names, self._groups, state["groups"], strict=True):
            hyper = {key: as_tensor(value) for key, value in values.items()}
            for name in members:
                if name in grads:
                    grad = -grads[name] if flags.get("maximize") else grads[name]
                    slot = state["slots"].get(name, {})
                    new_params[name], made = self._rule(hyper, flags | values, params[name], grad, slot)
                    new_slots[name] = {**slot, **made}
        return new_params, {"groups": state["groups"], "slots": new_slots}


def _detached(params: Tensors) -> Tensors:
    return {name: param.detach() for name, param in params.items()}


def _fused(optimizer: Optimizer, params: Tensors) -> Optimizer:
    """The optimizer with its fused kernel, which differs in roundings from the others and takes real numbers only."""
    if optimizer.cls not in _FUSED or any(param.is_complex() for param in params.values()):
        return optimizer

    def chosen(values: Group) -> Group:
        return {key: value for key, value in values.items() if key not in ("fused", "foreach")}

    hyperparameters = {**chosen(optimizer.hyperparameters), "fused": True}
    return evolve(optimizer, hyperparameters=hyperparameters, groups=tuple(map(chosen, optimizer.groups)))


def differ(group: Group) -> bool:
    """Whether members have hyperparameters of their own."""
    return any(isinstance(leaf, (Tensor, Members)) for value in group.values() for leaf in _listed(value))


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [value]


def _with_common_steps(slots: State) -> State | None:
    """The slots with one step counter for all members, or ``None`` where they have made different numbers of steps."""
    counters: dict[int, Tensor] = {}
    common = {}
    for name, slot in slots.items():
        steps = slot.get("step")
        if steps is not None:
            if id(steps) not in counters:
                if not bool((steps == steps[0]).all()):
                    return None
                counters[id(steps)] = steps[0].clone()
            slot = {**slot, "step": counters[id(steps)]}
        common[name] = slot
    return common


def _with_steps_of_members(slots: State, members: int) -> State:
    counters: dict[int, Tensor] = {}
    public = {}
    for name, slot in slots.items():
        if "step" in slot:
            step = slot["step"]
            if id(step) not in counters:
                counters[id(step)] = step.expand(members)
            slot = {**slot, "step": counters[id(step)]}
        public[name] = slot
    return public


def as_tensor(value: Any) -> Any:
    """A hyperparameter in double precision, in which torch computes with numbers, of shape ``(members,)`` or ``()``."""
    if isinstance(value, list):
        return [as_tensor(each) for each in value]
    if isinstance(value, Tensor):
        return value.double()
    return torch.tensor(list(value) if isinstance(value, Members) else value, dtype=torch.float64)


def _along(value: Tensor, param: Tensor) -> Tensor:
    """``value`` in the precision of ``param`` and in a shape that broadcasts along its member axis."""
    value = value.to(param.device, param.dtype)
    return value.reshape(-1, *[1] * (param.dim() - 1)) if value.dim() else value


def counted(slot: Group, param: Tensor) -> Tensor:
    """How many steps every member has made after one more."""
    return slot["step"] + 1 if "step" in slot else torch.ones(len(param), dtype=torch.float32)


def _decayed(hyper: Group, param: Tensor, grad: Tensor) -> Tensor:
    return grad + _along(hyper["weight_decay"], param) * param


def _mix(old: Tensor | None, new: Tensor, keep: Tensor) -> Tensor:
    """``keep * old + (1 - keep) * new``; nothing is the old value of the first step."""
    share = _along(1 - keep, new)
    return share * new if old is None else torch.lerp(old, new, share)


# A rule makes the new parameter and its new slots from the hyperparameters, flags, parameter, gradient and slots.


def _adam(hyper: Group, flags: Group, param: Tensor, grad: Tensor, slot: Group) -> tuple[Tensor, Group]:
    lr, (beta1, beta2) = hyper["lr"], hyper["betas"]
    if flags["decoupled_weight_decay"]:
        param = param * _along(1 - lr * hyper["weight_decay"], param)
    else:
        grad = _decayed(hyper, param, grad)
    step = counted(slot, param)
    mean = _mix(slot.get("exp_avg"), grad, beta1)
    square = _mix(slot.get("exp_avg_sq"), grad * grad, beta2)
    new = {"step": step, "exp_avg": mean, "exp_avg_sq": square}
    if flags["amsgrad"]:
        square = new["max_exp_avg_sq"] = torch.maximum(slot.get("max_exp_avg_sq", square), square)
    count = step.double()
    scale = square.sqrt() / _along((1 - beta2**count).sqrt(), param) + _along(hyper["eps"], param)
    return param - _along(lr / (1 - beta1**count), param) * mean / scale, new


def _sgd(hyper: Group, flags: Group, param: Tensor, grad: Tensor, slot: Group) -> tuple[Tensor, Group]:
    lr, momentum, grad = _along(hyper["lr"], param), _along(hyper["momentum"], param), _decayed(hyper, param, grad)
    if not bool(hyper["momentum"].any()):
        return param - lr * grad, {}
    buffer = grad
    if "momentum_buffer" in slot:
        buffer = momentum * slot["momentum_buffer"] + _along(1 - hyper["dampening"], param) * grad
    # torch dampens nothing where there is no momentum.
    buffer = torch.where(momentum == 0, grad, buffer)
    return param - lr * (grad + momentum * buffer if flags["nesterov"] else buffer), {"momentum_buffer": buffer}


def _rmsprop(hyper: Group, flags: Group, param: Tensor, grad: Tensor, slot: Group) -> tuple[Tensor, Group]:
    grad = _decayed(hyper, param, grad)
    square = _mix(slot.get("square_avg"), grad * grad, hyper["alpha"])
    new = {"step": counted(slot, param), "square_avg": square}
    mean = _mix(slot.get("grad_avg"), grad, hyper["alpha"]) if flags["centered"] else None
    move = grad / ((square if mean is None else square - mean * mean).sqrt() + _along(hyper["eps"], param))
    if bool(hyper["momentum"].any()):
        if "momentum_buffer" in slot:
            move = _along(hyper["momentum"], param) * slot["momentum_buffer"] + move
        new["momentum_buffer"] = move
    if mean is not None:
        new["grad_avg"] = mean
    return param - _along(hyper["lr"], param) * move, new


_RULES = {
    torch.optim.SGD: _sgd,
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    torch.optim.RMSprop: _rmsprop,
}
