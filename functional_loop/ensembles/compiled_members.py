"""The tensor program of one batch of all members of an ensemble as two compiled graphs: gradients and update."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import optree
import torch
from torch import Tensor

from ..compile.draws import Draw
from ..compile.graphs import Function, Graph, UncompilableError, compile_graph
from ..compile.tracing import Column, traced_gradients
from ..core.batch import Batch, copied
from ..core.outputs import tree_detach
from ..engine.step import Gradients, Tensors
from ..engine.template import with_loss
from ..optim.formulas import Formulas, Group, formulas
from ..purity.agreement import gradients_differ, nudged, tolerance, update_differs
from .member_draws import GivenDraws, drawn
from .member_optimizers import as_tensor, counted, differ
from .member_step import MembersStep, Seeds

if TYPE_CHECKING:
    from ..engine.loop import Loop

MANY_GRAPHS = 8
"""So many graphs are compiled for a loop without a warning."""


Slots: TypeAlias = tuple[tuple[str, ...], ...]
"""Names of slots, for every group."""


class Kept(NamedTuple):
    """A graph, what of the parameters it is for, and what is drawn before it."""

    graph: Graph
    names: tuple[str, ...]
    draws: tuple[Draw, ...] = ()


_graphs: WeakKeyDictionary[Loop, dict[Hashable, Kept | None]] = WeakKeyDictionary()


class CompiledMembersStep(MembersStep):
    """A `MembersStep` whose gradients and update are compiled, for every shape of batch and number of members.

    Hyperparameters, counters and random numbers enter as tensors, so that a schedule compiles nothing. What every graph
    makes first is compared with what `MembersStep` makes. What can't be compiled, or computes something else when it
    is, is done without it, with a warning that says why.
    """

    def __init__(self, loop: Loop) -> None:
        super().__init__(loop)
        self._graphs = _graphs.setdefault(loop, {})
        self._formulas = formulas(loop.optimizer, with_loss(loop).params())
        self._values: tuple[Any, list[Group], Slots] = (None, [], ())

    def gradients(
        self, params: Tensors, buffers: Tensors, trainable: tuple[str, ...], batch: Batch, seeds: Seeds
    ) -> Gradients:
        tree: Any = (batch.x, batch.y)
        leaves, structure = optree.tree_flatten(tree)
        inputs = _contiguous([*params.values(), *buffers.values(), *leaves])
        key = ("gradients", *params, *buffers, trainable, structure, *_forms(inputs))
        if key not in self._graphs:
            # The eager step finds what is wrong with the network, which parameters have gradients, and what is drawn.
            right = super().gradients(params, buffers, trainable, copied(batch), seeds)
            with_grads, draws = tuple(right.grads), self.draws(trainable, batch)
            function = self._differentiation(params, buffers, trainable, structure, len(leaves), with_grads, draws)

            def nearby() -> Gradients:
                others = nudged(params, self._autocast[1])
                return MembersStep.gradients(self, others, buffers, trainable, copied(batch), seeds)

            def check(kept: Kept) -> str:
                made = self._gradients_of(kept, inputs, params, buffers, seeds)
                return gradients_differ(made, right, self._tolerance(params), nearby)

            self._graphs[key] = self._compiled(function, inputs, with_grads, draws, check)
        if (kept := self._graphs[key]) is None:
            return super().gradients(params, buffers, trainable, batch, seeds)
        return self._gradients_of(kept, inputs, params, buffers, seeds)

    def _gradients_of(
        self, kept: Kept, inputs: list[Tensor], params: Tensors, buffers: Tensors, seeds: Seeds
    ) -> Gradients:
        made = kept.graph.run([*inputs, *self._draw(kept.draws, seeds)])
        n = 1 + len(buffers)
        grads = dict(zip(kept.names, made[n:]))
        return Gradients(made[0], kept.graph.tree(made), params, dict(zip(buffers, made[1:n])), grads)

    def _draw(self, draws: Sequence[Draw], seeds: Seeds) -> list[Tensor]:
        if not draws:
            return []
        return drawn(draws, self.seeded(seeds()))

    def update(self, grads: Tensors, state: Any, params: Tensors) -> tuple[Tensors, Any]:
        known = self._formulas
        names = tuple(name for name in params if name in grads and name in known.group) if known is not None else ()
        if known is None or not names:
            return super().update(grads, state, params)
        if state["groups"] is not self._values[0]:
            of_members = list(map(_of_members, state["groups"]))
            self._values = state["groups"], of_members, _slots(known, of_members)
        _, values, keys = self._values
        slots = {name: state["slots"].get(name, {}) for name in names}
        columns = [_slot(slots[name], key, params[name]) for name in names for key in keys[known.group[name]]]
        numbers, rows = _numbers(known, values, slots, params)
        given = [*(params[name] for name in names), *(grads[name] for name in names), *columns, *numbers]
        inputs = _contiguous(given)
        key = ("update", names, keys, rows, *_forms(inputs))

        def of(kept: Kept) -> tuple[Tensors, Any]:
            made = iter(kept.graph.run(inputs))
            new_params = params | dict(zip(names, made))
            counters = _counters(slots, params) if known.counts else {}
            new_slots = dict(state["slots"])
            for name in names:
                step = {"step": counters[name]} if known.counts else {}
                new_slots[name] = {**slots[name], **step, **{key: next(made) for key in keys[known.group[name]]}}
                if not new_slots[name]:
                    del new_slots[name]
            return new_params, {"groups": state["groups"], "slots": new_slots}

        def check(kept: Kept) -> str:
            right = MembersStep.update(self, grads, state, params)
            return update_differs(params, grads, of(kept), right, self._tolerance(params))

        if key not in self._graphs:
            function = _movement(known, names, keys, rows, len(numbers))
            self._graphs[key] = self._compiled(function, inputs, names, (), check)
        kept = self._graphs[key]
        return super().update(grads, state, params) if kept is None else of(kept)

    def _tolerance(self, params: Tensors) -> float:
        return tolerance(params.values(), self._autocast[1])

    def _compiled(
        self,
        function: Function,
        inputs: list[Tensor],
        names: tuple[str, ...],
        draws: tuple[Draw, ...],
        check: Callable[[Kept], str],
    ) -> Kept | None:
        """The graph, or ``None`` where there can't be one.

        Args:
            check: says what it computes otherwise than the step that is not compiled.
        """
        try:
            if any(draw.reads or len(draw.func._schema.returns) != 1 for draw in draws):
                raise UncompilableError("the network draws random numbers in a way that depends on values")
            if len(self._graphs) == MANY_GRAPHS:
                warnings.warn(
                    f"compile=True: an ensemble needs more than {MANY_GRAPHS} graphs, two for every number of members "
                    "that still train and one more for every other shape of batch; each takes some time to compile",
                    UserWarning,
                    stacklevel=2,
                )
            examples = self._draw(draws, lambda: [0] * len(inputs[0]))
            kept = Kept(compile_graph(function, [*inputs, *examples]), names, draws)
            if difference := check(kept):
                raise UncompilableError(f"when it is compiled it is another: {difference}")
            return kept
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
        count: int,
        with_grads: tuple[str, ...],
        draws: tuple[Draw, ...],
    ) -> Function:
        """From parameters, buffers, ``count`` leaves of a batch and what is drawn to losses, buffers and gradients; and
        the outputs."""
        names, buffer_names = tuple(params), tuple(buffers)
        n, m = len(names), len(names) + len(buffer_names)

        def function(tensors: Column) -> tuple[list[Tensor], Any]:
            leaves = {name: tensor.detach() for name, tensor in zip(names, tensors)}
            wanted = [leaves[name].requires_grad_() for name in trainable]
            # The network may write to its input, the graph must not.
            x, y = optree.tree_unflatten(structure, [leaf.clone() for leaf in tensors[m : m + count]])
            given = GivenDraws(draws, tensors[m + count :], len(tensors[0]))
            arguments = (leaves, dict(zip(buffer_names, tensors[n:m])), x, y)
            with torch.enable_grad(), given if draws else nullcontext():
                losses, outputs, new_buffers = self.map(self.forward, arguments, draws)
                grads = traced_gradients(losses.sum(), wanted, trainable, with_grads)
            made = [losses.detach(), *(new_buffers[name].detach() for name in buffer_names)]
            return [*made, *(grad.contiguous() for grad in grads.values())], tree_detach(outputs)

        return function


def _movement(known: Formulas, names: tuple[str, ...], slots: Slots, rows: tuple[int, ...], count: int) -> Function:
    """From parameters, gradients, slots and ``count`` tensors of numbers to new parameters and slots."""

    def function(tensors: Column) -> tuple[list[Tensor], Any]:
        n = len(names)
        params, grads, columns, numbers = tensors[:n], tensors[n : 2 * n], tensors[2 * n : -count], tensors[-count:]
        own = [
            [number.reshape(-1, *[1] * (param.dim() - 1)) for number in numbers[row].unbind()]
            for row, param in zip(rows, params)
        ]
        new_params, new_columns = known.move_by(names, slots, own, params, grads, columns)
        return [*new_params, *new_columns], ()

    return function


def _of_members(group: Group) -> Group:
    """The hyperparameters, as tensors if members differ in any."""
    return {key: as_tensor(value) for key, value in group.items()} if differ(group) else group


def _slots(known: Formulas, values: list[Group]) -> Slots:
    """Those that any member needs."""
    momenta = [torch.as_tensor(group["momentum"]).max() if "momentum" in group else 0 for group in values]
    return known.slots({"groups": [{**group, "momentum": m} for group, m in zip(values, momenta)]})


def _slot(slot: Group, key: str, param: Tensor) -> Tensor:
    return slot[key] if key in slot else param.new_zeros(()).expand_as(param)


def _numbers(
    known: Formulas, values: list[Group], slots: dict[str, Group], params: Tensors
) -> tuple[list[Tensor], tuple[int, ...]]:
    """Tensors of the numbers of all members, and which of them each parameter goes by."""
    found: dict[Hashable, int] = {}
    numbers: list[Tensor] = []
    rows = []
    counts: dict[int, tuple[float, ...]] = {}
    for name, slot in slots.items():
        group, param, step = known.group[name], params[name], slot.get("step")
        if id(step) not in counts:
            counts[id(step)] = (0.0,) if step is None else tuple(step.tolist())
        done = counts[id(step)] if known.counts else (float(bool(slot)),)
        key = (group, param.dtype, done)
        if key not in found:
            found[key] = len(numbers)
            count: Any = done[0] if len(set(done)) == 1 else torch.tensor(done, dtype=torch.float64)
            made = known.formula.numbers(values[group], known.flags[group], count + 1)
            numbers.append(_rows(made, len(param)).to(param.dtype))
        rows.append(found[key])
    return numbers, tuple(rows)


def _rows(numbers: list[Any], members: int) -> Tensor:
    """A row for each of ``numbers``, a column for each member."""
    if any(isinstance(number, Tensor) for number in numbers):
        return torch.stack([torch.as_tensor(n, dtype=torch.float64).expand(members) for n in numbers])
    return torch.tensor(numbers, dtype=torch.float64).unsqueeze(1).expand(-1, members)


def _contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [(tensor.detach() if tensor.requires_grad else tensor).contiguous() for tensor in tensors]


def _forms(tensors: list[Tensor]) -> list[Hashable]:
    """What of contiguous tensors a graph depends on."""
    return [form for tensor in tensors for form in (tensor.shape, tensor.dtype)]


def _counters(slots: dict[str, Group], params: Tensors) -> Tensors:
    """Counters after one more step, one for all parameters that had one."""
    found: dict[int, Tensor] = {}
    made = {}
    for name, slot in slots.items():
        step = id(slot.get("step"))
        if step not in found:
            found[step] = counted(slot, params[name])
        made[name] = found[step]
    return made
