"""Averages of the weights over training: exponential moving averages and stochastic weight averaging."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...core.callback import Callback, Hook, compose, when
from ...core.context import Context
from ...core.record import did_you_mean, evolve
from ..checks import check_flag, check_integer, check_number
from .windows import updates

# After early stopping, which so keeps the very weights that were validated.
_WEIGHT = 2000.0
_KINDS = ("ema", "swa")


def ema(decay: float = 0.999, use_buffers: bool = True, validate: bool = False, id: str = "ema") -> Callback:
    """Keeps an exponential moving average of the weights, updated after every update of the optimizer.

    The first average is the weights after the first update; then ``average = decay * average + (1 - decay) * weights``.
    `averaged` takes it out.

    Args:
        decay: how much of the average stays in an update, from 0 to 1.
        use_buffers: whether buffers of floating point (the running statistics of BatchNorm) are averaged too; if not,
            and for buffers of integers, the average goes with those of the last update.
        validate: whether epochs are validated with the average in place of the weights. Early stopping then keeps, and
            restores, averages.
        id: the name of the slot, unique in a loop.

    Raises:
        ValueError: an argument that can't work; in `init`: ``validate`` without validation data, or with another
            callback that validates with an average.

    Resuming:
        The average is part of the context, and while an epoch is validated with it, so are the weights that it stands
        in for: also a run that was interrupted then goes on with the right ones.

    Mirrors `torch.optim.swa_utils.AveragedModel` with ``get_ema_multi_avg_fn(decay)``, bit for bit; Polyak and
    Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992.

    >>> import functional_loop as fl
    >>> from functional_loop.callbacks.gradients.averaging import averaged, ema
    >>> from functional_loop.examples.digits import loop
    >>> ctx = fl.train(fl.init(fl.evolve(loop(epochs=2), callbacks=[ema(decay=0.9)])))
    >>> fl.validate(averaged(ctx, "ema"))["accuracy"] > 0.9
    True
    """
    check_number("ema", "decay", decay, least=0, most=1)
    average = _averager(id, lambda count: 1 - decay, use_buffers)
    settings = {"decay": decay, "use_buffers": use_buffers, "validate": validate}
    return _averaging("ema", id, settings, batch_end=when(updates, average))


def swa(start: int, every: int = 1, use_buffers: bool = True, validate: bool = False, id: str = "swa") -> Callback:
    """Keeps the plain mean of the weights at the ends of epochs: stochastic weight averaging.

    It averages the weights after the last batch of epoch ``start`` and of every ``every``-th epoch after it. The
    learning rate that suits it, constant or cyclic and rather high, is the business of a schedule. `averaged` takes the
    mean out.

    Args:
        start: the first epoch whose weights are averaged; they are the first average.
        every: epochs between two that are averaged.
        use_buffers: whether buffers of floating point (the running statistics of BatchNorm) are averaged too; if not,
            and for buffers of integers, the average goes with those of the last epoch averaged.
        validate: whether epochs are validated with the average in place of the weights, once there is one. Early
            stopping then keeps, and restores, averages.
        id: the name of the slot, unique in a loop.

    Raises:
        ValueError: an argument that can't work; in `init`: ``validate`` without validation data, or with another
            callback that validates with an average.

    Resuming:
        The average is part of the context, and while an epoch is validated with it, so are the weights that it stands
        in for: also a run that was interrupted then goes on with the right ones.

    Mirrors `torch.optim.swa_utils.AveragedModel`, bit for bit in single precision; Izmailov et al., "Averaging Weights
    Leads to Wider Optima and Better Generalization", UAI 2018.

    >>> import functional_loop as fl
    >>> from functional_loop.callbacks.gradients.averaging import averaged, swa
    >>> from functional_loop.examples.digits import loop
    >>> ctx = fl.train(fl.init(fl.evolve(loop(epochs=4), callbacks=[swa(start=2)])))
    >>> ctx.callbacks["swa"]["count"]
    3
    >>> fl.validate(averaged(ctx, "swa"))["accuracy"] > 0.9
    True
    """
    check_integer("swa", "start", start, least=1)
    check_integer("swa", "every", every, least=1)

    def is_due(ctx: Context) -> bool:
        return ctx.epoch >= start and (ctx.epoch - start) % every == 0

    average = _averager(id, lambda count: 1 / (count + 1), use_buffers)
    settings = {"start": start, "every": every, "use_buffers": use_buffers, "validate": validate}
    return _averaging("swa", id, settings, before_valid=when(is_due, average))


def averaged(ctx: Context, id: str = "ema") -> Context:
    """A copy of ``ctx`` whose parameters and buffers are the average that `ema` or `swa` keeps.

    For `predict`, `validate` or `to_module`, or to train on from there.

    Args:
        ctx: any context of the run.
        id: the id of the callback.

    Raises:
        KeyError: the loop has no averaging callback of that id.
        ValueError: nothing has been averaged yet.

    >>> import functional_loop as fl
    >>> from functional_loop.callbacks.gradients.averaging import averaged, ema
    >>> from functional_loop.examples.digits import loop
    >>> averaged(fl.init(fl.evolve(loop(), callbacks=[ema()])))
    Traceback (most recent call last):
    ValueError: callback 'ema' has averaged nothing yet, at epoch 0, step 0
    """
    known = [callback.id for callback in ctx.loop.callbacks if callback.kind in _KINDS]
    if id not in known:
        raise KeyError(f"no averaging callback {id!r} in this loop{did_you_mean(id, known)}")
    slot = ctx.callbacks[id]
    if not slot["count"]:
        raise ValueError(f"callback {id!r} has averaged nothing yet, at epoch {ctx.epoch}, step {ctx.step}")
    return ctx if slot["swapped"] else evolve(ctx, params=slot["params"], buffers=slot["buffers"])


def _averager(id: str, share: Callable[[int], float], use_buffers: bool) -> Hook:
    """The hook that moves the average towards the weights, by a share that depends on how many it is of already."""

    def average(ctx: Context) -> Context:
        slot = ctx.callbacks[id]
        count, params, buffers = slot["count"], ctx.params, ctx.buffers
        if count:
            params = _interpolate(slot["params"], params, share(count))
            buffers = _interpolate(slot["buffers"], buffers, share(count)) if use_buffers else buffers
        return ctx.with_callback_state(id, {**slot, "count": count + 1, "params": params, "buffers": buffers})

    return average


def _interpolate(average: dict[str, Tensor], new: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    return {
        name: torch.lerp(average[name], value, share) if value.is_floating_point() or value.is_complex() else value
        for name, value in new.items()
    }


def _averaging(kind: str, id: str, settings: dict[str, Any], **hooks: Any) -> Callback:
    check_flag(kind, "use_buffers", settings["use_buffers"])
    check_flag(kind, "validate", validate := settings["validate"])

    def swap(ctx: Context) -> Context:
        """The weights and those in the slot change places: what is not in use is in the slot."""
        slot = ctx.callbacks[id]
        kept = {**slot, "params": ctx.params, "buffers": ctx.buffers, "swapped": not slot["swapped"]}
        return evolve(ctx.with_callback_state(id, kept), params=slot["params"], buffers=slot["buffers"])

    def swap_in(ctx: Context) -> Context:
        validates = ctx.loop.valid is not None and ctx.loop.evaluates(ctx.epoch)
        return swap(ctx) if validates and ctx.callbacks[id]["count"] else ctx

    def start(ctx: Context) -> dict[str, Any]:
        if (optimizer := ctx.loop.optimizer).has_modes:
            raise ValueError(
                f"{kind}: {optimizer.cls.__name__} averages the parameters itself, for evaluation; leave out {id!r}"
            )
        if validate:
            _check_validation(kind, ctx)
        return {"count": 0, "params": (), "buffers": (), "swapped": False}

    swap_out = when(lambda ctx: ctx.callbacks[id]["swapped"], swap)
    if validate:
        average = hooks.get("before_valid", compose())
        hooks |= {"before_valid": compose(average, swap_in), "valid_end": swap_out}
    # A run that was saved in mid-validation does not finish it where it goes on with more epochs.
    return Callback(id, init=start, weight=_WEIGHT, kind=kind, settings=settings, epoch_end=swap_out, **hooks)


def _check_validation(kind: str, ctx: Context) -> None:
    if ctx.loop.valid is None:
        raise ValueError(f"{kind}: validate=True needs validation data: give the Loop valid=batches(...)")
    validating = [c.id for c in ctx.loop.callbacks if c.kind in _KINDS and "valid_end" in c.hooks]
    if len(validating) > 1:
        raise ValueError(f"only one callback can validate with its average, not {' and '.join(validating)}")
