"""Unfreezing: parameters that become trainable later than others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...core.callback import Callback
from ...core.context import Context
from ...core.patterns import Patterns, check_patterns, select
from ...core.record import did_you_mean, evolve
from ..checks import check_integer


def unfreeze(starting_weights: Patterns, unfreeze: Sequence[dict[str, Any]], id: str = "unfreeze") -> Callback:
    """Trains some parameters from the start and others from a later epoch or batch on.

    It changes ``ctx.trainable``: a parameter that is not in it has no gradient, and neither weight decay nor momentum
    touch it, as with ``requires_grad=False`` in torch. Names are matched as everywhere: shell globs of the dotted name
    or functions of it. Parameters that the optimizer does not cover can't be trained.

    Args:
        starting_weights: which parameters are trainable from the start, a pattern or a list of them; ``[]`` for none.
        unfreeze: rows ``{"epoch": n, "weights": patterns}``, trainable from epoch ``n`` on, or
            ``{"batch": n, "weights": patterns}``, from the ``n``-th batch of the run on, or the next that is not passed
            over; both count from 1.
        id: the name of the callback, unique in a loop.

    Raises:
        TypeError: something else than a pattern, or than rows.
        ValueError: a row with other keys or a count below 1; in `init`: a pattern that matches no parameter.

    Resuming:
        Which parameters are trainable is part of the context: what was unfrozen stays so.

    Mirrors R's ``CallbackSetUnfreeze`` (mlr3torch).

    >>> import functional_loop as fl
    >>> from functional_loop.callbacks.gradients.unfreeze import unfreeze
    >>> from functional_loop.examples.digits import loop
    >>> gradually = unfreeze("14.*", [{"epoch": 2, "weights": "8.*"}, {"batch": 30, "weights": ["*"]}])
    >>> contexts = fl.iterate(fl.init(fl.evolve(loop(epochs=2), callbacks=[gradually])))
    >>> [len(ctx.trainable) for ctx in contexts if ctx.stage in ("begin", "epoch_begin", "end")]
    [2, 2, 3, 11]
    """
    _check_listed(starting_weights, "starting_weights")
    if not isinstance(unfreeze, (list, tuple)):
        raise TypeError(f"unfreeze: unfreeze is a list of rows such as {_EXAMPLE}, not {unfreeze!r}")
    for row in unfreeze:
        _check_row(row)

    def check(ctx: Context) -> tuple[()]:
        chosen(ctx, starting_weights, "starting_weights")
        for row in unfreeze:
            chosen(ctx, row["weights"], "unfreeze")
        return ()

    def freeze(ctx: Context) -> Context:
        return evolve(ctx, trainable=tuple(chosen(ctx, starting_weights, "starting_weights")))

    def thaw(unit: str, counts: range, ctx: Context) -> Context:
        names = {n for row in unfreeze if row.get(unit) in counts for n in chosen(ctx, row["weights"], "unfreeze")}
        if names.issubset(ctx.trainable):
            return ctx
        return evolve(ctx, trainable=tuple(name for name in ctx.params if name in names or name in ctx.trainable))

    return Callback(
        id,
        init=check,
        kind="unfreeze",
        settings={"starting_weights": starting_weights, "unfreeze": unfreeze},
        begin=freeze,
        epoch_begin=lambda ctx: thaw("epoch", range(ctx.epoch, ctx.epoch + 1), ctx),
        batch_begin=lambda ctx: thaw("batch", _reached(ctx), ctx),
    )


def _reached(ctx: Context) -> range:
    """The number of the batch at hand, and those just before it that were passed over, at which no hook ran."""
    first, skipped = ctx.global_step, ctx.loop.skipped(ctx.callbacks)
    while first - 1 in skipped:
        first -= 1
    return range(first, ctx.global_step + 1)


_KEYS = ("epoch", "batch", "weights")
_EXAMPLE = '{"epoch": 2, "weights": ["head.*"]}'


def chosen(ctx: Context, patterns: Patterns, argument: str) -> list[str]:
    """The parameters that match, among those that the optimizer covers."""
    return select(patterns, ctx.loop.optimizer.covers(ctx.params), f"pattern of {argument}")


def _check_listed(patterns: object, what: str) -> None:
    if patterns != []:
        check_patterns(patterns, what)


def _check_row(row: object) -> None:
    if not isinstance(row, dict):
        raise TypeError(f"unfreeze: a row is a dict such as {_EXAMPLE}, not {row!r}")
    for key in row:
        if key not in _KEYS:
            raise ValueError(f"unfreeze: a row has no key {key!r}{did_you_mean(str(key), _KEYS)}")
    units = row.keys() & {"epoch", "batch"}
    if len(units) != 1 or "weights" not in row:
        raise ValueError(f'unfreeze: a row has "weights" and one of "epoch" and "batch", not {row!r}')
    unit = units.pop()
    check_integer("unfreeze", f'"{unit}" of a row', row[unit], least=1)
    check_patterns(row["weights"], '"weights" of a row')
