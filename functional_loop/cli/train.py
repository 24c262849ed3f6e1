"""``train``: train a loop in a folder, from where the folder stands to the end, or until a signal comes."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

from ..checkpoint.digests import digest
from ..checkpoint.resume import resume
from ..checkpoint.store import CheckpointStore
from ..core.context import Context, context_of
from ..core.errors import CheckpointError, StateDictError, add_note
from ..engine.loop import Loop
from ..engine.signals import Signals
from ..engine.train import iterate
from . import report, run_file
from .console import make_console
from .progress import progress
from .target import load_loop, with_history
from .usage import UsageError, in_one_line

_KEPT = 3


def run(options: argparse.Namespace, command: str) -> int:
    """Train what ``options.target`` names in the folder ``options.run``; a run that is there already is continued.

    The folder gets ``checkpoints/``, ``history.csv``, ``learning_curve.png`` and ``run.json``, which says what is
    trained; the loop gets a `history` if it has none.

    Args:
        options: of the command line.
        command: what a person has to type to continue.

    Returns:
        The exit code; see `functional_loop.cli.main`.

    Raises:
        UsageError: there is no such target; the folder is a file, or holds something else than this run.
    """
    loop = load_loop(options.target, options.epochs, options.overfit)
    return Run(with_history(loop), options, command).train(options.seed)


class Run:
    """A loop, the folder it is trained in, and the console that is told of it."""

    def __init__(self, loop: Loop, options: argparse.Namespace, command: str) -> None:
        self.folder = Path(os.path.abspath(options.run))
        check_folder(self.folder)
        self.loop = loop
        self.options = options
        self.command = command
        self.store = CheckpointStore(self.folder / "checkpoints", keep_last=_KEPT, allow=options.allow)
        self.console = make_console()

    def train(self, seed: int) -> int:
        ctx = self._resume(seed)
        if ctx.stage == "end":
            self._say(f"{self.folder}: finished already, after {_epochs(ctx)}")
            return self._finish(ctx)
        if self._is_enough(ctx):
            self._say(f"{self.folder}: stopped already, after {_place(ctx)}, as --max-steps says")
            return 0
        self._check(ctx)
        start = (
            f"a new run of {_epochs(self.loop)}, seed {seed}" if ctx.stage == "" else f"continuing after {_place(ctx)}"
        )
        self._say(f"{self.folder}: {start}")
        run_file.write(self.folder, run_file.Trained(self.options.target, self.options.overfit))
        signals = Signals(self._requeue)
        try:
            with signals:
                ctx = self._walk(ctx, signals)
        except KeyboardInterrupt:
            self._say(f"Stopped at once. What was saved before is unharmed; continue with:\n  {self.command}")
            return signals.exit_code
        except Exception as error:
            return self._fail(error)
        return self._finish(ctx) if ctx.stage == "end" else self._stop(ctx, signals)

    def _resume(self, seed: int) -> Context:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            try:
                ctx = resume(self.loop, self.store.path, seed, self.options.allow, must_exist=False)
            except (StateDictError, CheckpointError) as error:
                raise UsageError(in_one_line(error)) from None
        for warning in caught:
            print(f"functional-loop: warning: {warning.message}", file=sys.stderr)
        return ctx

    def _check(self, ctx: Context) -> None:
        """Refuse a folder that another process trains in, or that can't be written to."""
        try:
            self.store.check(ctx)
        except (StateDictError, CheckpointError) as error:
            raise UsageError(in_one_line(error)) from None
        except OSError as error:
            raise UsageError(f"--run {self.options.run} can't be written to: {error.strerror or error}") from None

    def _walk(self, start: Context, signals: Signals) -> Context:
        """Train to the end, the last step or the first boundary after a signal, and save on the way."""
        with progress(self.console, start, signals) as display:
            for ctx in iterate(start):
                display.show(ctx)
                stops = bool(signals.received) or self._is_enough(ctx)
                if stops or self._is_due(ctx):
                    self.store.save(ctx)
                if stops:
                    break
        return ctx

    def _is_enough(self, ctx: Context) -> bool:
        most: int | None = self.options.max_steps
        return most is not None and ctx.global_step >= most

    def _is_due(self, ctx: Context) -> bool:
        every: int | None = self.options.every_steps
        if ctx.stage == "batch_end":
            return every is not None and ctx.global_step % every == 0
        return ctx.stage in ("epoch_end", "end")

    def _finish(self, ctx: Context) -> int:
        rows = ctx.callbacks["history"]
        if rows:
            self.console.print(report.table(rows, report.columns(self.loop)))
        self._say(f"digest: {digest(ctx)}")
        self._write(ctx)
        return 0

    def _stop(self, ctx: Context, signals: Signals) -> int:
        self._say(f"Stopped and saved after {_place(ctx)}.")
        self._write(ctx)
        self._say(f"Continue with:\n  {self.command}")
        signals.requeue()
        return signals.exit_code

    def _requeue(self) -> None:
        """Run the command that the person gave to queue the job again."""
        if self.options.requeue is not None:
            done = subprocess.run(self.options.requeue, shell=True, check=False)
            if done.returncode != 0:
                print(f"functional-loop: --requeue failed with exit code {done.returncode}", file=sys.stderr)

    def _fail(self, error: Exception) -> int:
        """Save the last good context, and let the person see what happened."""
        if (ctx := context_of(error)) is not None:
            try:
                path = self.store.save(ctx)
                add_note(error, f"the state before the error, after {_place(ctx)}, was saved to {path}")
            except Exception as failure:
                add_note(error, f"the state before the error could not be saved: {failure!r}")
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
    # What tells of the run is there before its first checkpoint.
    if not folder.exists() or all(path.name.lstrip(".").startswith(run_file.NAME) for path in folder.iterdir()):
        return
    checkpoints = folder / "checkpoints"
    if not checkpoints.is_dir() or not all(path.name.startswith(("step-", ".")) for path in checkpoints.iterdir()):
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
    length = ctx.loop.train.expected_length
    of = f" of {length}" if length is not None and ctx.step <= length else ""
    validation = f", validation step {ctx.step_valid}" if ctx.step_valid else ""
    return f"step {ctx.step}{of} of epoch {ctx.epoch} of {ctx.loop.epochs}{validation}"
