"""The folder of a store: which of its files are checkpoints, what they say of themselves, and which can be used."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs

from ..core.context import Context
from ..core.errors import CheckpointError, StateDictError
from ..core.patterns import Patterns
from ..core.plain import decode
from ..engine.loop import Loop
from . import file as checkpoint_file
from .atomic import TEMPORARY
from .comparing import Difference, refusal
from .going_on import check_fit, reopened
from .header import NewerFormatError
from .identity import identity, remembered_start
from .migrations import VERSION, migrate_fingerprint
from .state import load_state_dict

_NAME = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,})(-end)?\.safetensors")
_LEFT_OVER = re.compile(_NAME.pattern + TEMPORARY)

PLACE = ("epoch", "step", "global_step", "stage", "terminate")
"""What the metadata of a checkpoint says of its place in the loop."""

_REQUIRED: dict[str, type] = {"seed": int, "version": int, "fingerprint": dict, "epoch": int, "step": int}
_REQUIRED |= {"global_step": int, "stage": str, "terminate": bool}
_OPTIONAL: dict[str, type] = {"last_scores_valid": dict, "minimize": dict, "members": list, "environment": dict}
_OPTIONAL |= {"hyperparameters": list, "skipped": list, "skip_batches": list, "step_valid": int, "start": dict}
_ITEMS = {"last_scores_valid": (float, int), "minimize": (bool, type(None)), "members": (int,), "skipped": (int,)}
"""What the lists and dicts of the metadata hold."""


@attrs.frozen(order=True)
class Entry:
    """A file that is a checkpoint by its name; ``end`` if it is that of a finished run."""

    global_step: int
    end: bool
    path: Path

    def metadata(self) -> dict[str, Any]:
        """What it says of itself; the tensors are neither read nor verified.

        Raises:
            CheckpointError: it is damaged, no checkpoint of a run, or not the one that its name says.
        """
        return self._checked(checkpoint_file.read_metadata(self.path))

    def read(self) -> tuple[Any, dict[str, Any]]:
        """State dict and metadata, after verifying every bit; raises as `metadata` does."""
        state, metadata = checkpoint_file.read(self.path)
        if type(state) is not dict:
            raise CheckpointError(f"{self.path} is no checkpoint of a run: it holds no state dict")
        metadata = self._checked(metadata)
        also = _also_in_metadata(state)
        if any(type(metadata.get(name)) is not type(also[name]) or metadata.get(name) != also[name] for name in also):
            raise CheckpointError(f"{self.path} is no checkpoint of a run: state and metadata contradict each other")
        return state, metadata

    def verify(self) -> dict[str, Any]:
        """The metadata, after verifying every bit; raises as `metadata` does."""
        return self._checked(checkpoint_file.verify(self.path))

    def _checked(self, metadata: dict[str, Any]) -> dict[str, Any]:
        for name, kind in {**_REQUIRED, **_OPTIONAL}.items():
            if name not in metadata and name in _REQUIRED:
                raise CheckpointError(f"{self.path} is no checkpoint of a run: it lacks {name}")
            if type(metadata.get(name, kind())) is not kind:
                raise CheckpointError(f"{self.path} is no checkpoint of a run: its {name} is no {kind.__name__}")
        for name, kinds in _ITEMS.items():
            found = metadata.get(name, ())
            if any(type(value) not in kinds for value in (found.values() if isinstance(found, dict) else found)):
                raise CheckpointError(f"{self.path} is no checkpoint of a run: its {name} are {found!r:.100}")
        if self.path.name != (name := file_name(metadata["global_step"], metadata["stage"])):
            raise CheckpointError(f"{self.path} is not what its name says: it was saved as {name}")
        try:
            return {**metadata, "fingerprint": migrate_fingerprint(metadata["fingerprint"], metadata["version"])}
        except StateDictError as error:
            kind = NewerFormatError if metadata["version"] > VERSION else CheckpointError
            raise kind(f"{self.path}: {error}") from error


def _also_in_metadata(state: dict[str, Any]) -> dict[str, Any]:
    if "members" not in state:
        return {name: state[name] for name in ("seed", *PLACE) if name in state} | {"members": None}
    members = state["members"]
    found = [m.get("seed") if isinstance(m, dict) else None for m in members] if isinstance(members, list) else []
    return {"members": [seed if type(seed) is int else None for seed in found]}


@attrs.frozen
class Intact:
    """A checkpoint of which every bit was verified."""

    path: Path
    state: Any
    seed: int | list[int]
    """The seed of the run, or those of all members of an ensemble."""
    start: dict[str, Any]
    """What is known of the values that the run started with."""

    def into(self, ctx: Context, strict: bool, allow: Patterns) -> Context:
        """The context that was saved, in the loop of ``ctx``.

        Raises:
            StateDictError: it belongs to another loop; the differences are listed.
        """
        loaded = load_state_dict(ctx, self.state, strict=strict, allow=allow)
        self._check_start(ctx, allow)
        if loaded.ensemble is None and loaded.stage not in ("", "end"):
            check_fit(loaded)
        return loaded

    def _check_start(self, ctx: Context, allow: Patterns) -> None:
        """Refuse a network made by a function that makes other values of the same seed on the same machine."""
        made = remembered_start(ctx) if ctx.seed == self.seed else None
        saved = self.start.get("values")
        if not self.start.get("made") or made in (None, saved):
            return
        line = Difference("start", f"first values of the hash {saved} in what was saved, {made} here")
        if self.state["environment"] == identity(ctx.loop)["environment"] and not line.is_allowed(allow):
            raise refusal("the network of this loop starts with other values than the run did:", [line])


def file_name(global_step: int, stage: str) -> str:
    return f"step-{global_step:08}{'-end' if stage == 'end' else ''}.safetensors"


def entry_of(folder: Path, ctx: Context) -> Entry:
    """Where ``ctx`` is saved."""
    return Entry(ctx.global_step, ctx.stage == "end", folder / file_name(ctx.global_step, ctx.stage))


def entries(folder: Path) -> list[Entry]:
    """The files that are checkpoints by their names, oldest first."""
    paths = (path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else ()
    named = ((_NAME.fullmatch(path.name), path) for path in paths)
    return sorted(Entry(int(name[1]), bool(name[2]), path) for name, path in named if name)


def readable(found: list[Entry]) -> list[tuple[Entry, dict[str, Any]]]:
    """The checkpoints whose metadata can be read, with it."""
    pairs = []
    for entry in found:
        with suppress(CheckpointError, OSError):
            pairs.append((entry, entry.metadata()))
    return pairs


def newest_metadata(folder: Path) -> dict[str, Any] | None:
    """What the newest readable checkpoint says of itself, or ``None`` if there is no file that is one by its name.

    Raises:
        NewerFormatError: it takes a newer version to read it.
        CheckpointError: there are such files, and not one of them is readable.
    """
    failed: Exception | None = None
    for entry in reversed(entries(folder)):
        try:
            return entry.metadata()
        except NewerFormatError:
            raise
        except FileNotFoundError:
            continue  # deleted by another process since it was listed
        except CheckpointError as error:
            failed = failed or error
    if failed is not None:
        raise CheckpointError(
            f"{folder} holds files named like checkpoints, and none is an intact one: give this run a folder of its "
            f"own, or let resume() set them aside: {failed}"
        )
    return None


def newest_intact(folder: Path, loop: Loop, step: int | None) -> tuple[Intact | None, dict[Path, CheckpointError]]:
    """The newest checkpoint from which ``loop`` goes on, or that of ``step``, and the damaged ones that are newer.

    Raises:
        NewerFormatError: it is not damage if a newer version wrote it, and going back behind it would lose work.
        CheckpointError: only finished runs are left, and ``loop`` has more epochs than they have.
    """
    found = entries(folder)
    while True:
        try:
            return _newest_intact([entry for entry in found if step in (None, entry.global_step)], loop)
        except FileNotFoundError:
            # A process that writes there may have deleted what it had listed before.
            before, found = found, entries(folder)
            if found == before:
                raise


def _newest_intact(found: list[Entry], loop: Loop) -> tuple[Intact | None, dict[Path, CheckpointError]]:
    damaged: dict[Path, CheckpointError] = {}
    passed_over = None
    for entry in reversed(found):
        try:
            if entry.end and not _is_final(entry.metadata(), loop):
                passed_over = entry
                continue
            state, metadata = entry.read()
            if entry.end and _would_go_on(state, loop):
                passed_over = entry
                continue
            return Intact(
                entry.path, state, metadata.get("members", metadata["seed"]), metadata.get("start", {})
            ), damaged
        except NewerFormatError:
            raise
        except CheckpointError as error:
            damaged[entry.path] = error
    if passed_over is not None:
        raise CheckpointError(
            f"{passed_over.path} is of a finished run and can't be trained for {loop.epochs} epochs; that needs the "
            "checkpoint of an 'epoch_end' or an earlier stage, and there is no intact one"
        )
    return None, damaged


def _is_final(metadata: dict[str, Any], loop: Loop) -> bool:
    return bool(metadata["terminate"] or metadata["epoch"] >= loop.epochs)


def _would_go_on(state: Any, loop: Loop) -> bool:
    """Whether callbacks ended the run that would not end it any more."""
    entries: Any = state.get("callbacks")
    if not (state.get("terminate") and isinstance(entries, dict)):
        return False
    with suppress(LookupError, TypeError, ValueError, AttributeError):  # refused where it is loaded
        return reopened(loop, {id: decode(entry["state"]) for id, entry in entries.items()}) is not None
    return False


def delete(paths: list[Path], folder: int | None) -> list[str]:
    """Delete files of the folder with the descriptor ``folder``, see `open_folder`; what failed, a line each."""
    failed = []
    for path in paths:
        try:
            os.unlink(path if folder is None else path.name, dir_fd=folder)
        except FileNotFoundError:
            pass
        except OSError as error:
            failed.append(f"an old checkpoint could not be deleted: {error}")
    return failed


def left_over(folder: Path) -> list[Path]:
    """Unfinished files of processes that were killed while they saved."""
    return [path for path in folder.iterdir() if _LEFT_OVER.fullmatch(path.name)]


def set_aside(path: Path) -> Path:
    """Rename a damaged file, so that it is no longer loaded and can still be inspected."""
    aside = path.with_name(f"{path.name}.damaged")
    number = 1
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{number}")
    return path.rename(aside)


def signature(path: Path) -> tuple[int, ...]:
    """Differs when another process has written the file."""
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns
