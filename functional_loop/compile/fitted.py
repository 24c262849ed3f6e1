"""What the graphs of a compiled step are run on: tensors in the layouts for which they were compiled."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

import optree
from torch import Tensor

from ..core.batch import Batch, copied
from ..engine.step import Tensors, refuse_inference_mode
from ..engine.template import with_loss
from ..optim.formulas import Plan
from ..optim.layouts import fit, layout
from ..optim.torch_update import State
from .draws import Recording
from .tracing import Case, Column, TracedStep

if TYPE_CHECKING:
    from ..engine.loop import Loop

MANY_CASES = 8
"""So many shapes of batches are compiled without a warning."""


class Made(NamedTuple):
    """What a step made, in the layouts that the next one needs."""

    plan: Plan | None = None
    tensors: Column = ()
    columns: Column = ()
    counters: Sequence[Any] = ()


class FittedStep(TracedStep):
    """A `TracedStep` that brings tensors into fixed layouts; what the last step made is in them already."""

    def __init__(self, loop: Loop) -> None:
        super().__init__(loop)
        whole = with_loss(loop)
        tensors: Tensors = {**whole.params(), **whole.statistics()}
        self._layouts = {name: layout(tensor.detach().clone()) for name, tensor in tensors.items()}
        self._cases: list[Case] = []
        self._made = Made()

    def release(self) -> None:
        super().release()
        self._made = Made()

    def _case(
        self, params: Tensors, buffers: Tensors, trainable: tuple[str, ...], batch: Batch, seed: int, probe: bool
    ) -> tuple[Case, list[Any]]:
        """What the gradients of ``batch`` are compiled for, and its tensors."""
        tree: Any = (batch.x, batch.y)
        leaves, structure = optree.tree_flatten(tree)
        layouts = [layout(leaf) for leaf in leaves]
        for case in self._cases:
            if case.layouts == layouts and case.structure == structure and case.trainable == trainable:
                if probe:
                    refuse_inference_mode()
                return case, leaves
        if "training" not in self.probed.done:
            # It computes the batch several times, of which one is to be recorded.
            super().gradients(params, buffers, trainable, copied(batch), seed, probe=True)
        # The eager step finds what is wrong with the network, and which parameters have gradients.
        with Recording(seed) as recording:
            grads = super().gradients(params, buffers, trainable, copied(batch), seed, probe=True).grads
        self._cases.append(Case(trainable, structure, layouts, tuple(grads), recording))
        if len(self._cases) == MANY_CASES + 1:
            warnings.warn(
                f"compile=True: batches, or sets of trainable parameters, of more than {MANY_CASES} shapes, each of "
                "which is compiled; pad batches to a few shapes",
                UserWarning,
                stacklevel=2,
            )
        return self._cases[-1], leaves

    def _new_state(
        self, plan: Plan, params: Tensors, buffers: Tensors, state: State, made: Column
    ) -> tuple[State, Column]:
        """The optimizer's state after a step that made columns, counters, and what else is returned."""
        assert self._formulas is not None
        n = len(plan.columns)
        m = n + len(plan.heads) * self._formulas.counts
        state = self._formulas.state(plan, state, made[:n], made[n:m])
        counters = self._formulas.counters(plan, state)
        self._made = Made(plan, self._in_order(params, buffers), made[:n], counters)
        return state, made[m:]

    def _in_order(self, params: Tensors, buffers: Tensors) -> list[Tensor]:
        return [*map(params.__getitem__, self._names), *map(buffers.__getitem__, self._buffer_names)]

    def _tensors(self, params: Tensors, buffers: Tensors) -> Column:
        tensors = self._in_order(params, buffers)
        return (
            tensors if _same(tensors, self._made.tensors) else self._fit((*self._names, *self._buffer_names), tensors)
        )

    def _columns(self, plan: Plan, state: State) -> Column:
        assert self._formulas is not None
        columns = self._formulas.columns(plan, state)
        return columns if _same(columns, self._made.columns) else self._fit([name for name, _ in plan.columns], columns)

    def _plan(self, with_grads: tuple[str, ...], state: State) -> Plan:
        assert self._formulas is not None
        last = self._made.plan
        if (
            last is not None
            and last.names == with_grads
            and last.slots == self._formulas.slots(state)
            and _same(self._formulas.counters(last, state), self._made.counters)
        ):
            return last
        return self._formulas.plan(with_grads, state)

    def _fit(self, names: Iterable[str], tensors: Iterable[Tensor]) -> Column:
        return [fit(tensor, self._layouts[name], name) for name, tensor in zip(names, tensors, strict=True)]


def _same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(some) == len(others) and all(map(is_, some, others))
