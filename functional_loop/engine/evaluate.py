"""Scores and predictions of a trained, or half-trained, context."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import Any

from torch import Tensor

from ..core import measures
from ..core.context import Context, check_context, first_output
from ..core.errors import keeping_stop_iteration, noting
from ..core.outputs import leaves
from ..core.record import evolve
from ..data.reader import VALIDATION, Item, Reader, check_validated
from ..data.sources import Batch, BatchSource, batches, to_device
from ..ensembles.evaluation import member_outputs, member_scores
from .solo import SoloProgram


@keeping_stop_iteration()
def validate(ctx: Context, source: BatchSource | None = None) -> dict[str, float]:
    """Scores of ``measures_valid`` by id, on ``source`` or on the loop's own validation data; no hooks run.

    Of a stacked context every score is a float64 tensor of shape ``(members,)`` where members differ.

    Raises:
        ValueError: there is neither a source nor validation data, it has no batch, or the loop has no
            ``measures_valid``.

    >>> from functional_loop.examples.digits import loop
    >>> import functional_loop as fl
    >>> sorted(fl.validate(fl.init(loop())))
    ['accuracy', 'cross_entropy']
    """
    check_context(ctx, "validate")
    source = source if source is not None else ctx.loop.valid
    if source is None:
        raise ValueError("validate: the loop has no validation data; give a source: validate(ctx, batches(x, y))")
    if not ctx.loop.measures_valid:
        raise ValueError("validate: the loop has no measures_valid, so there is nothing to score")
    if ctx.ensemble is not None:
        return member_scores(ctx, source)
    chosen = ctx.loop.measures_valid
    running = measures.start(chosen)
    for y_hats, loss, batch in _outputs(ctx, source, measures.need_loss(chosen)):
        running = measures.accumulate(chosen, running, y_hats, batch.y, batch.x, loss)
    return measures.scores(chosen, running)


@keeping_stop_iteration()
def predict(ctx: Context, x: Any, *, batch_size: int | None = None) -> Any:
    """Outputs of the network in evaluation mode, in the order of the rows.

    Args:
        ctx: any context.
        x: a tensor, tuple or dict of tensors with the rows along the first axis, or a source that does not shuffle.
        batch_size: rows at a time; all at once by default. A source has its own.

    Returns:
        What the network returns (a tensor, or all of its outputs), for all rows. Of a stacked context with an axis of
        members before that of rows.

    Raises:
        ValueError: a source that shuffles, no rows, a batch size below 1, or an output without an axis of rows.

    >>> from functional_loop.examples.digits import loop
    >>> import torch, functional_loop as fl
    >>> fl.predict(fl.init(loop()), torch.zeros(3, 1, 8, 8)).shape
    torch.Size([3, 10])
    """
    check_context(ctx, "predict")
    if isinstance(x, BatchSource):
        source = x
        if (
            order := next((key for key in ("shuffle", "weighted", "bootstrap") if x.fingerprint().get(key)), None)
        ) is not None:
            raise ValueError(f"predict: the rows of this source come in a random order ({order}); make one without it")
    else:
        rows = _rows(x)
        source = batches(x, batch_size=max(rows, 1) if batch_size is None else batch_size)
    outputs, rows_axis = (_outputs, 0) if ctx.ensemble is None else (member_outputs, 1)
    return _joined([y_hats for y_hats, _, _ in outputs(ctx, source)], rows_axis)


def _joined(outputs: list[Any], axis: int) -> Any:
    for path, leaf in leaves(outputs[0]) if outputs else ():
        if leaf is not None and not (isinstance(leaf, Tensor) and leaf.dim() > axis):
            form = f"of shape {list(leaf.shape[axis:])}" if isinstance(leaf, Tensor) else f"a {type(leaf).__name__}"
            raise ValueError(
                f"predict: {f'output {path}' if path else 'the output'} of the network has no axis of rows: it is "
                f"{form}. Give the Loop a network that returns what is to be predicted"
            )
    return measures.join(outputs, axis)


def _rows(x: Any) -> int:
    first = first_output(x)
    if isinstance(x, list) or not hasattr(first, "shape") or not first.shape:
        raise TypeError(
            f"predict takes a tensor, tuple or dict of tensors with rows, or batches(...), not {type(x).__name__}"
        )
    return int(first.shape[0])


def _outputs(ctx: Context, source: BatchSource, with_loss: bool = False) -> Generator[tuple[Any, Any, Batch]]:
    program, at = SoloProgram(ctx).open(), evolve(ctx, step_valid=0)
    try:
        with closing(Reader(source, VALIDATION, ctx.seed, max(ctx.epoch, 1), 0, ())) as reader:
            while (item := _next(reader, at.step_valid + 1)) is not None:
                batch, at = to_device(item.batch, ctx.loop.device), evolve(at, step_valid=at.step_valid + 1)
                yield *program.evaluated(at, batch, with_loss), batch
        check_validated(at)
    finally:
        program.close()


def _next(reader: Reader, number: int) -> Item | None:
    with noting(lambda: f"while reading batch {number} of the data"):
        return reader.take()
