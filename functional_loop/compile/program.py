"""The tensor program of one batch as compiled graphs: one for all of it, or two where hooks see the gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import optree
from torch import Tensor

from ..core.batch import Batch, copied
from ..core.rng import torch_seeded
from ..engine.step import Gradients, Step, StepInputs, Tensors
from ..optim.formulas import Plan
from ..optim.layouts import fit, layout
from ..optim.torch_update import State
from ..purity.agreement import gradients_differ, nudged, step_differs, tolerance, update_differs
from .draws import Draw, StrangeDrawError, drawn
from .fitted import FittedStep
from .graphs import Graph, UncompilableError, compile_graph
from .tracing import Case, Column, Program

if TYPE_CHECKING:
    from ..engine.loop import Loop


class Compiled(NamedTuple):
    """A graph, and what its outputs are; the first of them belong to parameters and buffers."""

    graph: Graph
    params: tuple[str, ...]
    owners: tuple[str, ...]
    to_restride: tuple[int, ...]
    """Outputs that have other strides than their owners."""
    draws: tuple[Draw, ...]
    """What is drawn before it runs."""


class Ran(NamedTuple):
    """A step that was one graph, and what came out of it."""

    case: Case
    plan: Plan
    compiled: Compiled
    made: list[Tensor]


class CompiledStep(FittedStep):
    """A `Step` whose gradients and update are compiled: once for every shape of batch, set of trainable parameters and
    structure of the optimizer's state.

    Hyperparameters, counters and random numbers enter the graphs as tensors, so that a schedule compiles nothing, and
    random numbers are those of the eager step. What every graph makes first is compared with what `Step` makes. What
    can't be compiled, or computes something else when it is, is done as `Step` does it, with a warning that says why.
    Evaluation is not compiled, nor are updates of optimizers for which there are no `formulas`.
    """

    in_place = False

    def __init__(self, loop: Loop) -> None:
        super().__init__(loop)
        self._graphs: dict[Hashable, Compiled | None] = {}
        self.at_once = self._formulas is not None and loop.accumulate == 1 and not loop.hooks["after_backward"]

    def whole(self, given: StepInputs) -> tuple[Gradients, State]:
        """`gradients` and `update` in one, for a loop whose steps are made ``at_once``: with the new parameters, and
        with gradients only where a hook can see them."""
        if (ran := self.run(given)) is None:
            return self.eagerly(given)
        return self._whole_of(ran, given)

    def _whole_of(self, ran: Ran, given: StepInputs) -> tuple[Gradients, State]:
        params, buffers, optimizer_state, rest = self.after(ran, given.params, given.optimizer_state)
        grads = dict(zip(ran.case.with_grads, rest[1:])) if self._shows_grads else {}
        return Gradients(rest[0], ran.compiled.graph.tree(ran.made), params, buffers, grads), optimizer_state

    def eagerly(self, given: StepInputs) -> tuple[Gradients, State]:
        """As `whole`, without a graph."""
        params, buffers, trainable, batch, optimizer_state, seed, probe = given
        found = super().gradients(params, buffers, trainable, batch, seed, probe)
        params, optimizer_state = self.updater(found.grads, optimizer_state, found.params)
        return found._replace(params=params), optimizer_state

    def run(self, given: StepInputs) -> Ran | None:
        """A step as one graph, or ``None`` where there can't be one."""
        assert self._formulas is not None
        params, buffers, trainable, batch, optimizer_state, seed, probe = given
        case, leaves = self._case(params, buffers, trainable, batch, seed, probe)
        plan = self._plan(case.with_grads, optimizer_state)
        columns = self._columns(plan, optimizer_state)
        inputs = (self._tensors(params, buffers), columns, leaves, self._formulas.fill(plan, optimizer_state))

        def check(compiled: Compiled) -> str:
            ran = Ran(case, plan, compiled, self._call(compiled, inputs, seed))
            made, right = self._whole_of(ran, given), self.eagerly(_kept(given))
            return step_differs(params, made, right, self._tolerance(params), nearby)

        def nearby() -> tuple[Gradients, State]:
            return self.eagerly(_kept(given)._replace(params=nudged(params, self.autocast_dtype)))

        compiled = self._graph((case, plan), lambda: self._whole_program(case, plan), inputs, check)
        return None if compiled is None else Ran(case, plan, compiled, self._call(compiled, inputs, seed))

    def run_on(self, ran: Ran, batch: Batch, optimizer_state: State, seed: int) -> Ran | None:
        """The step after ``ran`` by the same graph, into which goes what came out of it.

        ``None`` if the batch needs another graph, or if not all that the graph takes has come out of it.

        Args:
            optimizer_state: that before ``ran`` or an earlier step, for its hyperparameters.
        """
        assert self._formulas is not None
        case, plan, compiled, made = ran
        tree: Any = (batch.x, batch.y)
        leaves, structure = optree.tree_flatten(tree)
        if [layout(leaf) for leaf in leaves] != case.layouts or structure != case.structure:
            return None
        if compiled.params != self._names:
            return None
        n = len(compiled.owners)
        counters = made[n : n + len(plan.heads) * self._formulas.counts]
        inputs = (made[:n], leaves, self._formulas.fill_after(plan, optimizer_state, counters))
        return Ran(case, plan, compiled, self._call(compiled, inputs, seed))

    def after(self, ran: Ran, params: Tensors, state: State) -> tuple[Tensors, Tensors, State, Column]:
        """Parameters, buffers and the optimizer's state after a step, and what else came out of it: first the loss."""
        params, buffers, rest = self._network_tensors(ran.compiled, params, ran.made)
        state, rest = self._new_state(ran.plan, params, buffers, state, rest)
        return params, buffers, state, rest

    def loss_and_outputs(self, ran: Ran) -> tuple[Tensor, Any]:
        assert self._formulas is not None
        loss = ran.made[len(ran.compiled.owners) + len(ran.plan.heads) * self._formulas.counts]
        return loss, ran.compiled.graph.tree(ran.made)

    def gradients(
        self, params: Tensors, buffers: Tensors, trainable: tuple[str, ...], batch: Batch, seed: int, probe: bool
    ) -> Gradients:
        case, leaves = self._case(params, buffers, trainable, batch, seed, probe)
        inputs = (self._tensors(params, buffers), leaves)

        def of(compiled: Compiled) -> Gradients:
            made = self._call(compiled, inputs, seed)
            new_params, new_buffers, (loss, *grads) = self._network_tensors(compiled, params, made)
            tree = compiled.graph.tree(made)
            return Gradients(loss, tree, new_params, new_buffers, dict(zip(case.with_grads, grads)))

        def check(compiled: Compiled) -> str:
            def eagerly(params: Tensors) -> Gradients:
                return Step.gradients(self, params, buffers, trainable, copied(batch), seed, False)

            right, by = eagerly(params), self._tolerance(params)
            return gradients_differ(of(compiled), right, by, lambda: eagerly(nudged(params, self.autocast_dtype)))

        compiled = self._graph(case, lambda: self._gradients_program(case), inputs, check)
        return of(compiled) if compiled else super().gradients(params, buffers, trainable, batch, seed, probe)

    def update(
        self,
        params: Tensors,
        buffers: Tensors,
        grads: Tensors,
        optimizer_state: State,
        loss: Tensor,
        again: Callable[[Tensors, Tensors], Gradients],
    ) -> tuple[Tensors, State, Tensors]:
        def eagerly() -> tuple[Tensors, State, Tensors]:
            return Step.update(self, params, buffers, grads, optimizer_state, loss, again)

        if self._formulas is not None and not any(grad.is_sparse for grad in grads.values()):
            plan = self._plan(tuple(grads), optimizer_state)
            if not plan.moved:
                return params, optimizer_state, buffers
            inputs = (
                self._fit(plan.moved, [params[name] for name in plan.moved]),
                self._fit(plan.moved, [grads[name] for name in plan.moved]),
                self._columns(plan, optimizer_state),
                self._formulas.fill(plan, optimizer_state),
            )

            def of(compiled: Compiled) -> tuple[Tensors, State, Tensors]:
                made = self._call(compiled, inputs, seed=0)
                moved = {**params, **dict(zip(plan.moved, made))}
                state, _ = self._new_state(plan, moved, buffers, optimizer_state, made[len(plan.moved) :])
                return moved, state, buffers

            def check(compiled: Compiled) -> str:
                return update_differs(params, grads, of(compiled)[:2], eagerly()[:2], self._tolerance(params))

            if compiled := self._graph(plan, lambda: self._update_program(plan), inputs, check):
                return of(compiled)
        return eagerly()

    # Graphs, each compiled once.

    def _compiled(self, program: Program, inputs: Sequence[Column]) -> Compiled:
        with torch_seeded(0):
            examples = drawn(program.draws)
        graph = compile_graph(program.function, *inputs, examples)
        pairs = enumerate(zip(program.owners, graph.layouts))
        differing = tuple(i for i, (name, made) in pairs if made != self._layouts[name])
        return Compiled(graph, program.params, program.owners, differing, program.draws)

    def _graph(
        self,
        key: Hashable,
        program: Callable[[], Program],
        inputs: Sequence[Column],
        check: Callable[[Compiled], str],
    ) -> Compiled | None:
        """The graph for ``key``, or ``None`` where there can't be one.

        Args:
            check: says what it computes otherwise than the eager step.
        """
        try:
            return self._graphs[key]
        except KeyError:
            pass
        try:
            compiled = self._compiled(program(), inputs)
            if difference := check(compiled):
                raise UncompilableError(f"when it is compiled it is another: {difference}")
            self._graphs[key] = compiled
        except (UncompilableError, StrangeDrawError) as error:
            warnings.warn(
                f"compile=True: a step is computed without compiling it, because {error}", UserWarning, stacklevel=2
            )
            self._graphs[key] = None
        finally:
            self.network.release()
            self.updater.release()
        return self._graphs[key]

    def _call(self, compiled: Compiled, inputs: Sequence[Column], seed: int) -> list[Tensor]:
        run = compiled.graph.run
        tensors = [tensor for column in inputs for tensor in column]
        if compiled.draws or compiled.graph.draws:
            with torch_seeded(seed):
                made = list(run([*tensors, *drawn(compiled.draws)]))
        else:
            made = list(run(tensors))
        for i in compiled.to_restride:
            made[i] = fit(made[i], self._layouts[compiled.owners[i]], compiled.owners[i])
        return made

    def _network_tensors(
        self, compiled: Compiled, params: Tensors, made: list[Tensor]
    ) -> tuple[Tensors, Tensors, Column]:
        """Parameters and buffers after a graph that made ``made``, and what else it made."""
        n = len(compiled.params)
        m = n + len(self._buffer_names)
        return params | dict(zip(compiled.params, made)), dict(zip(self._buffer_names, made[n:m])), made[m:]

    def _tolerance(self, params: Tensors) -> float:
        return tolerance(params.values(), self.autocast_dtype)


def _kept(given: StepInputs) -> StepInputs:
    """The same for a step that may write to its batch, and is not the first one."""
    return given._replace(batch=copied(given.batch), probe=False)
