"""Errors of functional_loop, and the context that an error carries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .context import Context

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


class noting:  # noqa: N801  (a context manager, named like a function)
    """A region whose errors gain a note; what it says is a function, called only when there is an error."""

    __slots__ = ("_say",)

    def __init__(self, say: Callable[[], str]) -> None:
        self._say = say

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            error.add_note(self._say())


def attach_context(error: BaseException, ctx: Context) -> None:
    """Let ``error`` carry ``ctx``; an error that carries one already keeps it."""
    if context_of(error) is None:
        setattr(error, _ATTRIBUTE, ctx)


def context_of(error: BaseException) -> Context | None:
    """The last boundary context before ``error``, or ``None`` if it was not raised while training.

    Training can be continued from it, or it can be saved: it is a legal checkpoint.

    >>> context_of(ValueError("raised somewhere else")) is None
    True
    """
    return getattr(error, _ATTRIBUTE, None)
