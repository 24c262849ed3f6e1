"""Fast updates: parameters and slots in columns, moved by torch's own kernels without the Python of `torch.optim`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

from .buckets import Buckets
from .kernels import KERNELS, Column, Columns, Group, Kernel, Shared, Write, copied_counters
from .layouts import Layout, fit, is_contiguous, layout
from .mover import Mover
from .torch_update import Closure, State, Tensors, TorchUpdate


@attrs.define(eq=False)
class FastUpdate:
    """The update of all groups by kernels, and by ``generic`` in a step in which only that will do.

    The generic update takes the first step of a parameter whose slots torch makes of its gradient (the momentum of
    SGD), and everything unusual: hyperparameters that are tensors, gradients that are sparse, or that a hook gave
    other strides than their parameter has.
    """

    groups: Sequence[FastGroup]
    generic: TorchUpdate
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

    What moved the last step is remembered: tensors that come back as it made them need no look at their layouts, and
    are in columns already.
    """

    layouts: dict[str, Layout]
    flags: Group
    kernel: Kernel
    contiguous: bool = attrs.field(init=False)
    _last: Mover | None = attrs.field(default=None, init=False)
    _buckets: dict[tuple[tuple[str, ...], bool], Buckets] = attrs.field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        self.contiguous = all(map(is_contiguous, self.layouts.values()))

    def step(self, values: Group, grads: Tensors, slots: State, params: Tensors) -> tuple[Tensors, State] | None:
        """The new parameters and slots of those that have gradients, or ``None`` where kernels will not do."""
        names = [name for name in self.layouts if name in grads]
        if not names:
            return {}, {}
        own_grads = [grads[name] for name in names]
        if not self._fit(names, own_grads):
            return None
        if (mover := self._mover(names, values, slots, params)) is None:
            return None
        mover.renew()
        for write in mover.row(own_grads):
            write()
        self._last = mover
        moved, made = mover.by_name()
        return moved, with_others(made, slots)

    def mover(self, names: list[str], values: Group, columns: Columns, joins: bool = True) -> Mover:
        """What moves `columns` over and over."""
        keys = self.kernel.slots(values, self.flags)
        columns = [copied_counters(column) if key == "step" else column for key, column in zip(("", *keys), columns)]
        # Tensors side by side are moved by one step.
        joins = joins and self.kernel.elementwise
        joins = joins and all(isinstance(column, Shared) for key, column in zip(keys, columns[1:]) if key == "step")
        if (key := (tuple(names), joins)) not in self._buckets:
            layouts = [self.layouts[name] for name in names]
            self._buckets[key] = Buckets(layouts) if joins else Buckets(layouts, most=0)
        return Mover(self.kernel, self.flags, names, keys, values, columns, self._buckets[key])

    def row(self, mover: Mover, grads: Column) -> Sequence[Write] | None:
        """A step of ``mover`` with gradients that autograd made; ``None`` if one is sparse.

        Autograd gives them their shapes and dtypes, and says nothing of strides, which kernels rely on.
        """
        try:
            if mover.copies_all:
                return mover.row(grads)
            if self.contiguous:
                return mover.row(list(map(Tensor.contiguous, grads)))
            return mover.row([fit(grad, self.layouts[name], name) for name, grad in zip(mover.names, grads)])
        except RuntimeError:
            if any(grad.is_sparse for grad in grads):
                return None
            raise

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
        return columns if self._all_fit(names, keys, columns) else None

    def release(self) -> None:
        self._last = None

    def _mover(self, names: list[str], values: Group, slots: State, params: Tensors) -> Mover | None:
        """What moves these parameters and slots; ``None`` where kernels will not do."""
        last, keys = self._last, self.kernel.slots(values, self.flags)
        if last is None or not last.has(names, keys, params, slots) or not _are_numbers(values.values()):
            columns = self.columns(names, values, slots, params)
            return None if columns is None else self.mover(names, values, columns)
        last.set(values)
        return last

    def _all_fit(self, names: list[str], keys: tuple[str, ...], columns: Columns) -> bool:
        params, *slots = columns
        return self._fit(names, params) and all(
            _are_counters(column) if key == "step" else self._fit(names, column)
            for key, column in zip(keys, slots, strict=True)
        )

    def _fit(self, names: list[str], column: Column) -> bool:
        """Whether all have the layouts of their parameters; fused kernels read memory without a look at shapes."""
        return all(
            type(tensor) is Tensor and layout(tensor) == self.layouts[name]
            for name, tensor in zip(names, column, strict=True)
        )


def fast_update(
    cls: type[torch.optim.Optimizer],
    names: Sequence[Sequence[str]],
    groups: Sequence[Group],
    params: Tensors,
    generic: TorchUpdate,
) -> FastUpdate | None:
    """The update by kernels for parameters like ``params``, or ``None`` where there is none.

    Args:
        cls: the optimizer class; a subclass of a known one may compute anything, so it is unknown.
        names: of the parameters of every group.
        groups: all hyperparameters of every group.
        params: parameters by name.
        generic: the update for all other steps.
    """
    if cls not in KERNELS or not all(_are_usual([params[name] for name in group]) for group in names):
        return None
    if torch_optimizer._global_optimizer_pre_hooks or torch_optimizer._global_optimizer_post_hooks:
        return None
    foreach, fused = KERNELS[cls]
    return FastUpdate(
        [
            FastGroup(
                # A clone has the layout that every later parameter has; the first one may be a view with gaps.
                {name: layout(params[name].detach().clone()) for name in members},
                group,
                fused if group["fused"] else foreach,
            )
            for members, group in zip(names, groups, strict=True)
        ],
        generic,
    )


def with_others(made: State, slots: State) -> State:
    """Slots by name, with those that the kernel knows nothing of."""
    if any(len(slots[name]) != len(row) for name, row in made.items() if name in slots):
        return {name: slots.get(name, {}) | row for name, row in made.items()}
    return made


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
