"""A log as a file of rows, to which a run that is continued adds as if it had never stopped."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from ...checkpoint.atomic import explaining, write_all
from ...core.context import Context
from ...engine.loop import Loop
from ..checks import check_integer
from .history import named_scores
from .writing import CallbackSetWriting, PathOrFunction

Row: TypeAlias = dict[str, int | float]


class CallbackSetRowLog(CallbackSetWriting, ABC):
    """Base of callbacks that write a line per evaluated epoch, or per ``every_steps`` batches, to a text file.

    A line is written at once, so that a process that is killed loses none that a checkpoint knows of. When a run is
    entered, or has gone back, the lines that come after its place are cut off. A file that is another one than that of
    the last line, or was written to by others since, is an error, and is not written to. Rows of epochs are written
    after all other callbacks, so that they have the scores that these add.
    """

    def __init__(self, path: PathOrFunction, every_steps: int | None = None, id: str | None = None) -> None:
        super().__init__(path, id)
        if every_steps is not None:
            check_integer(self.id, "every_steps", every_steps, least=1)
        self.every_steps = every_steps
        self.last = every_steps is None
        self._last = 0
        self._left: tuple[int, ...] | None = None

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages at which it does something."""
        return ("begin", "epoch_end" if self.every_steps is None else "batch_end", "exit")

    @abstractmethod
    def _header(self, columns: list[str]) -> str:
        """The first line of the file, or nothing."""

    def _columns_of(self, path: Path, expected: list[str]) -> list[str]:
        """The columns of the file, which may have more than those that are ``expected``."""
        return expected

    def _widen(self, path: Path, before: list[str], columns: list[str]) -> None:
        """Give the file more columns, where it has any."""
        return

    @abstractmethod
    def _line(self, row: Row, columns: list[str]) -> str:
        """A row, with the end of its line."""

    def _beginning(self) -> str:
        """What every row begins with, where the header does not tell that the file is such a log."""
        return ""

    @abstractmethod
    def _place(self, line: str, column: str) -> int:
        """The number in ``column``, the first of the row; a ValueError if this is not a line of the log."""

    def on_begin(self) -> None:
        path = self._enter()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._rewind(path, self._entered_after())

    def on_batch_end(self) -> None:
        ctx = self.ctx.context
        if self.every_steps is not None and ctx.global_step % self.every_steps == 0:
            place: Row = {"global_step": ctx.global_step, "epoch": ctx.epoch, "step": ctx.step}
            self._append({**place, "loss": self.ctx.last_loss.item()})

    def on_epoch_end(self) -> None:
        ctx = self.ctx.context
        scores = {name: float(score) for name, score in named_scores(ctx).items()}
        if scores or ctx.loop.evaluates(ctx.epoch):
            self._append({"epoch": ctx.epoch, **scores})

    def on_exit(self) -> None:
        self._left = None

    def _rewind(self, path: Path, last: int) -> None:
        _check_regular(path, self.id)
        expected = self._columns(self.ctx.context.loop)
        columns = self._columns_of(path, expected)
        try:
            rewind(path, self._header(columns), self._beginning(), lambda line: self._place(line, columns[0]), last)
        except ValueError as error:
            raise ValueError(
                f"{self.id}: {path} is not a log of this run ({error}); give it a file of its own"
            ) from None
        if columns != expected and path.read_bytes() == self._header(columns).encode():
            path.write_bytes(self._header(expected).encode())
        self._last, self._left = last, _form(path)

    def _append(self, row: Row) -> None:
        columns = self._columns(self.ctx.context.loop)
        path, place = self.path or self._enter(), int(row[columns[0]])
        self._check_untouched(path)
        if (valid := min(place - 1, self._still_valid())) < self._last:
            self._rewind(path, valid)
        self._last = place
        columns = self._columns_of(path, columns)
        if new := [name for name in row if name not in columns]:
            self._widen(path, columns, columns := [*columns, *new])
        # A `train_step` does not begin a run, so that there may be no header yet.
        header = "" if path.exists() and path.stat().st_size else self._header(columns)
        append(path, (header + self._line(row, columns)).encode())
        self._left = _form(path)

    def _check_untouched(self, path: Path) -> None:
        """Refuse to write to another file than that in which the last row is, as its end.

        Raises:
            RuntimeError: it is another.
        """
        if self._left is None:
            _check_regular(path, self.id)
        elif not path.exists() or _form(path) != self._left:
            raise RuntimeError(
                f"{self.id}: {path} was moved, removed, replaced or written to by others since the last row, so that "
                "nothing is written there; give this run a file of its own"
            )

    def _still_valid(self) -> int:
        """The place of the last row but for those of batches that are passed over since."""
        last, ctx = self._last, self.ctx.context
        while self.every_steps is not None and last in ctx.loop.skipped(ctx.callbacks):
            last -= self.every_steps
        return last

    def _columns(self, loop: Loop) -> list[str]:
        if self.every_steps is not None:
            return ["global_step", "epoch", "step", "loss"]
        valid = loop.measures_valid if loop.valid is not None else ()
        return ["epoch", *(f"train.{m.id}" for m in loop.measures_train), *(f"valid.{m.id}" for m in valid)]

    def _entered_after(self) -> int:
        """The last step, or the last epoch, that the run has behind it."""
        ctx: Context = self.ctx.context
        if self.every_steps is not None:
            return ctx.global_step
        return ctx.epoch if ctx.stage == "epoch_end" else ctx.epoch - 1


def _form(path: Path) -> tuple[int, ...]:
    """Differs when the file is another one, or longer."""
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size


def _check_regular(path: Path, id: str) -> None:
    """Refuse a pipe or a device, which to read may take for ever; what is written to `os.devnull` is not to be kept."""
    if path.exists() and not (path.is_file() or path.is_dir() or path.samefile(os.devnull)):
        raise ValueError(f"{id}: {path} is no regular file")


def append(path: Path, data: bytes) -> None:
    """Write ``data`` to the end of ``path``, all or nothing; the file is made if there is none."""
    with explaining(path), open(path, "ab", buffering=0) as file:
        size = file.tell()
        try:
            write_all(file.fileno(), data)
        except BaseException:
            file.truncate(size)
            raise


def rewind(path: Path, header: str, beginning: str, place: Callable[[str], int], last: int) -> None:
    """Cut off the lines of ``path`` whose place is after ``last``, and one that was not written to its end.

    The places ascend from line to line. The file changes in one system call; it is made if there is none.

    Raises:
        ValueError: the file has another header, a line without a place, or an end without the ``beginning`` of a line.
    """
    content = path.read_bytes() if path.exists() else b""
    first, start_of_row = header.encode(), beginning.encode()
    if first.startswith(content):
        path.write_bytes(first)
        return
    if not content.startswith(first):
        raise ValueError(f"its first line is {content.splitlines()[0].decode(errors='replace')!r}")
    end = content.rfind(b"\n") + 1
    if not content[end:].startswith(start_of_row[: len(content) - end]):
        raise ValueError(f"its last line is {content[end:].decode(errors='replace')!r:.100}")
    while end > len(first):
        start = content.rfind(b"\n", 0, end - 1) + 1
        if place(content[start:end].decode()) <= last:
            break
        end = start
    if end < len(content):
        os.truncate(path, end)
