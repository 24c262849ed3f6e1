"""The grammar of the stages: a state machine that can be entered after any of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from . import measures
from .context import Context, boundary, first_output
from .data import Batch, to_device
from .record import evolve
from .rng import fold_in

if TYPE_CHECKING:
    from .step import Gradients, Step, Tensors

T = TypeVar("T")


def walk(step: Step, ctx: Context) -> Iterator[Context]:
    """The grammar of the stages, entered after ``ctx.stage``."""
    loop = ctx.loop
    if ctx.stage == "":
        ctx = _stage("begin", ctx)
        yield ctx
    while True:
        if ctx.stage in ("begin", "epoch_end"):
            if ctx.terminate or ctx.epoch >= loop.epochs:
                yield _stage("end", ctx)
                return
            ctx = _stage("epoch_begin", _next_epoch(ctx))
            yield ctx
        if ctx.stage in ("epoch_begin", "batch_end"):
            for ctx in _train_batches(step, ctx):  # noqa: B020
                yield ctx
            ctx = _stage("before_valid", _score_train(ctx))
            yield ctx
        if loop.valid is not None and loop.evaluates(ctx.epoch) and ctx.stage != "valid_end":
            for ctx in _valid_batches(step, ctx):  # noqa: B020
                yield ctx
            ctx = evolve(_stage("valid_end", _score_valid(ctx)), step_valid=0)
            yield ctx
        elif ctx.stage != "valid_end":
            ctx = evolve(ctx, last_scores_valid=())
        ctx = _stage("epoch_end", ctx)
        yield ctx


def _stage(stage: str, ctx: Context) -> Context:
    """The boundary after ``stage``."""
    return boundary(_run_hooks(stage, ctx), stage)


def _run_hooks(stage: str, ctx: Context) -> Context:
    for id, hook in ctx.loop.hooks[stage]:
        ctx = run_hook(stage, id, hook, ctx)
    return ctx


def run_hook(stage: str, id: str, hook: Any, ctx: Context) -> Context:
    try:
        result = hook(ctx)
        if not isinstance(result, Context):
            raise TypeError(f"a hook must return a Context (for example evolve(ctx, ...)), not {type(result).__name__}")
    except BaseException as error:
        error.add_note(f"in callback {id!r} at stage {stage!r} ({_place(ctx)})")
        raise
    return result


def _place(ctx: Context) -> str:
    return f"epoch {ctx.epoch}, step {ctx.step}" + (f", validation step {ctx.step_valid}" if ctx.step_valid else "")


def _next_epoch(ctx: Context) -> Context:
    loop = ctx.loop
    running = measures.start(loop.measures_train) if loop.evaluates(ctx.epoch + 1) else ()
    return evolve(ctx, epoch=ctx.epoch + 1, step=0, measures={"train": running, "valid": ()})


def _train_batches(step: Step, ctx: Context) -> Iterator[Context]:
    source = ctx.loop.train
    if ctx.step == source.length:
        return
    batches = source.fetch(ctx.seed, ctx.epoch, ctx.step, ctx.data)
    if source.length is None and ctx.loop.accumulate > 1:
        marked = _mark_last(batches)
    else:
        marked = ((item, i == source.length) for i, item in enumerate(batches, ctx.step + 1))
    probe = True
    for (batch, data), last in _naming_data(ctx, "train", marked):
        ctx = train_batch(step, evolve(ctx, data=data) if data is not ctx.data else ctx, batch, last, probe)
        yield ctx
        probe = False
    if ctx.step == 0:
        raise ValueError(f"the training data gave no batch in epoch {ctx.epoch}")


def _mark_last(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Every item, and whether it is the last: reads one item ahead."""
    iterator = iter(items)
    for item in iterator:
        for following in iterator:
            yield item, False
            item = following
        yield item, True


def _naming_data(ctx: Context, which: str, items: Iterator[T]) -> Iterator[T]:
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except Exception as error:
            error.add_note(f"while reading the {which} data (epoch {ctx.epoch})")
            raise
        yield item


