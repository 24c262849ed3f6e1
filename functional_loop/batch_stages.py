"""The stages of one batch, and the hooks that run at a stage."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from . import measures
from .batch import Batch, copied, to_device
from .context import Context, after, run_as
from .errors import add_note, noting
from .hook_seeds import BATCH_STAGES
from .place import check_not_moved
from .plain import check_plain
from .record import did_you_mean, evolve
from .rng import fold_in
from .step import StepInputs

if TYPE_CHECKING:
    from .hook_seeds import Kind
    from .loop import Loop
    from .stages import Hook
    from .step import Gradients, Step, Tensors


_OF_BATCHES = frozenset(chain(*BATCH_STAGES.values()))


def boundary_after(stage: str, ctx: Context, seeds: bool = True) -> Context:
    return after(run_hooks_of(stage, ctx, seeds), stage)


def run_hooks_of(stage: str, ctx: Context, seeds: bool = True) -> Context:
    hooks = ctx.loop.hooks[stage]
    return run_hooks(stage, hooks, evolve(ctx, running=stage), seeds) if hooks else ctx


def run_hooks(stage: str, hooks: Iterable[tuple[str, Hook]], ctx: Context, seeds: bool = True) -> Context:
    """What the hooks make of ``ctx``, one after the other; their errors say which hook of which callback it was.

    Args:
        seeds: whether all are called under their seeds, or only those that are known to draw.
    """
    hook_seeds = ctx.loop.hook_seeds
    if not (seeds or hook_seeds.observers or hook_seeds.drawing):
        for id, hook in hooks:
            ctx = run_unseeded(stage, id, hook, ctx)
        return ctx
    for id, hook in hooks:
        ctx = run_unseeded(stage, id, partial(hook_seeds.call, stage, id, hook, seeds=seeds), ctx)
    return ctx


def run_hook(stage: str, id: str, hook: Hook, ctx: Context) -> Context:
    """What one hook makes of ``ctx``, under its seed."""
    return run_hooks(stage, [(id, hook)], ctx)


def run_unseeded(stage: str, id: str, hook: Hook, ctx: Context, of_all: bool = False) -> Context:
    """What one hook makes of ``ctx``, or once of that of all members; its errors say which it was."""
    try:
        result = run_as(id, hook, ctx)
        if not isinstance(result, Context):
            raise TypeError(f"a hook must return a Context (for example evolve(ctx, ...)), not {type(result).__name__}")
        if result is not ctx and stage not in ("exit", "resume"):
            check_not_moved(ctx, result, stage, of_all)
            if result.callbacks is not ctx.callbacks:
                _check_slots(ctx, result, stage)
    except BaseException as error:
        add_note(error, f"in callback {id!r} at stage {stage!r} ({place_of(ctx)})")
        raise
    return result


def _check_slots(before: Context, after: Context, stage: str) -> None:
    """Refuse states of callbacks that could not be saved. A state that changes at every batch is looked at in the first
    batches of an epoch, since its form hardly changes later; saving looks at all.

    Raises:
        TypeError: one is no plain tree.
        ValueError: there are states of other callbacks than before.
    """
    if before.callbacks.keys() != after.callbacks.keys():
        names = sorted(before.callbacks.keys() ^ after.callbacks.keys(), key=str)
        raise ValueError(f"ctx.callbacks has one state for each callback of the loop, and can't gain or lose {names}")
    if stage in _OF_BATCHES and (before.step_valid or before.step) > 2:
        return
    for id, slot in after.callbacks.items():
        if slot is not before.callbacks[id]:
            check_plain(slot, f"the state of callback {id!r}")


def place_of(at: Context | Draft, step: int = 0, step_valid: int = 0) -> str:
    ctx = at.context() if isinstance(at, Draft) else at
    step, step_valid = ctx.step + step, ctx.step_valid + step_valid
    return f"epoch {ctx.epoch}, step {step}" + (f", validation step {step_valid}" if step_valid else "")


def train_batch(step: Step, ctx: Context, batch: Batch, data: Any, last: bool, probe: bool) -> Context:
    """The boundary after ``batch_end`` of one batch.

    Args:
        data: ``ctx.data`` after the batch.
        last: it is the last of its epoch, and closes an open accumulation window.
        probe: look, at some cost, for what is wrong with the network and the loss.
    """
    if ctx.global_step + 1 in ctx.loop.skipped(ctx.callbacks):
        return pass_over(ctx, data)

    def run(seeds: bool) -> Context:
        return _train_batch(step, ctx, batch, data, last, probe, seeds)

    return ctx.loop.hook_seeds.batch("train", run)


def _train_batch(step: Step, ctx: Context, batch: Batch, data: Any, last: bool, probe: bool, seeds: bool) -> Context:
    loop = ctx.loop
    draft = Draft(ctx, seeds)
    draft.changes = {
        "batch": to_device(batch, loop.device),
        "data": data,
        "step": ctx.step + 1,
        "global_step": ctx.global_step + 1,
    }
    draft.run_hooks("batch_begin")
    if step.at_once:
        _compiled(step, draft, probe)
    else:
        _in_parts(step, draft, last, probe)
    draft.run_hooks("batch_end")
    return draft.after("batch_end")


def _in_parts(step: Step, draft: Draft, last: bool, probe: bool) -> None:
    """Gradients, the hooks that see them, and the update where a window ends."""
    loop = draft["loop"]
    found = _gradients(step, draft, draft["params"], draft["buffers"], probe)
    position = _position(draft)
    updates = last or position == loop.accumulate
    sums = (
        found.grads
        if loop.accumulate == 1
        else _add(draft["accumulated"], found.grads, draft["trainable"], sparse=loop.optimizer.needs_sparse)
    )
    draft.changes.update(
        params=found.params,
        buffers=found.buffers,
        y_hats=found.y_hats,
        last_loss=found.loss,
        grads=sums if position == 1 else {name: total / position for name, total in sums.items()},
        accumulated=() if updates else sums,
        measures=_measure(draft, found),
    )
    if draft.run_hooks("after_backward"):
        _check_grads(draft["grads"], draft["params"])
    if updates:
        _update(step, draft)


def _compiled(step: Any, draft: Draft, probe: bool) -> None:
    """All that `_in_parts` does, in one graph."""
    seed = fold_in(draft["seed"], "step", draft["global_step"])
    with noting(lambda: f"in the compiled step, between 'batch_begin' and 'batch_end' ({place_of(draft)})"):
        names = ("params", "buffers", "trainable", "optimizer_state")
        batch = for_network(draft["batch"], draft["loop"], "train")
        given = StepInputs(**{name: draft[name] for name in names}, batch=batch, seed=seed, probe=probe)
        found, optimizer_state = step.whole(given)
    draft.changes.update(
        params=found.params,
        buffers=found.buffers,
        y_hats=found.y_hats,
        last_loss=found.loss,
        grads=found.grads,
        optimizer_state=optimizer_state,
        measures=_measure(draft, found),
    )


def for_network(batch: Batch, loop: Loop, kind: Kind) -> Batch:
    """The batch, or a copy where hooks may see it or run again on it: a network may write to its input."""
    return copied(batch) if kind in loop.hook_seeds.hooked else batch


def pass_over(ctx: Context, data: Any) -> Context:
    """The boundary after a batch that is skipped; ``data`` is ``ctx.data`` after it."""
    return after(ctx, "batch_end", step=ctx.step + 1, global_step=ctx.global_step + 1, data=data)


def _position(draft: Draft) -> int:
    """Which of the batches of its accumulation window the one at hand is, those passed over not counted."""
    step, number, loop = draft["step"], draft["global_step"], draft["loop"]
    if loop.accumulate == 1:
        return 1
    passed = sum(number - step < n < number for n in loop.skipped(draft["callbacks"]))
    return int((step - passed - 1) % loop.accumulate + 1)


class Draft:
    """A builder: collects field changes, and builds a `Context` only when a hook needs one."""

    __slots__ = ("_ctx", "_seeds", "changes")

    def __init__(self, ctx: Context, seeds: bool) -> None:
        self._ctx = ctx
        self._seeds = seeds
        self.changes: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        return self.changes[name] if name in self.changes else getattr(self._ctx, name)

    def context(self) -> Context:
        return evolve(self._ctx, **self.changes) if self.changes else self._ctx

    def after(self, stage: str) -> Context:
        return after(self._ctx, stage, **self.changes)

    def run_hooks(self, stage: str) -> bool:
        """Run the hooks of ``stage`` on the context as it is now; whether there are any."""
        if not (hooks := self._ctx.loop.hooks[stage]):
            return False
        self._ctx = run_hooks(stage, hooks, evolve(self._ctx, **self.changes, running=stage), self._seeds)
        self.changes = {}
        return True


def _gradients(step: Step, draft: Draft, params: Tensors, buffers: Tensors, probe: bool = False) -> Gradients:
    seed = fold_in(draft["seed"], "step", draft["global_step"])
    with noting(lambda: f"in the network or the loss, between 'batch_begin' and 'after_backward' ({place_of(draft)})"):
        batch = for_network(draft["batch"], draft["loop"], "train")
        return step.gradients(params, buffers, draft["trainable"], batch, seed, probe)


def _check_grads(grads: Any, params: Tensors) -> None:
    if not isinstance(grads, dict):
        raise TypeError(f"a hook of 'after_backward' left {type(grads).__name__} in ctx.grads, which is a dict by name")
    for name in grads.keys() - params.keys():
        raise ValueError(f"a hook of 'after_backward' left {name!r} in ctx.grads{did_you_mean(name, params)}")


def _add(sums: Tensors | tuple[()], grads: Tensors, trainable: tuple[str, ...], sparse: bool) -> Tensors:
    # A sum grows by the rows of every batch, unless it is dense.
    grads = {name: grad.to_dense() if grad.is_sparse and not sparse else grad for name, grad in grads.items()}
    if not sums:
        return grads
    # A parameter frozen within the window drops out of it.
    kept = {name: total for name, total in sums.items() if name in trainable}
    return {**kept, **{name: kept[name] + grad if name in kept else grad for name, grad in grads.items()}}


def _update(step: Step, draft: Draft) -> None:
    with noting(lambda: f"in the optimizer, between 'after_backward' and 'batch_end' ({place_of(draft)})"):
        params, optimizer_state, buffers = step.update(
            draft["params"],
            draft["buffers"],
            draft["grads"],
            draft["optimizer_state"],
            draft["last_loss"],
            again=lambda params, buffers: _gradients(step, draft, params, buffers),
        )
    draft.changes.update(params=params, optimizer_state=optimizer_state, buffers=buffers)


def _measure(draft: Draft, found: Gradients) -> Any:
    running, measures_train = draft["measures"], draft["loop"].measures_train
    if not measures_train or running["train"] == ():
        return running
    with noting(lambda: f"in the training scores ({place_of(draft)})"):
        batch = draft["batch"]
        train = measures.accumulate(measures_train, running["train"], found.y_hats, batch.y, batch.x, found.loss)
    return {**running, "train": train}


def valid_batch(step: Step, ctx: Context, batch: Batch, data: Any) -> Context:
    """The boundary after ``batch_valid_end`` of one batch, with ``ctx.data`` after it."""

    def run(seeds: bool) -> Context:
        return _valid_batch(step, ctx, batch, data, seeds)

    return ctx.loop.hook_seeds.batch("valid", run)


def _valid_batch(step: Step, ctx: Context, batch: Batch, data: Any, seeds: bool) -> Context:
    loop = ctx.loop
    if ctx.stage == "before_valid":
        ctx = evolve(ctx, measures={**ctx.measures, "valid": measures.start(loop.measures_valid)})
    ctx = evolve(ctx, step_valid=ctx.step_valid + 1, batch=to_device(batch, loop.device), data=data)
    ctx = run_hooks_of("batch_valid_begin", ctx, seeds)
    batch, chosen, running = ctx.batch, loop.measures_valid, ctx.measures["valid"]
    y_hats, loss = evaluate(step, ctx, for_network(batch, loop, "valid"), measures.need_loss(chosen))
    with noting(lambda: f"in the validation scores ({place_of(ctx)})"):
        running = measures.accumulate(chosen, running, y_hats, batch.y, batch.x, loss)
    return boundary_after("batch_valid_end", evolve(ctx, y_hats=y_hats, measures={**ctx.measures, "valid": running}))


def evaluate(step: Step, ctx: Context, batch: Batch, with_loss: bool = False) -> tuple[Any, Any]:
    """Outputs of the network in evaluation mode, and the loss if wanted; what they draw is a function of the place."""
    seed = fold_in(fold_in(ctx.seed, "evaluation", ctx.epoch), "batch", ctx.step_valid)
    what = "network or the loss" if with_loss else "network"
    with noting(lambda: f"in the {what}, in evaluation mode ({place_of(ctx)})"):
        params = step.evaluation_params(ctx.params, ctx.optimizer_state)
        return step.evaluate(params, ctx.buffers, ctx.trainable, batch, seed, with_loss)
