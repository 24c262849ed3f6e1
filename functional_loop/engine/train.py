"""Training as a function: `train` to the end, `iterate` boundary by boundary, `train_step` batch by batch."""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Any

from ..checkpoint.going_on import going_on
from ..core.batch import Batch, as_batch, copied
from ..core.context import Context
from ..core.errors import attach_context, keeping_stop_iteration, region, telling_of_stop_iteration
from ..core.place import check_place
from ..data.reader import Item, is_done
from ..ensembles.program import EnsembleProgram
from .runner import Program, Runner
from .solo import SoloProgram, passed_over
from .step import autocast_off


def iterate(ctx: Context) -> Generator[Context]:
    """Every boundary context after ``ctx``, lazily, up to the one of ``end``.

    The caller may stop, keep what it was given, go on from any of it, or train a changed context instead. The
    ``exit`` hooks run when the iterator ends, is closed or fails. A finished context has nothing after it. A
    ``StopIteration`` of a hook, the network or the data is the cause of a RuntimeError here, because Python lets none
    leave a generator; `train` raises it as it is.

    >>> from functional_loop.examples.digits import loop
    >>> import functional_loop as fl
    >>> [ctx.stage for ctx in fl.iterate(fl.init(loop(epochs=0)))]
    ['begin', 'end']
    """
    check_place(ctx, "iterate")
    ctx = going_on(ctx)
    _check_validation(ctx, "iterate")
    return _contexts(ctx)


def train(ctx: Context, steps: int | None = None) -> Context:
    """Train to the end, or for at most ``steps`` more batches; ``ctx`` stays valid and unchanged.

    Args:
        ctx: any boundary context, also in mid-epoch or in mid-validation.
        steps: a number of batches, after the last of which its ``batch_end`` context is returned, also at the end of an
            epoch; the next call runs what follows.

    A finished context is returned as it is. If its loop was given more epochs since, it goes on from the end of its
    last epoch.

    Errors of a hook, of the network or of the data keep their type and say where they come from; `context_of` gives
    the last boundary before them (of an ensemble whose members train in turn, one at most 20 batches earlier).

    Raises:
        ValueError: ``steps`` is negative, ``ctx`` was taken inside a stage, or the loop has ``measures_valid`` and no
            ``valid``.
        StateDictError: the loop has fewer epochs than were begun; it has more than a finished context, and what
            callbacks did in ``end`` can't be undone.

    >>> from functional_loop.examples.digits import loop
    >>> import functional_loop as fl
    >>> ctx = fl.train(fl.init(loop(), seed=0), steps=2)
    >>> ctx.stage, ctx.global_step
    ('batch_end', 2)
    """
    check_place(ctx, "train")
    if steps is not None and (type(steps) is not int or steps < 0):
        raise ValueError(f"train: steps must be a non-negative integer or None, not {steps!r}")
    if steps == 0:
        return ctx
    ctx = going_on(ctx)
    if ctx.stage == "end":
        return ctx
    _check_validation(ctx, "train")
    goal = math.inf if steps is None else ctx.global_step + steps
    runner = Runner(program_of(ctx), stop=goal)
    # So that the program can free the tensors of a context that is not referenced elsewhere.
    del ctx
    program = runner.program
    with keeping_stop_iteration(), _entered(runner):
        while runner.advance() and not (program.live.global_step == goal and program.live.stage == "batch_end"):
            pass
    return program.context()


def program_of(ctx: Context) -> Program:
    """The program that trains ``ctx``."""
    return SoloProgram(ctx) if ctx.ensemble is None else EnsembleProgram(ctx)


