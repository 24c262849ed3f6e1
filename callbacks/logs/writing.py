"""What callbacks that write to a file or a folder have in common."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from ..objects.callback_set import CallbackSet

StrPath: TypeAlias = str | os.PathLike[str]
PathOrFunction: TypeAlias = StrPath | Callable[[], StrPath]


class CallbackSetWriting(CallbackSet):
    """Base of callbacks that write to ``path``, which is given, or returned by a function that each run asks once.

    Attributes:
        path: where it writes, an absolute path, so that the working folder may change; ``None`` before a function was
            asked.
    """

    for_one_run = True

    def __init__(self, path: PathOrFunction, id: str | None = None) -> None:
        self._id = id
        self._given = path
        self.path = None if callable(path) else self._as_path(path)

    def _as_path(self, path: object) -> Path:
        """Raises a TypeError if it is none."""
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"{self.id}: path is a string or a Path, or a function that returns one, not {path!r}")
        return Path(os.path.abspath(path))

    def _enter(self) -> Path:
        """Where the run writes that is being entered: a function is asked where a run starts, not where it goes on."""
        if callable(self._given) and (self.path is None or self.ctx.context.stage == ""):
            self.path = self._as_path(self._given())
        assert self.path is not None
        return self.path
