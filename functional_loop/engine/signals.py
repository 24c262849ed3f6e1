"""Signals as a wish that a loop looks at between batches: to save, and to leave."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

# SIGUSR1 is what SLURM is told to send before time is up; Windows has no such signal.
_NUMBERS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Signals:
    """Notes the first SIGINT (Ctrl-C), SIGTERM or SIGUSR1 in ``received``, so that the loop can save and leave.

    A context manager around training. A SIGINT that comes after another signal is a ``KeyboardInterrupt`` at once. At
    the end the handlers from before are back. Where another `Signals` is in force already, that one is left to do its
    work.

    Python lets only the main thread set handlers: entered in another, it says in a ``UserWarning`` that signals are
    off. Training that runs in a thread can look at a `Signals` that the main thread has entered.

    Args:
        requeue: called by `exit` when the signal was SIGUSR1, after all that is to be saved was saved: to queue the job
            again, for example by ``scontrol requeue``.

    Attributes:
        received: the signal, or ``None``.

    >>> import tempfile
    >>> import functional_loop as fl
    >>> from functional_loop.examples.digits import loop
    >>> store = fl.CheckpointStore(tempfile.mkdtemp())
    >>> try:
    ...     with fl.Signals() as signals:
    ...         for ctx in fl.iterate(fl.resume(loop(), store.path, must_exist=False)):
    ...             if ctx.global_step == 5:
    ...                 signal.raise_signal(signal.SIGTERM)
    ...             if signals.received:
    ...                 path = store.save(ctx)
    ...             signals.exit()
    ... except SystemExit as error:
    ...     print(path.name, error.code)
    step-00000005.safetensors 143
    """

    def __init__(self, requeue: Callable[[], object] | None = None) -> None:
        if requeue is not None and not callable(requeue):
            raise TypeError(f"Signals: requeue is a function of no arguments, not {requeue!r}")
        self.received: signal.Signals | None = None
        self._requeue = requeue
        self._before: dict[int, Any] = {}
        self._process = 0

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            warnings.warn(
                f"signals are off: training runs in the thread {threading.current_thread().name!r}, and only the main "
                "thread can handle signals; enter Signals there, and look at it here",
                UserWarning,
                stacklevel=2,
            )
            return self
        self._process = os.getpid()
        for number in _NUMBERS:
            handler = signal.getsignal(number)
            # One that is None was not set by Python, which could not put it back.
            if handler is not None and not isinstance(getattr(handler, "__self__", None), Signals):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            _as_if_unhandled(number)
        elif number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        elif self.received is None:
            self.received = signal.Signals(number)

    @property
    def exit_code(self) -> int:
        """What a shell expects of a program that a signal has stopped: 130, 143 or 138; 0 if there was none."""
        return 128 + self.received if self.received is not None else 0

    def exit(self) -> None:
        """Leave the program if there was a signal, and queue the job again if it was SIGUSR1; else do nothing.

        Raises:
            SystemExit: with `exit_code`.
        """
        if self.received is not None:
            self.requeue()
            raise SystemExit(self.exit_code)

    def requeue(self) -> None:
        """Call the function ``requeue``, if there is one and the signal was SIGUSR1."""
        if self._requeue is not None and self.received == getattr(signal, "SIGUSR1", None):
            self._requeue()


def _as_if_unhandled(number: int) -> None:
    """In a process that was forked while training, such as a data worker, signals do what they usually do.

    But for Ctrl-C, which a terminal sends to all of them: a worker goes on, so that the batch at hand can be finished.
    """
    if number != signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
