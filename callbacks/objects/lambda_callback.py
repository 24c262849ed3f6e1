"""A callback made of plain functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from .callback_set import CallbackSet
from .view import ContextView

StageFunction: TypeAlias = Callable[[ContextView], object]


def lambda_callback(*, id: str = "lambda_callback", **functions: StageFunction) -> CallbackSet:
    """A callback that calls a function of the `ContextView` at a stage; what the function returns is ignored.

    Args:
        id: the name of the callback, unique in a loop.
        functions: ``on_<stage>=function``, for any of the stages.

    Raises:
        TypeError: something else than a function, or a misspelt stage.
        ValueError: no function at all.

    Resuming:
        It keeps no state, and what the functions keep elsewhere is not resumed. ``on_begin`` is called in every run of
        every process.

    Mirrors Keras's ``LambdaCallback``.

    >>> import functional_loop as fl
    >>> from functional_loop.callbacks.objects.lambda_callback import lambda_callback
    >>> from functional_loop.examples.digits import loop
    >>> telling = lambda_callback(on_epoch_end=lambda ctx: print("epoch", ctx.epoch, "of", ctx.total_epochs))
    >>> ctx = fl.train(fl.init(fl.evolve(loop(epochs=2), callbacks=[telling])))
    epoch 1 of 2
    epoch 2 of 2
    """
    if not functions:
        raise ValueError("lambda_callback: give a function, such as on_epoch_end=lambda ctx: print(ctx.epoch)")
    for name, function in functions.items():
        if not callable(function):
            raise TypeError(f"lambda_callback: {name} must be a function of the context, not {function!r}")
        if not name.startswith("on_"):
            raise TypeError(f"lambda_callback: {name!r} is not a stage; stages are given as on_epoch_end=... and so on")
    methods: dict[str, Any] = {name: _method(function) for name, function in functions.items()}
    made: CallbackSet = type("CallbackSetLambda", (CallbackSet,), {"__module__": __name__, **methods})()
    made._id, made._settings = id, functions
    return made


def _method(function: StageFunction) -> Callable[[CallbackSet], None]:
    def call(self: CallbackSet) -> None:
        function(self.ctx)

    return call
