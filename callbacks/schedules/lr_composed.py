"""Learning rate schedules made of others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import lr_scheduler

from ...core.callback import Callback
from ...engine.loop import AsCallback, Loop
from .lr_schedulers import check_milestones
from .schedule import Schedule, schedule_callback


def lr_sequential(
    schedules: Sequence[AsCallback], milestones: Sequence[int], step_on: str = "epoch", id: str = "lr_sequential"
) -> Callback:
    """One schedule after the other: the next one takes over at every step in ``milestones``.

    Args:
        schedules: what the functions ``lr_...`` return, or descriptors of it; their own ``step_on`` and ``id`` don't
            matter.
        milestones: steps, ascending, one less than there are schedules.
        step_on: ``"epoch"`` steps at the end of every epoch, ``"batch"`` after every update of the parameters.
        id: the name of the slot, unique in a loop.

    Raises:
        TypeError: something that is not a schedule, or one that steps on scores.
        ValueError: no schedules, or another number of milestones.
        StateDictError: when a run is continued that began with other schedules or arguments.

    Resuming:
        The places of all schedules, and the rates, are part of the context: they go on at the step that they had
        reached.

    Mirrors `torch.optim.lr_scheduler.SequentialLR`, bit for bit.

    >>> from functional_loop.callbacks.schedules.lr_schedulers import lr_cosine_annealing, lr_linear
    >>> warm_up, decay = lr_linear(0.01, total_iters=100), lr_cosine_annealing(T_max=900)
    >>> lr_sequential([warm_up, decay], milestones=[100], step_on="batch")
    Callback('lr_sequential', begin, batch_end)
    """
    parts = _parts("lr_sequential", schedules)
    check_milestones("lr_sequential", milestones)
    if len(milestones) != (expected := len(parts) - 1):
        raise ValueError(f"lr_sequential: {len(parts)} schedules have {expected} milestones, not {len(milestones)}")

    def build(optimizer: torch.optim.Optimizer, loop: Loop) -> Any:
        return lr_scheduler.SequentialLR(
            optimizer, [part.source.build(optimizer, loop) for part in parts], list(milestones)
        )

    def settings(loop: Loop) -> dict[str, Any]:
        return {"schedules": _settings(parts, loop), "milestones": list(milestones)}

    arguments = {"schedules": _arguments(parts), "milestones": list(milestones)}
    return schedule_callback("lr_sequential", id, Schedule(build, arguments, settings), step_on)


def lr_chained(schedules: Sequence[AsCallback], step_on: str = "epoch", id: str = "lr_chained") -> Callback:
    """Several schedules at once: at every step each one changes the rates that the one before it left.

    Args:
        schedules: what the functions ``lr_...`` return, or descriptors of it; their own ``step_on`` and ``id`` don't
            matter.
        step_on: ``"epoch"`` steps at the end of every epoch, ``"batch"`` after every update of the parameters.
        id: the name of the slot, unique in a loop.

    Raises:
        TypeError: something that is not a schedule, or one that steps on scores.
        ValueError: no schedules.
        StateDictError: when a run is continued that began with other schedules or arguments.

    Resuming:
        The places of all schedules, and the rates, are part of the context: they go on at the step that they had
        reached.

    Mirrors `torch.optim.lr_scheduler.ChainedScheduler`, bit for bit.

    >>> from functional_loop.callbacks.schedules.lr_schedulers import lr_constant, lr_exponential
    >>> lr_chained([lr_constant(0.1, total_iters=2), lr_exponential(0.9)])
    Callback('lr_chained', begin, epoch_end)
    """
    parts = _parts("lr_chained", schedules)

    def build(optimizer: torch.optim.Optimizer, loop: Loop) -> Any:
        return lr_scheduler.ChainedScheduler([part.source.build(optimizer, loop) for part in parts], optimizer)

    def settings(loop: Loop) -> dict[str, Any]:
        return {"schedules": _settings(parts, loop)}

    arguments = {"schedules": _arguments(parts)}
    return schedule_callback("lr_chained", id, Schedule(build, arguments, settings), step_on)


def _parts(owner: str, schedules: Any) -> list[Callback]:
    if not isinstance(schedules, (list, tuple)):
        raise TypeError(
            f"{owner}: schedules is a list of what functions such as lr_step(...) return, not {schedules!r}"
        )
    if not schedules:
        raise ValueError(f"{owner}: there are no schedules")
    return [_part(owner, schedule) for schedule in schedules]


def _part(owner: str, schedule: Any) -> Callback:
    made = schedule.as_callback() if hasattr(schedule, "as_callback") and not isinstance(schedule, type) else schedule
    if not isinstance(made, Callback) or not isinstance(made.source, Schedule):
        raise TypeError(f"{owner}: {schedule!r} is not a schedule such as lr_step(...) returns")
    if made.kind == "lr_reduce_on_plateau":
        raise TypeError(f"{owner}: lr_reduce_on_plateau steps on a score, so it can't be a part of another schedule")
    return made


def _arguments(parts: Sequence[Callback]) -> list[dict[str, Any]]:
    return [{"class": part.kind, **part.source.arguments} for part in parts]


def _settings(parts: Sequence[Callback], loop: Loop) -> list[dict[str, Any]]:
    return [{"kind": part.kind, **part.source.settings(loop)} for part in parts]
