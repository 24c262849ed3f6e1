"""``run.json``: what is trained in a folder, for the commands that look at the run later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs

from ..checkpoint.atomic import replacing
from .usage import UsageError

NAME = "run.json"


@attrs.frozen
class Trained:
    """What was trained in a folder: the target, and on how many batches where it was not on all (``--overfit``)."""

    target: str
    overfit: int | None = None


def write(folder: Path, trained: Trained) -> None:
    """Note in ``folder`` what is trained there; a file is noted by its absolute path."""
    place, _, name = trained.target.rpartition(":")
    target = f"{Path(place).resolve()}:{name}" if place.endswith(".py") else trained.target
    noted = {"target": target, **({} if trained.overfit is None else {"overfit": trained.overfit})}
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / NAME) as write_bytes:
        write_bytes((json.dumps(noted) + "\n").encode())


def read(folder: Path, target: str | None = None, trust: bool = False) -> Trained:
    """What was trained in ``folder``, or in the folder that ``folder`` is in; as ``target``, if that is given.

    A target that is noted there is for people to see: to import it runs code that came with the folder.

    Raises:
        UsageError: no target is given, and nothing is noted there or it is not to be trusted; or what is noted can't be
            read.
    """
    path = next((path for path in (folder / NAME, folder.parent / NAME) if path.is_file()), None)
    if path is None:
        if target is None:
            raise UsageError(f"{folder} does not say what was trained there; give the TARGET")
        return Trained(target)
    try:
        noted = _checked(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        if target is not None:
            return Trained(target)
        raise UsageError(f"{path} can't be read ({error}); give the TARGET that was trained") from None
    if target is None and not trust:
        raise UsageError(
            f"give the TARGET that was trained in {folder}: {path} says {noted.target!r}, and importing it would run "
            "whatever code is there; --trust does so, for a folder of your own"
        )
    return Trained(target or noted.target, noted.overfit)


def _checked(noted: Any) -> Trained:
    target, overfit = noted["target"], noted.get("overfit")
    if type(target) is not str or not (overfit is None or (type(overfit) is int and overfit > 0)):
        raise ValueError(f"target {target!r}, overfit {overfit!r}")
    return Trained(target, overfit)
