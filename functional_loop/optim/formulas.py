"""Updates of SGD, Adam, AdamW and RMSprop as formulas, out of place and without branches on values: for graphs."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, TypeAlias

import attrs
import torch
from torch import Tensor

from .optimizer import Optimizer
from .torch_update import State, Tensors, without_params

Group: TypeAlias = dict[str, Any]
Numbers: TypeAlias = list[Any]


@attrs.frozen(eq=False)
class Formula:
    """One optimizer class.

    ``slots(values, flags)`` names the tensors that it keeps for a parameter beside the counter of its steps; they
    start as zeros. ``numbers(values, flags, count)`` is all that changes from step to step, ``count`` being the number
    of this one (for a class without counters, 1 where there is no slot yet, else 2); of values and counts that are
    tensors, it makes tensors. ``move(flags, c, param, grad, slots)`` gives the new parameter and slots, ``c`` being the
    numbers as tensors.
    """

    slots: Callable[[Group, Group], tuple[str, ...]]
    numbers: Callable[[Group, Group, int], Numbers]
    move: Callable[[Group, Sequence[Tensor], Tensor, Tensor, Sequence[Tensor]], tuple[Tensor, ...]]
    counts: bool = True


@attrs.frozen(eq=False)
class Plan:
    """What the graph of an update is made for; steps with the same plan run the same graph."""

    names: tuple[str, ...]
    """The parameters that have gradients."""
    moved: tuple[str, ...]
    """The parameters among them that the optimizer updates."""
    slots: tuple[tuple[str, ...], ...]
    """Names of slots, for every group."""
    columns: tuple[tuple[str, str], ...]
    """The parameter and the name of every slot of those moved."""
    rows: tuple[int, ...]
    """Which row of numbers every parameter moved uses: those of a group with equal counters share one."""
    heads: tuple[tuple[int, str], ...]
    """The group, and a parameter, of every row."""
    buffer: array[float]
    """Memory of ``numbers``."""
    numbers: Tensor
    """The rows of numbers, one after the other, as they were last filled in: the number of steps made, and those of the
    formula."""


class Formulas:
    """The update of an optimizer, planned for ``params``: parameters by name."""

    def __init__(self, formula: Formula, optimizer: Optimizer, params: Tensors) -> None:
        self.formula = formula
        self.counts = formula.counts
        params = {name: param.detach() for name, param in params.items()}
        groups = optimizer.to_torch(params, optimizer.init(params)).param_groups
        self.flags = [without_params(group) for group in groups]
        self.group = {name: i for i, names in enumerate(optimizer.group_names(params)) for name in names}
        self._params = params
        wide = any(param.dtype is torch.float64 for param in params.values())
        self._dtype = torch.float64 if wide else torch.float32
        self._counter_dtype = torch.float64 if torch.get_default_dtype() is torch.float64 else torch.float32
        self._plans: dict[Any, Plan] = {}

    def plan(self, names: tuple[str, ...], state: State) -> Plan:
        """The plan of an update of the parameters ``names``, as far as the optimizer updates them."""
        moved = tuple(name for name in names if name in self.group)
        slots = self.slots(state)
        rows: dict[tuple[int, int], int] = {}
        heads, of = [], []
        for name in moved:
            row = (self.group[name], self._count(name, state))
            if row not in rows:
                rows[row] = len(rows)
                heads.append((row[0], name))
            of.append(rows[row])
        columns = tuple((name, key) for name in moved for key in slots[self.group[name]])
        key = (names, slots, tuple(of), tuple(heads))
        if key not in self._plans:
            buffer = array("d" if self._dtype is torch.float64 else "f", self._numbers(heads, state))
            numbers = torch.frombuffer(buffer, dtype=self._dtype) if buffer else torch.empty(0)
            self._plans[key] = Plan(names, moved, slots, columns, tuple(of), tuple(heads), buffer, numbers)
        return self._plans[key]

    def slots(self, state: State) -> tuple[tuple[str, ...], ...]:
        """Names of slots, for every group."""
        return tuple([self.formula.slots(*group) for group in zip(state["groups"], self.flags, strict=True)])

    def counters(self, plan: Plan, state: State) -> list[Any]:
        """For every parameter moved, the object that says how many steps it has made."""
        slots = state["slots"]
        if not self.counts:
            return [name in slots for name in plan.moved]
        return [slots[name].get("step") if name in slots else None for name in plan.moved]

    def columns(self, plan: Plan, state: State) -> list[Tensor]:
        """The slots of those moved; zeros for those that torch would make in this step."""
        slots = state["slots"]
        try:
            return [slots[name][key] for name, key in plan.columns]
        except KeyError:
            return [
                slots[name][key] if key in slots.get(name, ()) else torch.zeros_like(self._params[name])
                for name, key in plan.columns
            ]

    def fill(self, plan: Plan, state: State) -> list[Tensor]:
        """The numbers of this step: a list of one tensor, which is written to in the next step."""
        return self._filled(plan, self._numbers(plan.heads, state))

    def fill_after(self, plan: Plan, state: State, counters: Sequence[Tensor]) -> list[Tensor]:
        """The numbers of a step that follows one of the same plan, which made ``counters``."""
        counts = [int(counter.item()) for counter in counters] or [1] * len(plan.heads)
        numbers: Numbers = []
        for (group, _), count in zip(plan.heads, counts):
            numbers += self._row(group, state, count)
        return self._filled(plan, numbers)

    def _filled(self, plan: Plan, numbers: Numbers) -> list[Tensor]:
        plan.buffer[:] = array(plan.buffer.typecode, numbers)
        return [plan.numbers]

    def move(
        self, plan: Plan, params: Sequence[Tensor], grads: Sequence[Tensor], columns: Sequence[Tensor], numbers: Tensor
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """New parameters, slots and counters of those moved."""
        rows = [row.unbind() for row in numbers.view(len(plan.heads), -1)] if plan.heads else []
        own = [rows[row][1:] for row in plan.rows]
        new_params, new_columns = self.move_by(plan.moved, plan.slots, own, params, grads, columns)
        counters = [(row[0] + 1).to(self._counter_dtype) for row in rows] if self.counts else []
        return new_params, new_columns, counters

    def move_by(
        self,
        names: Sequence[str],
        slots: Sequence[Sequence[str]],
        numbers: Sequence[Sequence[Tensor]],
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        columns: Sequence[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """New parameters and slots of ``names``, each by its own ``numbers``; ``slots`` are names, for every group."""
        following = iter(columns)
        new_params, new_columns = [], []
        for name, own, param, grad in zip(names, numbers, params, grads, strict=True):
            group = self.group[name]
            old = list(islice(following, len(slots[group])))
            new_param, *new_slots = self.formula.move(self.flags[group], own, param, grad, old)
            new_params.append(new_param)
            new_columns += new_slots
        return new_params, new_columns

    def state(self, plan: Plan, state: State, columns: Sequence[Tensor], counters: Sequence[Tensor]) -> State:
        """The state after a step that made ``columns`` and ``counters``."""
        slots, following = dict(state["slots"]), iter(columns)
        for name, row in zip(plan.moved, plan.rows):
            made = {"step": counters[row]} if counters else {}
            for key in plan.slots[self.group[name]]:
                made[key] = next(following)
            if made:
                slots[name] = {**slots[name], **made} if name in slots else made
        return {"groups": state["groups"], "slots": slots}

    def _numbers(self, heads: Iterable[tuple[int, str]], state: State) -> Numbers:
        made: Numbers = []
        for group, name in heads:
            made += self._row(group, state, self._count(name, state))
        return made

    def _row(self, group: int, state: State, count: int) -> Numbers:
        return [count, *map(float, self.formula.numbers(state["groups"][group], self.flags[group], count + 1))]

    def _count(self, name: str, state: State) -> int:
        slot = state["slots"].get(name)
        if not self.counts:
            return int(bool(slot))
        return int(slot["step"].item()) if slot and "step" in slot else 0


def formulas(optimizer: Optimizer, params: Tensors) -> Formulas | None:
    """The update of ``optimizer`` as formulas, or ``None`` where there are none.

    There are for `torch.optim.SGD`, `Adam`, `AdamW` and `RMSprop` (and not for subclasses of them), and real parameters
    on the CPU. They round differently than torch's own kernels.
    """
    usual = all(param.is_cpu and param.is_floating_point() for param in params.values())
    formula = FORMULAS.get(optimizer.cls)
    return Formulas(formula, optimizer, params) if formula is not None and usual else None


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) else float(value)


def _adam_slots(values: Group, flags: Group) -> tuple[str, ...]:
    return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if flags["amsgrad"] else ("exp_avg", "exp_avg_sq")


def _adam_numbers(values: Group, flags: Group, count: int) -> Numbers:
    lr, decay = _double(values["lr"]), values["weight_decay"]
    beta1, beta2 = map(_double, values["betas"])
    return [
        1 - lr * decay if flags["decoupled_weight_decay"] else decay,
        1 - beta1,
        beta2,
        1 - beta2,
        (1 - beta2**count) ** 0.5,
        values["eps"],
        lr / (1 - beta1**count),
    ]


def _adam_move(
    flags: Group, c: Sequence[Tensor], param: Tensor, grad: Tensor, slots: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    decay, new1, old2, new2, correction, eps, rate = c
    mean, square, *largest = slots
    grad = -grad if flags["maximize"] else grad
    if flags["decoupled_weight_decay"]:
        param = param * decay
    else:
        grad = grad + param * decay
    mean = mean + (grad - mean) * new1
    square = square * old2 + grad * grad * new2
    largest = [torch.maximum(old, square) for old in largest]
    scale = (largest[0] if largest else square).sqrt() / correction + eps
    return param - rate * (mean / scale), mean, square, *largest


def _sgd_slots(values: Group, flags: Group) -> tuple[str, ...]:
    return ("momentum_buffer",) if values["momentum"] != 0 else ()


def _sgd_numbers(values: Group, flags: Group, count: int) -> Numbers:
    # The first gradient is not dampened, nor is any where there is no momentum.
    momentum, dampens = values["momentum"], (count > 1) * (values["momentum"] != 0)
    return [_double(values["lr"]), values["weight_decay"], momentum, 1 - values["dampening"] * dampens]


def _sgd_move(
    flags: Group, c: Sequence[Tensor], param: Tensor, grad: Tensor, slots: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    lr, decay, momentum, new = c
    grad = (-grad if flags["maximize"] else grad) + param * decay
    if not slots:
        return (param - grad * lr,)
    buffer = slots[0] * momentum + grad * new
    return param - (grad + buffer * momentum if flags["nesterov"] else buffer) * lr, buffer


def _rmsprop_slots(values: Group, flags: Group) -> tuple[str, ...]:
    momentum = ("momentum_buffer",) if values["momentum"] > 0 else ()
    return ("square_avg", *momentum, "grad_avg") if flags["centered"] else ("square_avg", *momentum)


def _rmsprop_numbers(values: Group, flags: Group, count: int) -> Numbers:
    alpha = values["alpha"]
    return [_double(values["lr"]), values["weight_decay"], alpha, 1 - alpha, values["eps"], values["momentum"]]


def _rmsprop_move(
    flags: Group, c: Sequence[Tensor], param: Tensor, grad: Tensor, slots: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    lr, decay, old, new, eps, momentum = c
    square, *others = slots
    grad = (-grad if flags["maximize"] else grad) + param * decay
    square = square * old + grad * grad * new
    average = square
    if flags["centered"]:
        mean = others.pop()
        mean = mean + (grad - mean) * new
        average, centre = square - mean * mean, [mean]
    else:
        centre = []
    move = grad / (average.sqrt() + eps)
    if others:
        move = others[0] * momentum + move
        others = [move]
    return param - move * lr, square, *others, *centre


FORMULAS = {
    torch.optim.SGD: Formula(_sgd_slots, _sgd_numbers, _sgd_move, counts=False),
    torch.optim.Adam: Formula(_adam_slots, _adam_numbers, _adam_move),
    torch.optim.AdamW: Formula(_adam_slots, _adam_numbers, _adam_move),
    torch.optim.RMSprop: Formula(_rmsprop_slots, _rmsprop_numbers, _rmsprop_move),
}
