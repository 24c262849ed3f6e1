"""Saving into a folder: nothing is written over but what this run wrote, nothing deleted before the new is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..context import Context
from ..ensembles.ensemble import member_seeds
from ..errors import CheckpointError
from ..identity import compare_runs, refusal
from ..patterns import Patterns
from . import checkpoint_file
from .folder import PLACE, Entry, delete, entries, newest_metadata, readable, signature
from .retention import Retention


class Saver:
    """Writes the checkpoints of one run into ``folder``; one thread at a time, see `FolderLock`."""

    def __init__(self, folder: Path, retention: Retention, allow: Patterns = ()) -> None:
        self.folder = folder
        self.retention = retention
        self.allow = allow
        self.forget()

    def forget(self) -> None:
        """What is known of the folder is no longer true of it."""
        self._identity: dict[str, Any] | None = None
        self._last_written: tuple[Path, tuple[int, ...]] | None = None

    def check_run(self, identity: dict[str, Any]) -> None:
        """Refuse a folder of another run than that of ``identity``.

        Raises:
            StateDictError: it holds another run; the differences are listed.
            CheckpointError: it holds files that are checkpoints by their names, and no readable one.
        """
        saved = self._identity
        if saved is None and (metadata := newest_metadata(self.folder)) is not None:
            saved = identity_of(metadata)
        if saved is not None and (differences := compare_runs(saved, identity, self.allow)):
            raise refusal(
                f"{self.folder} holds checkpoints of another run; give this run a folder of its own:", differences
            )

    def write(self, entry: Entry, state: Any, metadata: dict[str, Any]) -> list[str]:
        """Write a file, and delete what is too old when it is on the disk; what could not be deleted, a line each.

        Raises:
            StateDictError, CheckpointError: as `check_run`, or the file to be replaced is damaged or of another run.
            OSError: the file could not be written.
        """
        identity = identity_of(metadata)
        self.check_run(identity)
        self._check_target(entry, identity)
        checkpoint_file.write(entry.path, state, metadata)
        self._identity = identity
        self._last_written = entry.path, signature(entry.path)
        return delete(self._too_old(entry.global_step, identity))

    def _check_target(self, entry: Entry, identity: dict[str, Any]) -> None:
        """Nothing is written over but an intact file of this run: one just written here, or one that is verified."""
        path = entry.path
        if not path.exists() or self._last_written == (path, signature(path)):
            return
        try:
            saved = identity_of(entry.verify())
        except CheckpointError as error:
            raise CheckpointError(f"refused to write over a file that is not intact, move it away: {error}") from error
        if differences := compare_runs(saved, identity, self.allow):
            raise CheckpointError(f"refused to write over {path}, which is of another run: {'; '.join(differences)}")

    def _too_old(self, newest: int, identity: dict[str, Any]) -> list[Path]:
        """What is not to be kept of the files of this run up to the step ``newest``, which was just saved."""
        if self.retention == Retention():
            return []
        found = readable([entry for entry in entries(self.folder) if entry.global_step <= newest])
        own = [item for item in found if not compare_runs(identity_of(item[1]), identity, self.allow)]
        kept = self.retention.kept(metadata for _, metadata in own)
        return [entry.path for entry, _ in own if entry.global_step not in kept]


def describe(ctx: Context, state: dict[str, Any]) -> dict[str, Any]:
    """What can be known of a checkpoint without reading its tensors."""
    return {
        **run_of(ctx),
        **{name: getattr(ctx, name) for name in PLACE},
        "last_scores_valid": {id: _mean(score) for id, score in dict(ctx.last_scores_valid).items()},
        "minimize": {measure.id: measure.minimize for measure in ctx.loop.measures_valid},
        "epochs": ctx.loop.epochs,
        **{name: state[name] for name in ("version", "fingerprint", "environment")},
    }


def _mean(score: Any) -> float:
    """The score of a run, or the mean over the members of an ensemble."""
    return float(torch.as_tensor(score, dtype=torch.float64).mean())


def run_of(ctx: Context) -> dict[str, Any]:
    """The seed of a run, and those of the members of an ensemble."""
    if ctx.ensemble is None:
        return {"seed": ctx.seed}
    seeds = member_seeds(ctx)
    return {"seed": seeds[0], "members": seeds}


def identity_of(metadata: dict[str, Any]) -> dict[str, Any]:
    return {**{key: metadata[key] for key in ("seed", "members") if key in metadata}, **metadata["fingerprint"]}
