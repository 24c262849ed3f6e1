"""The kernels of SGD, Adam and AdamW: torch's own, on columns of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .torch_update import State

Group: TypeAlias = dict[str, Any]
Column: TypeAlias = list[Tensor] | tuple[Tensor, ...]
"""One tensor per parameter: the parameters themselves, their gradients, or one of their slots."""
Columns: TypeAlias = Sequence[Column]
"""The parameters, and their slots."""
Write: TypeAlias = Callable[[], object]
Move: TypeAlias = Callable[[Column], Sequence[Write]]
"""From gradients: a row of calls that moves the columns in place. Before the first of these calls nothing is written
to, and all go directly into torch, so that no signal can come between them."""


class Kernel(NamedTuple):
    """The update of one parameter group."""

    prepare: Callable[[Group, Group, Columns], Move]
    """From hyperparameters, flags and columns: what moves these columns in place, over and over. Hyperparameters stay
    what they are; tensors in the lists may be replaced by others of the same layouts."""
    slots: Callable[[Group, Group], tuple[str, ...]]
    """Names of the slots of a parameter."""
    fresh: Callable[[Tensor, Group], State] | None
    """The slots before the first step of a parameter; ``None`` where torch makes them of its gradient."""
    elementwise: bool
    """Whether it calls operators for every tensor of its columns, one after the other."""


def _adam_slots(values: Group, flags: Group) -> tuple[str, ...]:
    slots = ("step", "exp_avg", "exp_avg_sq")
    return (*slots, "max_exp_avg_sq") if flags["amsgrad"] else slots


def _sgd_slots(values: Group, flags: Group) -> tuple[str, ...]:
    return ("momentum_buffer",) if values["momentum"] != 0 else ()


def _adam_fresh(param: Tensor, flags: Group) -> State:
    zeros = [torch.zeros_like(param, memory_format=torch.preserve_format) for _ in _adam_slots({}, flags)[1:]]
    # As torch: a counter of double precision would not go with its fused kernels.
    double = torch.get_default_dtype() == torch.float64 and not flags["fused"]
    step = torch.tensor(0.0, dtype=torch.float64 if double else torch.float32)
    return dict(zip(_adam_slots({}, flags), (step, *zeros), strict=True))


# On the CPU torch's foreach and single-tensor forms have the same bits, so that one kernel stands for both.


def _adam(values: Group, flags: Group, columns: Columns) -> Move:
    lr, (beta1, beta2), decay = values["lr"], values["betas"], values["weight_decay"]
    decoupled = flags["decoupled_weight_decay"]
    params, steps, means, squares, *maxima = columns
    scales = _scratch(params)
    kept, kept_square, eps = (_wrapped(number, params) for number in (1 - lr * decay, beta2, values["eps"]))

    def move(grads: Column) -> list[Write]:
        if flags["maximize"]:
            grads = torch._foreach_neg(grads)
        if decay != 0 and not decoupled:
            grads = torch._foreach_add(grads, params, alpha=decay)
        counters = steps[:1] if isinstance(steps, Shared) else steps
        counts = [counter.item() + 1 for counter in counters]
        corrections = [_wrapped((1 - beta2**count) ** 0.5, params) for count in counts]
        sizes = [lr / (1 - beta1**count) for count in counts]
        if isinstance(steps, Shared):
            corrections, sizes = corrections * len(params), sizes * len(params)
        row: list[Write] = [partial(counter.add_, _ONE) for counter in counters]
        for i, (param, grad, mean, square, scale) in enumerate(zip(params, grads, means, squares, scales)):
            if decay != 0 and decoupled:
                row.append(partial(param.mul_, kept))
            row += (
                partial(mean.lerp_, grad, 1 - beta1),
                partial(square.mul_, kept_square),
                partial(square.addcmul_, grad, grad, value=1 - beta2),
            )
            for largest in maxima:
                row.append(partial(torch.maximum, largest[i], square, out=largest[i]))
                square = largest[i]
            row += (
                partial(torch.sqrt, square, out=scale),
                partial(scale.div_, corrections[i]),
                partial(scale.add_, eps),
                partial(param.addcdiv_, mean, scale, value=-sizes[i]),
            )
        return row

    return move


def _adam_fused(values: Group, flags: Group, columns: Columns) -> Move:
    params, steps, means, squares, *maxima = columns
    beta1, beta2 = values["betas"]
    grads: list[Tensor] = []
    step = partial(
        torch._fused_adamw_ if flags["decoupled_weight_decay"] else torch._fused_adam_,
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

    def move(new: Column) -> list[Write]:
        grads[:] = new
        counters = steps[:1] if isinstance(steps, Shared) else steps
        return [*(partial(counter.add_, _ONE) for counter in counters), step, grads.clear]

    return move


def _sgd(values: Group, flags: Group, columns: Columns) -> Move:
    lr, momentum, decay = values["lr"], values["momentum"], values["weight_decay"]
    params, *buffers = columns
    sums = _scratch(params) if flags["nesterov"] else params
    kept = _wrapped(momentum, params)

    def move(grads: Column) -> list[Write]:
        if flags["maximize"]:
            grads = torch._foreach_neg(grads)
        if decay != 0:
            grads = torch._foreach_add(grads, params, alpha=decay)
        row: list[Write] = []
        for i, (param, grad, total) in enumerate(zip(params, grads, sums)):
            for column in buffers:
                buffer = column[i]
                row += (partial(buffer.mul_, kept), partial(buffer.add_, grad, alpha=1 - values["dampening"]))
                if flags["nesterov"]:
                    row.append(partial(torch.add, grad, buffer, alpha=momentum, out=total))
                grad = total if flags["nesterov"] else buffer
            row.append(partial(param.add_, grad, alpha=-lr))
        return row

    return move


def _sgd_fused(values: Group, flags: Group, columns: Columns) -> Move:
    params, *buffers = columns
    grads: list[Tensor] = []
    step = partial(
        torch._fused_sgd_,
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
    row: list[Write] = [step, grads.clear]

    def move(new: Column) -> list[Write]:
        grads[:] = new
        return row

    return move


class Shared(list[Tensor]):
    """A column that is one tensor over and over."""


def copied_counters(steps: Column) -> Column:
    """Copies of counters: one for all parameters, where they have made the same number of steps."""
    if isinstance(steps, Shared) or len({step.item() for step in steps}) == 1:
        return Shared([steps[0].clone()] * len(steps))
    return torch._foreach_clone(steps)


def _scratch(column: Column) -> list[Tensor]:
    """Tensors like those of the column, all in the same memory."""
    memory = torch.empty(max(tensor.numel() for tensor in column), dtype=column[0].dtype, device="cpu")
    return [memory.as_strided(tensor.shape, tensor.stride()) for tensor in column]


def _wrapped(number: float, column: Column) -> Tensor:
    # Of a number torch makes a tensor at every call, which costs more than the arithmetic of a small one.
    return torch.scalar_tensor(number, dtype=column[0].dtype, device="cpu")


_ONE = torch.tensor(1.0, dtype=torch.float32, device="cpu")
_ADAM = Kernel(_adam, _adam_slots, _adam_fresh, True), Kernel(_adam_fused, _adam_slots, _adam_fresh, False)
_SGD = Kernel(_sgd, _sgd_slots, None, True), Kernel(_sgd_fused, _sgd_slots, None, False)
KERNELS: dict[type[torch.optim.Optimizer], tuple[Kernel, Kernel]] = {
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    torch.optim.SGD: _SGD,
}
"""By optimizer class: the kernels of the foreach and single-tensor forms, and of the fused one."""
