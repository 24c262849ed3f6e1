"""Entering a run that others began, and leaving a run: ``resume`` and ``exit`` hooks."""

from __future__ import annotations

from collections.abc import Iterable

from ..checkpoint.going_on import check_fit
from ..core.callback import Hook
from ..core.context import Context
from ..core.errors import add_note, attach_context, told
from .hooks import hooks_of

Call = tuple[str, Hook, Context]
"""The id of a callback, its hook, and the context that the hook is given."""


def run_resume(ctx: Context) -> None:
    """Run the ``resume`` hooks.

    Raises:
        StateDictError: a callback can't continue with its state.
    """
    check_fit(ctx)
    hooks = hooks_of(ctx.loop)
    for id, hook in hooks.of["resume"]:
        hooks.run_one("resume", id, hook, ctx)


def run_exit(ctx: Context, reason: BaseException | None, calls: Iterable[Call] | None = None) -> None:
    """Run every ``exit`` hook, even when one fails; their failures never hide the error that training stopped for.

    Args:
        ctx: the last boundary.
        reason: the error that training stopped for.
        calls: the hooks to run; by default those of the loop, on ``ctx``.
    """
    hooks, failures = hooks_of(ctx.loop), []
    for id, hook, given in calls if calls is not None else ((id, hook, ctx) for id, hook in hooks.of["exit"]):
        try:
            hooks.run_one("exit", id, hook, given)
        except BaseException as error:
            failures.append(error)
    # What stops the process (KeyboardInterrupt, SystemExit) must get through.
    failures.sort(key=lambda error: isinstance(error, Exception))
    if reason is not None:
        _add_notes(reason, failures)
    elif failures:
        first, *others = failures
        attach_context(first, ctx)
        _add_notes(first, others)
        raise first


def _add_notes(error: BaseException, failures: list[BaseException]) -> None:
    for failure in failures:
        add_note(error, f"an exit hook failed as well: {told(failure)}")
