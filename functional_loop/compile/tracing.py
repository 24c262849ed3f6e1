"""The tensor program of one batch as functions to be traced: what the graphs of a compiled step are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import attrs
import optree
import torch
from torch import Tensor

from ..core.outputs import tree_detach
from ..engine.step import Gradients, Step, Tensors, backward
from ..engine.template import with_loss
from ..optim.formulas import Plan, formulas
from .draws import Draw, GivenDraws, Recording, beforehand
from .graphs import Function, UncompilableError

if TYPE_CHECKING:
    from ..engine.loop import Loop

Column: TypeAlias = Sequence[Tensor]


@attrs.frozen(eq=False)
class Case:
    """What gradients are compiled for."""

    trainable: tuple[str, ...]
    structure: Any
    layouts: list[Any]
    """Of the tensors in the batch."""
    with_grads: tuple[str, ...]
    """The parameters that have gradients."""
    recording: Recording
    """What the network draws."""


class Program(NamedTuple):
    """A function to be compiled, and what its outputs are; the first of them belong to parameters and buffers."""

    function: Function
    params: tuple[str, ...]
    owners: tuple[str, ...]
    draws: tuple[Draw, ...] = ()
    """What is drawn before it, and given to it in its last column."""


class TracedStep(Step):
    """A `Step` that has programs of its parts: gradients, update, and both in one."""

    def __init__(self, loop: Loop) -> None:
        super().__init__(loop)
        whole = with_loss(loop)
        params = whole.params()
        self._names, self._buffer_names = tuple(params), tuple(whole.statistics())
        self._formulas = formulas(self.optimizer, params)
        self._shows_grads = bool(loop.hooks["batch_end"])

    def _whole_program(self, case: Case, plan: Plan) -> Program:
        formulas = self._formulas
        assert formulas is not None
        changed = (*plan.moved, *(name for name in self._names if name in self.network.writes - {*plan.moved}))

        def function(
            tensors: Column, columns: Column, leaves: Column, numbers: Column, drawn: Column
        ) -> tuple[list[Tensor], Any]:
            found = self._differentiate(case, tensors, leaves, drawn)
            moved, columns, counters = formulas.move(
                plan,
                [found.params[name] for name in plan.moved],
                [found.grads[name] for name in plan.moved],
                columns,
                numbers[0],
            )
            params = found.params | dict(zip(plan.moved, moved))
            made = [params[name] for name in changed] + [found.buffers[name] for name in self._buffer_names]
            grads = [found.grads[name] for name in case.with_grads] if self._shows_grads else []
            return [*made, *columns, *counters, found.loss, *grads], found.y_hats

        owners = (*changed, *self._buffer_names, *(name for name, _ in plan.columns))
        return Program(function, changed, owners, beforehand(case.recording.all_draws()))

    def _gradients_program(self, case: Case) -> Program:
        changed = tuple(name for name in self._names if name in self.network.writes)

        def function(tensors: Column, leaves: Column, drawn: Column) -> tuple[list[Tensor], Any]:
            found = self._differentiate(case, tensors, leaves, drawn)
            made = [found.params[name] for name in changed] + [found.buffers[name] for name in self._buffer_names]
            return [*made, found.loss, *(found.grads[name] for name in case.with_grads)], found.y_hats

        owners = (*changed, *self._buffer_names)
        return Program(function, changed, owners, beforehand(case.recording.all_draws()))

    def _update_program(self, plan: Plan) -> Program:
        formulas = self._formulas
        assert formulas is not None

        def function(
            params: Column, grads: Column, columns: Column, numbers: Column, drawn: Column
        ) -> tuple[list[Tensor], Any]:
            params, columns, counters = formulas.move(plan, params, grads, columns, numbers[0])
            return [*params, *columns, *counters], ()

        return Program(function, plan.moved, (*plan.moved, *(name for name, _ in plan.columns)))

    def _differentiate(self, case: Case, tensors: Column, leaves: Column, drawn: Column) -> Gradients:
        """As `Step.gradients`, on tensors that are being traced."""
        params = dict(zip(self._names, tensors))
        buffers = dict(zip(self._buffer_names, tensors[len(self._names) :]))
        # The network may write to its input, the graph must not.
        x, y = optree.tree_unflatten(case.structure, [leaf.clone() for leaf in leaves])
        enabled = self.autocast_dtype is not None
        with torch.enable_grad(), GivenDraws(drawn):
            variables = self.leaves(params, case.trainable)
            # Without the cache of autocast, which would keep tensors of the trace.
            with torch.autocast(self.device_type, self.autocast_dtype, enabled, cache_enabled=False):
                loss, y_hats, buffers = self.network.loss(variables, buffers, x, y, training=True)
            wanted = [variables[name] for name in case.trainable]
            grads = traced_gradients(loss, wanted, case.trainable, case.with_grads)
        params |= {name: variables[name].detach() for name in self.network.writes}
        return Gradients(loss.detach(), tree_detach(y_hats), params, buffers, grads)


def traced_gradients(
    loss: Tensor, leaves: Sequence[Tensor], names: tuple[str, ...], with_grads: tuple[str, ...]
) -> Tensors:
    """Gradients by name, in a trace, of leaves of which those called ``with_grads`` have any.

    Raises:
        UncompilableError: others have.
    """
    found = backward(loss, leaves)
    grads = {name: grad for name, grad in zip(names, found, strict=True) if grad is not None}
    if tuple(grads) != with_grads:
        raise UncompilableError("which parameters have gradients depends on values of tensors")
    return grads
