"""The kernels of SGD, Adam and AdamW: torch's own, on columns of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .borrowed import State

Group: TypeAlias = dict[str, Any]
Column: TypeAlias = list[Tensor] | tuple[Tensor, ...]
"""One tensor per parameter: the parameters themselves, their gradients, or one of their slots."""
Columns: TypeAlias = Sequence[Column]
"""The parameters, and their slots."""
Write: TypeAlias = Callable[[], object]
Move: TypeAlias = Callable[[Column], tuple[Sequence[Write], Columns]]
"""From gradients: a row of calls that end the step, and the columns after it. Before the first of these calls nothing
is written to that was there before, and all go directly into torch, so that no signal can come between them."""


class Kernel(NamedTuple):
    """The update of one parameter group."""

    prepare: Callable[[Group, Group, Columns, bool], Move]
    """From hyperparameters, flags, columns, and whether these may be written to: what moves them, once if they may not,
    else over and over. Hyperparameters stay what they are."""
    slots: Callable[[Group, Group], tuple[str, ...]]
    """Names of the slots of a parameter."""
    fresh: Callable[[Tensor, Group], State] | None
    """The slots before the first step of a parameter; ``None`` where torch makes them of its gradient."""


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


def _adam_foreach(values: Group, flags: Group, columns: Columns, own: bool) -> Move:
    lr, (beta1, beta2), decay = values["lr"], values["betas"], values["weight_decay"]
    decoupled = flags["decoupled_weight_decay"]
    params, steps, means, squares, *maxima = columns

    def move(grads: Column) -> tuple[Sequence[Write], Columns]:
        nonlocal params, steps, means, squares, maxima
        row: list[Write] = []
        if flags["maximize"]:
            grads = torch._foreach_neg(grads)
        if decay != 0 and not decoupled:
            grads = torch._foreach_add(grads, params, alpha=decay)
        if not own:
            params = torch._foreach_clone(params)
        if decay != 0 and decoupled:
            row.append(partial(torch._foreach_mul_, params, _wrapped(1 - lr * decay, params)))
        steps = _counted(steps)
        means = torch._foreach_lerp(means, grads, 1 - beta1)
        squares = torch._foreach_mul(squares, _wrapped(beta2, squares))
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        maxima = [torch._foreach_maximum(old, squares) for old in maxima]
        scales = torch._foreach_sqrt(maxima[0] if maxima else squares)
        counts = _counts(steps)
        corrections = {count: _wrapped((1 - beta2**count) ** 0.5, params) for count in set(counts)}
        torch._foreach_div_(scales, [corrections[count] for count in counts])
        torch._foreach_add_(scales, _wrapped(values["eps"], scales), alpha=1)
        sizes = {count: -(lr / (1 - beta1**count)) for count in corrections}
        row.append(partial(torch._foreach_addcdiv_, params, means, scales, [sizes[count] for count in counts]))
        return row, (params, steps, means, squares, *maxima)

    return move


def _adam_fused(values: Group, flags: Group, columns: Columns, own: bool) -> Move:
    # Counters may be shared with parameters that are not moved now.
    columns = [column if own and i != 1 else _cloned(column) for i, column in enumerate(columns)]
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
    counters = steps[:1] if isinstance(steps, _Shared) else steps
    row: tuple[Write, ...] = (*(partial(counter.add_, 1) for counter in counters), step, grads.clear)

    def move(new: Column) -> tuple[Sequence[Write], Columns]:
        grads[:] = new
        return row, columns

    return move


def _sgd_foreach(values: Group, flags: Group, columns: Columns, own: bool) -> Move:
    params, *buffers = columns

    def move(grads: Column) -> tuple[Sequence[Write], Columns]:
        nonlocal params, buffers
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
        if not own:
            return (), (torch._foreach_add(params, grads, alpha=-values["lr"]), *buffers)
        return [partial(torch._foreach_add_, params, grads, alpha=-values["lr"])], (params, *buffers)

    return move


def _sgd_fused(values: Group, flags: Group, columns: Columns, own: bool) -> Move:
    if not own:
        columns = [_cloned(column) for column in columns]
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

    def move(new: Column) -> tuple[Sequence[Write], Columns]:
        grads[:] = new
        return (step, grads.clear), columns

    return move


class _Shared(tuple[Tensor, ...]):
    """A column that is one tensor over and over."""


def shared(steps: Column) -> Column:
    """One counter for all parameters, where they have made the same number of steps."""
    return _Shared(steps[:1] * len(steps)) if len({step.item() for step in steps}) == 1 else steps


def _cloned(column: Column) -> Column:
    if isinstance(column, _Shared):
        return _Shared((column[0].clone(),) * len(column))
    return torch._foreach_clone(column)


def _counted(steps: Column) -> Column:
    if isinstance(steps, _Shared):
        return _Shared((steps[0] + 1,) * len(steps))
    return torch._foreach_add(steps, _ONE, alpha=1)


def _counts(steps: Column) -> list[float]:
    return [steps[0].item()] * len(steps) if isinstance(steps, _Shared) else [step.item() for step in steps]


def _wrapped(number: float, column: Column) -> Tensor:
    # A foreach operator on the CPU makes a tensor of a number anew for every tensor of the column, which costs more
    # than the arithmetic of a small one.
    return torch.scalar_tensor(number, dtype=column[0].dtype, device="cpu")


_ONE = torch.tensor(1.0, dtype=torch.float32, device="cpu")
_ADAM = Kernel(_adam_foreach, _adam_slots, _adam_fresh), Kernel(_adam_fused, _adam_slots, _adam_fresh)
KERNELS: dict[type[torch.optim.Optimizer], tuple[Kernel, Kernel]] = {
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    torch.optim.SGD: (Kernel(_sgd_foreach, _sgd_slots, None), Kernel(_sgd_fused, _sgd_slots, None)),
}
"""By optimizer class: the kernels of the foreach and single-tensor forms, and of the fused one."""
