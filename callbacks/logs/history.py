"""A history: the scores of every epoch."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from ...core.callback import Callback
from ...core.context import Context
from ...core.record import did_you_mean
from ..registry.packages import require

_AFTER_SCORES = 1000.0


def history(id: str = "history") -> Callback:
    """Keeps the scores of every epoch that has any, as a list of rows in ``ctx.callbacks[id]``.

    A row is ``{"epoch": int, "train.<measure id>": float, "valid.<measure id>": float}``; `to_frame`
    makes a data frame of them. Epochs that `Loop.eval_freq` leaves out have no row. Scores that hooks add are there
    too: it runs after them (weight 1000).

    Args:
        id: the name of the slot, unique in a loop.

    Resuming:
        The rows are part of the context: a resumed run has those from before, and every epoch once.

    >>> import functional_loop as fl
    >>> from functional_loop.callbacks import history
    >>> from functional_loop.examples.digits import loop
    >>> ctx = fl.train(fl.init(fl.evolve(loop(epochs=2), callbacks=[history()])))
    >>> [row["epoch"] for row in ctx.callbacks["history"]]
    [1, 2]
    >>> sorted(ctx.callbacks["history"][0])
    ['epoch', 'train.accuracy', 'train.cross_entropy', 'valid.accuracy', 'valid.cross_entropy']
    """

    def append(ctx: Context) -> Context:
        scores = named_scores(ctx)
        if not (scores or ctx.loop.evaluates(ctx.epoch)):
            return ctx
        return ctx.with_callback_state(id, [*ctx.callbacks[id], {"epoch": ctx.epoch, **scores}])

    return Callback(id, init=lambda ctx: [], weight=_AFTER_SCORES, settings={}, epoch_end=append)


def named_scores(ctx: Context) -> dict[str, float]:
    """The scores of the epoch by the names that they have in a history, those that hooks have added among them."""
    parts = (("train", ctx.last_scores_train), ("valid", ctx.last_scores_valid))
    return {f"{part}.{id}": score for part, found in parts for id, score in dict(found).items()}


def to_frame(history: Context | Sequence[dict[str, Any]], id: str = "history") -> Any:
    """The rows of a history as a ``pandas.DataFrame``.

    Args:
        history: a context, or a list of rows.
        id: the id of the callback that keeps the rows, for a context.

    Raises:
        ImportError: pandas is not installed.
        KeyError: the loop has no callback of that id.

    >>> rows = [{"epoch": 1, "valid.error": 0.5}, {"epoch": 2, "valid.error": 0.25}]
    >>> to_frame(rows)
       epoch  valid.error
    0      1         0.50
    1      2         0.25
    """
    require("pandas", "to_frame")
    if isinstance(history, Context):
        if id not in history.callbacks:
            raise KeyError(f"no callback {id!r} in this loop{did_you_mean(id, history.callbacks)}")
        history = history.callbacks[id]
    return importlib.import_module("pandas").DataFrame(history, columns=None if history else ["epoch"])
