"""Saves and leaves when a signal comes."""

from __future__ import annotations

import math
from collections.abc import Callable

from ...checkpoint.store import CheckpointStore
from ...core.context import boundary
from ...engine.signals import Signals
from ..logs.writing import CallbackSetWriting, PathOrFunction


class CallbackSetStopOnSignal(CallbackSetWriting):
    """Saves the context at the next batch after SIGINT (Ctrl-C), SIGTERM or SIGUSR1, and leaves the program.

    It leaves by ``SystemExit`` with the usual code (130, 143, 138), so that files are closed and every ``exit`` hook
    runs; the same program started again goes on with ``resume(loop, path, seed)``. A SIGINT after another signal stops
    at once, by ``KeyboardInterrupt``. Handlers from before are put back when the run is left. See `Signals` for
    training outside of the main thread, where signals are off, and says so.

    It runs last in its stages (weight infinity), so that what it saves is what the other callbacks have left. An
    ensemble is saved as one, with all its members.

    Args:
        path: the folder of a `CheckpointStore`, that of ``checkpoint`` for example; or a function that returns it and
            is asked once per run.
        requeue: called after saving when the signal was SIGUSR1, which SLURM sends before time is up
            (``sbatch --signal=USR1@120``): a function that queues the job again.
        id: the name of the callback, unique in a loop.

    Raises:
        TypeError: ``path`` or ``requeue`` is something else.
        StateDictError: before training: the folder holds another run.

    Resuming:
        It keeps no state.

    >>> import signal, tempfile
    >>> import functional_loop as fl
    >>> from functional_loop.callbacks.control.stop_on_signal import CallbackSetStopOnSignal
    >>> from functional_loop.examples.digits import loop
    >>> path = tempfile.mkdtemp()
    >>> send = fl.Callback("send", batch_end=lambda ctx: signal.raise_signal(signal.SIGTERM) or ctx)
    >>> try:
    ...     fl.train(fl.init(fl.evolve(loop(), callbacks=[send, CallbackSetStopOnSignal(path)])))
    ... except SystemExit as error:
    ...     print(error.code, fl.CheckpointStore(path).steps())
    143 [1]
    """

    weight = math.inf
    last = True
    whole = True
    for_one_run = False

    def __init__(
        self, path: PathOrFunction, requeue: Callable[[], object] | None = None, id: str | None = None
    ) -> None:
        super().__init__(path, id)
        Signals(requeue)
        self._requeue = requeue
        self._signals: Signals | None = None

    def on_begin(self) -> None:
        self._store = CheckpointStore(self._enter())
        self._store.check(self.ctx.context)
        self.on_exit()
        self._signals = Signals(self._requeue).__enter__()

    def on_batch_end(self) -> None:
        self._leave("batch_end")

    def on_batch_valid_end(self) -> None:
        self._leave("batch_valid_end")

    def on_epoch_end(self) -> None:
        self._leave("epoch_end")

    def on_exit(self) -> None:
        if self._signals is not None:
            self._signals.__exit__()
            self._store.close()
        self._signals = None

    def _leave(self, stage: str) -> None:
        if self._signals is not None and self._signals.received is not None:
            self._store.save(boundary(self.ctx.context, stage))
            self._signals.exit()


stop_on_signal = CallbackSetStopOnSignal
