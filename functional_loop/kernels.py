"""Fast updates of SGD, Adam and AdamW: torch's own kernels, without the Python of `torch.optim`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from operator import is_
from typing import Any, NamedTuple, TypeAlias

import attrs
import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

from .borrowed import Borrowed, Closure, State, Tensors, like

Group: TypeAlias = dict[str, Any]
Layout: TypeAlias = tuple[Any, ...]
Column: TypeAlias = list[Tensor] | tuple[Tensor, ...]
Columns: TypeAlias = Sequence[Column]
Write: TypeAlias = Callable[[], object]


class Kernel(NamedTuple):
    """The update of one group in torch's own kernels."""

    plan: Callable[[Group, Group, Column, Columns], tuple[Write, Columns]]
    """From hyperparameters, flags, gradients and columns: one call into torch that ends the step, and the columns
    after it. Nothing is written to before that call, which makes all that is to be written at once."""
    slots: Callable[[Group, Group], tuple[str, ...]]
    """Names of the slots of a parameter."""
    fresh: Callable[[Tensor, Group], State] | None
    """The slots before the first step of a parameter; ``None`` where torch makes them of its gradient."""
    in_place: bool
    """Whether the call writes to the columns given, all but the counters; else all that it makes is new."""


@attrs.define(eq=False)
class FastUpdate:
    """The update of all groups by kernels, and by ``generic`` in a step in which only that will do.

    The generic update takes the first step of every parameter, in which torch makes its slots, and everything
    unusual: hyperparameters that are tensors, gradients that are sparse, or that have other strides than their
    parameter.
    """

    groups: Sequence[FastGroup]
    generic: Borrowed
    # Made once, since it costs as much as the arithmetic of a small tensor.
    no_grad: torch.no_grad = attrs.field(factory=torch.no_grad, init=False)

    def __call__(
        self, grads: Tensors, state: State, params: Tensors, closure: Closure | None = None
    ) -> tuple[Tensors, State]:
        with self.no_grad:
            moved = self._move(grads, state, params)
        return moved or self.generic(grads, state, params, closure)

    def _move(self, grads: Tensors, state: State, params: Tensors) -> tuple[Tensors, State] | None:
        new_params, new_slots = dict(params), dict(state["slots"])
        for group, values in zip(self.groups, state["groups"], strict=True):
            moved = group.step(values, grads, state["slots"], params)
            if moved is None:
                return None
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
    contiguous: bool = attrs.field(init=False)
    _last: tuple[Sequence[str], Columns] = attrs.field(default=((), ()), init=False)

    def __attrs_post_init__(self) -> None:
        strides = [(stride, torch.empty(shape, device="meta").stride()) for _, shape, stride in self.layouts.values()]
        self.contiguous = all(stride == usual for stride, usual in strides)

    def step(self, values: Group, grads: Tensors, slots: State, params: Tensors) -> tuple[Tensors, State] | None:
        """The new parameters and slots of those that have gradients, or ``None`` where kernels will not do."""
        names = [name for name in self.layouts if name in grads]
        if not names:
            return {}, {}
        own_grads = [grads[name] for name in names]
        if not self._fit(names, own_grads):
            return None
        if (columns := self.columns(names, values, slots, params)) is None:
            return None
        if self.kernel.in_place:
            keys = ("", *self.kernel.slots(values, self.flags))
            columns = [c if key == "step" else torch._foreach_clone(c) for key, c in zip(keys, columns)]
        write, made = self.kernel.plan(values, self.flags, own_grads, columns)
        write()
        self._last = names, made
        return self.rows(names, values, slots, made)

    def plan(self, values: Group, grads: Column, columns: Columns) -> tuple[Write, Columns]:
        """What the kernel will write to ``columns``, and the columns after it."""
        return self.kernel.plan(values, self.flags, grads, columns) if grads else (_NOTHING, columns)

    def fitted(self, grads: Column, columns: Columns) -> Column | None:
        """Gradients that autograd made, with the strides of their parameters; ``None`` if one is sparse.

        Autograd gives them their shapes and dtypes, and says nothing of strides, which kernels rely on.
        """
        for grad in grads:
            if grad.is_sparse:
                return None
        if self.contiguous:
            return [grad.contiguous() for grad in grads]
        return [like(param, grad) for param, grad in zip(columns[0], grads)]

    def columns(self, names: list[str], values: Group, slots: State, params: Tensors) -> Columns | None:
        """Parameters and slots of ``names`` as columns, or ``None`` where kernels will not do."""
        keys, fresh = self.kernel.slots(values, self.flags), self.kernel.fresh
        if not names:
            return [(), *(() for _ in keys)]
        if not _are_numbers(values.values()):
            return None
        if fresh is not None:
            slots = {name: slots.get(name) or fresh(params[name], self.flags) for name in names}
        try:
            columns: Columns = [
                [params[name] for name in names],
                *([slots[name][key] for name in names] for key in keys),
            ]
        except KeyError:
            return None
        if self._made(names, columns):
            return self._last[1]
        if not self._all_fit(names, keys, columns):
            return None
        return [_shared(column) if key == "step" else column for key, column in zip(("", *keys), columns)]

    def rows(self, names: list[str], values: Group, slots: State, columns: Columns) -> tuple[Tensors, State]:
        """Parameters and slots by name: the inverse of `columns`."""
        params, *own_slots = columns
        keys = self.kernel.slots(values, self.flags)
        # There are no rows where the kernel has no slots.
        new_slots = {name: slots.get(name, {}) | dict(zip(keys, row)) for name, row in zip(names, zip(*own_slots))}
        return dict(zip(names, params)), new_slots

    def release(self) -> None:
        self._last = (), ()

    def _made(self, names: list[str], columns: Columns) -> bool:
        """Whether these are the very tensors that the last step made."""
        last_names, last = self._last
        if names != last_names or len(columns) != len(last):
            return False
        return all(map(is_, chain.from_iterable(columns), chain.from_iterable(last)))

    def _all_fit(self, names: list[str], keys: tuple[str, ...], columns: Columns) -> bool:
        params, *slots = columns
        return self._fit(names, params) and all(
            _are_counters(column) if key == "step" else self._fit(names, column)
            for key, column in zip(keys, slots, strict=True)
        )

    def _fit(self, names: list[str], column: Column) -> bool:
        """Whether all have the layouts of their parameters; fused kernels read memory without a look at shapes."""
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
    foreach, fused = _KERNELS[cls]
    return FastUpdate(
        [
            FastGroup(
                # A clone has the layout that every later parameter has; the first one may be a view with gaps.
                {name: _layout(params[name].detach().clone()) for name in members},
                group,
                fused if group["fused"] else foreach,
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


def _adam_fresh(param: Tensor, flags: Group) -> State:
    zeros = [torch.zeros_like(param, memory_format=torch.preserve_format) for _ in _adam_slots({}, flags)[1:]]
    # As torch: a counter of double precision would not go with its fused kernels.
    double = torch.get_default_dtype() == torch.float64 and not flags["fused"]
    step = torch.tensor(0.0, dtype=torch.float64 if double else torch.float32)
    return dict(zip(_adam_slots({}, flags), (step, *zeros), strict=True))


# On the CPU torch's foreach and single-tensor forms have the same bits, so that one kernel stands for both.


def _adam_foreach(values: Group, flags: Group, grads: Column, columns: Columns) -> tuple[Write, Columns]:
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
    largest = [torch._foreach_maximum(old, squares) for old in maxima]
    scales = torch._foreach_sqrt(largest[0] if largest else squares)
    counts = _counts(steps)
    corrections = {count: _wrapped((1 - beta2**count) ** 0.5, params) for count in set(counts)}
    torch._foreach_div_(scales, [corrections[count] for count in counts])
    torch._foreach_add_(scales, _wrapped(values["eps"], scales), alpha=1)
    sizes = {count: -(lr / (1 - beta1**count)) for count in corrections}
    write = partial(torch._foreach_addcdiv_, params, means, scales, [sizes[count] for count in counts])
    return write, (params, steps, means, squares, *largest)


def _adam_fused(values: Group, flags: Group, grads: Column, columns: Columns) -> tuple[Write, Columns]:
    kernel = torch._fused_adamw_ if flags["decoupled_weight_decay"] else torch._fused_adam_
    params, steps, means, squares, *maxima = columns
    steps = _counted(steps)
    beta1, beta2 = values["betas"]
    write = partial(
        kernel,
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
    return write, (params, steps, means, squares, *maxima)


def _sgd_foreach(values: Group, flags: Group, grads: Column, columns: Columns) -> tuple[Write, Columns]:
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
    return _NOTHING, (torch._foreach_add(params, grads, alpha=-values["lr"]), *buffers)


def _sgd_fused(values: Group, flags: Group, grads: Column, columns: Columns) -> tuple[Write, Columns]:
    params, *buffers = columns
    write = partial(
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
    return write, columns


class _Shared(tuple[Tensor, ...]):
    """A column that is one tensor over and over."""


def _shared(steps: Column) -> Column:
    """One counter for all parameters, where they have made the same number of steps."""
    return _Shared(steps[:1] * len(steps)) if len({step.item() for step in steps}) == 1 else steps


def _counted(steps: Column) -> Column:
    if type(steps) is _Shared:
        return _Shared((steps[0] + 1,) * len(steps))
    return torch._foreach_add(steps, _ONE, alpha=1)


def _counts(steps: Column) -> list[float]:
    return [steps[0].item()] * len(steps) if type(steps) is _Shared else [step.item() for step in steps]


def _wrapped(number: float, column: Column) -> Tensor:
    # A foreach operator on the CPU makes a tensor of a number anew for every tensor of the column, which costs more
    # than the arithmetic of a small one.
    return torch.scalar_tensor(number, dtype=column[0].dtype, device="cpu")


# Not a function in Python, in which a signal could be handled.
_NOTHING: Write = bool
_ONE = torch.tensor(1.0, dtype=torch.float32, device="cpu")
_ADAM = (Kernel(_adam_foreach, _adam_slots, _adam_fresh, False), Kernel(_adam_fused, _adam_slots, _adam_fresh, True))
_KERNELS = {
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    torch.optim.SGD: (Kernel(_sgd_foreach, _sgd_slots, None, False), Kernel(_sgd_fused, _sgd_slots, None, True)),
}
"""By optimizer class: the kernels of the foreach and single-tensor forms, and of the fused one."""
