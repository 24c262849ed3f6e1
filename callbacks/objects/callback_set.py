"""CallbackSet: stateful, object-oriented callbacks."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from ...core.callback import Callback
from ...core.record import did_you_mean
from ...core.stages import STAGES
from .adapter import Adapter
from .view import ContextView


class CallbackSet:
    """A collection of methods ``on_<stage>`` that share attributes: the base class of object callbacks.

    Inside a method, ``self.ctx`` is the state of training, see `ContextView`; outside a run it is ``None``. Any
    attribute may be assigned to ``self``. What must survive a restart, a fork or a step back in time is returned by
    ``state_dict()`` and taken by ``load_state_dict()``: after every stage the loop keeps the first in its context, and
    calls the second before a stage whose context holds another state than the object produced last.

    Attributes:
        id: the name of its slot in ``ctx.callbacks``: the class's name without ``CallbackSet``, in snake case.
        weight: callbacks run by ascending weight within a stage.
        last: it runs after all that are not, whatever their weights: one that saves what a stage has left.
        ctx: the `ContextView`, or ``None``.
        volatile: its state is not the same in every run (a clock's, say): it is kept over restarts, but is no part of
            the digest and identity of a run.
        replays: whether it has a part in the result: a replay of the run calls it, and a run without it is another. By
            default one that keeps a state has, or whose methods write to ``self.ctx``; all that others do is done to
            the world. ``True`` is for one that changes training by other ways, ``False`` for one whose effects must
            not be repeated.
        whole: of an ensemble it runs once, for effects (a checkpoint, a display), and is given the stacked context of
            all members, see `Callback`; others run for every member.
        vectorises: its methods at the stages of a batch use no values of tensors and neither ``ctx.network`` nor
            ``ctx.optimizer``, and may be called once for all members of an ensemble, under ``torch.func.vmap``.
        for_one_run: it can't be in an ensemble at all (a file that holds what one run makes).
        environment: fields of ``ctx`` that only the one who trains can know: ``learner``, ``task_train``,
            ``task_valid`` and ``prediction_encoder``; set before training.

    Resuming: ``on_begin`` and ``on_exit`` run in every run of every process, so that files can be opened and closed; in
    a continued run, what ``on_begin`` writes to the context is dropped, and the state is loaded after it.

    Raises:
        TypeError: when a class is defined with a method ``on_...`` that is no stage.

    Mirrors R's ``CallbackSet`` (mlr3torch).

    >>> class CallbackSetStopAt(CallbackSet):
    ...     def on_epoch_end(self):
    ...         if self.ctx.epoch == 3:
    ...             self.ctx.terminate = True
    >>> CallbackSetStopAt()
    <CallbackSetStopAt 'stop_at': epoch_end>
    >>> import functional_loop as fl
    >>> from functional_loop.examples.digits import loop
    >>> fl.train(fl.init(fl.evolve(loop(epochs=9), callbacks=[CallbackSetStopAt()]))).epoch
    3
    """

    weight: float = 0.0
    ctx: ContextView = None  # type: ignore[assignment]  # always set inside a hook, where it is read
    volatile: bool = False
    replays: bool | None = None
    whole: ClassVar[bool] = False
    vectorises: ClassVar[bool] = False
    last: bool = False
    for_one_run: ClassVar[bool] = False
    environment: Mapping[str, Any] = MappingProxyType({})
    known_state: Any = None
    """The slot whose state the object has, kept by the loop: not to be written to."""
    _id: str | None = None
    _settings: Mapping[str, Any] | None = None
    _stages: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in dir(cls):
            if name.startswith("on_"):
                if name.removeprefix("on_") not in STAGES:
                    known = [f"on_{stage}" for stage in STAGES]
                    raise TypeError(f"{cls.__name__}: {name} is not a stage{did_you_mean(name, known)}")
                if not callable(getattr(cls, name)):
                    raise TypeError(f"{cls.__name__}: {name} must be a method, not {getattr(cls, name)!r}")
        check_weight(cls.weight, cls.__name__)
        cls._stages = tuple(stage for stage in STAGES if hasattr(cls, f"on_{stage}"))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            check_weight(value, type(self).__name__)
        if name.startswith("on_"):
            raise TypeError(
                f"{type(self).__name__}: {name} can't be assigned to an object, where it would not run; "
                "define a method, or use callback_set()"
            )
        object.__setattr__(self, name, value)

    @property
    def id(self) -> str:
        return self._id if self._id is not None else default_id(type(self))

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages at which it does something."""
        return self._stages

    def state_dict(self) -> Any:
        """What to keep with the trained model: dicts with string keys, lists, tensors, numbers, strings; or
        ``None``."""
        return None

    def load_state_dict(self, state_dict: Any) -> None:
        """Take a state that ``state_dict()`` made."""
        if state_dict is not None:
            warnings.warn(
                f"{type(self).__name__} was handed a state but has no load_state_dict() to take it", stacklevel=2
            )

    def clone(self, deep: bool = False) -> CallbackSet:
        """A copy; with ``deep`` the attributes are copied too.

        Raises:
            RuntimeError: training is running.
        """
        if self.ctx is not None:
            raise RuntimeError(f"{type(self).__name__} can't be cloned while training runs")
        return copy.deepcopy(self) if deep else copy.copy(self)

    def as_callback(self) -> Callback:
        """The pure callback that runs this object."""
        return Adapter(self).as_callback()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id!r}: {', '.join(self.stages) or 'no stages'}>"


def check_weight(weight: Any, owner: str) -> None:
    """Refuse a weight that has no place in an order.

    Raises:
        TypeError: it is not a number.
        ValueError: it is NaN.
    """
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise TypeError(f"{owner}: the weight is a number, not {weight!r}")
    if math.isnan(weight):
        raise ValueError(f"{owner}: the weight is NaN, which has no place in an order")


def default_id(cls: type) -> str:
    """The class's name without ``CallbackSet``, in snake case.

    >>> default_id(type("CallbackSetLRMonitor", (), {}))
    'lr_monitor'
    """
    name = cls.__name__.replace("CallbackSet", "") or cls.__name__
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
