"""Checkpoints on disk: a folder of verified files, one per saved step of one run."""

from __future__ import annotations

import os
import re
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs

from . import checkpoint_file
from .checkpoint_file import NewerFormatError
from .context import Context, check_boundary, check_context
from .errors import CheckpointError, StateDictError
from .identity import compare_runs, fingerprint, refusal
from .loop import Loop, init
from .migrations import VERSION, migrate_fingerprint
from .patterns import Patterns, matches
from .retention import Retention, best_steps
from .state import load_state_dict, state_dict

_NAME = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,})(-end)?\.safetensors")
_PLACE = ("epoch", "step", "global_step", "stage", "terminate")


@attrs.frozen(order=True)
class _Entry:
    """A file that is a checkpoint by its name; ``end`` if it is that of a finished run."""

    global_step: int
    end: bool
    path: Path


@attrs.frozen
class _Intact:
    path: Path
    state: Any
    seed: int


class CheckpointStore:
    """A folder of checkpoints of one run.

    Args:
        path: the folder; it is made when the first checkpoint is saved, and may hold other files too.
        keep_last: how many steps to keep, counted back from the one just saved; ``None`` keeps all, or with
            ``keep_best`` only the one just saved.
        keep_best: the id of a validation measure, or a pair of it and a number: so many steps of the best scores are
            kept beside the last ones. A score counts at the end of its epoch.
        allow: differences in spite of which a run is loaded from here, and goes on being saved here; see
            `load_state_dict`.

    Raises:
        ValueError: a number is less than 1, or ``keep_best`` is something else.
        NotADirectoryError: ``path`` is a file.

    >>> import tempfile
    >>> import torch, functional_loop as fl
    >>> x = torch.arange(8.0).unsqueeze(1)
    >>> loop = fl.Loop(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss, fl.optimizer(torch.optim.SGD, lr=0.01),
    ...                train=fl.batches(x, 2 * x, batch_size=4), epochs=2)
    >>> store = CheckpointStore(tempfile.mkdtemp(), keep_last=3)
    >>> ctx = fl.train(fl.init(loop, seed=0), steps=3)
    >>> store.save(ctx).name
    'step-00000003.safetensors'
    >>> fl.digest(store.load(loop)) == fl.digest(ctx)
    True
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        keep_last: int | None = None,
        keep_best: str | tuple[str, int] | None = None,
        allow: Patterns = (),
    ) -> None:
        self.path = Path(path)
        self.retention = Retention(keep_last, keep_best)
        self.allow = allow
        self._identity: dict[str, Any] | None = None
        self._last_written: tuple[Path, tuple[int, ...]] | None = None
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"{self.path} is a file, and a checkpoint store is a folder")

    def __repr__(self) -> str:
        kept = self.retention
        return f"CheckpointStore({str(self.path)!r}, keep_last={kept.keep_last}, keep_best={kept.keep_best})"

    def steps(self) -> list[int]:
        """The values of ``global_step`` for which there is a file, ascending."""
        return sorted({entry.global_step for entry in self._entries()})

    def best(self, measure: str) -> int:
        """The step with the best score of a validation measure; of equal ones the first.

        Raises:
            FileNotFoundError: no checkpoint has a score of which it is known whether low or high is better.
        """
        found = best_steps((metadata for _, metadata in _intact_metadata(self._entries())), measure)
        if not found:
            raise FileNotFoundError(f"no checkpoint in {self.path} has a validation score {measure!r} with a direction")
        return found[0]

    def check(self, ctx: Context) -> None:
        """Refuse what `save` would refuse of any context of this run, before time is spent on training it.

        Raises:
            StateDictError: the folder holds another run; the differences are listed.
            ValueError: the scores of the loop do not say which checkpoint is the best one to keep.
        """
        check_context(ctx, "check")
        self.retention.check(ctx.loop)
        self._check_run({"seed": ctx.seed, **fingerprint(ctx.loop)})

    def save(self, ctx: Context) -> Path:
        """Save ``ctx`` durably, in place of an earlier boundary of the same step; then delete what is too old.

        The context of a finished run is saved beside the last ``epoch_end`` of the run, from which training is
        continued when ``epochs`` is raised.

        Returns:
            The file.

        Raises:
            StateDictError: the folder holds another run; the differences are listed.
            ValueError: the scores of the loop do not say which checkpoint is the best one to keep.
            CheckpointError: the file to be replaced is damaged, or belongs to another run.
            OSError: the file could not be written; what was saved before is unharmed.
        """
        check_boundary(ctx, "save")
        self.retention.check(ctx.loop)
        state = state_dict(ctx)
        metadata = _describe(ctx, state)
        identity = _identity(metadata)
        path = self.path / _file_name(ctx)
        self.path.mkdir(parents=True, exist_ok=True)
        self._check_run(identity)
        self._check_target(path, identity)
        checkpoint_file.write(path, state, metadata)
        self._identity = identity
        self._last_written = path, _signature(path)
        self._prune(ctx.global_step, identity)
        return path

    def load(self, loop: Loop, step: int | None = None, allow: Patterns | None = None) -> Context:
        """The context saved at ``global_step`` ``step``, or the newest one, with every bit of its file verified.

        Damaged files that are newer than the one loaded are named in a ``UserWarning``. The context of a finished
        run is taken only where ``loop`` has nothing left to train, else the ``epoch_end`` before it. ``allow`` is for
        once what that of the store is for all.

        Raises:
            FileNotFoundError: there is no checkpoint, or none of that step.
            CheckpointError: all of them are damaged.
            StateDictError: the checkpoint belongs to another loop; the differences are listed.
        """
        entries = [entry for entry in self._entries() if step in (None, entry.global_step)]
        if not entries:
            which = "" if step is None else f" of step {step}; there is {self.steps() or 'none'}"
            raise FileNotFoundError(f"no checkpoint in {self.path}{which}")
        found, damaged = _newest_intact(entries, loop)
        if found is None:
            raise CheckpointError("\n".join(str(error) for error in damaged.values()))
        for error in damaged.values():
            warnings.warn(f"{error}; using {found.path.name}", UserWarning, stacklevel=2)
        return _load_into(init(loop, seed=found.seed), found, self.allow if allow is None else allow)

    def _entries(self) -> list[_Entry]:
        """The files that are checkpoints by their names, oldest first."""
        paths = (path for path in self.path.iterdir() if path.is_file()) if self.path.is_dir() else ()
        named = ((_NAME.fullmatch(path.name), path) for path in paths)
        return sorted(_Entry(int(name[1]), bool(name[2]), path) for name, path in named if name)

    def _check_run(self, identity: dict[str, Any]) -> None:
        saved = self._identity or _newest_identity(self._entries())
        if saved is not None and (differences := compare_runs(saved, identity, self.allow)):
            raise refusal(
                f"{self.path} holds checkpoints of another run; give this run a folder of its own:", differences
            )

    def _check_target(self, path: Path, identity: dict[str, Any]) -> None:
        """Nothing is written over but an intact file of this run: one just written here, or one that is verified."""
        if not path.exists() or self._last_written == (path, _signature(path)):
            return
        try:
            _, metadata = checkpoint_file.read(path)
            saved = _identity(_of_a_run(metadata, path))
        except CheckpointError as error:
            raise CheckpointError(f"refused to write over a file that is not intact, move it away: {error}") from error
        if differences := compare_runs(saved, identity, self.allow):
            raise CheckpointError(f"refused to write over {path}, which is of another run: {'; '.join(differences)}")

    def _prune(self, newest: int, identity: dict[str, Any]) -> None:
        """Delete what is not to be kept of the files of this run up to the step ``newest``, which was just saved."""
        if self.retention == Retention():
            return
        found = _intact_metadata([entry for entry in self._entries() if entry.global_step <= newest])
        own = [item for item in found if not compare_runs(_identity(item[1]), identity, self.allow)]
        kept = self.retention.kept(metadata for _, metadata in own)
        for entry, _ in own:
            if entry.global_step not in kept:
                try:
                    entry.path.unlink(missing_ok=True)
                except OSError as error:
                    warnings.warn(f"an old checkpoint could not be deleted: {error}", UserWarning, stacklevel=3)


def resume(loop: Loop, path: str | os.PathLike[str], seed: int = 0, allow: Patterns = ()) -> Context:
    """The newest intact checkpoint in the folder ``path``, or the start of a new run if there is none.

    A damaged file that is newer is renamed to ``….damaged``, and a ``UserWarning`` names it. Resuming a finished run
    returns its final context and touches no file.

    Args:
        allow: differences to continue in spite of; see `load_state_dict`. With ``"seed"`` the saved one counts. To save
            into the same folder then, its `CheckpointStore` has to allow them too.

    Raises:
        StateDictError: the folder holds another run, or one with another seed; the differences are listed.
        NotADirectoryError: ``path`` is a file.

    >>> import tempfile
    >>> import torch, functional_loop as fl
    >>> x = torch.arange(8.0).unsqueeze(1)
    >>> loop = fl.Loop(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss, fl.optimizer(torch.optim.SGD, lr=0.01),
    ...                train=fl.batches(x, 2 * x, batch_size=4), epochs=2)
    >>> folder = tempfile.mkdtemp()
    >>> ctx = fl.train(resume(loop, folder, seed=1), steps=3)
    >>> _ = CheckpointStore(folder).save(ctx)
    >>> resume(loop, folder, seed=1).global_step
    3
    """
    found, damaged = _newest_intact(CheckpointStore(path)._entries(), loop)
    ctx = init(loop, seed)
    if found is not None:
        if found.seed != seed and not matches(allow, "seed"):
            raise StateDictError(
                f"{path} holds a run with another seed; resume with that one, or give this run a folder of its own:",
                [f"seed: {found.seed} in what was saved, {seed} here"],
            )
        ctx = _load_into(ctx, found, allow)
    for broken, error in damaged.items():
        aside = _set_aside(broken)
        instead = f"using {found.path.name}" if found else "starting from the beginning"
        warnings.warn(f"{error}; renamed it to {aside.name}, {instead}", UserWarning, stacklevel=2)
    return ctx


def _file_name(ctx: Context) -> str:
    return f"step-{ctx.global_step:08}{'-end' if ctx.stage == 'end' else ''}.safetensors"


def _describe(ctx: Context, state: dict[str, Any]) -> dict[str, Any]:
    """What can be known of a checkpoint without reading its tensors."""
    return {
        "seed": ctx.seed,
        **{name: getattr(ctx, name) for name in _PLACE},
        "last_scores_valid": dict(ctx.last_scores_valid),
        "minimize": {measure.id: measure.minimize for measure in ctx.loop.measures_valid},
        "epochs": ctx.loop.epochs,
        **{name: state[name] for name in ("version", "fingerprint", "environment")},
    }


def _metadata(path: Path) -> dict[str, Any]:
    return _of_a_run(checkpoint_file.read_metadata(path), path)


def _of_a_run(metadata: dict[str, Any], path: Path) -> dict[str, Any]:
    if missing := {"seed", "version", "fingerprint", *_PLACE} - metadata.keys():
        raise CheckpointError(f"{path} is no checkpoint of a run: it lacks {', '.join(sorted(missing))}")
    try:
        return {**metadata, "fingerprint": migrate_fingerprint(metadata["fingerprint"], metadata["version"])}
    except StateDictError as error:
        kind = NewerFormatError if metadata["version"] > VERSION else CheckpointError
        raise kind(f"{path}: {error}") from error


def _identity(metadata: dict[str, Any]) -> dict[str, Any]:
    return {"seed": metadata["seed"], **metadata["fingerprint"]}


def _newest_identity(entries: list[_Entry]) -> dict[str, Any] | None:
    for entry in reversed(entries):
        try:
            return _identity(_metadata(entry.path))
        except NewerFormatError:
            raise
        except CheckpointError:
            continue
    return None


def _intact_metadata(entries: list[_Entry]) -> list[tuple[_Entry, dict[str, Any]]]:
    """The checkpoints whose metadata can be read."""
    found = []
    for entry in entries:
        with suppress(CheckpointError, OSError):
            found.append((entry, _metadata(entry.path)))
    return found


def _newest_intact(entries: list[_Entry], loop: Loop) -> tuple[_Intact | None, dict[Path, CheckpointError]]:
    """The newest checkpoint from which ``loop`` goes on, and the damaged ones that are newer.

    Raises:
        NewerFormatError: it is not damage if a newer version wrote it, and going back behind it would lose work.
        CheckpointError: only finished runs are left, and ``loop`` has more epochs than they have.
    """
    damaged: dict[Path, CheckpointError] = {}
    passed_over = None
    for entry in reversed(entries):
        try:
            if entry.end and not _is_final(_metadata(entry.path), loop):
                passed_over = entry
                continue
            state, metadata = checkpoint_file.read(entry.path)
            return _Intact(entry.path, state, _of_a_run(metadata, entry.path)["seed"]), damaged
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


def _load_into(ctx: Context, found: _Intact, allow: Patterns) -> Context:
    try:
        return load_state_dict(ctx, found.state, allow=allow)
    except StateDictError as error:
        error.add_note(f"while loading {found.path}")
        raise


def _set_aside(path: Path) -> Path:
    aside = path.with_name(f"{path.name}.damaged")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{number}")
    return path.rename(aside)


def _signature(path: Path) -> tuple[int, ...]:
    """Differs when somebody else has written the file."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
