"""Scores as lines of JSON."""

from __future__ import annotations

import json
import math

from .row_log import CallbackSetRowLog, Row


class CallbackSetJSONLog(CallbackSetRowLog):
    """Writes an object of scores for every epoch that has any, or of the loss for every ``every_steps`` batches, as a
    line of JSON.

    Keys are ``epoch, train.<measure id>..., valid.<measure id>...``, or ``global_step, epoch, step, loss`` with
    ``every_steps``. Numbers have all digits that they need to be read back exactly; NaN and infinity, which JSON lacks,
    are ``null``.

    Args:
        path: the file, or a function that returns it and is asked once per run; its folder is made if there is none.
        every_steps: batches per line; ``None`` for a line per epoch.
        id: the name of the callback, unique in a loop.

    Raises:
        TypeError: ``path`` is something else.
        ValueError: ``every_steps`` is not a positive integer; before training: the file holds something else than such
            a log.

    Resuming:
        As `CallbackSetCSVLog`: it keeps no state, and wherever a run is entered, the lines of what it has not trained
        yet are cut off.

    Format: JSON Lines, https://jsonlines.org.

    >>> import tempfile
    >>> from pathlib import Path
    >>> import functional_loop as fl
    >>> from functional_loop.callbacks.logs.json_log import CallbackSetJSONLog
    >>> from functional_loop.examples.digits import loop
    >>> path = Path(tempfile.mkdtemp()) / "loss.jsonl"
    >>> log = CallbackSetJSONLog(path, every_steps=10)
    >>> ctx = fl.train(fl.init(fl.evolve(loop(epochs=1), callbacks=[log])))
    >>> [json.loads(line)["global_step"] for line in path.read_text().splitlines()]
    [10, 20]
    """

    def _header(self, columns: list[str]) -> str:
        return ""

    def _beginning(self) -> str:
        return '{"'

    def _line(self, row: Row, columns: list[str]) -> str:
        return json.dumps({key: value if math.isfinite(value) else None for key, value in row.items()}) + "\n"

    def _place(self, line: str, column: str) -> int:
        row = json.loads(line)
        if not isinstance(row, dict) or next(iter(row), None) != column or type(row[column]) is not int:
            raise ValueError(f"its line {line.strip()!r} does not begin with {column!r}")
        return int(row[column])


json_log = CallbackSetJSONLog
