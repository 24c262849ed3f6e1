"""Going on with what a folder of checkpoints holds."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from ..core.context import Context
from ..core.errors import CheckpointError, StateDictError, loading
from ..core.patterns import Patterns, matches
from ..engine.init import init
from ..engine.loop import Loop
from ..ensembles.ensemble import member_seeds
from .comparing import check_allowed
from .folder import newest_intact, set_aside
from .identity import identity
from .lock import FolderLock
from .store import CheckpointStore


def resume(
    loop: Loop | Context,
    path: str | os.PathLike[str],
    seed: int = 0,
    allow: Patterns = (),
    *,
    strict: bool = True,
    must_exist: bool | None = None,
) -> Context:
    """The newest intact checkpoint in the folder ``path``, or the start of a new run if there is none.

    That a new run starts is a ``UserWarning``, because a folder that was misspelt is empty too.

    A damaged file that is newer is renamed to ``….damaged``, if nothing forbids it, and a ``UserWarning`` names it.
    Resuming a finished run returns its final context and touches no file.

    Args:
        loop: a loop, whose run starts with ``init(loop, seed)``, or the context to start with (of an ensemble, say).
        allow: differences to continue in spite of; see `load_state_dict`. With ``"seed"`` the saved one counts. To save
            into the same folder then, its `CheckpointStore` has to allow them too.
        strict: with ``False`` callbacks may have come and gone, see `load_state_dict`; a `CheckpointStore` that saves
            into the same folder then has to allow ``"callbacks"``.
        must_exist: with ``True`` a new run is an error, with ``False`` it is no warning either.

    Raises:
        StateDictError: the folder holds another run, or one with another seed; the differences are listed. Or it has
            begun more epochs than the loop has.
        FileNotFoundError: there is no checkpoint, and one ``must_exist``.
        NotADirectoryError: ``path`` is a file.

    >>> import tempfile
    >>> import torch
    >>> import functional_loop as fl
    >>> x = torch.arange(8.0).unsqueeze(1)
    >>> loop = fl.Loop(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss, fl.optimizer(torch.optim.SGD, lr=0.01),
    ...                train=fl.batches(x, 2 * x, batch_size=4), epochs=2)
    >>> folder = tempfile.mkdtemp()
    >>> ctx = fl.train(resume(loop, folder, seed=1, must_exist=False), steps=3)
    >>> _ = CheckpointStore(folder).save(ctx)
    >>> resume(loop, folder, seed=1).global_step
    3
    """
    ctx = init(loop, seed) if isinstance(loop, Loop) else loop
    found, damaged = newest_intact(CheckpointStore(path).path, ctx.loop, step=None)
    here = ctx.seed if ctx.ensemble is None else member_seeds(ctx)
    if found is not None:
        with loading(found.path):
            if found.seed != here and not matches(allow, "seed"):
                raise StateDictError(
                    f"{path} holds a run with another seed; resume with that one, or give this run a folder of its "
                    "own:",
                    [f"seed: {found.seed} in what was saved, {here} here"],
                )
            ctx = found.into(ctx, strict, allow)
    elif must_exist:
        raise FileNotFoundError(f"no checkpoint to continue from in {Path(path).resolve()}{_which(path, damaged)}")
    else:
        check_allowed(allow, identity(ctx.loop))
        if must_exist is None and not damaged:
            warnings.warn(
                f"no checkpoint in {Path(path).resolve()}{_which(path, damaged)}: a new run starts (must_exist=False "
                "is without this warning, must_exist=True makes it an error)",
                UserWarning,
                stacklevel=2,
            )
    for broken, error in damaged.items():
        instead = f"using {found.path.name}" if found else "starting from the beginning"
        warnings.warn(f"{error}; {_set_aside(broken)}, {instead}", UserWarning, stacklevel=2)
    return ctx


def _which(path: str | os.PathLike[str], damaged: dict[Path, CheckpointError]) -> str:
    if damaged:
        return f", where {len(damaged)} are damaged"
    return "" if Path(path).is_dir() else ", which does not exist"


def _set_aside(broken: Path) -> str:
    """Rename a damaged file, or say why not: what was damaged is as unusable under its own name."""
    try:
        lock = FolderLock(broken.parent)
    except (OSError, CheckpointError) as error:
        return f"could not rename it: {error}"
    try:
        return f"renamed it to {set_aside(broken).name}"
    except OSError as error:
        return f"could not rename it: {error}"
    finally:
        lock.release()
