"""A learning rate schedule that follows a validation score."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.optim import lr_scheduler

from ...core.callback import Callback
from ...core.context import Context
from ...engine.loop import Loop
from ..checks import check_choice, check_integer, check_number, check_numbers
from ..control.watched import check_measure, watched
from .schedule import Schedule, schedule_callback, to_plain


def lr_reduce_on_plateau(
    factor: float = 0.1,
    patience: int = 10,
    threshold: float = 1e-4,
    threshold_mode: str = "rel",
    cooldown: int = 0,
    min_lr: float | list[float] = 0.0,
    eps: float = 1e-8,
    measure: str | None = None,
    id: str = "lr_reduce_on_plateau",
) -> Callback:
    """Multiplies the learning rates by ``factor`` when a validation score has stopped improving.

    It steps in ``epoch_end`` of every epoch that evaluates, after the scores are made.

    Args:
        factor: what the rates are multiplied by, below 1.
        patience: evaluations without improvement that are put up with; the one after them reduces the rates.
        threshold: by how much a score must be better to count.
        threshold_mode: ``"rel"``, by that part of the best score, or ``"abs"``.
        cooldown: evaluations after a reduction in which nothing is counted.
        min_lr: rates below which there is no reduction; a number, or a list with one for every parameter group.
        eps: reductions smaller than this are left out.
        measure: id of the validation measure to watch; by default the first. Which direction is better, the measure
            says (``minimize``).
        id: the name of the slot, unique in a loop.

    Raises:
        TypeError, ValueError: an argument that can't work; in `init`: no validation data, no such measure, or one of
            which neither high nor low is better.
        StateDictError: when a run is continued that began with other arguments, or another measure.

    Resuming:
        The best score, how long it has been the best, and the rates are part of the context: patience goes on counting.

    Mirrors `torch.optim.lr_scheduler.ReduceLROnPlateau`, bit for bit.

    >>> import functional_loop as fl
    >>> from functional_loop.callbacks.schedules.lr_plateau import lr_reduce_on_plateau
    >>> from functional_loop.examples.digits import loop
    >>> reduce = lr_reduce_on_plateau(0.5, patience=0, threshold=10, threshold_mode="abs", measure="accuracy")
    >>> ctx = fl.train(fl.init(fl.evolve(loop(epochs=2, lr=0.5), callbacks=[reduce])))
    >>> ctx.optimizer_state["groups"][0]["lr"]
    0.25
    """
    check_number("lr_reduce_on_plateau", "factor", factor, least=0, most=1)
    if factor == 1:
        raise ValueError("lr_reduce_on_plateau: factor must be below 1, or nothing is reduced")
    check_integer("lr_reduce_on_plateau", "patience", patience, least=0)
    check_number("lr_reduce_on_plateau", "threshold", threshold, least=0)
    check_choice("lr_reduce_on_plateau", "threshold_mode", threshold_mode, ("rel", "abs"))
    check_integer("lr_reduce_on_plateau", "cooldown", cooldown, least=0)
    check_numbers("lr_reduce_on_plateau", "min_lr", min_lr, least=0)
    check_number("lr_reduce_on_plateau", "eps", eps, least=0)
    check_measure("lr_reduce_on_plateau", measure)
    arguments: dict[str, Any] = {
        "factor": factor,
        "patience": patience,
        "threshold": threshold,
        "threshold_mode": threshold_mode,
        "cooldown": cooldown,
        "min_lr": min_lr,
        "eps": eps,
    }

    def build(optimizer: torch.optim.Optimizer, loop: Loop) -> Any:
        mode: Literal["min", "max"] = "min" if watched("lr_reduce_on_plateau", loop, measure).minimize else "max"
        return lr_scheduler.ReduceLROnPlateau(optimizer, mode, **arguments)

    def settings(loop: Loop) -> dict[str, Any]:
        watching = watched("lr_reduce_on_plateau", loop, measure)
        return {"measure": watching.id, "minimize": watching.minimize, **to_plain(arguments)}

    def score(ctx: Context) -> float:
        return dict(ctx.last_scores_valid)[watched("lr_reduce_on_plateau", ctx.loop, measure).id]

    schedule = Schedule(build, {**arguments, "measure": measure}, settings)
    return schedule_callback("lr_reduce_on_plateau", id, schedule, score=score)
