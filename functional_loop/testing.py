"""Checks for the tests of those who write callbacks: are its hooks pure, is everything that it knows in its state?"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import pairwise
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from .checkpoint.digests import durable
from .checkpoint.state import StateDict, load_state_dict, state_dict
from .core.callback import Callback, Hook
from .core.context import Context
from .core.measures import measure
from .core.record import evolve, tree_equal
from .core.rng import seeded
from .data.sources import batches
from .engine.init import init
from .engine.loop import AsCallback, Loop
from .engine.train import iterate
from .optim.optimizer import optimizer
from .purity.check import object_of


def check_hook(
    hook: Hook | AsCallback | type, stage: str = "batch_end", *, loop: Loop | None = None, seed: int = 0
) -> None:
    """Check that a hook, or every hook of a callback, is pure, by training with it.

    Args:
        hook: a function ``Context -> Context``; or a callback, a descriptor, or a class of objects.
        stage: where a function is run.
        loop: what to train; its callbacks are replaced. By default that of `check_callback`.
        seed: the seed of the run.

    Raises:
        PurityError: the hook wrote to what it was given, left a setting of torch changed, returned a context of another
            form, or depends on more than the context and its seed; the message has the callback, the stage, the path in
            the context, and the operation. See `Loop`, ``check_pure``.

    >>> import functional_loop as fl
    >>> def clamp(ctx):
    ...     for weight in ctx.params.values():
    ...         weight.clamp_(-1, 1)
    ...     return ctx
    >>> try:
    ...     check_hook(clamp)
    ... except fl.PurityError as error:
    ...     print(error)
    the hook of 'batch_end' of callback 'clamp' is not pure: it wrote to ctx.params['0.weight'] by
    aten.clamp_.default; make a new value instead
    """
    if isinstance(hook, type):
        hook = hook()
    if not hasattr(hook, "as_callback"):
        hooks: dict[str, Any] = {stage: hook}
        hook = Callback(getattr(hook, "__name__", "hook"), init=lambda ctx: (), **hooks)
    loop = evolve(loop if loop is not None else _small_loop(), callbacks=[hook], check_pure=True)
    deque(iterate(init(loop, seed)), maxlen=0)


def check_callback(factory: Callable[[], AsCallback] | AsCallback, *, loop: Loop | None = None, seed: int = 0) -> None:
    """Check that a run with a callback can be continued anywhere as if it had never stopped.

    Trains with one callback for the whole run; then every part of the run, from one boundary between stages to the
    next, with a new callback that has nothing but what was saved at the first. All durable state is compared bit for
    bit.

    Args:
        factory: a class of objects or another function of no arguments that makes a new callback whenever it is
            called; a descriptor; or a pure callback.
        loop: what to train; its callbacks are replaced. By default a small network with batch normalisation and dropout
            for two epochs, with measures, validation and two batches to an update.
        seed: the seed of the runs.

    Raises:
        AssertionError: the runs part; the message has the stage, the step, and the path of the state that differs
            first. Or two whole runs differ; or an object does not have the state that it was given, after
            ``load_state_dict``; or the state in an earlier context was written to.
        TypeError: the factory gives the same object again.

    Errors of the callback itself are raised as they are.

    >>> import functional_loop as fl
    >>> def forgetful():
    ...     seen = []
    ...     def count(ctx):
    ...         seen.append(ctx.step)
    ...         return ctx.with_callback_state("counter", len(seen))
    ...     return fl.Callback("counter", init=lambda ctx: 0, batch_end=count)
    >>> check_callback(forgetful)
    Traceback (most recent call last):
        ...
    AssertionError: callback 'counter': a run that is continued with a new callback after 'batch_end' (epoch 1, step 1)
    parts from the one that went on at 'batch_end' (epoch 1, step 2): ['callbacks']['counter']['state'] is 1 against 2;
    something that the callback knows is not in its state
    """
    loop = loop if loop is not None else _small_loop()
    make = factory if callable(factory) else lambda: factory
    _check_new(make().as_callback(), make().as_callback())
    whole, again = list(_run(loop, make(), seed)), _run(loop, make(), seed)
    for one, other in zip(whole, again, strict=False):
        _compare(
            (durable(other.saved), durable(one.saved)),
            f"{one.owner}: two runs of one seed part at {one.place}",
            "a state that can't be the same in every run (a clock's) is marked by volatile = True",
        )
    for one in whole:
        _compare(
            (state_dict(one.ctx), one.saved),
            f"{one.owner}: the context of {one.place} was changed by what came later",
            "make new values instead of writing to those in a context",
        )
    for before, after in pairwise(whole):
        _compare(
            (durable(_next(loop, make(), before).saved), durable(after.saved)),
            f"{after.owner}: a run that is continued with a new callback after {before.place} "
            f"parts from the one that went on at {after.place}",
            "something that the callback knows is not in its state",
        )


def _check_new(one: Callback, other: Callback) -> None:
    if (shared := object_of(one)) is not None and shared is object_of(other):
        raise TypeError(
            f"check_callback needs a new object whenever it asks for one, not {shared!r} again: "
            "pass the class, or a function that makes one"
        )


@attrs.frozen(eq=False)
class _Boundary:
    """A context, and what its state dict was when it was made."""

    ctx: Context
    saved: StateDict

    @property
    def owner(self) -> str:
        return f"callback {self.ctx.loop.callbacks[0].id!r}"

    @property
    def place(self) -> str:
        return f"{self.ctx.stage or 'init'!r} (epoch {self.ctx.epoch}, step {self.ctx.step})"


def _boundary(ctx: Context) -> _Boundary:
    return _Boundary(ctx, copy.deepcopy(state_dict(ctx)))


def _run(loop: Loop, made: AsCallback, seed: int) -> Iterator[_Boundary]:
    start = init(evolve(loop, callbacks=[made]), seed)
    yield _boundary(start)
    yield from map(_boundary, iterate(start))


def _next(loop: Loop, made: AsCallback, before: _Boundary) -> _Boundary:
    callback = made.as_callback()
    loop = evolve(loop, callbacks=[callback, _round_trip(callback)])
    ctx = load_state_dict(init(loop, before.ctx.seed), before.saved)
    with closing(iterate(ctx)) as boundaries:
        return _boundary(next(boundaries))


def _round_trip(callback: Callback) -> Callback:
    """Looks, when a run is continued, whether an object has the state that it is given."""

    def look(ctx: Context) -> Context:
        made, saved = object_of(callback), ctx.callbacks[callback.id]
        if made is not None and saved != ():
            made.load_state_dict(copy.deepcopy(saved))
            _compare(
                (made.state_dict(), saved),
                f"callback {callback.id!r}: after load_state_dict(), state_dict() is not what was loaded",
                "one of the two leaves something out",
            )
        return ctx

    return Callback(f"round trip of {callback.id}", resume=look, weight=math.inf)


def _compare(states: tuple[Any, Any], message: str, advice: str) -> None:
    if not (comparison := tree_equal(*states)):
        where = comparison.path or "the state"
        raise AssertionError(f"{message}: {where} is {comparison.reason}; {advice}")


def _small_loop() -> Loop:
    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.3), nn.Linear(4, 2))

    def error(y_hat: Tensor, y: Tensor) -> Tensor:
        return (y_hat - y).abs().mean()

    with seeded(0):
        x, y = torch.randn(14, 3), torch.randn(14, 2)
    measures = [measure("error", error, minimize=True)]
    return Loop(
        network,
        nn.functional.mse_loss,
        optimizer(torch.optim.AdamW, lr=0.01),
        train=batches(x, y, batch_size=5, shuffle=True),
        valid=batches(x[:6], y[:6], batch_size=3),
        epochs=2,
        accumulate=2,
        measures_train=measures,
        measures_valid=measures,
    )
