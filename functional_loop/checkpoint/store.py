"""Checkpoints on disk: a folder of verified files, one per saved step of one run."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, Self

from ..core.context import Context, check_context
from ..core.errors import CheckpointError, loading
from ..core.patterns import Patterns
from ..core.place import check_place
from ..engine.loop import Loop
from .atomic import explaining, make_folder
from .background import Background
from .folder import delete, entries, entry_of, left_over, newest_intact, readable
from .identity import identity
from .lock import FolderLock
from .migrations import VERSION
from .retention import Retention, best_steps
from .state import start_of, state_dict
from .writer import Saver, describe, identity_of, run_of


class CheckpointStore:
    """A folder of checkpoints of one run.

    One process at a time writes to a folder: from its first `save` or `check` on, until `close` or the end of the
    process, other processes are refused, see `FolderLock`. Reading is always possible.

    Args:
        path: the folder; it is made when the first checkpoint is saved, and may hold other files too. A relative path
            is one in the working folder of now.
        keep_last: how many steps to keep, counted back from the one just saved; ``None`` keeps all, or with
            ``keep_best`` or ``every`` only the one just saved.
        keep_best: the id of a validation measure, or a pair of it and a number: so many steps of the best scores are
            kept beside the last ones. A score counts at the end of its epoch; an ensemble has the mean of its members.
        every: a number of steps: the first checkpoint at or after each multiple of it is kept for good.
        allow: differences in spite of which a run is loaded from here, and goes on being saved here; see
            `load_state_dict`.

    Nothing is deleted before a newer checkpoint is on the disk, and never the newest.

    Raises:
        ValueError: a number is less than 1, or ``keep_best`` is something else.
        NotADirectoryError: ``path`` is a file.

    >>> import tempfile
    >>> import torch
    >>> import functional_loop as fl
    >>> x = torch.arange(8.0).unsqueeze(1)
    >>> loop = fl.Loop(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss, fl.optimizer(torch.optim.SGD, lr=0.01),
    ...                train=fl.batches(x, 2 * x, batch_size=4), epochs=2)
    >>> ctx = fl.train(fl.init(loop, seed=0), steps=3)
    >>> with CheckpointStore(tempfile.mkdtemp(), keep_last=3) as store:
    ...     store.save(ctx).name
    'step-00000003.safetensors'
    >>> fl.digest(store.load(loop)) == fl.digest(ctx)
    True
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        keep_last: int | None = None,
        keep_best: str | tuple[str, int] | None = None,
        every: int | None = None,
        allow: Patterns = (),
    ) -> None:
        self.path = Path(os.path.abspath(path))
        self.retention = Retention(keep_last, keep_best, every)
        self.allow = allow
        self._saver = Saver(self.path, self.retention, allow)
        self._lock: FolderLock | None = None
        self._background = Background()
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"{self.path} is a file, and a checkpoint store is a folder")

    def __repr__(self) -> str:
        kept = self.retention
        every = f", every={kept.every}" if kept.every is not None else ""
        return f"CheckpointStore({str(self.path)!r}, keep_last={kept.keep_last}, keep_best={kept.keep_best}{every})"

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is another store of the same folder."""
        kept = self.retention
        return CheckpointStore, (self.path, kept.keep_last, kept.keep_best, kept.every, self.allow)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """The values of ``global_step`` for which there is a file, ascending."""
        return sorted({entry.global_step for entry in entries(self.path)})

    def latest(self) -> int:
        """The newest step of which there is a file that can be read.

        Raises:
            FileNotFoundError: there is none.
        """
        found = readable(entries(self.path))
        if not found:
            raise FileNotFoundError(f"no checkpoint in {self.path}")
        return found[-1][0].global_step

    def best(self, measure: str | None = None) -> int:
        """The step with the best score of a validation measure, by default that of ``keep_best``; of equal ones the
        first.

        Raises:
            FileNotFoundError: no checkpoint has a score of which it is known whether low or high is better.
            TypeError: no measure is given, and the store has no ``keep_best``.
        """
        if measure is None:
            if self.retention.keep_best is None:
                raise TypeError("best: by which measure? This store has no keep_best")
            measure = self.retention.keep_best[0]
        found = best_steps((metadata for _, metadata in readable(entries(self.path))), measure)
        if not found:
            raise FileNotFoundError(f"no checkpoint in {self.path} has a validation score {measure!r} with a direction")
        return found[0]

    def verify(self) -> dict[Path, CheckpointError]:
        """Verify every bit of every checkpoint: those that are damaged, and what is wrong with each; ``{}`` if none is.

        >>> import tempfile
        >>> CheckpointStore(tempfile.mkdtemp()).verify()
        {}
        """
        damaged = {}
        for entry in entries(self.path):
            try:
                entry.verify()
            except FileNotFoundError:
                continue  # deleted by a process that writes here, since it was listed
            except CheckpointError as error:
                damaged[entry.path] = error
        return damaged

    def check(self, ctx: Context) -> None:
        """Refuse what `save` would refuse of any context of this run, before time is spent on training it; and lock the
        folder, which is made if there is none.

        A run that starts (``ctx`` is of before its first epoch) has an empty folder, or one of the very same run: there
        ``allow`` does not count, and other hyperparameters, other first values and other code are another run too.

        Raises:
            StateDictError: the folder holds another run; the differences are listed.
            StoreInUseError: another process writes to the folder.
            ValueError: the scores of the loop do not say which checkpoint is the best one to keep.
            OSError: the folder can't be written to.
        """
        check_context(ctx, "check")
        self.retention.check(ctx.loop)
        here = identity(ctx.loop)
        self._saver.check_allow(here)
        if ctx.epoch == 0:
            self._saver.check_start(ctx, {"version": VERSION, **here})
        self._saver.check_run(run_of(ctx) | here["fingerprint"])
        self._locked()

    def save(self, ctx: Context, wait: bool = True) -> Path:
        """Save ``ctx`` durably, in place of an earlier boundary of the same step; then delete what is too old.

        The same boundary of a step is replaced by equal bits alone, and a later one stays. A run that goes back to pass
        batches over (see `rollback`) replaces what it saved on the way to them.

        The context of a finished run is saved beside the last ``epoch_end`` of the run, from which training is
        continued when ``epochs`` is raised.

        Args:
            wait: with ``False`` only what is refused is found out at once, and a thread writes the file, the same to
                the byte, while training goes on: contexts do not change, so nothing is copied. One save is under way
                at a time, a second waits for its end. An error in it is raised by the next `save`, by `wait` or by
                `close`, whichever comes first. The process does not end before the file is written.

        Returns:
            The file.

        Raises:
            StateDictError: the folder holds another run; the differences are listed.
            StoreInUseError: another process writes to the folder.
            ValueError: the scores of the loop do not say which checkpoint is the best one to keep.
            TypeError: the state of a callback holds something that can't be saved, by its path.
            CheckpointError: the file to be replaced is damaged, belongs to another run, or has other bits.
            OSError: the file could not be written; what was saved before is unharmed. A folder that was moved, removed
                or replaced since it was locked is a ``FileNotFoundError``, until the store is closed.
        """
        self.wait()
        check_place(ctx, "save")
        with explaining(self.path):
            self.retention.check(ctx.loop)
            state = state_dict(ctx)
            self._saver.check_allow(state)
            if ctx.epoch == 0:
                self._saver.check_start(ctx, state)
            metadata = describe(ctx, state, self._saver.started())
            self._saver.check_run(identity_of(metadata))
            lock, entry = self._locked(), entry_of(self.path, ctx)

        def write() -> list[str]:
            with lock.writing, explaining(self.path):
                return self._saver.write(entry, state, metadata, lock)

        if wait:
            _warn(write())
        else:
            self._background.start(write)
        return entry.path

    def wait(self) -> None:
        """Wait for a save that is under way in the background; its error is raised here, and its warnings are given."""
        _warn(self._background.wait() or [])

    def surface(self) -> None:
        """As `wait`, but only if nothing is under way any more."""
        if self._background.done:
            self.wait()

    def close(self) -> None:
        """Wait for what is under way, and let other processes write to the folder; a later `save` locks it again."""
        try:
            self.wait()
        finally:
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def load(
        self, loop: Loop, step: int | None = None, allow: Patterns | None = None, *, strict: bool = True
    ) -> Context:
        """The context saved at ``global_step`` ``step``, or the newest one, with every bit of its file verified.

        Damaged files that are newer than the one loaded are named in a ``UserWarning``. The context of a finished
        run is taken only where ``loop`` has nothing left to train, else the ``epoch_end`` before it. ``allow`` is for
        once what that of the store is for all, ``strict`` what it is for `load_state_dict`.

        Raises:
            FileNotFoundError: there is no checkpoint, or none of that step.
            CheckpointError: all of them are damaged.
            StateDictError: the checkpoint belongs to another loop; the differences are listed.
        """
        self._background.join()
        found, damaged = newest_intact(self.path, loop, step)
        if found is None and not damaged:
            which = "" if step is None else f" of step {step}; there is {self.steps() or 'none'}"
            raise FileNotFoundError(f"no checkpoint in {self.path}{which}")
        if found is None:
            raise CheckpointError("\n".join(str(error) for error in damaged.values()))
        for error in damaged.values():
            warnings.warn(f"{error}; using {found.path.name}", UserWarning, stacklevel=2)
        allow = self.allow if allow is None else allow
        with loading(found.path):
            return found.into(start_of(loop, found.state, strict, allow), strict, allow)

    def _locked(self) -> FolderLock:
        """The lock of the folder, which is made if there is none.

        Raises:
            StoreInUseError: another process has it.
            OSError: the folder can't be written to, or was moved, removed or replaced since it was locked.
        """
        with explaining(self.path):
            if self._lock is not None:
                self._lock.check_is_of(self.path)
            if self._lock is not None and not self._lock.is_held:
                self._lock.release()
                self._lock = None
                self._saver.forget()
            if self._lock is None:
                make_folder(self.path)
                self._lock = FolderLock(self.path)
                if self._lock.is_first and self._lock.excludes_others:
                    with self._lock.writing:
                        _warn(delete(left_over(self.path), self._lock.folder))
        return self._lock


def _warn(messages: list[str]) -> None:
    for message in messages:
        warnings.warn(message, UserWarning, stacklevel=3)
