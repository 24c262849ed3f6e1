"""Learning rate schedules that cycle the momentum too."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import lr_scheduler

from ...core.callback import Callback
from ...core.context import Context
from ...engine.loop import Loop
from ..checks import check_choice, check_flag, check_integer, check_number, check_numbers
from .schedule import Schedule, schedule_callback, schedule_of, stateless, to_plain


def lr_cyclic(
    base_lr: float | list[float],
    max_lr: float | list[float],
    step_size_up: int = 2000,
    step_size_down: int | None = None,
    mode: str = "triangular",
    gamma: float = 1.0,
    scale_fn: Callable[[float], float] | None = None,
    scale_mode: str = "cycle",
    cycle_momentum: bool = True,
    base_momentum: float | list[float] = 0.8,
    max_momentum: float | list[float] = 0.9,
    step_on: str = "batch",
    id: str = "lr_cyclic",
) -> Callback:
    """Lets the learning rates go up and down between two bounds, and the momentum (or first beta) down and up.

    Args:
        base_lr, max_lr: the bounds; numbers, or lists with one for every parameter group.
        step_size_up, step_size_down: steps of the two halves of a cycle; the second is by default as long as the first.
        mode: ``"triangular"``, ``"triangular2"`` (half as high with every cycle) or ``"exp_range"`` (``gamma**step`` as
            high).
        gamma: see ``mode``.
        scale_fn: instead of ``mode``, how high a cycle is: a pure function of what ``scale_mode`` says.
        scale_mode: ``"cycle"`` or ``"iterations"``, what ``scale_fn`` is a function of.
        cycle_momentum: whether the momentum cycles too.
        base_momentum, max_momentum: its bounds, as those of the rate.
        step_on: ``"epoch"`` steps at the end of every epoch, ``"batch"`` after every update of the parameters.
        id: the name of the slot, unique in a loop.

    Raises:
        TypeError, ValueError: an argument that can't work; in `init`: lists that are not as long as there are parameter
            groups, or an optimizer without momentum.
        StateDictError: when a run is continued that began with other arguments.

    Resuming:
        Its place, the rates and momenta are part of the context: it goes on at the step that it had reached.

    Mirrors `torch.optim.lr_scheduler.CyclicLR`, bit for bit; Smith, "Cyclical Learning Rates for Training Neural
    Networks", 2017.

    >>> lr_cyclic(base_lr=0.001, max_lr=0.1, step_size_up=100)
    Callback('lr_cyclic', begin, batch_end)
    """
    check_integer("lr_cyclic", "step_size_up", step_size_up, least=1)
    if step_size_down is not None:
        check_integer("lr_cyclic", "step_size_down", step_size_down, least=1)
    check_choice("lr_cyclic", "mode", mode, ("triangular", "triangular2", "exp_range"))
    check_number("lr_cyclic", "gamma", gamma, least=0)
    if scale_fn is not None and not callable(scale_fn):
        raise TypeError(f"lr_cyclic: scale_fn is a function or None, not {scale_fn!r}")
    check_choice("lr_cyclic", "scale_mode", scale_mode, ("cycle", "iterations"))
    check_numbers("lr_cyclic", "base_lr", base_lr, least=0)
    check_numbers("lr_cyclic", "max_lr", max_lr, least=0)
    _check_momentum("lr_cyclic", cycle_momentum, base_momentum, max_momentum)
    schedule = schedule_of(
        lr_scheduler.CyclicLR,
        base_lr=base_lr,
        max_lr=max_lr,
        step_size_up=step_size_up,
        step_size_down=step_size_down,
        mode=mode,
        gamma=gamma,
        scale_fn=None if scale_fn is None else stateless(scale_fn),
        scale_mode=scale_mode,
        cycle_momentum=cycle_momentum,
        base_momentum=base_momentum,
        max_momentum=max_momentum,
    )
    return schedule_callback("lr_cyclic", id, schedule, step_on)


def lr_one_cycle(
    max_lr: float | list[float],
    total_steps: int | None = None,
    pct_start: float = 0.3,
    anneal_strategy: str = "cos",
    cycle_momentum: bool = True,
    base_momentum: float | list[float] = 0.85,
    max_momentum: float | list[float] = 0.95,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    three_phase: bool = False,
    step_on: str = "batch",
    id: str = "lr_one_cycle",
) -> Callback:
    """One cycle over the whole run: the learning rates rise to ``max_lr`` and fall far below where they began.

    Args:
        max_lr: the highest rate; a number, or a list with one for every parameter group.
        total_steps: steps of the cycle; by default the updates, or epochs, that the loop makes.
        pct_start: the part of the cycle in which the rates rise, from 0 to 1.
        anneal_strategy: ``"cos"`` or ``"linear"``.
        cycle_momentum: whether the momentum (or first beta) falls while the rates rise, and the other way round.
        base_momentum, max_momentum: its bounds, as ``max_lr``.
        div_factor: the first rate is ``max_lr / div_factor``.
        final_div_factor: the last rate is the first one divided by this.
        three_phase: whether the rates fall to the first one in the time in which they rose, and then on.
        step_on: ``"epoch"`` steps at the end of every epoch, ``"batch"`` after every update of the parameters.
        id: the name of the slot, unique in a loop.

    Raises:
        TypeError, ValueError: an argument that can't work; in `init`: lists that are not as long as there are parameter
            groups, an optimizer without momentum, fewer ``total_steps`` than the loop makes, or none where the number
            of batches is unknown; at the end of an epoch: another number of batches than the data said.
        StateDictError: when a run is continued that began with another number of steps, or other arguments.

    Resuming:
        Its place, the rates and momenta are part of the context: it goes on at the step that it had reached. The cycle
        is bound to the length of the run: a run with other ``epochs``, or another number of batches, is refused before
        its first batch, unless ``total_steps`` is given and the same.

    Mirrors `torch.optim.lr_scheduler.OneCycleLR`, bit for bit; Smith and Topin, "Super-Convergence: Very Fast Training
    of Neural Networks Using Large Learning Rates", 2018.

    >>> import functional_loop as fl
    >>> from functional_loop.callbacks.schedules.lr_cycles import lr_one_cycle
    >>> from functional_loop.examples.digits import loop
    >>> contexts = fl.iterate(fl.init(fl.evolve(loop(epochs=1), callbacks=[lr_one_cycle(max_lr=0.01)])))
    >>> rates = [ctx.optimizer_state["groups"][0]["lr"] for ctx in contexts]
    >>> f"{rates[0]:.4f} {max(rates):.4f}"
    '0.0004 0.0100'
    """
    if total_steps is not None:
        check_integer("lr_one_cycle", "total_steps", total_steps, least=1)
    check_number("lr_one_cycle", "pct_start", pct_start, least=0, most=1)
    check_choice("lr_one_cycle", "anneal_strategy", anneal_strategy, ("cos", "linear"))
    check_number("lr_one_cycle", "div_factor", div_factor, least=1)
    check_number("lr_one_cycle", "final_div_factor", final_div_factor, least=1)
    check_flag("lr_one_cycle", "three_phase", three_phase)
    check_numbers("lr_one_cycle", "max_lr", max_lr, least=0)
    _check_momentum("lr_one_cycle", cycle_momentum, base_momentum, max_momentum)

    given: dict[str, Any] = {
        "max_lr": max_lr,
        "total_steps": total_steps,
        "pct_start": float(pct_start),
        "anneal_strategy": anneal_strategy,
        "cycle_momentum": cycle_momentum,
        "base_momentum": base_momentum,
        "max_momentum": max_momentum,
        "div_factor": div_factor,
        "final_div_factor": final_div_factor,
        "three_phase": three_phase,
    }

    def arguments(loop: Loop) -> dict[str, Any]:
        return {**given, "total_steps": _total_steps(loop, step_on) if total_steps is None else total_steps}

    def build(optimizer: torch.optim.Optimizer, loop: Loop) -> Any:
        return lr_scheduler.OneCycleLR(optimizer, **arguments(loop))

    def check(loop: Loop) -> None:
        if total_steps is not None and total_steps < (made := _steps(loop, step_on) or 0):
            raise ValueError(f"lr_one_cycle: total_steps={total_steps}, but the loop makes {made} steps")

    def check_epoch(ctx: Context) -> Context:
        if ctx.step != (expected := ctx.loop.train.expected_length):
            raise ValueError(
                f"lr_one_cycle: epoch {ctx.epoch} had {ctx.step} batches, but by the len of the training data it has "
                f"{expected}, so that the cycle would not end with the run; give total_steps"
            )
        return ctx

    schedule = Schedule(build, given, lambda loop: to_plain(arguments(loop)))
    callback = schedule_callback("lr_one_cycle", id, schedule, step_on, check=check)
    return callback.remade(epoch_end=check_epoch) if step_on == "batch" and total_steps is None else callback


def _total_steps(loop: Loop, step_on: str) -> int:
    steps = _steps(loop, step_on)
    if steps is None:
        raise ValueError("lr_one_cycle: the number of batches of an epoch is not known in advance; give total_steps")
    # A run of no epochs has a schedule too, which never steps.
    return max(steps, 1)


def _steps(loop: Loop, step_on: str) -> int | None:
    """How many epochs or updates the whole run has."""
    if step_on == "epoch":
        return loop.epochs
    length = loop.train.expected_length
    return None if length is None else loop.epochs * math.ceil(length / loop.accumulate)


def _check_momentum(owner: str, cycle_momentum: Any, base_momentum: Any, max_momentum: Any) -> None:
    check_flag(owner, "cycle_momentum", cycle_momentum)
    check_numbers(owner, "base_momentum", base_momentum, least=0, most=1)
    check_numbers(owner, "max_momentum", max_momentum, least=0, most=1)
