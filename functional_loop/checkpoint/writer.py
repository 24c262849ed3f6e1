"""Saving into a folder: nothing is written over but what this run wrote, nothing deleted before the new is there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ..core.context import Context
from ..core.errors import CheckpointError, StateDictError
from ..core.patterns import Patterns
from ..core.stages import BOUNDARIES
from ..ensembles.ensemble import member_seeds
from . import file as checkpoint_file
from .comparing import check_allowed, compare_runs, refusal, unknown_differences
from .digests import digest_of, durable
from .folder import PLACE, Entry, delete, entries, newest_metadata, readable, signature
from .identity import hash_of_start, remembered_start
from .lock import FolderLock
from .migrations import migrate
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
        self._start: dict[str, Any] | None = None
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

    def check_allow(self, told: dict[str, Any]) -> None:
        """Refuse a misspelt name in ``allow``; ``told`` is what a state dict tells of the run that is to be saved."""
        if self._identity is None and self.allow:
            check_allowed(self.allow, told, newest_metadata(self.folder) or {})

    def check_start(self, ctx: Context, state: dict[str, Any]) -> None:
        """Refuse a folder that holds more than the beginning of another run than the one that starts with ``ctx``.

        Only the very same run starts again where one has been, and what code means is not known: nothing is allowed.

        Raises:
            StateDictError, CheckpointError: as `check_run`.
        """
        self._start = begun(ctx)
        metadata = newest_metadata(self.folder)
        if metadata is None or metadata["global_step"] == 0:
            return
        here = describe(ctx, state, self._start)
        saved, own = ({**identity_of(each), **_started(each, metadata)} for each in (metadata, here))
        found = [*compare_runs(saved, own), *unknown_differences(saved, own)]
        # That data or first values are computed in another way explains nothing where something else is another.
        if found := found or compare_runs(saved, own, rounded=True):
            raise StateDictError(
                f"{self.folder} holds checkpoints of another run, up to step {metadata['global_step']}, among which a "
                "run that starts would put its own: give it a folder of its own, or go on with that one by "
                "resume(loop, path):",
                found,
            )

    def write(self, entry: Entry, state: Any, metadata: dict[str, Any], lock: FolderLock) -> list[str]:
        """Write a file, and delete what is too old when it is on the disk; what could not be deleted, a line each.

        Where a later boundary of the step is saved already, that stays. All is done in the folder that is locked,
        wherever that is by now: nothing in a folder that has taken its place changes.

        Raises:
            StateDictError, CheckpointError: as `check_run`, or the file to be replaced is damaged or of another run.
            OSError: the file could not be written; or the folder is not the one that was locked any more.
        """
        lock.check_is_of(self.folder)
        identity = identity_of(metadata)
        self.check_run(identity)
        if self._replaces(entry, state, metadata):
            checkpoint_file.write(entry.path, state, metadata, lock.folder)
            lock.check_is_of(self.folder)
            self._last_written = entry.path, signature(entry.path)
        too_old = self._too_old(entry.global_step, identity)
        lock.check_is_of(self.folder)
        self._identity = identity
        return delete(too_old, lock.folder)

    def started(self) -> dict[str, Any]:
        """What is known of the start of the run that the folder holds."""
        if self._start is None:
            self._start = (newest_metadata(self.folder) or {}).get("start", {})
        return self._start

    def _replaces(self, entry: Entry, state: Any, metadata: dict[str, Any]) -> bool:
        """Whether the file is to be written: nothing is written over but an intact file of this run (one just written
        here, or one that is verified) of an earlier boundary, or of this one with the same bits.

        Raises:
            CheckpointError: the file that is there is another.
        """
        path = entry.path
        if not os.path.lexists(path):
            return True
        if not path.exists():
            raise CheckpointError(f"refused to write over {path}, which is a link that leads nowhere: move it away")
        own = self._last_written == (path, signature(path))
        try:
            saved = entry.metadata() if own else entry.verify()
        except CheckpointError as error:
            raise CheckpointError(f"refused to write over a file that is not intact, move it away: {error}") from error
        there, here = identity_of(saved), identity_of(metadata)
        if differences := compare_runs(there, here, self.allow):
            raise CheckpointError(f"refused to write over {path}, which is of another run: {'; '.join(differences)}")
        if compare_runs(there, here) or set(saved.get("skipped", ())) < set(metadata["skipped"]):
            return True  # a difference that is allowed, or a run that went back to pass batches over
        if _place(saved) != _place(metadata):
            return _place(saved) < _place(metadata)
        if _same_bits(entry, saved["version"], state):
            return True
        raise CheckpointError(
            f"refused to write over {path}, which is of the same place of the run (step {entry.global_step}, after "
            f"{metadata['stage']!r}) with other bits: this is a branch of that run, or its code, data or machine is "
            "another; give it a folder of its own"
        )

    def _too_old(self, newest: int, identity: dict[str, Any]) -> list[Path]:
        """What is not to be kept of the files of this run up to the step ``newest``, which was just saved."""
        if self.retention == Retention():
            return []
        found = readable([entry for entry in entries(self.folder) if entry.global_step <= newest])
        own = [item for item in found if not compare_runs(identity_of(item[1]), identity, self.allow)]
        kept = self.retention.kept(metadata for _, metadata in own)
        return [entry.path for entry, _ in own if entry.global_step not in kept]


def describe(ctx: Context, state: dict[str, Any], start: dict[str, Any] | None = None) -> dict[str, Any]:
    """What can be known of a checkpoint without reading its tensors.

    Args:
        start: what is known of the start of the run, see `begun`.
    """
    return {
        **run_of(ctx),
        **{name: getattr(ctx, name) for name in PLACE},
        "step_valid": ctx.step_valid,
        "last_scores_valid": {id: _mean(score) for id, score in dict(ctx.last_scores_valid).items()},
        "minimize": {measure.id: measure.minimize for measure in ctx.loop.measures_valid},
        "epochs": ctx.loop.epochs,
        "skip_batches": sorted(ctx.loop.skip_batches),
        "skipped": sorted(ctx.loop.skipped(ctx.callbacks)),
        "start": start or {},
        **{name: state[name] for name in ("version", "fingerprint", "environment", "hyperparameters")},
    }


def begun(ctx: Context) -> dict[str, Any]:
    """What is known of a start: a hash of its values, and whether they are those that the loop makes of the seed."""
    values = hash_of_start(ctx)
    return {"values": values, "made": ctx.ensemble is None and remembered_start(ctx) == values}


def _started(metadata: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """What two runs that start must have in common beside the fingerprint, of what the ``other`` has."""
    known = {name: metadata[name] for name in ("hyperparameters", "skip_batches") if name in other}
    return known | ({"start": metadata["start"]["values"]} if other.get("start") else {})


def _same_bits(entry: Entry, version: int, state: dict[str, Any]) -> bool:
    """Whether a file holds the bits of ``state``; only one of an earlier version is read for that."""
    if version == state["version"]:
        return bool(durable(checkpoint_file.read_outline(entry.path)) == durable(checkpoint_file.outline(state)))
    return digest_of(migrate(entry.read()[0])) == digest_of(state)


def _place(metadata: dict[str, Any]) -> tuple[int, int, int]:
    """Which of two boundaries of a step is later."""
    stage = metadata["stage"]
    return metadata["epoch"], BOUNDARIES.index(stage) if stage in BOUNDARIES else -1, metadata.get("step_valid", 0)


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
