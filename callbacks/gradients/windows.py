"""Accumulation windows, as callbacks see them."""

from __future__ import annotations

from ...core.context import Context


def updates(ctx: Context) -> bool:
    """Whether the batch at hand ends with an update of the parameters; for hooks of a training batch.

    With ``Loop(accumulate=k)`` that is every ``k``-th batch of an epoch and its last.
    """
    # After the gradients are made, the sums of a window are there exactly as long as it is open; they may be empty.
    return ctx.accumulated == ()
