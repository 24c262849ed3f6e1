"""``train``: train a loop in a folder, from where the folder stands to the end, or until a signal comes."""

from __future__ import annotations

import sys
import traceback
import warnings
from pathlib import Path

from rich.console import Console

from ..callbacks import history
from ..context import Context
from ..errors import CheckpointError, StateDictError, context_of
from ..lock import NAME as LOCK
from ..loop import Loop
from ..record import evolve
from ..resuming import resume
from ..state import digest
from ..store import CheckpointStore
from ..training import iterate
from . import report
from .interrupts import Interrupts
from .progress import progress
from .usage import UsageError

_KEPT = 3
_WIDTH = 200  # of the table, where no terminal has a width


def train(loop: Loop, folder: Path, seed: int, every_steps: int | None, command: str) -> int:
    """Train ``loop`` in ``folder``; a run that is there already is continued.

    Args:
        loop: what to train; it gets a `history` if it has none.
        folder: gets ``checkpoints/``, ``history.csv`` and ``learning_curve.png``.
        seed: of the run; a run with another seed in ``folder`` is refused.
        every_steps: save every so many batches too, not only after every epoch.
        command: what a person has to type to continue.

    Returns:
        The exit code; see `functional_loop.cli.main`.

    Raises:
        UsageError: ``folder`` is a file, or holds something else than this run.
    """
    if all(callback.as_callback().id != "history" for callback in loop.callbacks):
        loop = evolve(loop, callbacks=[*loop.callbacks, history()])
    return Run(loop, folder, every_steps, command).train(seed)


class Run:
    """A loop, the folder it is trained in, and the console that is told of it."""

    def __init__(self, loop: Loop, folder: Path, every_steps: int | None, command: str) -> None:
        check_folder(folder)
        self.loop = loop
        self.folder = folder
        self.every_steps = every_steps
        self.command = command
        self.store = CheckpointStore(folder / "checkpoints", keep_last=_KEPT)
        self.console = Console(
            width=None if sys.stdout.isatty() else _WIDTH, highlight=False, markup=False, emoji=False
        )

    def train(self, seed: int) -> int:
        ctx = self._resume(seed)
        if ctx.stage == "end":
            self._say(f"{self.folder}: finished already, after {_epochs(ctx)}")
            return self._finish(ctx)
        self._check(ctx)
        start = (
            f"a new run of {_epochs(self.loop)}, seed {seed}" if ctx.stage == "" else f"continuing after {_place(ctx)}"
        )
        self._say(f"{self.folder}: {start}")
        interrupts = Interrupts()
        try:
            with interrupts:
                ctx = self._walk(ctx, interrupts)
        except KeyboardInterrupt:
            self._say(f"Stopped at once. What was saved before is unharmed; continue with:\n  {self.command}")
            return interrupts.exit_code
        except Exception as error:
            return self._fail(error)
        return self._finish(ctx) if ctx.stage == "end" else self._stop(ctx, interrupts)

    def _resume(self, seed: int) -> Context:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            try:
                ctx = resume(self.loop, self.store.path, seed)
            except (StateDictError, CheckpointError) as error:
                raise UsageError(_in_one_line(error)) from None
        for warning in caught:
            print(f"functional-loop: warning: {warning.message}", file=sys.stderr)
        return ctx

    def _check(self, ctx: Context) -> None:
        """Refuse a folder that another process trains in, or that can't be written to."""
        try:
            self.store.check(ctx)
        except (StateDictError, CheckpointError) as error:
            raise UsageError(_in_one_line(error)) from None
        except OSError as error:
            raise UsageError(f"--run {self.folder} can't be written to: {error.strerror or error}") from None

    def _walk(self, start: Context, interrupts: Interrupts) -> Context:
        """Train to the end or to the first boundary after a signal, and save on the way."""
        with progress(self.console, start, interrupts) as display:
            for ctx in iterate(start):
                display.show(ctx)
                if interrupts.received or self._is_due(ctx):
                    self.store.save(ctx)
                if interrupts.received:
                    break
        return ctx

    def _is_due(self, ctx: Context) -> bool:
        if ctx.stage == "batch_end":
            return self.every_steps is not None and ctx.global_step % self.every_steps == 0
        return ctx.stage in ("epoch_end", "end")

    def _finish(self, ctx: Context) -> int:
        rows = ctx.callbacks["history"]
        if rows:
            self.console.print(report.table(rows, report.columns(self.loop)))
        self._say(f"digest: {digest(ctx)}")
        self._write(ctx)
        return 0

    def _stop(self, ctx: Context, interrupts: Interrupts) -> int:
        self._say(f"Stopped and saved after {_place(ctx)}.")
        self._write(ctx)
        self._say(f"Continue with:\n  {self.command}")
        return interrupts.exit_code

    def _fail(self, error: Exception) -> int:
        """Save the last good context, and let the person see what happened."""
        if (ctx := context_of(error)) is not None:
            try:
                path = self.store.save(ctx)
                error.add_note(f"the state before the error, after {_place(ctx)}, was saved to {path}")
            except Exception as failure:
                error.add_note(f"the state before the error could not be saved: {failure!r}")
        traceback.print_exception(error)
        print(f"Training failed. When the reason is mended, continue with:\n  {self.command}", file=sys.stderr)
        return 1

    def _write(self, ctx: Context) -> None:
        """Scores as files, and where all files are."""
        files = [self.store.path]
        if rows := ctx.callbacks["history"]:
            files += report.write(self.folder, rows, report.columns(self.loop))
        self._say("files:  " + "  ".join(map(str, files)))

    def _say(self, line: str) -> None:
        self.console.print(line, soft_wrap=True)


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds something else than a run."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--run {folder} is a file; give a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return
    checkpoints = folder / "checkpoints"
    if not checkpoints.is_dir() or not all(
        path.name.startswith("step-") or path.name == LOCK for path in checkpoints.iterdir()
    ):
        raise UsageError(f"--run {folder} is not empty and holds no run of functional-loop; give a folder of its own")


def _epochs(run: Loop | Context) -> str:
    number = run.epoch if isinstance(run, Context) else run.epochs
    return f"{number} epoch" + ("" if number == 1 else "s")


def _place(ctx: Context) -> str:
    """The words for a boundary: where a run goes on."""
    if ctx.epoch == 0 or ctx.stage == "end":
        return f"the {'start' if ctx.epoch == 0 else 'end'} of the run"
    if ctx.stage == "epoch_end":
        return f"epoch {ctx.epoch} of {ctx.loop.epochs}"
    length = ctx.loop.train.length
    of = f" of {length}" if length is not None else ""
    validation = f", validation step {ctx.step_valid}" if ctx.step_valid else ""
    return f"step {ctx.step}{of} of epoch {ctx.epoch} of {ctx.loop.epochs}{validation}"


def _in_one_line(error: Exception) -> str:
    message, *differences = str(error).splitlines()
    shown = [line.strip().removeprefix("- ") for line in differences[:3]]
    more = [f"and {len(differences) - 3} more"] if len(differences) > 3 else []
    return " ".join([message, "; ".join(shown + more)]).strip()
