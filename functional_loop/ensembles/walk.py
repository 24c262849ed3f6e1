"""The grammar of the stages for all members of an ensemble at once."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Any
from weakref import WeakSet

from torch import Tensor

from .. import measures
from ..batch import Batch, to_device
from ..batch_stages import for_network
from ..context import Context, after
from ..errors import noting
from ..measures import Measure
from ..reading import TRAINING, VALIDATION, Item, check_epoch_done, check_validated, without_validation
from ..record import evolve, tree_map
from ..repeatable import is_repeatable
from ..rng import fold_in
from ..step import Gradients
from .ensemble import combine_contexts, ended, member_seeds, own, split_context
from .member_data import fetch_members
from .member_hooks import run_member_hooks
from .member_step import MembersStep
from .stacking import combine, split, vectorised
from .trial import NotVectorisedError


class Crew:
    """The members that still train, as one stacked context, and those that have finished, each at its end.

    A member that has finished takes no part in what follows.
    """

    def __init__(self, ctx: Context) -> None:
        assert ctx.ensemble is not None
        self._ensemble = ctx.ensemble
        self.seats = list(range(ctx.ensemble.members))
        self.finished: dict[int, Context] = {}
        self.live = ctx
        if any(end is not None for end in ctx.ensemble.ends):
            self._part(split_context(ctx))

    def _part(self, members: list[Context]) -> None:
        """``members`` are those of ``live``, some or all of which have finished."""
        seated = dict(zip(self.seats, members, strict=True))
        self.finished |= {seat: own(ctx) for seat, ctx in seated.items() if ctx.stage == "end"}
        self.seats = [seat for seat, ctx in seated.items() if ctx.stage != "end"]
        going = [seated[seat] for seat in self.seats]
        self.live = self._combine(going) if going else self.context()

    def retire(self) -> None:
        """Let every member that terminates, or has trained for all its epochs, finish by ``end``."""
        ctx = self.live
        assert ctx.ensemble is not None
        terminating = ctx.ensemble.terminating
        if ctx.terminate or ctx.epoch >= ctx.loop.epochs:
            ctx = ended(run_stage("end", ctx))
            if self.finished:
                self._part(split_context(ctx))
            self.live, self.seats = self.context() if self.finished else ctx, []
        elif terminating:
            members = split_context(ctx)
            leaving = self._combine([members[i] for i in sorted(terminating)])
            for i, member in zip(sorted(terminating), split_context(run_stage("end", leaving)), strict=True):
                members[i] = member
            self._part(members)

    def context(self) -> Context:
        """The stacked context of all members."""
        if not self.finished:
            return self.live
        members = self.finished | dict(zip(self.seats, split_context(self.live) if self.seats else (), strict=True))
        return self._combine([members[seat] for seat in sorted(members)])

    def _combine(self, members: list[Context]) -> Context:
        return combine_contexts(members, self._ensemble)


def walk_vectorised(step: MembersStep, crew: Crew) -> Iterator[Context]:
    """Every boundary of the members that still train, entered after the one at which they are; ``crew`` follows.

    The last one is that of ``end``, after which all have finished.
    """
    loop = crew.live.loop
    if crew.live.stage == "":
        crew.live = run_stage("begin", crew.live)
        yield crew.live
    while True:
        if crew.live.stage in ("begin", "epoch_end"):
            crew.retire()
            if not crew.seats:
                yield crew.live
                return
            crew.live = run_stage("epoch_begin", _next_epoch(crew.live))
            yield crew.live
        if crew.live.stage in ("epoch_begin", "batch_end"):
            for crew.live in _train_batches(step, crew.live):  # noqa: B020
                yield crew.live
            crew.live = run_stage("before_valid", _score("train", crew.live))
            yield crew.live
        if loop.valid is not None and loop.evaluates(crew.live.epoch) and crew.live.stage != "valid_end":
            for crew.live in _valid_batches(step, crew.live):  # noqa: B020
                yield crew.live
            crew.live = run_stage("valid_end", _score("valid", crew.live))
            yield crew.live
        elif crew.live.stage != "valid_end":
            crew.live = evolve(crew.live, last_scores_valid=())
        crew.live = run_stage("epoch_end", crew.live)
        yield crew.live


def run_stage(stage: str, ctx: Context) -> Context:
    """The boundary after ``stage``."""
    return after(run_member_hooks(stage, ctx), stage)


def _next_epoch(ctx: Context) -> Context:
    loop = ctx.loop
    running = _start(loop.measures_train, ctx) if loop.evaluates(ctx.epoch + 1) else ()
    return evolve(ctx, epoch=ctx.epoch + 1, step=0, accumulated=(), measures={"train": running, "valid": ()})


def _members(ctx: Context) -> int:
    assert ctx.ensemble is not None
    return ctx.ensemble.members


def _train_batches(step: MembersStep, ctx: Context) -> Iterator[Context]:
    with closing(_read(ctx, TRAINING)) as items:
        while (item := _next(items, ctx, "training data")) is not None:
            ctx = train_batch(step, evolve(ctx, data=item.data), item.batch, item.last)
            yield ctx
    check_epoch_done(ctx)


def _read(ctx: Context, part: str) -> Generator[Item]:
    """The rest of an epoch of all members, with what their ``ctx.data`` become."""
    loop, start = ctx.loop, ctx.step if part == TRAINING else ctx.step_valid
    source = loop.train if part == TRAINING else loop.valid
    assert source is not None
    found, before = ctx.data, split(ctx.data, _members(ctx))
    fetched = fetch_members(source, part, member_seeds(ctx), ctx.epoch, start, before)
    # Not to keep its memory.
    del ctx
    with closing(fetched):
        for batch, data, last in fetched:
            yield Item(batch, found if data is before else combine(data), last)


def first_batch(ctx: Context, part: str) -> Batch | None:
    """The first batch of the epoch, if there is one.

    Raises:
        NotVectorisedError: it can't be read for all members.
    """
    try:
        with closing(_read(ctx, part)) as items:
            item = next(items, None)
    except NotVectorisedError:
        raise
    except Exception as error:
        raise NotVectorisedError(f"their first batch can't be read ({type(error).__name__}: {error})") from error
    return None if item is None else to_device(item.batch, ctx.loop.device)


def _next(items: Generator[Item], ctx: Context, called: str) -> Item | None:
    place = f"epoch {ctx.epoch}, step {ctx.step + 1}" if called == "training data" else f"epoch {ctx.epoch}"
    with noting(lambda: f"while reading the {called} ({place})"):
        return next(items, None)


def train_batch(step: MembersStep, ctx: Context, batch: Batch, last: bool) -> Context:
    """The three stages of one batch of every member, the ``last`` of its epoch or not."""
    loop = ctx.loop
    counted = {"step": ctx.step + 1, "global_step": ctx.global_step + 1}
    ctx = run_member_hooks("batch_begin", evolve(ctx, batch=to_device(batch, loop.device), **counted))
    batch = for_network(ctx.batch, loop, "train")
    found = members_gradients(step, ctx, batch)
    position = (ctx.step - 1) % loop.accumulate + 1
    updates = last or position == loop.accumulate
    sums = found.grads if position == 1 else _add(ctx, found.grads)
    ctx = evolve(
        ctx,
        buffers=found.buffers,
        y_hats=found.y_hats,
        last_loss=found.loss,
        grads=sums if position == 1 else {name: total / position for name, total in sums.items()},
        accumulated=() if updates else sums,
        measures=_measured("train", loop.measures_train, ctx, found.y_hats, found.loss),
    )
    ctx = run_member_hooks("after_backward", ctx)
    if updates:
        with noting(lambda: f"in the optimizer, of an ensemble (epoch {ctx.epoch}, step {ctx.step})"):
            grads: Any = ctx.grads
            params, optimizer_state = step.update(grads, ctx.optimizer_state, ctx.params)
        ctx = evolve(ctx, params=params, optimizer_state=optimizer_state)
    return run_stage("batch_end", ctx)


def members_gradients(step: MembersStep, ctx: Context, batch: Batch) -> Gradients:
    """What the forward and backward pass of a batch of every member make."""

    def seeds() -> list[int]:
        return [fold_in(seed, "step", ctx.global_step) for seed in member_seeds(ctx)]

    with noting(lambda: f"in the network or the loss, of an ensemble (epoch {ctx.epoch}, step {ctx.step})"):
        return step.gradients(ctx.params, ctx.buffers, ctx.trainable, batch, seeds)


def _add(ctx: Context, grads: dict[str, Tensor]) -> dict[str, Tensor]:
    # A parameter frozen within the window drops out of it.
    sums = {name: total for name, total in dict(ctx.accumulated).items() if name in ctx.trainable}
    return {**sums, **{name: sums[name] + grad if name in sums else grad for name, grad in grads.items()}}


def _valid_batches(step: MembersStep, ctx: Context) -> Iterator[Context]:
    loop = ctx.loop
    if ctx.stage == "before_valid":
        ctx = evolve(ctx, measures={**ctx.measures, "valid": _start(loop.measures_valid, ctx)})
    with closing(_read(ctx, VALIDATION)) as items:
        while (item := _next(items, ctx, "validation data")) is not None:
            batch = to_device(item.batch, loop.device)
            ctx = evolve(ctx, step_valid=ctx.step_valid + 1, batch=batch, data=item.data)
            ctx = run_member_hooks("batch_valid_begin", ctx)
            chosen, own = loop.measures_valid, for_network(ctx.batch, loop, "valid")
            y_hats, losses = evaluate_members(step, ctx, own, measures.need_loss(chosen))
            measured = _measured("valid", chosen, ctx, y_hats, losses)
            ctx = run_stage("batch_valid_end", evolve(ctx, y_hats=y_hats, measures=measured))
            yield ctx
    check_validated(ctx)


def evaluate_members(step: MembersStep, ctx: Context, batch: Batch, with_loss: bool = False) -> tuple[Any, Any]:
    """Outputs of all members in evaluation mode, and losses if wanted, for a batch with a leading member axis."""

    def seeds() -> list[int]:
        return [fold_in(fold_in(s, "evaluation", ctx.epoch), "batch", ctx.step_valid) for s in member_seeds(ctx)]

    with noting(lambda: f"in the network, in evaluation mode, of an ensemble (epoch {ctx.epoch}, step {ctx.step})"):
        return step.evaluate(ctx.params, ctx.buffers, ctx.trainable, batch, seeds, with_loss)


def _start(chosen: Any, ctx: Context) -> Any:
    members = _members(ctx)
    return tree_map(
        lambda leaf: leaf.expand(members, *leaf.shape).clone() if isinstance(leaf, Tensor) else leaf,
        measures.start(chosen),
    )


def _measured(part: str, chosen: Any, ctx: Context, y_hats: Any, losses: Any) -> Any:
    running = ctx.measures[part]
    if not chosen or running == ():
        return ctx.measures
    x, y, members = ctx.batch.x, ctx.batch.y, _members(ctx)
    rows = measures.count_rows(y, x, axis=1)

    def picked(m: Measure) -> Any:
        # A function picks from the outputs of one member.
        return _of_members(m, m.picked, (y_hats,), members) if callable(m.of) else m.picked(y_hats)

    with noting(lambda: f"in the scores of an ensemble (epoch {ctx.epoch}, step {ctx.step})"):
        chunks, states = measures.keep(chosen, running["predictions"], picked, y, x, axis=1), {}
        for m in chosen:
            if m.update:
                given = (running["states"][m.id], y_hats, y, losses)
                if not (m.is_loss or is_repeatable(m, "update")):
                    # Under vmap there are no bits to compare.
                    with noting(lambda m=m: f"in {m}"):  # type: ignore[misc]
                        m.checked_advance(*split(given, members)[0], rows)
                states[m.id] = _of_members(m, lambda *each, m=m: m.advance(*each, rows), given, members)
    return {**ctx.measures, part: {"predictions": chunks, "states": states}}


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


def _score(part: str, ctx: Context) -> Context:
    chosen = ctx.loop.measures_train if part == "train" else ctx.loop.measures_valid
    running, scores = ctx.measures[part], ()
    if running != ():
        with noting(lambda: f"in the scores of an ensemble (epoch {ctx.epoch}, step {ctx.step})"):
            scores = combine([measures.scores(chosen, each) for each in split(running, _members(ctx))], numbers=True)
    changes = {"measures": {**ctx.measures, part: ()}, f"last_scores_{part}": scores}
    if part == VALIDATION:
        changes["data"] = without_validation(ctx.data)
    return evolve(ctx, **changes)
