"""The program that trains all members of an ensemble at once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any
from weakref import WeakSet

from torch import Tensor

from ..core import measures
from ..core.batch import Batch, BatchSource, to_device
from ..core.context import Context, after
from ..core.errors import noting
from ..core.measures import Measure
from ..core.record import tree_map
from ..core.rng import evaluation_seed, step_seed
from ..engine.batch import Again, BatchProgram, Chosen
from ..engine.step import Gradients
from ..purity.repeatable import is_repeatable
from .compiled_members import CompiledMembersStep
from .ensemble import combine_contexts, ended, member_seeds, own, split_context
from .member_data import MemberReader
from .member_hooks import run_member_hooks
from .member_step import MembersStep
from .stacking import combine, split, vectorised
from .trial import NotVectorisedError


class MembersProgram(BatchProgram):
    """Trains the members that still train as one stacked context; those that have finished are kept at their ends.

    Args:
        compiles: whether steps are compiled where the loop says so.

    Raises:
        NotVectorisedError: (by its methods) members can't be computed at once.
    """

    of = ", of an ensemble"

    def __init__(self, ctx: Context, compiles: bool = True) -> None:
        super().__init__(ctx)
        assert ctx.ensemble is not None
        self._ensemble = ctx.ensemble
        self._seats = list(range(ctx.ensemble.members))
        self._finished: dict[int, Context] = {}
        if any(end is not None for end in ctx.ensemble.ends):
            self._part(split_context(ctx))
        self._step = CompiledMembersStep(self.loop) if compiles and self.loop.compile else MembersStep(self.loop)

    def context(self) -> Context:
        if not self._finished:
            return self.live
        going = split_context(self.live) if self._seats else ()
        members = self._finished | dict(zip(self._seats, going, strict=True))
        return self._combined([members[seat] for seat in sorted(members)])

    def retire(self) -> bool:
        ensemble = self.live.ensemble
        assert ensemble is not None
        if super().retire():
            ctx = ended(self.live)
            if self._finished:
                self._part(split_context(ctx))
            self._live, self._seats = self.context() if self._finished else ctx, []
        elif terminating := sorted(ensemble.terminating):
            members = split_context(self.live)
            leaving = self._combined([members[i] for i in terminating])
            done = after(self.hooked("end", leaving, seeds=True), "end")
            for i, member in zip(terminating, split_context(done), strict=True):
                members[i] = member
            self._part(members)
        return not self._seats

    def _part(self, members: list[Context]) -> None:
        """``members`` are those that were seated, some or all of which have finished."""
        seated = dict(zip(self._seats, members, strict=True))
        self._finished |= {seat: own(ctx) for seat, ctx in seated.items() if ctx.stage == "end"}
        self._seats = [seat for seat, ctx in seated.items() if ctx.stage != "end"]
        going = [seated[seat] for seat in self._seats]
        self._live = self._combined(going) if going else self.context()

    def _combined(self, members: list[Context]) -> Context:
        return combine_contexts(members, self._ensemble)

    def reader(self, source: BatchSource, part: str, start: int) -> MemberReader:
        return MemberReader(source, part, member_seeds(self.live), self.live.epoch, start, self.live.data)

    def first_batch(self, part: str) -> Batch | None:
        """The next batch, if there is one.

        Raises:
            NotVectorisedError: it can't be read for all members.
        """
        try:
            with closing(self.read(part)) as reader:
                item = reader.take()
        except NotVectorisedError:
            raise
        except Exception as error:
            raise NotVectorisedError(f"their first batch can't be read ({type(error).__name__}: {error})") from error
        return None if item is None else to_device(item.batch, self.loop.device)

    def gradients(self, ctx: Context, params: Any, buffers: Any, batch: Batch, probe: bool = False) -> Gradients:
        def seeds() -> list[int]:
            return [step_seed(seed, ctx.global_step) for seed in member_seeds(ctx)]

        return self._step.gradients(params, buffers, ctx.trainable, batch, seeds)

    def update(
        self, ctx: Context, params: Any, buffers: Any, grads: Any, loss: Tensor, again: Again
    ) -> tuple[Any, Any, Any]:
        return *self._step.update(grads, ctx.optimizer_state, params), buffers

    def outputs(self, ctx: Context, batch: Batch, with_loss: bool) -> tuple[Any, Any]:
        def seeds() -> list[int]:
            return [evaluation_seed(seed, ctx.epoch, ctx.step_valid) for seed in member_seeds(ctx)]

        return self._step.evaluate(ctx.params, ctx.buffers, ctx.trainable, batch, seeds, with_loss)

    def hooked(self, stage: str, ctx: Context, seeds: bool) -> Context:
        return run_member_hooks(stage, ctx)

    def start(self, chosen: Chosen) -> Any:
        members = len(self._seats)
        return tree_map(
            lambda leaf: leaf.expand(members, *leaf.shape).clone() if isinstance(leaf, Tensor) else leaf,
            measures.start(chosen),
        )

    def measured(self, chosen: Chosen, running: Any, batch: Batch, y_hats: Any, loss: Any) -> Any:
        x, y, members = batch.x, batch.y, len(self._seats)
        rows = measures.count_rows(y, x, axis=1)

        def picked(m: Measure) -> Any:
            # A function picks from the outputs of one member.
            return _of_members(m, m.picked, (y_hats,), members) if callable(m.of) else m.picked(y_hats)

        chunks, states = measures.keep(chosen, running["predictions"], picked, y, x, axis=1), {}
        for m in chosen:
            if m.update:
                given = (running["states"][m.id], y_hats, y, loss)
                if not (m.is_loss or is_repeatable(m, "update")):
                    # Under vmap there are no bits to compare.
                    with noting(lambda m=m: f"in {m}"):  # type: ignore[misc]
                        state, outputs, own_y, own_loss = split(given, members)[0]
                        m.checked_advance(state, outputs, own_y, own_loss, rows)
                states[m.id] = _of_members(m, lambda *each, m=m: m.advance(*each, rows), given, members)
        return {"predictions": chunks, "states": states}

    def scores(self, chosen: Chosen, running: Any) -> Any:
        return combine([measures.scores(chosen, each) for each in split(running, len(self._seats))], numbers=True)

    def close(self) -> None:
        self._step.release()


def _of_members(measure: Measure, function: Callable[..., Any], given: tuple[Any, ...], members: int) -> Any:
    """What ``function``, which is one of ``measure``, makes for all members."""
    with noting(lambda: f"in {measure}"):
        if measure not in _needing_values:
            try:
                return vectorised(function, given, members)
            except Exception:
                # If it is no fault of the function's own, it needs Python values.
                _needing_values.add(measure)
        return combine([function(*each) for each in split(given, members)])


_needing_values: WeakSet[Measure] = WeakSet()
