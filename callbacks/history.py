"""A history: the scores of every epoch."""

from __future__ import annotations

from functional_loop import Callback, Context


def history(id: str = "history") -> Callback:
    """Keeps the scores of every epoch that has any, as a list of rows in ``ctx.callbacks[id]``.

    A row is ``{"epoch": int, "train.<measure id>": float, "valid.<measure id>": float}``; the list is what
    ``pandas.DataFrame(ctx.callbacks["history"])`` takes. Epochs that `Loop.eval_freq` leaves out have no row.

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
        if not ctx.loop.evaluates(ctx.epoch):
            return ctx
        row: dict[str, int | float] = {"epoch": ctx.epoch}
        for part, scores in (("train", ctx.last_scores_train), ("valid", ctx.last_scores_valid)):
            row |= {f"{part}.{name}": score for name, score in dict(scores).items()}
        return ctx.with_callback_state(id, [*ctx.callbacks[id], row])

    return Callback(id, init=lambda ctx: [], epoch_end=append)
