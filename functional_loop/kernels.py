"""Fast updates of SGD, Adam and AdamW: torch's own kernels, without the Python of `torch.optim`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from operator import is_
from typing import Any, TypeAlias

import attrs
import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

from .borrowed import Borrowed, Closure, State, Tensors

Group: TypeAlias = dict[str, Any]
Layout: TypeAlias = tuple[Any, ...]
Column: TypeAlias = list[Tensor] | tuple[Tensor, ...]
Columns: TypeAlias = Sequence[Column]
Kernel: TypeAlias = Callable[[Group, Group, Column, Columns], Columns]


@attrs.frozen(eq=False)
class FastUpdate:
    """The update of all groups by kernels, and by ``generic`` in a step in which only that will do.

    The generic update takes the first step of every parameter, in which torch makes its slots, and everything
    unusual: hyperparameters that are tensors, gradients that are sparse, or that have other strides than their
    parameter.
    """

    groups: Sequence[FastGroup]
    generic: Borrowed

    def __call__(
        self, grads: Tensors, state: State, params: Tensors, closure: Closure | None = None
    ) -> tuple[Tensors, State]:
        new_params, new_slots = dict(params), dict(state["slots"])
        for group, values in zip(self.groups, state["groups"], strict=True):
            moved = group.step(values, grads, state["slots"], params)
            if moved is None:
                return self.generic(grads, state, params, closure)
            new_params |= moved[0]
            new_slots |= moved[1]
        return new_params, {"groups": state["groups"], "slots": new_slots}

    def release(self) -> None:
        for group in self.groups:
            group.release()


@attrs.define(eq=False)
class FastGroup:
    """One parameter group: the layout of every parameter by name, its flags, its kernel and the slots of that.

    A column has one tensor per parameter: the parameters themselves, their gradients, or one of their slots. The
    columns that the last step made are remembered, because tensors that come back need no look at their layouts.
    """

    layouts: dict[str, Layout]
    flags: Group
    kernel: Kernel
    slots_of: Callable[[Group, Group], tuple[str, ...]]
    _last: tuple[list[str], Columns] = attrs.field(default=([], []), init=False)

    def step(self, values: Group, grads: Tensors, slots: State, params: Tensors) -> tuple[Tensors, State] | None:
        """The new parameters and slots of those that have gradients."""
        names = [name for name in self.layouts if name in grads]
        if not names:
            return {}, {}
        keys = self.slots_of(values, self.flags)
        try:
            columns = [[params[name] for name in names], *([slots[name][key] for name in names] for key in keys)]
        except KeyError:
            return None
        own_grads = [grads[name] for name in names]
        if not (_are_numbers(values.values()) and self._fit(names, own_grads) and self._know(names, keys, columns)):
            return None
        with torch.no_grad():
            new_params, *new_slots = made = self.kernel(values, self.flags, own_grads, columns)
        self._last = names, made
        rows = zip(names, zip(*new_slots, strict=True), strict=False)
        return (
            dict(zip(names, new_params, strict=True)),
            {name: slots[name] | dict(zip(keys, row, strict=True)) for name, row in rows},
        )

    def release(self) -> None:
        self._last = [], []

    def _know(self, names: list[str], keys: Sequence[str], columns: Columns) -> bool:
        """Whether the columns are the ones made last, or have the layouts that those would have."""
        last_names, last = self._last
        if names == last_names and len(columns) == len(last):
            tensors = chain.from_iterable
            if all(map(is_, tensors(columns), tensors(last))):
                return True
        return all(
            _are_counters(column) if key == "step" else self._fit(names, column)
            for key, column in zip(("", *keys), columns, strict=True)
        )

    def _fit(self, names: list[str], column: Column) -> bool:
        """Whether tensors have the layouts of their parameters; fused kernels read memory without a look at shapes."""
        return all(
            type(tensor) is Tensor and _layout(tensor) == self.layouts[name]
            for name, tensor in zip(names, column, strict=True)
        )


def fast_update(
    cls: type[torch.optim.Optimizer],
    names: Sequence[Sequence[str]],
    groups: Sequence[Group],
    params: Tensors,
    generic: Borrowed,
) -> FastUpdate | None:
    """The update by kernels for parameters like ``params``, or ``None`` where there is none.

    Args:
        cls: the optimizer class; a subclass of a known one may compute anything, so it is unknown.
        names: of the parameters of every group.
        groups: all hyperparameters of every group.
        params: parameters by name.
        generic: the update for all other steps.
    """
    if cls not in _KERNELS or not all(_are_usual([params[name] for name in group]) for group in names):
        return None
    if torch_optimizer._global_optimizer_pre_hooks or torch_optimizer._global_optimizer_post_hooks:
        return None
    slots_of, foreach, fused = _KERNELS[cls]
    return FastUpdate(
        [
            FastGroup(
                # A clone has the layout that every later parameter has; the first one may be a view with gaps.
                {name: _layout(params[name].detach().clone()) for name in members},
                group,
                fused if group["fused"] else foreach,
                slots_of,
            )
            for members, group in zip(names, groups, strict=True)
        ],
        generic,
    )


def _layout(tensor: Tensor) -> Layout:
    return tensor.dtype, tensor.shape, tensor.stride()


def _are_usual(params: Column) -> bool:
    # In half precision foreach and single-tensor forms differ in the last bit.
    dtypes = {param.dtype for param in params}
    return (
        len(dtypes) <= 1
        and dtypes <= {torch.float32, torch.float64}
        and all(type(param) in (Tensor, torch.nn.Parameter) and param.is_cpu for param in params)
    )


def _are_numbers(values: Iterable[Any]) -> bool:
    return all(type(v) in (float, int) or (type(v) is list and _are_numbers(v)) for v in values)


def _are_counters(steps: Column) -> bool:
    return all(type(step) is Tensor and step.dim() == 0 for step in steps)


def _adam_slots(values: Group, flags: Group) -> tuple[str, ...]:
    slots = ("step", "exp_avg", "exp_avg_sq")
    return (*slots, "max_exp_avg_sq") if flags["amsgrad"] else slots


def _sgd_slots(values: Group, flags: Group) -> tuple[str, ...]:
    return ("momentum_buffer",) if values["momentum"] != 0 else ()


# A kernel makes new columns of the parameters and slots from the gradients and the old columns, which it leaves alone.
# On the CPU torch's foreach and single-tensor forms have the same bits, so that one kernel stands for both.


def _adam_foreach(values: Group, flags: Group, grads: Column, columns: Columns) -> Columns:
    lr, (beta1, beta2), decay = values["lr"], values["betas"], values["weight_decay"]
    params, steps, means, squares, *maxima = columns
    if flags["maximize"]:
        grads = torch._foreach_neg(grads)
    if decay != 0 and not flags["decoupled_weight_decay"]:
        grads = torch._foreach_add(grads, params, alpha=decay)
    if decay != 0 and flags["decoupled_weight_decay"]:
        params = torch._foreach_mul(params, _wrapped(1 - lr * decay, params))
    else:
        params = torch._foreach_clone(params)
    steps = _counted(steps)
    means = torch._foreach_lerp(means, grads, 1 - beta1)
    squares = torch._foreach_mul(squares, _wrapped(beta2, squares))
    torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
    if maxima:
        maxima = [torch._foreach_maximum(maxima[0], squares)]
    scales = torch._foreach_sqrt(maxima[0] if maxima else squares)
    counts = [step.item() for step in steps]
    corrections = {count: _wrapped((1 - beta2**count) ** 0.5, params) for count in set(counts)}
    torch._foreach_div_(scales, [corrections[count] for count in counts])
    torch._foreach_add_(scales, _wrapped(values["eps"], scales), alpha=1)
    torch._foreach_addcdiv_(params, means, scales, [-(lr / (1 - beta1**count)) for count in counts])
    return params, steps, means, squares, *maxima


def _adam_fused(values: Group, flags: Group, grads: Column, columns: Columns) -> Columns:
    kernel = torch._fused_adamw_ if flags["decoupled_weight_decay"] else torch._fused_adam_
    params, steps, means, squares, *maxima = columns
    params, means, squares, *maxima = map(torch._foreach_clone, (params, means, squares, *maxima))
    steps = _counted(steps)
    beta1, beta2 = values["betas"]
    kernel(
        params,
        grads,
        means,
        squares,
        maxima[0] if maxima else [],
        steps,
        amsgrad=flags["amsgrad"],
        lr=values["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=values["weight_decay"],
        eps=values["eps"],
        maximize=flags["maximize"],
    )
    return params, steps, means, squares, *maxima


def _sgd_foreach(values: Group, flags: Group, grads: Column, columns: Columns) -> Columns:
    params, *buffers = columns
    if flags["maximize"]:
        grads = torch._foreach_neg(grads)
    if values["weight_decay"] != 0:
        grads = torch._foreach_add(grads, params, alpha=values["weight_decay"])
    for old in buffers:
        momentum = values["momentum"]
        new = torch._foreach_mul(old, _wrapped(momentum, old))
        torch._foreach_add_(new, grads, alpha=1 - values["dampening"])
        buffers = [new]
        grads = torch._foreach_add(grads, new, alpha=momentum) if flags["nesterov"] else new
    return torch._foreach_add(params, grads, alpha=-values["lr"]), *buffers


def _sgd_fused(values: Group, flags: Group, grads: Column, columns: Columns) -> Columns:
    params, *buffers = map(torch._foreach_clone, columns)
    torch._fused_sgd_(
        params,
        grads,
        buffers[0] if buffers else [],
        weight_decay=values["weight_decay"],
        momentum=values["momentum"],
        lr=values["lr"],
        dampening=values["dampening"],
        nesterov=flags["nesterov"],
        maximize=flags["maximize"],
        is_first_step=False,
    )
    return params, *buffers


def _counted(steps: Column) -> Column:
    return torch._foreach_add(steps, _ONE, alpha=1)


def _wrapped(number: float, column: Column) -> Tensor:
    # A foreach operator on the CPU makes a tensor of a number anew for every tensor of the column, which costs more
    # than the arithmetic of a small one.
    return torch.scalar_tensor(number, dtype=column[0].dtype, device="cpu")


_ONE = torch.tensor(1.0, device="cpu")
_KERNELS = {
    torch.optim.Adam: (_adam_slots, _adam_foreach, _adam_fused),
    torch.optim.AdamW: (_adam_slots, _adam_foreach, _adam_fused),
    torch.optim.SGD: (_sgd_slots, _sgd_foreach, _sgd_fused),
}
