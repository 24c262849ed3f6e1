"""Fast updates of SGD, Adam and AdamW: torch's own kernels on clones, without the Python of `torch.optim`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, TypeAlias

import attrs
import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

from .borrowed import State, Tensors

Group: TypeAlias = dict[str, Any]
Layout: TypeAlias = tuple[Any, ...]
List: TypeAlias = list[Tensor] | tuple[Tensor, ...]
Lists: TypeAlias = dict[str, List]
Kernel: TypeAlias = Callable[[Group, Group, List, List, Lists], None]

_ONE = torch.tensor(1.0, device="cpu")


@attrs.frozen(eq=False)
class FastUpdate:
    """The update of all groups by kernels, or ``None`` in a step in which only the generic update will do.

    The generic update takes the first step of every parameter, in which torch makes its slots, and everything
    unusual: hyperparameters that are tensors, gradients that are sparse, that have a graph, or that have other
    strides than their parameter.
    """

    groups: Sequence[FastGroup]

    def __call__(self, grads: Tensors, state: State, params: Tensors) -> tuple[Tensors, State] | None:
        new_params, new_slots = dict(params), dict(state["slots"])
        for group, values in zip(self.groups, state["groups"], strict=True):
            moved = group.step(values, grads, state["slots"], params)
            if moved is None:
                return None
            new_params |= moved[0]
            new_slots |= moved[1]
        return new_params, {"groups": state["groups"], "slots": new_slots}


@attrs.frozen(eq=False)
class FastGroup:
    """One parameter group: the layout of every parameter by name, its flags, its kernel and the slots of that."""

    layouts: dict[str, Layout]
    flags: Group
    kernel: Kernel
    slots_of: Callable[[Group, Group], tuple[str, ...]]

    def step(self, values: Group, grads: Tensors, slots: State, params: Tensors) -> tuple[Tensors, State] | None:
        """The new parameters and slots of those that have gradients."""
        names = [name for name in self.layouts if name in grads]
        if not names:
            return {}, {}
        if not _are_numbers(values.values()):
            return None
        keys = self.slots_of(values, self.flags)
        try:
            old_slots = [slots[name] for name in names] if keys else []
            columns: Lists = {key: [slot[key] for slot in old_slots] for key in keys}
        except KeyError:
            return None
        own_grads = [grads[name] for name in names]
        moments = [key for key in keys if key != "step"]
        written = [[params[name] for name in names], *(columns[key] for key in moments)]
        if not self._fit(names, [own_grads, *written]):
            return None
        own_params, *copies = _clones(written)
        columns.update(zip(moments, copies, strict=True))
        self.kernel(values, self.flags, own_params, own_grads, columns)
        rows = zip(*columns.values(), strict=True)
        new_slots = {
            name: old | dict(zip(keys, row, strict=True))
            for name, old, row in zip(names, old_slots, rows, strict=False)
        }
        return dict(zip(names, own_params, strict=True)), new_slots

    def _fit(self, names: list[str], columns: list[List]) -> bool:
        """Whether all tensors have the layouts of the plan; fused kernels read memory without a look at shapes."""
        layouts = [self.layouts[name] for name in names]
        return all([(t.dtype, t.shape, t.stride(), t.requires_grad) for t in column] == layouts for column in columns)


def fast_update(
    cls: type[torch.optim.Optimizer],
    names: Sequence[Sequence[str]],
    groups: Sequence[Group],
    params: Tensors,
) -> FastUpdate | None:
    """The update by kernels for parameters like ``params``, or ``None`` where there is none.

    Args:
        cls: the optimizer class; a subclass of a known one may compute anything, so it is unknown.
        names: of the parameters of every group.
        groups: all hyperparameters of every group.
        params: parameters by name.
    """
    if cls not in _KERNELS or not all(_is_usual(params[name]) for group in names for name in group):
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
        ]
    )


def _layout(tensor: Tensor) -> Layout:
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.requires_grad


def _clones(columns: list[List]) -> list[list[Tensor]]:
    clones = torch._foreach_clone(list(chain.from_iterable(columns)))
    count = len(columns[0])
    return [list(clones[start : start + count]) for start in range(0, len(clones), count)]


def _is_usual(param: Tensor) -> bool:
    # In half precision foreach and single-tensor forms differ in the last bit.
    dtypes = (torch.float32, torch.float64)
    return type(param) in (Tensor, torch.nn.Parameter) and param.is_cpu and param.dtype in dtypes


def _are_numbers(values: Iterable[Any]) -> bool:
    return all(type(v) in (float, int) or (type(v) is list and _are_numbers(v)) for v in values)


def _adam_slots(values: Group, flags: Group) -> tuple[str, ...]:
    slots = ("step", "exp_avg", "exp_avg_sq")
    return (*slots, "max_exp_avg_sq") if flags["amsgrad"] else slots


def _sgd_slots(values: Group, flags: Group) -> tuple[str, ...]:
    return ("momentum_buffer",) if values["momentum"] != 0 else ()


# The kernels write to the parameters and slots that they are given, and replace the step counters. On the CPU torch's
# foreach and single-tensor forms have the same bits, so that one kernel stands for both.


def _adam_foreach(values: Group, flags: Group, params: List, grads: List, slots: Lists) -> None:
    lr, (beta1, beta2), decay = values["lr"], values["betas"], values["weight_decay"]
    means, squares = slots["exp_avg"], slots["exp_avg_sq"]
    if flags["maximize"]:
        grads = torch._foreach_neg(grads)
    if decay != 0 and flags["decoupled_weight_decay"]:
        torch._foreach_mul_(params, 1 - lr * decay)
    elif decay != 0:
        grads = torch._foreach_add(grads, params, alpha=decay)
    torch._foreach_lerp_(means, grads, 1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
    if flags["amsgrad"]:
        torch._foreach_maximum_(slots["max_exp_avg_sq"], squares)
        squares = slots["max_exp_avg_sq"]
    slots["step"] = _counted(slots["step"])
    steps = [step.item() for step in slots["step"]]
    scales = torch._foreach_sqrt(squares)
    torch._foreach_div_(scales, [(1 - beta2**step) ** 0.5 for step in steps])
    torch._foreach_add_(scales, values["eps"])
    torch._foreach_addcdiv_(params, means, scales, [-(lr / (1 - beta1**step)) for step in steps])


def _adam_fused(values: Group, flags: Group, params: List, grads: List, slots: Lists) -> None:
    kernel = torch._fused_adamw_ if flags["decoupled_weight_decay"] else torch._fused_adam_
    slots["step"] = _counted(slots["step"])
    beta1, beta2 = values["betas"]
    kernel(
        params,
        grads,
        slots["exp_avg"],
        slots["exp_avg_sq"],
        slots.get("max_exp_avg_sq", []),
        slots["step"],
        amsgrad=flags["amsgrad"],
        lr=values["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=values["weight_decay"],
        eps=values["eps"],
        maximize=flags["maximize"],
    )


def _counted(steps: List) -> List:
    return torch._foreach_add(steps, _ONE, alpha=1.0)


def _sgd_foreach(values: Group, flags: Group, params: List, grads: List, slots: Lists) -> None:
    if flags["maximize"]:
        grads = torch._foreach_neg(grads)
    if values["weight_decay"] != 0:
        grads = torch._foreach_add(grads, params, alpha=values["weight_decay"])
    if slots:
        momentum, buffers = values["momentum"], slots["momentum_buffer"]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, grads, alpha=1 - values["dampening"])
        grads = torch._foreach_add(grads, buffers, alpha=momentum) if flags["nesterov"] else buffers
    torch._foreach_add_(params, grads, alpha=-values["lr"])


def _sgd_fused(values: Group, flags: Group, params: List, grads: List, slots: Lists) -> None:
    torch._fused_sgd_(
        params,
        grads,
        slots.get("momentum_buffer", []),
        weight_decay=values["weight_decay"],
        momentum=values["momentum"],
        lr=values["lr"],
        dampening=values["dampening"],
        nesterov=flags["nesterov"],
        maximize=flags["maximize"],
        is_first_step=False,
    )


_KERNELS = {
    torch.optim.Adam: (_adam_slots, _adam_foreach, _adam_fused),
    torch.optim.AdamW: (_adam_slots, _adam_foreach, _adam_fused),
    torch.optim.SGD: (_sgd_slots, _sgd_foreach, _sgd_fused),
}
