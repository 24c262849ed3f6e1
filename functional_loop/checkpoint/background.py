"""Work in the background: one thing at a time, and no error of it is lost."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import attrs

from ..core.errors import add_note


@attrs.define(eq=False)
class _Outcome:
    """The result of a piece of work, until it is asked for."""

    result: Any = None
    error: BaseException | None = None

    def take(self) -> Any:
        result, error = self.result, self.error
        self.result = self.error = None
        if error is not None:
            raise error
        return result

    def report(self) -> None:
        """The result was never asked for, and can't be any more."""
        if (error := self.error) is not None:
            add_note(error, "it happened in the background, and nobody waited for the result")
            sys.excepthook(type(error), error, error.__traceback__)


class Background:
    """Runs functions one after the other, each on a thread of its own, whose end the process awaits before it exits.

    >>> background = Background()
    >>> background.start(lambda: 6 * 7)
    >>> background.wait()
    42
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._outcome = _Outcome()
        weakref.finalize(self, self._outcome.report)

    def start(self, work: Callable[[], Any]) -> None:
        """Start ``work``, when what was started before is done; `wait` for that first, to see what became of it."""
        self.join()
        thread = threading.Thread(target=_run, args=(work, self._outcome), name="functional_loop", daemon=False)
        thread.start()
        self._thread = thread

    def wait(self) -> Any:
        """What the work returned, or ``None`` if there is none to wait for; an error of it is raised here, once."""
        self.join()
        return self._outcome.take()

    @property
    def done(self) -> bool:
        """Whether `wait` would return, or raise, at once."""
        return self._thread is None or not self._thread.is_alive()

    def join(self) -> None:
        """Wait, and leave what became of the work to `wait`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def _run(work: Callable[[], Any], outcome: _Outcome) -> None:
    try:
        outcome.result = work()
    except BaseException as error:
        outcome.error = error
