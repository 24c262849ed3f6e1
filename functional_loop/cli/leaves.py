"""Tables of the leaves in which two states differ."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from ..replay.differences import Difference

_MOST = 40


def table(differences: Sequence[Difference]) -> Table:
    """A row for every leaf: where it is, what differs, by how much at most, and how many units of the last place."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column("leaf", overflow="fold")
    made.add_column("differs in", overflow="fold")
    made.add_column("max abs", justify="right")
    made.add_column("ulps", justify="right")
    for leaf in differences[:_MOST]:
        max_abs = "" if leaf.max_abs is None else f"{leaf.max_abs:.3g}"
        made.add_row(leaf.path, leaf.reason, max_abs, "" if leaf.ulps is None else str(leaf.ulps))
    if len(differences) > _MOST:
        made.add_row(f"… and {len(differences) - _MOST} more", "", "", "")
    return made


def count(differences: Sequence[Difference]) -> str:
    return f"{len(differences)} leaf differs" if len(differences) == 1 else f"{len(differences)} leaves differ"
