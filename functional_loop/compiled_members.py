"""The tensor program of one batch of all members of an ensemble as two compiled graphs: gradients and update."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakKeyDictionary

import optree
import torch
from torch import Tensor

from .batch import Batch, copied
from .borrowed import State, without_params
from .formulas import FORMULAS, Formula
from .graphs import Graph, UncompilableError, compile_graph
from .layouts import layout
from .member_step import MembersStep, Seeds
from .network import tree_detach
from .stacking import Members
from .step import Gradients, Tensors
from .vmap_rules import over_members

if TYPE_CHECKING:
    from .loop import Loop

Group: TypeAlias = dict[str, Any]
Graphs: TypeAlias = dict[Hashable, tuple[Graph, tuple[str, ...]] | None]

MANY_GRAPHS = 8
"""So many graphs are compiled for a loop without a warning."""

_graphs: WeakKeyDictionary[Loop, Graphs] = WeakKeyDictionary()


class CompiledMembersStep(MembersStep):
    """A `MembersStep` whose gradients and update are compiled, for every shape of batch and number of members.

    Hyperparameters and counters enter as tensors, so that a schedule compiles nothing. What can't be compiled (networks
    that draw random numbers, autocast) is done without it, with a warning that says why.
    """

    def __init__(self, loop: Loop) -> None:
        super().__init__(loop)
        self._graphs = _graphs.setdefault(loop, {})
        params = {name: param.detach() for name, param in self.network.module.named_parameters()}
        self._group = {name: i for i, names in enumerate(loop.optimizer.group_names(params)) for name in names}
        groups = loop.optimizer.to_torch(params, loop.optimizer.init(params)).param_groups
        self._flags = [without_params(group) for group in groups]
        usual = all(param.is_cpu and param.is_floating_point() for param in params.values())
        self._formula = FORMULAS.get(loop.optimizer.cls) if usual else None

    def gradients(
        self, params: Tensors, buffers: Tensors, trainable: tuple[str, ...], batch: Batch, seeds: Seeds
    ) -> Gradients:
        tree: Any = (batch.x, batch.y)
        leaves, structure = optree.tree_flatten(tree)
        inputs = _contiguous([*params.values(), *buffers.values(), *leaves])
        key = ("gradients", *params, *buffers, trainable, structure, *map(layout, inputs))
        if key not in self._graphs:
            # The eager step finds what is wrong with the network, and which parameters have gradients.
            found = super().gradients(params, buffers, trainable, copied(batch), seeds)
            self._graphs[key] = self._compiled(
                lambda: self._differentiation(params, buffers, trainable, structure, inputs, tuple(found.grads))
            )
        if (kept := self._graphs[key]) is None:
            return super().gradients(params, buffers, trainable, batch, seeds)
        graph, names = kept
        made = list(graph.run(inputs))
        n = 1 + len(buffers)
        grads = dict(zip(names, made[n:]))
        return Gradients(made[0], graph.tree(made), params, dict(zip(buffers, made[1:n])), grads)

    def update(self, grads: Tensors, state: Any, params: Tensors) -> tuple[Tensors, Any]:
        formula = self._formula
        names = tuple(name for name in params if name in grads and name in self._group)
        if formula is None or not names or any(_is_by_member(group.get("momentum")) for group in state["groups"]):
            return super().update(grads, state, params)
        slots = {name: state["slots"].get(name, {}) for name in names}
        of_groups = [formula.slots(*group) for group in zip(state["groups"], self._flags)]
        keys = {name: of_groups[self._group[name]] for name in names}
        columns: list[Tensor] = []
        for name in names:
            zeros = params[name].new_zeros(()).expand_as(params[name])
            columns += [slots[name].get(key, zeros) for key in keys[name]]
        numbers, rows = self._numbers(formula, names, state, params)
        inputs = _contiguous([*(params[name] for name in names), *(grads[name] for name in names), *columns, *numbers])
        key = ("update", names, tuple(keys.values()), rows, *map(layout, inputs))
        if key not in self._graphs:
            self._graphs[key] = self._compiled(lambda: self._movement(formula, names, keys, rows, inputs, len(numbers)))
        if (kept := self._graphs[key]) is None:
            return super().update(grads, state, params)
        made = iter(kept[0].run(inputs))
        new_params = params | dict(zip(names, made))
        new_slots, counters = dict(state["slots"]), _counted(slots, len(params[names[0]])) if formula.counts else {}
        for name in names:
            step = {"step": counters[name]} if formula.counts else {}
            new_slots[name] = {**slots[name], **step, **{key: next(made) for key in keys[name]}}
            if not new_slots[name]:
                del new_slots[name]
        return new_params, {"groups": state["groups"], "slots": new_slots}

    def _compiled(self, compile: Callable[[], tuple[Graph, tuple[str, ...]]]) -> tuple[Graph, tuple[str, ...]] | None:
        try:
            if self._autocast[1] is not None:
                raise UncompilableError("it is made under autocast")
            if self._draws[True]:
                raise UncompilableError("the network draws random numbers, which every member draws for itself")
            if len(self._graphs) == MANY_GRAPHS:
                warnings.warn(
                    f"compile=True: an ensemble needs more than {MANY_GRAPHS} graphs, two for every number of members "
                    "that still train and one more for every other shape of batch; each takes some time to compile",
                    UserWarning,
                    stacklevel=2,
                )
            return compile()
        except UncompilableError as error:
            warnings.warn(
                f"compile=True: a step of an ensemble is computed without compiling it, because {error}",
                UserWarning,
                stacklevel=2,
            )
            return None
        finally:
            self.network.release()

    def _differentiation(
        self,
        params: Tensors,
        buffers: Tensors,
        trainable: tuple[str, ...],
        structure: Any,
        inputs: list[Tensor],
        names: tuple[str, ...],
    ) -> tuple[Graph, tuple[str, ...]]:
        n, m = len(params), len(params) + len(buffers)
        members = len(inputs[0])

        def forward(leaves: Tensors, buffers: Tensors, x: Any, y: Any) -> tuple[Tensor, Any, Tensors]:
            outputs, new_buffers = self.network(leaves, buffers, x, training=True)
            return self.loss(outputs, y), outputs, new_buffers

        def function(tensors: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
            leaves = {name: tensor.detach() for name, tensor in zip(params, tensors[:n])}
            wanted = [leaves[name].requires_grad_() for name in trainable]
            # The network may write to its input, the graph must not.
            x, y = optree.tree_unflatten(structure, [leaf.clone() for leaf in tensors[m:]])
            arguments = (leaves, dict(zip(buffers, tensors[n:m])), x, y)
            with torch.enable_grad():
                losses, outputs, new_buffers = over_members(forward, arguments, members, "error")
                grads: Any = torch.autograd.grad(losses.sum(), wanted, allow_unused=True) if wanted else ()
            found = {name: grad.contiguous() for name, grad in zip(trainable, grads) if grad is not None}
            if tuple(found) != names:
                raise UncompilableError("which parameters have gradients depends on values of tensors")
            made = [losses.detach(), *(new_buffers[name].detach() for name in buffers), *found.values()]
            return made, tree_detach(outputs)

        return compile_graph(function, inputs), names

    def _movement(
        self,
        formula: Formula,
        names: tuple[str, ...],
        keys: dict[str, tuple[str, ...]],
        rows: tuple[int, ...],
        inputs: list[Tensor],
        count: int,
    ) -> tuple[Graph, tuple[str, ...]]:
        def function(tensors: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
            n = len(names)
            columns, numbers = iter(tensors[2 * n : -count]), tensors[-count:]
            params, slots = [], []
            for name, row, param, grad in zip(names, rows, tensors[:n], tensors[n : 2 * n]):
                c = [number.reshape(-1, *[1] * (param.dim() - 1)) for number in numbers[row].unbind(1)]
                own = [next(columns) for _ in keys[name]]
                moved, *made = formula.move(self._flags[self._group[name]], c, param, grad, own)
                params.append(moved)
                slots += made
            return [*params, *slots], ()

        return compile_graph(function, inputs), names

    def _numbers(
        self, formula: Formula, names: tuple[str, ...], state: State, params: Tensors
    ) -> tuple[list[Tensor], tuple[int, ...]]:
        """Tensors with a row of numbers for every member, and which of them each parameter goes by."""
        members = len(params[names[0]])
        found: dict[Hashable, int] = {}
        numbers: list[Tensor] = []
        rows = []
        for name in names:
            group, slot = self._group[name], state["slots"].get(name, {})
            if formula.counts:
                counts = slot["step"].tolist() if "step" in slot else [0] * members
            else:
                counts = [bool(slot)] * members
            key = (group, params[name].dtype, tuple(counts))
            if key not in found:
                found[key] = len(numbers)
                of_members = _by_member(state["groups"][group], members)
                made = [formula.numbers(v, self._flags[group], int(n) + 1) for v, n in zip(of_members, counts)]
                numbers.append(torch.tensor(made, dtype=params[name].dtype))
            rows.append(found[key])
        return numbers, tuple(rows)


def _contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().contiguous() for tensor in tensors]


def _is_by_member(value: Any) -> bool:
    return isinstance(value, (Tensor, Members))


def _by_member(values: Group, members: int) -> list[Group]:
    """The hyperparameters of every member."""

    def listed(value: Any) -> list[Any]:
        if isinstance(value, list):
            return [list(each) for each in zip(*map(listed, value))]
        if isinstance(value, Tensor):
            return value.tolist() if value.dim() else [value.item()] * members
        return list(value) if isinstance(value, Members) else [value] * members

    columns = {key: listed(value) for key, value in values.items()}
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def _counted(slots: dict[str, Group], members: int) -> Tensors:
    """Counters after one more step, one for all parameters that had one."""
    counted: dict[int, Tensor] = {}
    made = {}
    for name, slot in slots.items():
        step = slot.get("step")
        if id(step) not in counted:
            counted[id(step)] = torch.ones(members, dtype=torch.float32) if step is None else step + 1
        made[name] = counted[id(step)]
    return made
