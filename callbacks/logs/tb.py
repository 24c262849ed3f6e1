"""Scores and losses for TensorBoard."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ...core.context import Context
from ..checks import check_flag
from ..registry.packages import require
from .history import named_scores
from .writing import CallbackSetWriting, PathOrFunction

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_TRIES = 3  # a second apart


class CallbackSetTB(CallbackSetWriting):
    """Logs the scores of every epoch that has any, and if asked the loss of every batch, for TensorBoard.

    Tags are ``train.<measure id>``, ``valid.<measure id>``, ``epoch`` and ``train.loss``; all points lie at the
    ``global_step`` after which they were made, as TensorBoard has one axis of steps. They are written at once, so that
    a process that is killed loses none that a checkpoint knows of.

    Args:
        path: the folder of the event files, which is the log of one run; or a function that returns it and is asked
            once per run.
        log_train_loss: whether to log the loss of every batch, which waits for a GPU.
        id: the name of the callback, unique in a loop.

    Raises:
        ImportError: TensorBoard is not installed.
        TypeError: ``path`` or ``log_train_loss`` is something else.
        NotADirectoryError: before training: ``path`` is a file.

    Resuming:
        It keeps no state. Every run writes an event file of its own, which begins by hiding the points of earlier files
        from the place of the run on (``purge_step``); points of that very step are written again from what the context
        knows. So the log has every point of the way to the present context once, whatever a run that died has left
        behind. A run that starts anew hides all that was there.

    Source: ``torch.utils.tensorboard.SummaryWriter``. Mirrors R's ``CallbackSetTB`` (mlr3torch), which logs scores at
    the number of the epoch.

    >>> import tempfile
    >>> import functional_loop as fl
    >>> from functional_loop.callbacks.logs.tb import CallbackSetTB
    >>> from functional_loop.examples.digits import loop
    >>> path = tempfile.mkdtemp()
    >>> ctx = fl.train(fl.init(fl.evolve(loop(epochs=2), callbacks=[CallbackSetTB(path)])))
    >>> from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    >>> [point.step for point in EventAccumulator(path).Reload().Scalars("valid.accuracy")]
    [23, 46]
    """

    def __init__(self, path: PathOrFunction, log_train_loss: bool = False, id: str | None = None) -> None:
        super().__init__(path, id)
        check_flag(self.id, "log_train_loss", log_train_loss)
        require("tensorboard", f"callback {self.id!r}")
        self.log_train_loss = log_train_loss
        self.last = not log_train_loss
        self._writer: SummaryWriter | None = None
        self._file: tuple[Path, os.stat_result] | None = None

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages at which it does something."""
        return ("begin", *(("batch_end",) if self.log_train_loss else ()), "epoch_end", "exit")

    def on_begin(self) -> None:
        ctx = self.ctx.context
        self.on_exit()
        self._open(purge_step=ctx.global_step)
        if self.log_train_loss:
            self._log_loss(ctx)
        if ctx.stage in ("epoch_end", "epoch_begin"):
            self._log_scores(ctx, ctx.epoch if ctx.stage == "epoch_end" else ctx.epoch - 1)

    def on_batch_end(self) -> None:
        self._log_loss(self.ctx.context)

    def on_epoch_end(self) -> None:
        self._log_scores(self.ctx.context, self.ctx.epoch)

    def on_exit(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None

    def _log_loss(self, ctx: Context) -> None:
        if not isinstance(ctx.last_loss, tuple):
            self._log({"train.loss": ctx.last_loss.item()}, ctx.global_step)

    def _log_scores(self, ctx: Context, epoch: int) -> None:
        if points := named_scores(ctx):
            self._log({"epoch": epoch, **points}, ctx.global_step)

    def _open(self, purge_step: int | None) -> None:
        folder = self._enter()
        before = _event_files(folder)
        self._writer = open_writer(folder, purge_step)
        path = folder / max(_event_files(folder) - before)
        self._file = path, path.stat()

    def _check_there(self) -> None:
        """Refuse to go on in another folder: the writer opens its file by its name, again and again.

        Raises:
            RuntimeError: the file is not there any more.
        """
        assert self._file is not None
        path, status = self._file
        if not path.exists() or not os.path.samestat(path.stat(), status):
            raise RuntimeError(
                f"{self.id}: the folder {path.parent} was moved, removed or replaced since the run was entered, so "
                "that nothing is written there"
            )

    def _log(self, points: dict[str, float], step: int) -> None:
        if self._writer is None:  # in a `train_step`, which no run surrounds
            self._open(purge_step=None)
        assert self._writer is not None
        self._check_there()
        for tag, value in points.items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()


def open_writer(folder: Path, purge_step: int | None) -> SummaryWriter:
    """A writer to a new event file that comes last in the order in which files are read: that of their names.

    Names begin with the second at which they were made, and go on with the host, the number of the process and a
    counter, neither of which is padded with zeros.

    Raises:
        RuntimeError: there are files from the future.
    """
    from torch.utils.tensorboard import SummaryWriter

    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, and event files are written to a folder")
    for _ in range(_TRIES):
        before = _event_files(folder)
        writer = SummaryWriter(str(folder), purge_step=purge_step)
        if not before or max(_event_files(folder) - before) > max(before):
            return writer
        # The file out of order stays: it has no points, and what it hides is to be hidden.
        writer.close()
        time.sleep(1 - time.time() % 1)
    raise RuntimeError(
        f"{folder} has event files from the future, after which TensorBoard would not read new ones: "
        "set the clock, or give this run a folder of its own"
    )


def _event_files(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("events.out.tfevents.*")}


tb = CallbackSetTB
