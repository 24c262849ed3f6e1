"""Errors of functional_loop, and the context that an error carries."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Sequence
from contextlib import ContextDecorator, suppress
from types import TracebackType
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_ATTRIBUTE = "_functional_loop_context"


class FunctionalLoopError(Exception):
    """Base of the errors that only functional_loop raises.

    Wrong arguments stay ordinary ``TypeError`` and ``ValueError``; errors of a hook or of the network keep their
    own type.
    """


class StateDictError(FunctionalLoopError, ValueError):
    """A state dict does not belong to the loop that it is loaded into.

    ``differences`` lists every path that differs, with the saved and the expected value.
    """

    def __init__(self, message: str, differences: Sequence[str] = ()) -> None:
        self.differences = tuple(map(str, differences))
        super().__init__("\n".join([message, *(f"  - {line}" for line in self.differences)]))


class CheckpointError(FunctionalLoopError):
    """A checkpoint file is damaged or foreign, or saving would harm something already saved."""


class StoreInUseError(CheckpointError):
    """Another process writes to the folder of a store."""


class PurityError(FunctionalLoopError):
    """A hook did what a pure function does not; `Loop` with ``check_pure=True`` raises it.

    ``findings`` lists what it did, with paths in the context.
    """

    def __init__(self, who: str, findings: tuple[str, ...] | list[str]) -> None:
        self.findings = tuple(findings)
        first, *others = self.findings
        super().__init__("\n".join([f"{who} is not pure: it {first}", *(f"  - and it {line}" for line in others)]))


def add_note(error: BaseException, note: str) -> None:
    """`BaseException.add_note`, also for an error of a class that refuses attributes, as frozen classes do; it can't
    fail.

    >>> class Frozen(Exception):
    ...     def __setattr__(self, name, value):
    ...         raise AttributeError(name)
    >>> error = Frozen()
    >>> add_note(error, "in callback 'ema'")
    >>> error.__notes__
    ["in callback 'ema'"]
    """
    try:
        BaseException.add_note(error, note)
    except Exception:
        # Past the class's own __setattr__. What can't be noted in this way either can't be told.
        with suppress(Exception):
            object.__setattr__(error, "__notes__", [*notes_of(error), note])


def notes_of(error: BaseException) -> list[str]:
    """The notes of ``error``."""
    notes = _attribute(error, "__notes__")
    return list(map(str, notes)) if isinstance(notes, (list, tuple)) else []


def told(error: BaseException) -> str:
    """The error and its notes in one line, also for a class whose ``repr`` fails."""
    try:
        text = repr(error)
    except Exception:
        text = type(error).__name__
    return ", ".join([text, "; ".join(notes_of(error))])


class noting:  # noqa: N801  (a context manager, named like a function)
    """A region whose errors gain a note; what it says is a function, called only when there is an error."""

    __slots__ = ("_say",)

    def __init__(self, say: Callable[[], str]) -> None:
        self._say = say

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            add_note(error, self._say())


def loading(path: object) -> noting:
    """A region whose errors say which file was being loaded."""
    return noting(lambda: f"while loading {path}")


def region(function: Callable[P, Generator[T]]) -> Callable[P, Region[T]]:
    """`contextlib.contextmanager` for regions that errors of any class pass: that one assigns to an attribute of the
    error, which a frozen dataclass answers with an error of its own. No error is suppressed.

    >>> @region
    ... def tidying():
    ...     try:
    ...         yield "tools"
    ...     finally:
    ...         print("tidy")
    >>> with tidying() as found:
    ...     print(found)
    tools
    tidy
    """

    @functools.wraps(function)
    def enter(*args: P.args, **kwargs: P.kwargs) -> Region[T]:
        return Region(function(*args, **kwargs))

    return enter


class Region(Generic[T]):
    """What a function decorated by `region` returns: a context manager for one use."""

    def __init__(self, parts: Generator[T]) -> None:
        self._parts = parts

    def __enter__(self) -> T:
        return next(self._parts)

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            next(self._parts, None)
            return
        try:
            self._parts.throw(error)
        except BaseException as raised:
            # A generator makes a RuntimeError of a StopIteration that leaves it.
            if raised is not error and not (isinstance(error, StopIteration) and raised.__cause__ is error):
                raise
            BaseException.with_traceback(error, trace)


class keeping_stop_iteration(ContextDecorator):  # noqa: N801
    """A region, or a function, that a ``StopIteration`` of other code leaves as what it is.

    Python takes one that leaves a generator for a mistake, and raises a RuntimeError of it (PEP 479). Our generators
    run hooks, networks and datasets, whose errors keep their type.
    """

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if (stop := _stop_iteration_in(error)) is None or error is None:
            return
        for note in notes_of(error):
            add_note(stop, note)
        if (ctx := attached_context(error)) is not None:
            attach_context(stop, ctx)
        context = stop.__context__
        try:
            raise stop
        finally:
            stop.__context__ = context


class telling_of_stop_iteration(keeping_stop_iteration):  # noqa: N801
    """The same within a generator, which none can leave: the RuntimeError has all notes, and it as its cause."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if (stop := _stop_iteration_in(error)) is not None and error is not None:
            for note in notes_of(stop):
                add_note(error, note)


def _stop_iteration_in(error: BaseException | None) -> StopIteration | None:
    """What a generator of ours made ``error`` of; one of others has made what it was meant to make."""
    stop = error.__cause__ if isinstance(error, RuntimeError) else None
    if not isinstance(stop, StopIteration) or stop.__traceback__ is None:
        return None
    # The frame that it left last is the first of its traceback.
    name = str(stop.__traceback__.tb_frame.f_globals.get("__name__"))
    return stop if name.partition(".")[0] == __name__.partition(".")[0] else None


def attach_context(error: BaseException, ctx: object) -> None:
    """Let ``error`` carry ``ctx``, in place of a context of a run before (one object may be raised twice) or within."""
    # Past a __setattr__ of its class, which may refuse.
    object.__setattr__(error, _ATTRIBUTE, ctx)


def attached_context(error: BaseException) -> Any:
    """What ``error`` carries, or ``None``."""
    return _attribute(error, _ATTRIBUTE)


def _attribute(error: BaseException, name: str) -> Any:
    """An attribute of ``error``, past a ``__getattr__`` of its class, which may answer to any name."""
    try:
        return object.__getattribute__(error, name)
    except AttributeError:
        return None
