"""Scores in a CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from ...checkpoint.atomic import replacing
from .row_log import CallbackSetRowLog, Row


class CallbackSetCSVLog(CallbackSetRowLog):
    """Writes a row of scores for every epoch that has any, or of the loss for every ``every_steps`` batches, as CSV.

    Columns are ``epoch, train.<measure id>..., valid.<measure id>...``, or ``global_step, epoch, step, loss`` with
    ``every_steps``. Scores that hooks add come after these, in columns that are added to the file, in one step, where
    they first appear; earlier rows have empty cells in them. Numbers have all digits that they need to be read back
    exactly.

    Args:
        path: the file, or a function that returns it and is asked once per run; its folder is made if there is none.
        every_steps: batches per row; ``None`` for a row per epoch.
        id: the name of the callback, unique in a loop.

    Raises:
        TypeError: ``path`` is something else.
        ValueError: ``every_steps`` is not a positive integer; before training: the file holds something else than such
            a log.

    Resuming:
        It keeps no state. Wherever a run is entered, or goes back (`rollback`), the rows of what it has not trained yet
        are cut off, in one step; so the file always has every row of the way to the present context once. A run that
        starts anew starts the file anew: forks that are to be kept need a file each.

    Mirrors Keras's ``CSVLogger``.

    >>> import tempfile
    >>> from pathlib import Path
    >>> import functional_loop as fl
    >>> from functional_loop.callbacks.logs.csv_log import CallbackSetCSVLog
    >>> from functional_loop.examples.digits import loop
    >>> path = Path(tempfile.mkdtemp()) / "scores.csv"
    >>> ctx = fl.train(fl.init(fl.evolve(loop(epochs=2), callbacks=[CallbackSetCSVLog(path)])))
    >>> header, *rows = path.read_text().splitlines()
    >>> header
    'epoch,train.cross_entropy,train.accuracy,valid.cross_entropy,valid.accuracy'
    >>> len(rows)
    2
    """

    def _header(self, columns: list[str]) -> str:
        return _csv(columns)

    def _columns_of(self, path: Path, expected: list[str]) -> list[str]:
        try:
            with open(path, newline="", errors="replace") as file:
                found = next(csv.reader(file), [])
        except (FileNotFoundError, csv.Error):
            return expected
        return found if found[: len(expected)] == expected else expected

    def _widen(self, path: Path, before: list[str], columns: list[str]) -> None:
        if not path.exists():
            return
        rows = path.read_bytes()[len(self._header(before).encode()) :].splitlines()
        empty = b"," * (len(columns) - len(before))
        with replacing(path.resolve()) as write:
            write(self._header(columns).encode() + b"".join(row + empty + b"\n" for row in rows))

    def _line(self, row: Row, columns: list[str]) -> str:
        return _csv([row.get(name, "") for name in columns])

    def _place(self, line: str, column: str) -> int:
        return int(line.split(",", 1)[0])


def _csv(cells: Sequence[object]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


csv_log = CallbackSetCSVLog