def train_batch(step: Step, ctx: Context, batch: Batch, last: bool, probe: bool) -> Context:
    loop = ctx.loop
    batch = to_device(batch, loop.device)
    ctx = evolve(ctx, batch=batch, step=ctx.step + 1, global_step=ctx.global_step + 1)
    ctx = _run_hooks("batch_begin", ctx)
    found = _gradients(step, ctx, ctx.params, ctx.buffers, probe)
    position = (ctx.step - 1) % loop.accumulate + 1
    updates = last or position == loop.accumulate
    sums = _add(ctx.accumulated, found.grads) if loop.accumulate > 1 else found.grads
    ctx = evolve(
        ctx,
        params=found.params,
        buffers=found.buffers,
        y_hats=found.y_hats,
        last_loss=found.loss,
        grads={name: total / position for name, total in sums.items()} if position > 1 else sums,
        accumulated=() if updates else sums,
        measures=_measure(ctx, found.y_hats),
    )
    ctx = _run_hooks("after_backward", ctx)
    if updates:
        ctx = _update(step, ctx, found)
    return _stage("batch_end", ctx)


def _gradients(step: Step, ctx: Context, params: Tensors, buffers: Tensors, probe: bool = False) -> Gradients:
    seed = fold_in(ctx.seed, "step", ctx.global_step)
    try:
        return step.gradients(params, buffers, ctx.trainable, ctx.batch, seed, probe)
    except Exception as error:
        error.add_note(f"in the network or the loss, between 'batch_begin' and 'after_backward' ({_place(ctx)})")
        raise


def _add(sums: Tensors | tuple[()], grads: Tensors) -> Tensors:
    if not sums:
        return grads
    return {**sums, **{name: sums[name] + grad if name in sums else grad for name, grad in grads.items()}}


def _update(step: Step, ctx: Context, found: Gradients) -> Context:
    found = found._replace(grads=ctx.grads or {}, params=ctx.params, buffers=ctx.buffers)
    try:
        params, optimizer_state, buffers = step.update(
            found, ctx.optimizer_state, lambda params, buffers: _gradients(step, ctx, params, buffers)
        )
    except Exception as error:
        error.add_note(f"in the optimizer, between 'after_backward' and 'batch_end' ({_place(ctx)})")
        raise
    return evolve(ctx, params=params, optimizer_state=optimizer_state, buffers=buffers)


def _measure(ctx: Context, y_hats: Any) -> Any:
    running = ctx.measures["train"]
    if not ctx.loop.measures_train or running == ():
        return ctx.measures
    after = measures.accumulate(ctx.loop.measures_train, running, first_output(y_hats), ctx.batch.y)
    return {**ctx.measures, "train": after}


def _score_train(ctx: Context) -> Context:
    running = ctx.measures["train"]
    scores = measures.scores(ctx.loop.measures_train, running) if running != () else ()
    return evolve(ctx, last_scores_train=scores, measures={**ctx.measures, "train": ()})


def _valid_batches(step: Step, ctx: Context) -> Iterator[Context]:
    loop, source = ctx.loop, ctx.loop.valid
    assert source is not None
    if ctx.stage == "before_valid":
        ctx = evolve(ctx, measures={**ctx.measures, "valid": measures.start(loop.measures_valid)})
    if ctx.step_valid == source.length:
        return
    probe = True
    for batch, _ in _naming_data(ctx, "validation", source.fetch(ctx.seed, ctx.epoch, ctx.step_valid, ())):
        ctx = evolve(ctx, batch=to_device(batch, loop.device), step_valid=ctx.step_valid + 1)
        ctx = _run_hooks("batch_valid_begin", ctx)
        y_hats = evaluate(step, ctx, ctx.batch.x, probe)
        running = ctx.measures["valid"]
        after = measures.accumulate(loop.measures_valid, running, first_output(y_hats), ctx.batch.y)
        ctx = evolve(ctx, y_hats=y_hats, measures={**ctx.measures, "valid": after})
        ctx = _stage("batch_valid_end", ctx)
        yield ctx
        probe = False


def evaluate(step: Step, ctx: Context, x: Any, probe: bool) -> Any:
    """Outputs of the network in evaluation mode; their randomness, if any, is a function of the place."""
    seed = fold_in(fold_in(ctx.seed, "evaluation", ctx.epoch), "batch", ctx.step_valid)
    try:
        return step.evaluate(ctx.params, ctx.buffers, ctx.trainable, x, seed, probe)
    except Exception as error:
        error.add_note(f"in the network, in evaluation mode ({_place(ctx)})")
        raise


def _score_valid(ctx: Context) -> Context:
    scores = measures.scores(ctx.loop.measures_valid, ctx.measures["valid"])
    return evolve(ctx, last_scores_valid=scores, measures={**ctx.measures, "valid": ()})
