"""``run.json``: what is trained in a folder, for the commands that look at the run later."""

from __future__ import annotations

import json
import os
from pathlib import Path

from .usage import UsageError

NAME = "run.json"


def write(folder: Path, target: str) -> None:
    """Note in ``folder`` what is trained there; a file is noted by its absolute path."""
    place, _, name = target.rpartition(":")
    if place.endswith(".py"):
        target = f"{Path(place).resolve()}:{name}"
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{NAME}.tmp"
    temporary.write_text(json.dumps({"target": target}) + "\n", encoding="utf-8")
    os.replace(temporary, folder / NAME)


def read_target(folder: Path) -> str:
    """The target that was trained in ``folder``, or in the folder that ``folder`` is in.

    Raises:
        UsageError: nothing is noted there, or it can't be read.
    """
    for path in (folder / NAME, folder.parent / NAME):
        if path.is_file():
            try:
                target = json.loads(path.read_text(encoding="utf-8"))["target"]
            except (ValueError, LookupError, TypeError) as error:
                raise UsageError(f"{path} can't be read ({error}); give the TARGET that was trained") from None
            if isinstance(target, str):
                return target
    raise UsageError(f"{folder} does not say what was trained there; give the TARGET")
