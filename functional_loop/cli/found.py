"""From what a person names, a run's folder or a file, to checkpoints."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checkpoint import file as checkpoint_file
from ..core.errors import CheckpointError, FunctionalLoopError
from ..engine.loop import Loop
from ..replay.replay import read_state, saved_files
from . import run_file
from .target import load_loop, with_history
from .usage import UsageError, in_one_line


def checkpoints_of(folder: Path) -> Path:
    """The folder of checkpoints of the run in ``folder``, which may itself be it.

    Raises:
        UsageError: there is none.
    """
    for path in (folder, folder / "checkpoints"):
        if saved_files(path):
            return path
    raise UsageError(f"{folder} holds no checkpoints")


def read(path: Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """A checkpoint file, or the newest one of a run's folder: its path, its state and its metadata.

    Raises:
        UsageError: there is no such file, or it is damaged or no checkpoint.
    """
    file = saved_files(checkpoints_of(path))[-1] if path.is_dir() else path
    try:
        return file, *read_state(file)
    except (OSError, FunctionalLoopError) as error:
        raise UsageError(in_one_line(error)) from None


@contextmanager
def showing(*files: Path) -> Generator[None]:
    """A region in which the states of files are shown, which may hold anything, though their checksums are right.

    Raises:
        UsageError: one can't be shown.
    """
    try:
        yield
    except Exception as error:
        named = " and ".join(map(str, files))
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(f"{named}: can't be shown, since it holds what no run has saved ({reason})") from error


def loop_of(folder: Path, target: str | None, trust: bool) -> Loop:
    """The loop that was trained in ``folder``: ``target``, or if it is to be trusted what was noted there, as it was
    trained.

    Raises:
        UsageError: there is no such thing.
    """
    trained = run_file.read(folder, target, trust)
    loop = load_loop(trained.target, overfit_batches=trained.overfit)
    return with_history(loop) if any(map(_has_history, saved_files(checkpoints_of(folder)))) else loop


def _has_history(file: Path) -> bool:
    try:
        return "history" in checkpoint_file.read_metadata(file)["fingerprint"]["callbacks"]
    except (CheckpointError, LookupError, TypeError):
        return False
