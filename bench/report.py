"""What a benchmark prints and writes: a plain table, a JSON file, a chart."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import functional_loop

Row = dict[str, Any]


class Chart(NamedTuple):
    """Which columns of the rows make a chart: bars of ``values``, side by side for each row, named by ``labels``."""

    labels: Sequence[str]
    values: Sequence[str]
    title: str
    line: float | None = 1.0
    """Where both sides are equal."""


def table(rows: Sequence[Row]) -> str:
    """The rows under the names of their columns; numbers to the right, nothing where a row has no such column.

    >>> print(table([{"case": "a", "µs": 1.5}, {"case": "long", "µs": 12.25, "note": "slow"}]))
    case     µs  note
    a       1.5
    long  12.25  slow
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = [[name, *(str(row.get(name, "")) for row in rows)] for name in names]
    widths = [max(map(len, column)) for column in columns]
    numeric = [any(isinstance(row.get(name), (int, float)) for row in rows) for name in names]
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
        "processor": _processor(),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def noise(where: Row, clock: str | None) -> str:
    """What the reader should know before believing a table."""
    busy = where["load"] > max(1, where["cores"] - 1)
    return "\n".join(
        [
            f"{where['processor']}, {where['cores']} cores, {where['threads']} thread, torch {where['torch']}"
            + (f", {clock} time" if clock else ""),
            f"Load was {where['load']} when this began"
            + (": the machine is BUSY, and these figures are rough. Measure again when it is quiet." if busy else "."),
            "Single times wander by 10 to 30 % from run to run, ratios of runs taken in turns by a few %: believe the "
            "ratios, and of two ratios no difference that is smaller than their spread.",
        ]
    )


def write_json(path: Path, command: str, where: Row, rows: Sequence[Row]) -> None:
    content = {"command": command, "environment": where, "rows": rows}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_png(path: Path, chart: Chart, rows: Sequence[Row]) -> None:
    """A chart of the rows that have all of its values."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if all(isinstance(row.get(name), (int, float)) for name in chart.values)]
    height = 0.8 / len(chart.values)
    figure = Figure(figsize=(9, 1.2 + 0.3 * len(rows) * len(chart.values)), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(chart.values):
        places = [place + (i - (len(chart.values) - 1) / 2) * height for place in range(len(rows))]
        bars = axes.barh(places, [row[name] for row in rows], height, label=name)
        axes.bar_label(bars, padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), [", ".join(str(row.get(name, "")) for name in chart.labels) for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    if chart.line is not None:
        axes.axvline(chart.line, color="black", linewidth=0.8)
    axes.set_title(chart.title)
    if len(chart.values) > 1:
        axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