def train_step(
    ctx: Context, batch: Batch | tuple[Any, Any], *, last: bool | None = None, donate: bool = False
) -> Context:
    """One batch, with the three batch stages: the context of its ``batch_end``.

    For those who bring their own batches. The batch takes the place of the epoch's next that is not skipped; ``exit``
    hooks do not run. A hook may go back to an earlier context, see `rollback`: look at ``ctx.epoch`` and ``ctx.step``.

    Args:
        ctx: a context after ``epoch_begin`` or ``batch_end``.
        batch: a `Batch` or a pair ``(x, y)``; the network gets a copy.
        last: whether it is the last of its epoch, which closes an open window of ``accumulate``. By default it is where
            the length of the training data says so; that of a loader is an estimate.
        donate: use ``ctx`` up: its tensors are let go of while they are copied, which saves their memory where nothing
            else has them. A later look at it is a `DonatedError`. What shares its tensors (an earlier context, the
            state of a callback, an array) stays as it is.

    Raises:
        ValueError: ``ctx`` is at another place in the loop, its epoch has no batch left, ``last`` contradicts the
            length of the training data, or is needed and not given.

    >>> from functional_loop.examples.digits import digits, loop
    >>> import functional_loop as fl
    >>> x, y = digits()
    >>> ctx = next(c for c in fl.iterate(fl.init(loop(), seed=0)) if c.stage == "epoch_begin")
    >>> fl.train_step(ctx, (x[:32], y[:32]))
    Context(epoch=1, step=1, global_step=1, stage='batch_end', seed=0)
    """
    check_place(ctx, "train_step")
    if ctx.ensemble is not None:
        raise ValueError("train_step takes the context of one run: train(ctx, steps=1) trains a stacked one")
    if ctx.stage not in ("epoch_begin", "batch_end"):
        raise ValueError(
            f"train_step needs a context after 'epoch_begin' or 'batch_end', not after {ctx.stage or 'init'!r}: "
            "walk there with iterate(ctx)"
        )
    _check_validation(ctx, "train_step")
    with keeping_stop_iteration():
        skipped = ctx.loop.skipped(ctx.callbacks)
    while not (done := is_done(ctx)) and ctx.global_step + 1 in skipped:
        ctx = passed_over(ctx, ctx.data)
    if done:
        raise ValueError(f"epoch {ctx.epoch} has {ctx.step} batches and all are done: walk on with iterate(ctx)")
    last = _is_last(ctx, last, skipped)
    program, item = SoloProgram(ctx).open(), Item(copied(as_batch(batch)), ctx.data, last)
    try:
        with keeping_stop_iteration(), autocast_off(ctx.loop.device.type):
            return program.use_up(item) if donate else program.train_batch(ctx, item, probe=True)
    except BaseException as error:
        attach_context(error, ctx)
        raise
    finally:
        program.close()


def _is_last(ctx: Context, last: bool | None, skipped: frozenset[int]) -> bool:
    """Whether the next batch, of ``train_step``, is the last of its epoch that is trained on."""
    source = ctx.loop.train
    if source.length is not None:
        left = range(ctx.global_step + 2, ctx.global_step + 1 + source.length - ctx.step)
        known = all(number in skipped for number in left)
        if last is not None and last is not known:
            raise ValueError(
                f"train_step: last={last!r}, but step {ctx.step + 1} is {'' if known else 'not '}the last of an epoch "
                f"of {source.length} batches"
            )
        return known
    if last is not None or ctx.loop.accumulate == 1:
        return bool(last)
    expected = source.expected_length
    if expected is not None and ctx.step >= expected:
        raise ValueError(
            f"train_step: by its len the training data has {expected} batches, and step {ctx.step + 1} comes after "
            "them; with accumulate, say of every batch whether it is the last of its epoch, by last="
        )
    return ctx.step + 1 == expected


def _check_validation(ctx: Context, function: str) -> None:
    """Refuse measures that would never be made, with a ValueError; `validate` makes them on a source of its own."""
    if ctx.loop.measures_valid and ctx.loop.valid is None:
        ids = ", ".join(repr(m.id) for m in ctx.loop.measures_valid)
        raise ValueError(
            f"{function}: the Loop has measures_valid ({ids}), and no validation data to make them on: give it "
            "valid=batches(...), or leave measures_valid out; measures_train are made on the training data"
        )


def _contexts(ctx: Context) -> Generator[Context]:
    if ctx.stage == "end":
        return
    runner = Runner(program_of(ctx))
    # The first context is the caller's to keep or to drop.
    del ctx
    with telling_of_stop_iteration(), _entered(runner):
        while runner.advance():
            yield runner.program.context()


@region
def _entered(runner: Runner) -> Generator[None]:
    """A run: it ends with the ``exit`` hooks, and its errors carry the last boundary."""
    program = runner.program
    try:
        try:
            program.enter()
            yield
        finally:
            runner.close()
    except GeneratorExit as error:
        attach_context(error, program.context())
        program.leave(None)
        raise
    except BaseException as error:
        attach_context(error, program.context())
        program.leave(error)
        raise
    else:
        program.leave(None)
