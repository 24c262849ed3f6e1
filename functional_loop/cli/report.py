"""What a run leaves behind: a table of its scores, ``history.csv`` and ``learning_curve.png``."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.table import Table

from ..checkpoint.atomic import replacing_by_name
from ..engine.loop import Loop

Row = dict[str, int | float]

_PARTS = ("train", "valid")
_MOST_ROWS = 30
_COLOURS = {"train": "#8a8f98", "valid": "#0b62c4"}


def columns(loop: Loop) -> list[str]:
    """The names of the scores of a row, in the order of the loop."""
    names = [f"train.{m.id}" for m in loop.measures_train]
    return names + [f"valid.{m.id}" for m in loop.measures_valid if loop.valid is not None]


def table(rows: Sequence[Row], names: Sequence[str]) -> Table:
    """The scores of every epoch; of a long run, those of the first and last epochs."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("epoch", *(name.replace(".", "\n", 1) for name in names)):
        made.add_column(name, justify="right")
    if len(rows) <= _MOST_ROWS:
        shown: list[Row | None] = [*rows]
    else:
        shown = [*rows[: _MOST_ROWS // 2], None, *rows[-_MOST_ROWS // 2 :]]
    for row in shown:
        made.add_row(*(["…"] * (1 + len(names)) if row is None else _cells(row, names)))
    return made


def _cells(row: Row, names: Sequence[str]) -> list[str]:
    return [str(row["epoch"]), *(format_score(row[name]) if name in row else "" for name in names)]


def format_score(score: float) -> str:
    """Four decimals, or four digits of a number for which those are too few or too many.

    >>> format_score(0.98765), format_score(0.0000123), format_score(123456.0), format_score(0.0)
    ('0.9877', '1.230e-05', '1.235e+05', '0.0000')
    """
    return f"{score:.4f}" if score == 0 or 1e-3 <= abs(score) < 1e4 or score != score else f"{score:.3e}"


def write(folder: Path, rows: Sequence[Row], names: Sequence[str]) -> list[Path]:
    """Write the scores as a table and as a picture; the files written."""
    files = [folder / "history.csv"]
    with replacing_by_name(files[0]) as path:
        _write_csv(path, rows, names)
    if names:
        files.append(folder / "learning_curve.png")
        with replacing_by_name(files[1]) as path:
            _figure(rows, names).savefig(path, format="png", dpi=150)
    return files


def _write_csv(path: Path, rows: Sequence[Row], names: Sequence[str]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["epoch", *names], restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def _figure(rows: Sequence[Row], names: Sequence[str]) -> Figure:
    """A panel for every measure, with its training and validation scores."""
    panels = list(dict.fromkeys(name.split(".", 1)[1] for name in names))
    across = min(len(panels), 3)
    down = -(-len(panels) // across)
    figure = Figure(figsize=(4.6 * across, 3.4 * down), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for panel, axis in zip(panels, axes, strict=False):
        _draw(axis, panel, rows, names)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    return figure


def _draw(axis: Any, panel: str, rows: Sequence[Row], names: Sequence[str]) -> None:
    for part in _PARTS:
        if (name := f"{part}.{panel}") in names:
            scored = [row for row in rows if name in row]
            # A line needs two points, and a run of one epoch has one.
            marker = "o" if len(scored) < 20 else None
            epochs, scores = [row["epoch"] for row in scored], [row[name] for row in scored]
            axis.plot(epochs, scores, color=_COLOURS[part], label=part, marker=marker, markersize=3.5)
    axis.set_title(panel.replace("_", " "), loc="left", fontsize=11)
    axis.set_xlabel("epoch")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
