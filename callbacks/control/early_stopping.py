"""Early stopping: training ends when a validation score stops improving."""

from __future__ import annotations

from typing import Any

from ...checkpoint.comparing import compare
from ...core.callback import Callback
from ...core.context import Context
from ...core.errors import StateDictError
from ...core.record import evolve
from ..checks import check_flag, check_integer, check_number
from .watched import check_measure, watched


def early_stopping(
    patience: int,
    min_delta: float = 0.0,
    restore_best_weights: bool = True,
    measure: str | None = None,
    id: str = "early_stopping",
) -> Callback:
    """Ends training when a validation score has not improved for ``patience`` evaluations.

    It decides in ``valid_end`` by setting ``terminate``; an epoch that does not evaluate counts for nothing, a score
    that is NaN is no improvement. With ``restore_best_weights`` the parameters and buffers of the best evaluation come
    back in ``end``, however the run ends, after the other callbacks of that stage (weight 1000). State:
    ``{"measure", "best_score", "best_epoch", "stagnation", "params", "buffers"}``, and ``"stopped"`` where it ended the
    run.

    Args:
        patience: evaluations without improvement after which training ends, at least 1.
        min_delta: an improvement is a change for the better by more than this.
        restore_best_weights: whether the run ends with the parameters and buffers of its best evaluation.
        measure: id of the validation measure to watch; by default the first. Which direction is better, the measure
            says (``minimize``).
        id: the name of the slot, unique in a loop.

    Raises:
        ValueError: an argument that can't work; in `init`: no validation data, no such measure, or one of which neither
            high nor low is better.
        StateDictError: when a run is continued that watched another measure, or kept no weights to restore. Where that
            is allowed (``"callbacks/early_stopping"``), it starts afresh.

    Resuming:
        Best score, best weights and stagnation are part of the context: a resumed run stops where an uninterrupted one
        does, with the same weights. A run that it ended goes on with more ``patience``, from its last ``epoch_end``,
        as it would have with that from the beginning; else it trains no further epoch, whatever ``epochs`` is.

    Mirrors R's ``CallbackSetEarlyStopping`` (mlr3torch); Prechelt, "Early Stopping - But When?", 1998.

    >>> import functional_loop as fl
    >>> from functional_loop.callbacks.control.early_stopping import early_stopping
    >>> from functional_loop.examples.digits import loop
    >>> stop = early_stopping(patience=1, min_delta=0.5, measure="accuracy")
    >>> ctx = fl.train(fl.init(fl.evolve(loop(epochs=9), callbacks=[stop])))
    >>> ctx.epoch, ctx.callbacks["early_stopping"]["best_epoch"]
    (2, 1)
    """
    check_integer("early_stopping", "patience", patience, least=1)
    check_number("early_stopping", "min_delta", min_delta, least=0)
    check_flag("early_stopping", "restore_best_weights", restore_best_weights)
    check_measure("early_stopping", measure)

    def start(ctx: Context) -> dict[str, Any]:
        return {
            "measure": watched("early_stopping", ctx.loop, measure).id,
            "best_score": None,
            "best_epoch": None,
            "stagnation": 0,
            "params": (),
            "buffers": (),
        }

    def improves(ctx: Context, score: float, best: float | None) -> bool:
        if best is None:
            return score == score
        minimize = watched("early_stopping", ctx.loop, measure).minimize
        return (best - score if minimize else score - best) > min_delta

    def decide(ctx: Context) -> Context:
        slot = ctx.callbacks[id]
        score = dict(ctx.last_scores_valid)[slot["measure"]]
        if improves(ctx, score, slot["best_score"]):
            weights = {"params": ctx.params, "buffers": ctx.buffers} if restore_best_weights else {}
            if restore_best_weights and ctx.loop.optimizer.has_modes:
                # What the network is evaluated with depends on it.
                weights |= {"optimizer_state": ctx.optimizer_state}
            best = {"best_score": score, "best_epoch": ctx.epoch, "stagnation": 0, **weights}
            return ctx.with_callback_state(id, {**slot, **best})
        stagnation = slot["stagnation"] + 1
        stops = stagnation >= patience and not ctx.terminate
        slot = {**slot, "stagnation": stagnation, **({"stopped": True} if stops else {})}
        ctx = ctx.with_callback_state(id, slot)
        return evolve(ctx, terminate=True) if stops else ctx

    def restore(ctx: Context) -> Context:
        slot = ctx.callbacks[id]
        if slot["best_epoch"] is None:
            return ctx
        names = ("params", "buffers", "optimizer_state")
        return evolve(ctx, **{name: slot[name] for name in names if name in slot})

    def fits(ctx: Context) -> tuple[StateDictError | None, Context]:
        slot, fresh = ctx.callbacks[id], start(ctx)
        if found := [*compare(slot["measure"], fresh["measure"], "measure")]:
            message = f"callback {id!r} can't continue with the best score of another measure:"
        elif restore_best_weights and slot["best_epoch"] is not None and slot["params"] == ():
            found = [*compare(False, True, "restore_best_weights")]
            message = f"callback {id!r} has no best weights to restore:"
        else:
            return None, ctx
        return StateDictError(message, found), ctx.with_callback_state(id, fresh)

    def reopens(slot: dict[str, Any]) -> dict[str, Any] | None:
        if not slot.get("stopped"):
            return slot
        return None if slot["stagnation"] >= patience else {k: v for k, v in slot.items() if k != "stopped"}

    return Callback(
        id,
        init=start,
        weight=1000,
        kind="early_stopping",
        settings={"min_delta": min_delta, "restore_best_weights": restore_best_weights, "measure": measure},
        fits=fits,
        reopens=reopens,
        valid_end=decide,
        end=restore if restore_best_weights else None,
    )
