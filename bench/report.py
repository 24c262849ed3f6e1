"""What a benchmark prints and writes: a plain table, and a JSON file."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import functional_loop

Row = dict[str, Any]


def table(rows: Sequence[Row]) -> str:
    """The rows, which have the same keys, under the names of their columns; numbers to the right.

    >>> print(table([{"case": "a", "µs": 1.5}, {"case": "long", "µs": 12.25}]))
    case     µs
    a       1.5
    long  12.25
    """
    columns = [[name, *(str(row[name]) for row in rows)] for name in rows[0]]
    widths = [max(map(len, column)) for column in columns]
    numeric = [isinstance(value, (int, float)) for value in rows[0].values()]
    lines = zip(*columns, strict=True)
    return "\n".join("  ".join(map(_aligned, line, widths, numeric)).rstrip() for line in lines)


def _aligned(cell: str, width: int, right: bool) -> str:
    return cell.rjust(width) if right else cell.ljust(width)


def environment() -> Row:
    """Where the numbers were measured."""
    return {
        "functional_loop": functional_loop.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def write_json(path: Path, command: str, rows: Sequence[Row]) -> None:
    content = {"command": command, "environment": environment(), "rows": rows}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
