"""SGD, Adam and AdamW out of place, differentiable in parameters, gradients, state and hyperparameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..optim.optimizer import Optimizer

Tensors = dict[str, Tensor]
State = dict[str, Any]
Rule = Callable[[dict[str, Any], Tensor, Tensor, State], tuple[Tensor, State]]


def differentiable_update(optimizer: Optimizer, params: Tensors) -> Callable[[Tensors, State, Tensors], Any]:
    """`Optimizer.update` with a graph: ``update(grads, state, params) -> (params, state)``.

    Values are those of the `torch.optim` class but for rounding; slots are its own.

    Raises:
        ValueError: the class is none of SGD, Adam and AdamW.
    """
    rule = _RULES.get(optimizer.cls)
    if rule is None:
        known = ", ".join(cls.__name__ for cls in _RULES)
        raise ValueError(f"{optimizer.cls.__name__} has no differentiable form; these have: {known}")
    groups = optimizer.group_names(params)
    flags = optimizer.hyperparameters_of(params)

    def update(grads: Tensors, state: State, params: Tensors) -> tuple[Tensors, State]:
        new, slots = dict(params), dict(state["slots"])
        for names, fixed, values in zip(groups, flags, state["groups"], strict=True):
            for name in names:
                if name not in grads:
                    continue
                new[name], slot = rule({**fixed, **values}, params[name], grads[name], slots.get(name, {}))
                if slot:
                    slots[name] = slot
        return new, {"groups": state["groups"], "slots": slots}

    return update


def _sgd(h: dict[str, Any], param: Tensor, grad: Tensor, slot: State) -> tuple[Tensor, State]:
    grad = -grad if h["maximize"] else grad
    grad = _decayed(grad, param, h["weight_decay"])
    if not _is_zero(h["momentum"]):
        old = slot.get("momentum_buffer")
        velocity = grad if old is None else h["momentum"] * old + (1 - h["dampening"]) * grad
        grad = grad + h["momentum"] * velocity if h["nesterov"] else velocity
        slot = {"momentum_buffer": velocity}
    return param - h["lr"] * grad, slot


def _adam(h: dict[str, Any], param: Tensor, grad: Tensor, slot: State) -> tuple[Tensor, State]:
    beta1, beta2 = h["betas"]
    grad = -grad if h["maximize"] else grad
    if h["decoupled_weight_decay"]:
        param = param * (1 - h["lr"] * h["weight_decay"])
    else:
        grad = _decayed(grad, param, h["weight_decay"])
    zeros = torch.zeros_like(param)
    step = slot.get("step", torch.zeros((), dtype=torch.float32)) + 1
    mean = beta1 * slot.get("exp_avg", zeros) + (1 - beta1) * grad
    square = beta2 * slot.get("exp_avg_sq", zeros) + (1 - beta2) * grad * grad
    new = {"step": step, "exp_avg": mean, "exp_avg_sq": square}
    if h["amsgrad"]:
        square = new["max_exp_avg_sq"] = torch.maximum(slot.get("max_exp_avg_sq", zeros), square)
    count = step.item()
    scale = _sqrt(square / (1 - beta2**count)) + h["eps"]
    return param - h["lr"] * (mean / (1 - beta1**count)) / scale, new


def _decayed(grad: Tensor, param: Tensor, weight_decay: Any) -> Tensor:
    return grad if _is_zero(weight_decay) else grad + weight_decay * param


def _is_zero(value: Any) -> bool:
    return not isinstance(value, Tensor) and value == 0


def _sqrt(square: Tensor) -> Tensor:
    """The square root, with the slope 0 at 0.

    A gradient that is exactly zero would else have an infinite slope there, times a mean of zero: NaN. As the mean is
    zero as well, 0 is what the slope of the whole update needs; no epsilon is put under the root, which would move it.
    """
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1).sqrt(), 0)


_RULES: dict[type[torch.optim.Optimizer], Rule] = {
    torch.optim.SGD: _sgd,
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
}
