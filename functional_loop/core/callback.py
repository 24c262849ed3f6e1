"""Hooks, and callbacks: hooks that share an id and a state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, Unpack

import attrs

from .looking_on import only_looks_on
from .record import did_you_mean
from .stages import STAGES

if TYPE_CHECKING:
    from .context import Context
    from .errors import StateDictError

Hook: TypeAlias = "Callable[[Context], Context]"
"""A pure function that is run at a stage."""

Fits: TypeAlias = "Callable[[Context], tuple[StateDictError | None, Context]]"
"""What keeps a callback from continuing with its state, and the context as it goes on in spite of that."""


class Hooks(TypedDict, total=False):
    """A hook, or ``None``, by stage."""

    begin: Hook | None
    epoch_begin: Hook | None
    batch_begin: Hook | None
    after_backward: Hook | None
    batch_end: Hook | None
    before_valid: Hook | None
    batch_valid_begin: Hook | None
    batch_valid_end: Hook | None
    valid_end: Hook | None
    epoch_end: Hook | None
    end: Hook | None
    exit: Hook | None


@attrs.frozen(eq=False, init=False)
class Callback:
    """Pure hooks that share an id and, if they keep one, a state in ``ctx.callbacks[id]``.

    Args:
        id: the name of its slot in ``ctx.callbacks``, unique in a loop.
        init: a function of the first context that makes the initial state; without it the state is ``()``.
        weight: callbacks run by ascending weight within a stage, equal weights in the order of the loop's list.
        last: it runs after all callbacks that are not, whatever their weights, as one must that saves what a stage has
            left; see `boundary`.
        kind: the class of the callback, which is part of its identity: a state saved by one kind is refused by another.
        resume: run when a run is entered after ``begin``, in a process that may be new; for effects, like ``exit``:
            what it returns is checked and dropped.
        volatile: its state is kept over restarts but is not the same in every run (a clock's): it is no part of the
            digest nor of the run's identity, and the callback may come and go.
        replays: whether a replay of a run calls it; false for one that only touches the world, by files or a screen. It
            may then come and go between saving and resuming, as may one without a state whose hooks are seen to return
            the context that they are given.
        skips: a function of its state that gives the numbers of batches of the run that are passed over, as
            ``skip_batches`` of the Loop does.
        source: what the callback was made from, for others to find; ``None`` if it is pure.
        whole: of an ensemble it runs once, at boundaries only and after the others, for effects (a checkpoint, a
            display): it is given the stacked context of all members, and of what it returns its own slot is kept, the
            same for all. If it is volatile, it gets at the stages of a batch only the members that still train, or the
            first of them where they are trained in turn, which costs nothing. Other callbacks run for every member.
        vectorises: whether its hooks at the stages of a batch can run once for all members of an ensemble, under
            ``torch.func.vmap``; if not, an ensemble refuses them before training.
        settings: the arguments that it was made with and that decide what it does, by name: with others a saved run is
            not continued. What is left out is free (the patience of early stopping). By default, the variables that
            its hooks read.
        fits: whether the callback can continue from its state in a context: a function that gives what keeps it from
            that, as an error or ``None``, and the context as it would go on in spite of that. It is asked when a state
            is loaded, where ``allow`` may say to go on, and when a run is entered, where the error is raised.
        reopens: a function of its state where a run has ended: the state before the callback ended it, if it would not
            end it now (with more patience, say); ``None`` if it would; and the very state if others ended the run.
        hooks: a function ``Context -> Context`` by stage; see `STAGES`.

    Raises:
        TypeError: an unknown stage, a hook that can't be called, an id or weight of the wrong type.
        ValueError: an empty id, or a weight that is not a number.

    >>> counter = Callback("counter", init=lambda ctx: 0,
    ...                    batch_end=lambda ctx: ctx.with_callback_state("counter", ctx.callbacks["counter"] + 1))
    >>> counter
    Callback('counter', batch_end)
    >>> Callback("typo", epoch_ends=lambda ctx: ctx)
    Traceback (most recent call last):
        ...
    TypeError: callback 'typo': no stage 'epoch_ends'; did you mean 'epoch_end'?
    """

    id: str
    init: Callable[[Context], Any] | None
    weight: float
    kind: str
    resume: Hook | None
    volatile: bool
    replays: bool
    skips: Callable[[Any], Iterable[int]] | None
    source: Any
    whole: bool
    vectorises: bool
    last: bool
    settings: Mapping[str, Any] | None
    fits: Fits | None
    reopens: Callable[[Any], Any] | None
    hooks: dict[str, Hook]

    def __init__(
        self,
        id: str,
        *,
        init: Callable[[Context], Any] | None = None,
        weight: float = 0.0,
        kind: str = "",
        resume: Hook | None = None,
        volatile: bool = False,
        replays: bool = True,
        skips: Callable[[Any], Iterable[int]] | None = None,
        source: Any = None,
        whole: bool = False,
        vectorises: bool = True,
        last: bool = False,
        settings: Mapping[str, Any] | None = None,
        fits: Fits | None = None,
        reopens: Callable[[Any], Any] | None = None,
        **hooks: Unpack[Hooks],
    ) -> None:
        if not isinstance(id, str):
            raise TypeError(f"the id of a callback is a string, not {id!r}")
        if not id:
            raise ValueError("the id of a callback must not be empty")
        if not isinstance(kind, str):
            raise TypeError(f"callback {id!r}: the kind is a string, not {kind!r}")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise TypeError(f"callback {id!r}: the weight is a number, not {weight!r}")
        if math.isnan(weight):
            raise ValueError(f"callback {id!r}: the weight is NaN, which has no place in an order")
        given: dict[str, Any] = {**hooks}
        for name, function in {"init": init, "resume": resume, "skips": skips, **given}.items():
            if name not in ("init", "resume", "skips", *STAGES):
                raise TypeError(f"callback {id!r}: no stage {name!r}{did_you_mean(name, STAGES)}")
            if function is not None and not callable(function):
                raise TypeError(f"callback {id!r}: {name} must be a function of the context, not {function!r}")
        ordered = {stage: given[stage] for stage in STAGES if given.get(stage) is not None}
        self.__attrs_init__(
            id,
            init,
            float(weight),
            kind,
            resume,
            volatile,
            replays,
            skips,
            source,
            whole,
            vectorises,
            last,
            settings,
            fits,
            reopens,
            ordered,
        )

    @property
    def order(self) -> tuple[bool, float]:
        """By what callbacks are sorted within a stage."""
        return self.last, self.weight

    @property
    def keeps_state(self) -> bool:
        """Whether it has a state that is part of the run."""
        return self.init is not None and not self.volatile

    @property
    def decides(self) -> bool:
        """Whether a run with this callback is another run than one without it, as far as its code tells."""
        effects = self.init is None and self.skips is None and all(map(only_looks_on, self.hooks.values()))
        return self.replays and not self.volatile and not effects

    def remade(self, **changes: Any) -> Callback:
        """A callback with other arguments, hooks among them; a hook that is ``None`` is left out.

        >>> Callback("log", epoch_end=print, end=print).remade(weight=2.0, end=None)
        Callback('log', epoch_end)
        """
        kept = {name: getattr(self, name) for name in _ARGUMENTS}
        return Callback(**{**kept, **self.hooks, **changes})

    def as_callback(self) -> Callback:
        """The callback itself: what a Loop asks of everything in ``callbacks``."""
        return self

    def __repr__(self) -> str:
        return f"Callback({', '.join([repr(self.id), *self.hooks])})"


_ARGUMENTS = tuple(field.name for field in attrs.fields(Callback) if field.name != "hooks")


def compose(*hooks: Hook) -> Hook:
    """One hook that runs ``hooks`` from left to right; associative, and the identity without arguments.

    >>> compose()("any context")
    'any context'
    >>> compose(lambda s: s + "b", lambda s: s + "c")("a")
    'abc'
    """

    def composed(ctx: Context) -> Context:
        for hook in hooks:
            ctx = hook(ctx)
        return ctx

    composed.made_with = {"def": "compose", "hooks": hooks}  # type: ignore[attr-defined]
    return composed


def when(condition: Callable[[Context], bool], hook: Hook) -> Hook:
    """``hook`` where ``condition(ctx)`` holds, else the identity.

    >>> halve_late = when(lambda ctx: ctx.epoch > 10, lambda ctx: ctx.with_hyperparameters(lr=0.5))
    """

    def conditional(ctx: Context) -> Context:
        return hook(ctx) if condition(ctx) else ctx

    conditional.made_with = {"def": "when", "condition": condition, "hook": hook}  # type: ignore[attr-defined]
    return conditional


def every(n: int, hook: Hook) -> Hook:
    """``hook`` at every ``n``-th batch of the run, or, in a stage outside batches, every ``n``-th epoch.

    In the stages of a validation batch it counts the validation batches of the epoch.

    Raises:
        ValueError: ``n`` is not a positive integer.

    >>> log = Callback("log", batch_end=every(100, lambda ctx: ctx))
    """
    if type(n) is not int or n < 1:
        raise ValueError(f"every: n must be a positive integer, not {n!r}")

    def count(ctx: Context) -> int:
        if ctx.batch == ():
            return ctx.epoch
        return ctx.step_valid or ctx.global_step

    counted = when(lambda ctx: count(ctx) % n == 0, hook)
    counted.made_with = {"def": "every", "n": n, "hook": hook}  # type: ignore[attr-defined]
    return counted
