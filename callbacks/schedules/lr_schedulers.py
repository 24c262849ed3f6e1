"""Learning rate schedules of `torch.optim.lr_scheduler` that are functions of the step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import lr_scheduler

from ...core.callback import Callback
from ..checks import check_integer, check_number
from .schedule import schedule_callback, schedule_of


def lr_step(step_size: int, gamma: float = 0.1, step_on: str = "epoch", id: str = "lr_step") -> Callback:
    """Multiplies the learning rates by ``gamma`` every ``step_size`` steps.

    Args:
        step_size: steps between two changes.
        gamma: what the rates are multiplied by.
        step_on: ``"epoch"`` steps at the end of every epoch, ``"batch"`` after every update of the parameters.
        id: the name of the slot, unique in a loop.

    Raises:
        ValueError: an argument that can't work.
        StateDictError: when a run is continued that began with other arguments.

    Resuming:
        Its place, and the rates, are part of the context: it goes on at the step that it had reached.

    Mirrors `torch.optim.lr_scheduler.StepLR`, bit for bit.

    >>> import functional_loop as fl
    >>> from functional_loop.callbacks.schedules.lr_schedulers import lr_step
    >>> from functional_loop.examples.digits import loop
    >>> ctx = fl.train(fl.init(fl.evolve(loop(epochs=2, lr=0.5), callbacks=[lr_step(1, gamma=0.5)])))
    >>> ctx.optimizer_state["groups"][0]["lr"]
    0.125
    """
    check_integer("lr_step", "step_size", step_size, least=1)
    check_number("lr_step", "gamma", gamma, least=0)
    schedule = schedule_of(lr_scheduler.StepLR, step_size=step_size, gamma=gamma)
    return schedule_callback("lr_step", id, schedule, step_on)


def lr_multi_step(
    milestones: Sequence[int], gamma: float = 0.1, step_on: str = "epoch", id: str = "lr_multi_step"
) -> Callback:
    """Multiplies the learning rates by ``gamma`` at every step in ``milestones``.

    Args:
        milestones: steps, ascending.
        gamma: what the rates are multiplied by.
        step_on: ``"epoch"`` steps at the end of every epoch, ``"batch"`` after every update of the parameters.
        id: the name of the slot, unique in a loop.

    Raises:
        TypeError, ValueError: an argument that can't work.
        StateDictError: when a run is continued that began with other arguments.

    Resuming:
        Its place, and the rates, are part of the context: it goes on at the step that it had reached.

    Mirrors `torch.optim.lr_scheduler.MultiStepLR`, bit for bit.

    >>> lr_multi_step([30, 80])
    Callback('lr_multi_step', begin, epoch_end)
    """
    check_milestones("lr_multi_step", milestones)
    check_number("lr_multi_step", "gamma", gamma, least=0)
    arguments = {"milestones": list(milestones), "gamma": gamma}
    schedule = schedule_of(lr_scheduler.MultiStepLR, **arguments)
    return schedule_callback("lr_multi_step", id, schedule, step_on)


def lr_constant(
    factor: float = 1 / 3, total_iters: int = 5, step_on: str = "epoch", id: str = "lr_constant"
) -> Callback:
    """Multiplies the learning rates by ``factor`` for the first ``total_iters`` steps.

    Args:
        factor: what the rates are multiplied by, from 0 to 1.
        total_iters: the step from which on the rates are the full ones.
        step_on: ``"epoch"`` steps at the end of every epoch, ``"batch"`` after every update of the parameters.
        id: the name of the slot, unique in a loop.

    Raises:
        ValueError: an argument that can't work.
        StateDictError: when a run is continued that began with other arguments.

    Resuming:
        Its place, and the rates, are part of the context: it goes on at the step that it had reached.

    Mirrors `torch.optim.lr_scheduler.ConstantLR`, bit for bit.

    >>> lr_constant(0.1, total_iters=100, step_on="batch")
    Callback('lr_constant', begin, batch_end)
    """
    check_number("lr_constant", "factor", factor, least=0, most=1)
    check_integer("lr_constant", "total_iters", total_iters, least=0)
    schedule = schedule_of(lr_scheduler.ConstantLR, factor=factor, total_iters=total_iters)
    return schedule_callback("lr_constant", id, schedule, step_on)


def lr_linear(
    start_factor: float = 1 / 3,
    end_factor: float = 1.0,
    total_iters: int = 5,
    step_on: str = "epoch",
    id: str = "lr_linear",
) -> Callback:
    """Multiplies the learning rates by a factor that goes in a line from ``start_factor`` to ``end_factor``: a warm-up.

    Args:
        start_factor: the factor at the start, above 0 and up to 1.
        end_factor: the factor from step ``total_iters`` on, from 0 to 1.
        total_iters: how many steps the line takes.
        step_on: ``"epoch"`` steps at the end of every epoch, ``"batch"`` after every update of the parameters.
        id: the name of the slot, unique in a loop.

    Raises:
        ValueError: an argument that can't work.
        StateDictError: when a run is continued that began with other arguments.

    Resuming:
        Its place, and the rates, are part of the context: it goes on at the step that it had reached.

    Mirrors `torch.optim.lr_scheduler.LinearLR`, bit for bit.

    >>> lr_linear(0.01, total_iters=500, step_on="batch")
    Callback('lr_linear', begin, batch_end)
    """
    check_number("lr_linear", "start_factor", start_factor, least=0, most=1)
    if start_factor == 0:
        raise ValueError("lr_linear: start_factor must be above 0, since every rate is made from the one before")
    check_number("lr_linear", "end_factor", end_factor, least=0, most=1)
    check_integer("lr_linear", "total_iters", total_iters, least=1)
    arguments = {"start_factor": start_factor, "end_factor": end_factor, "total_iters": total_iters}
    schedule = schedule_of(lr_scheduler.LinearLR, **arguments)
    return schedule_callback("lr_linear", id, schedule, step_on)


def lr_exponential(gamma: float, step_on: str = "epoch", id: str = "lr_exponential") -> Callback:
    """Multiplies the learning rates by ``gamma`` at every step.

    Args:
        gamma: what the rates are multiplied by.
        step_on: ``"epoch"`` steps at the end of every epoch, ``"batch"`` after every update of the parameters.
        id: the name of the slot, unique in a loop.

    Raises:
        ValueError: an argument that can't work.
        StateDictError: when a run is continued that began with other arguments.

    Resuming:
        Its place, and the rates, are part of the context: it goes on at the step that it had reached.

    Mirrors `torch.optim.lr_scheduler.ExponentialLR`, bit for bit.

    >>> lr_exponential(0.95)
    Callback('lr_exponential', begin, epoch_end)
    """
    check_number("lr_exponential", "gamma", gamma, least=0)
    schedule = schedule_of(lr_scheduler.ExponentialLR, gamma=gamma)
    return schedule_callback("lr_exponential", id, schedule, step_on)


def lr_polynomial(
    total_iters: int = 5, power: float = 1.0, step_on: str = "epoch", id: str = "lr_polynomial"
) -> Callback:
    """Lets the learning rates fall to 0 in ``total_iters`` steps, along a power of what is left.

    Args:
        total_iters: the step from which on the rates are 0.
        power: the power; 1 is a line.
        step_on: ``"epoch"`` steps at the end of every epoch, ``"batch"`` after every update of the parameters.
        id: the name of the slot, unique in a loop.

    Raises:
        ValueError: an argument that can't work.
        StateDictError: when a run is continued that began with other arguments.

    Resuming:
        Its place, and the rates, are part of the context: it goes on at the step that it had reached.

    Mirrors `torch.optim.lr_scheduler.PolynomialLR`, bit for bit.

    >>> lr_polynomial(total_iters=90, power=2.0)
    Callback('lr_polynomial', begin, epoch_end)
    """
    check_integer("lr_polynomial", "total_iters", total_iters, least=1)
    check_number("lr_polynomial", "power", power, least=0)
    schedule = schedule_of(lr_scheduler.PolynomialLR, total_iters=total_iters, power=power)
    return schedule_callback("lr_polynomial", id, schedule, step_on)


def lr_cosine_annealing(
    T_max: int,  # noqa: N803  (torch's name)
    eta_min: float = 0.0,
    step_on: str = "epoch",
    id: str = "lr_cosine_annealing",
) -> Callback:
    """Lets the learning rates fall to ``eta_min`` in ``T_max`` steps, along half a period of the cosine.

    Args:
        T_max: steps to the lowest rate; after it the rates rise again.
        eta_min: the lowest rate.
        step_on: ``"epoch"`` steps at the end of every epoch, ``"batch"`` after every update of the parameters.
        id: the name of the slot, unique in a loop.

    Raises:
        ValueError: an argument that can't work.
        StateDictError: when a run is continued that began with other arguments, such as another ``T_max``.

    Resuming:
        Its place, and the rates, are part of the context: it goes on at the step that it had reached.

    Mirrors `torch.optim.lr_scheduler.CosineAnnealingLR`, bit for bit; Loshchilov and Hutter, "SGDR: Stochastic Gradient
    Descent with Warm Restarts", 2017, without the restarts.

    >>> lr_cosine_annealing(T_max=30)
    Callback('lr_cosine_annealing', begin, epoch_end)
    """
    check_integer("lr_cosine_annealing", "T_max", T_max, least=1)
    check_number("lr_cosine_annealing", "eta_min", eta_min, least=0)
    arguments = {"T_max": T_max, "eta_min": eta_min}
    schedule = schedule_of(lr_scheduler.CosineAnnealingLR, **arguments)
    return schedule_callback("lr_cosine_annealing", id, schedule, step_on)


def lr_warm_restarts(
    T_0: int,  # noqa: N803  (torch's name)
    T_mult: int = 1,  # noqa: N803
    eta_min: float = 0.0,
    step_on: str = "epoch",
    id: str = "lr_warm_restarts",
) -> Callback:
    """Cosine annealing that starts over after ``T_0`` steps, then after ``T_0 * T_mult``, and so on.

    Args:
        T_0: steps to the first restart.
        T_mult: by how much every period is longer than the one before.
        eta_min: the lowest rate.
        step_on: ``"epoch"`` steps at the end of every epoch, ``"batch"`` after every update of the parameters.
        id: the name of the slot, unique in a loop.

    Raises:
        ValueError: an argument that can't work.
        StateDictError: when a run is continued that began with other arguments.

    Resuming:
        Its place, and the rates, are part of the context: it goes on at the step that it had reached.

    Mirrors `torch.optim.lr_scheduler.CosineAnnealingWarmRestarts`, bit for bit; Loshchilov and Hutter, "SGDR:
    Stochastic Gradient Descent with Warm Restarts", 2017.

    >>> lr_warm_restarts(T_0=10, T_mult=2)
    Callback('lr_warm_restarts', begin, epoch_end)
    """
    check_integer("lr_warm_restarts", "T_0", T_0, least=1)
    check_integer("lr_warm_restarts", "T_mult", T_mult, least=1)
    check_number("lr_warm_restarts", "eta_min", eta_min, least=0)
    arguments = {"T_0": T_0, "T_mult": T_mult, "eta_min": eta_min}
    schedule = schedule_of(lr_scheduler.CosineAnnealingWarmRestarts, **arguments)
    return schedule_callback("lr_warm_restarts", id, schedule, step_on)


def check_milestones(owner: str, milestones: Any) -> None:
    """Refuse anything but a list of steps in ascending order.

    Raises:
        TypeError, ValueError: as said.
    """
    if not isinstance(milestones, (list, tuple)):
        raise TypeError(f"{owner}: milestones is a list of steps, not {milestones!r}")
    for milestone in milestones:
        check_integer(owner, "a milestone", milestone, least=1)
    if list(milestones) != sorted(milestones):
        raise ValueError(f"{owner}: milestones must ascend, and are {list(milestones)}")
