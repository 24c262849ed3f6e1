"""Learning rate schedules of one's own: functions of the step, and scheduler classes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, overload

import attrs
from torch.optim import lr_scheduler

from ...core.callback import Callback
from ..checks import check_choice, check_functions
from ..objects.callback_set import default_id
from .schedule import schedule_callback, schedule_of, stateless

Factor: TypeAlias = Callable[[int], float]


def lr_lambda(lr_lambda: Factor | Sequence[Factor], step_on: str = "epoch", id: str = "lr_lambda") -> Callback:
    """Multiplies the initial learning rates by a function of the step.

    Args:
        lr_lambda: a pure function of the step, 0 before the first; or a list with one for every parameter group.
        step_on: ``"epoch"`` steps at the end of every epoch, ``"batch"`` after every update of the parameters.
        id: the name of the slot, unique in a loop.

    Raises:
        TypeError: it is not a function.

    Resuming:
        Its place, and the rates, are part of the context: it goes on at the step that it had reached. The function is
        not saved.

    Mirrors `torch.optim.lr_scheduler.LambdaLR`, bit for bit.

    >>> lr_lambda(lambda epoch: 0.95**epoch)
    Callback('lr_lambda', begin, epoch_end)
    """
    check_functions("lr_lambda", "lr_lambda", lr_lambda)
    schedule = schedule_of(lr_scheduler.LambdaLR, lr_lambda=_stateless(lr_lambda))
    return schedule_callback("lr_lambda", id, schedule, step_on)


def lr_multiplicative(
    lr_lambda: Factor | Sequence[Factor], step_on: str = "epoch", id: str = "lr_multiplicative"
) -> Callback:
    """Multiplies the learning rates, at every step, by a function of the step.

    Args:
        lr_lambda: a pure function of the step, 1 at the first; or a list with one for every parameter group.
        step_on: ``"epoch"`` steps at the end of every epoch, ``"batch"`` after every update of the parameters.
        id: the name of the slot, unique in a loop.

    Raises:
        TypeError: it is not a function.

    Resuming:
        Its place, and the rates, are part of the context: it goes on at the step that it had reached. The function is
        not saved.

    Mirrors `torch.optim.lr_scheduler.MultiplicativeLR`, bit for bit.

    >>> lr_multiplicative(lambda epoch: 0.95)
    Callback('lr_multiplicative', begin, epoch_end)
    """
    check_functions("lr_multiplicative", "lr_lambda", lr_lambda)
    schedule = schedule_of(lr_scheduler.MultiplicativeLR, lr_lambda=_stateless(lr_lambda))
    return schedule_callback("lr_multiplicative", id, schedule, step_on)


@overload
def as_lr_scheduler(x: type, step_on: str = "epoch", id: str | None = None) -> Callable[..., Callback]: ...
@overload
def as_lr_scheduler(x: Factor, step_on: str = "epoch", id: str | None = None) -> Callback: ...
def as_lr_scheduler(x: Any, step_on: str = "epoch", id: str | None = None) -> Any:
    """A callback from a scheduler class, or from a function of the step.

    Args:
        x: a class like those of torch, made with an optimizer and arguments, with ``step()``, ``state_dict()`` and
            ``load_state_dict()``; or a pure function of the step, 0 before the first, by which the initial learning
            rates are multiplied.
        step_on: ``"epoch"`` steps at the end of every epoch, ``"batch"`` after every update of the parameters.
        id: the name of the slot, unique in a loop; by default the name of the class in snake case, or
            ``"lr_scheduler"``.

    Returns:
        For a class, a function of its arguments (but the optimizer) that makes the callback; for a function, the
        callback.

    Raises:
        TypeError: ``x`` is neither.
        StateDictError: when a run is continued that began with other arguments.

    Resuming:
        What the class returns as ``state_dict()``, and the rates, are part of the context: it goes on at the step that
        it had reached. Functions and objects in its state are not saved.

    Mirrors R's ``as_lr_scheduler`` (mlr3torch).

    >>> from torch.optim.lr_scheduler import LRScheduler
    >>> class InverseSqrt(LRScheduler):
    ...     def __init__(self, optimizer, warmup, last_epoch=-1):
    ...         self.warmup = warmup
    ...         super().__init__(optimizer, last_epoch)
    ...     def get_lr(self):
    ...         step = self.last_epoch + 1
    ...         return [lr * min(step / self.warmup, (self.warmup / step) ** 0.5) for lr in self.base_lrs]
    >>> as_lr_scheduler(InverseSqrt, step_on="batch")(warmup=100)
    Callback('inverse_sqrt', begin, batch_end)
    >>> as_lr_scheduler(lambda step: 1 / (1 + step))
    Callback('lr_scheduler', begin, epoch_end)
    """
    check_choice("as_lr_scheduler", "step_on", step_on, ("epoch", "batch"))
    if not isinstance(x, type):
        check_functions("as_lr_scheduler", "x", x)
        return lr_lambda(x, step_on, "lr_scheduler" if id is None else id)
    _check_class(x)
    _, *parameters = inspect.signature(x).parameters.values()
    signature = inspect.Signature(parameters)
    kind, slot = f"{x.__module__}.{x.__qualname__}", default_id(x) if id is None else id

    def make(**arguments: Any) -> Callback:
        signature.bind(**arguments)
        schedule = attrs.evolve(schedule_of(x, **arguments), arguments={**arguments, "scheduler": x})
        return schedule_callback(kind, slot, schedule, step_on)

    make.__name__ = slot
    make.__doc__ = f"The callback that steps {x.__name__}; see `as_lr_scheduler`."
    make.__signature__ = signature  # type: ignore[attr-defined]  # (what descriptors read the parameters from)
    return make


def _check_class(x: type) -> None:
    for method in ("step", "state_dict", "load_state_dict"):
        if not callable(getattr(x, method, None)):
            raise TypeError(f"as_lr_scheduler: {x.__name__} is no scheduler class, it has no method {method}()")
    if issubclass(x, lr_scheduler.ReduceLROnPlateau):
        raise TypeError(f"as_lr_scheduler: {x.__name__} steps on a score, which lr_reduce_on_plateau has")


def _stateless(functions: Factor | Sequence[Factor]) -> Factor | list[Factor]:
    return stateless(functions) if callable(functions) else [stateless(function) for function in functions]
