"""Checkpoints while training."""

from __future__ import annotations

import math

from ...checkpoint.retention import Retention
from ...checkpoint.store import CheckpointStore
from ...core.context import boundary
from ...core.patterns import Patterns
from ..checks import check_integer
from ..logs.writing import CallbackSetWriting, PathOrFunction


class CallbackSetCheckpoint(CallbackSetWriting):
    """Saves the context to a `CheckpointStore`: every few epochs or batches, and at the end.

    It runs after all others of its stages, whatever their weights, so that what it saves is what the other callbacks of
    the stage have left. An ensemble is saved as one, with all its members. The end of the last epoch is saved in any
    case, because a run that is to be longer goes on from there.

    Args:
        path: the folder of the store, or a function that returns it and is asked once per run.
        every_steps: batches from one checkpoint to the next; ``None`` for none between epochs.
        every_epochs: epochs from one checkpoint to the next; ``None`` for none but that of the last epoch.
        keep_last: how many of the newest steps to keep; ``None`` for all, or with one of the next two for the newest
            alone.
        keep_best: id of a validation measure, or a pair such as ``("accuracy", 3)``: so many steps of the best scores
            are kept beside the newest; `CheckpointStore.best` finds the best one.
        keep_every: a number of steps: the first checkpoint at or after each multiple of it is kept for good.
        asynchronous: train on while a thread writes, see `CheckpointStore.save`; the files are the same to the byte. An
            error in it is the error of its next hook, in ``exit`` at the latest, where it waits for what is under way.
        allow: differences in spite of which a run goes on being saved in its folder, when it was resumed with the same
            ``allow``; see `load_state_dict`.
        id: the name of the callback, unique in a loop.

    Raises:
        TypeError: ``path`` is something else.
        ValueError: a number that is not positive; before training: no validation measure ``keep_best``, or one of which
            neither high nor low is better.
        NotADirectoryError: ``path`` is a file.
        StateDictError: before training: the folder holds another run.
        StoreInUseError: before training: another process writes to the folder; this one has it until ``exit``.
        OSError: a checkpoint could not be written; the run can be saved elsewhere with `context_of` of the error.

    Resuming:
        It keeps no state: ``resume(loop, path, seed)`` continues from the newest checkpoint, and a run that is
        continued saves where its own ``path`` says.

    Mirrors R's ``CallbackSetCheckpoint`` (mlr3torch).

    >>> import tempfile
    >>> import functional_loop as fl
    >>> from functional_loop.callbacks.control.checkpoint import CallbackSetCheckpoint
    >>> from functional_loop.examples.digits import loop
    >>> path = tempfile.mkdtemp()
    >>> saving = fl.evolve(loop(epochs=3), callbacks=[CallbackSetCheckpoint(path, keep_last=2)])
    >>> ctx = fl.train(fl.init(saving, seed=1))
    >>> fl.CheckpointStore(path).steps()
    [46, 69]
    >>> fl.digest(fl.resume(saving, path, seed=1)) == fl.digest(ctx)
    True
    """

    weight = math.inf
    last = True
    whole = True
    for_one_run = False

    def __init__(
        self,
        path: PathOrFunction,
        every_steps: int | None = None,
        every_epochs: int | None = 1,
        keep_last: int | None = None,
        keep_best: str | tuple[str, int] | None = None,
        keep_every: int | None = None,
        asynchronous: bool = False,
        allow: Patterns = (),
        id: str | None = None,
    ) -> None:
        super().__init__(path, id)
        for name, period in (("every_steps", every_steps), ("every_epochs", every_epochs)):
            if period is not None:
                check_integer(self.id, name, period, least=1)
        self.every_steps = every_steps
        self.every_epochs = every_epochs
        self.asynchronous = asynchronous
        self._retention = Retention(keep_last, keep_best, keep_every)
        self._allow = allow
        self._store: CheckpointStore | None = None

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages at which it does something."""
        return ("begin", *(("batch_end",) if self.every_steps else ()), "epoch_end", "end", "exit")

    def on_begin(self) -> None:
        self._open().check(self.ctx.context)

    def on_batch_end(self) -> None:
        if self._store is not None:
            self._store.surface()
        if self.ctx.global_step % self.every_steps == 0:
            self._save("batch_end")

    def on_epoch_end(self) -> None:
        ctx = self.ctx
        last = ctx.terminate or ctx.epoch >= ctx.total_epochs
        if last or (self.every_epochs is not None and ctx.epoch % self.every_epochs == 0):
            self._save("epoch_end")

    def on_end(self) -> None:
        self._save("end")

    def on_exit(self) -> None:
        store, self._store = self._store, None
        if store is not None:
            store.close()

    def _open(self) -> CheckpointStore:
        kept = self._retention
        self._store = CheckpointStore(self._enter(), kept.keep_last, kept.keep_best, kept.every, self._allow)
        return self._store

    def _save(self, stage: str) -> None:
        (self._store or self._open()).save(boundary(self.ctx.context, stage), wait=not self.asynchronous)


checkpoint = CallbackSetCheckpoint
