"""``diff``: the leaves in which two checkpoints differ."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from ..callbacks.logs.digest_trace import first_parting
from ..checkpoint.comparing import compare_runs, unknown_differences
from ..checkpoint.migrations import migrate_fingerprint
from ..core.place import Place
from ..replay.differences import differences
from .console import make_console
from .found import read, showing
from .leaves import count, table


def run(options: argparse.Namespace, command: str) -> int:
    """0 if the two checkpoints hold the same bits, 1 if they differ."""
    console = make_console()
    (file_a, a, _), (file_b, b, _) = read(options.a), read(options.b)
    with showing(file_a, file_b):
        return _show(console, file_a, a, file_b, b)


def _show(console: Console, file_a: Path, a: dict[str, Any], file_b: Path, b: dict[str, Any]) -> int:
    for name, file, state in (("first", file_a, a), ("second", file_b, b)):
        console.print(f"{name + ':':8} {file}  ({Place.of(state)})", soft_wrap=True)
    told = migrate_fingerprint(a["fingerprint"], a["version"]), migrate_fingerprint(b["fingerprint"], b["version"])
    for line in [*compare_runs(*told, rounded=True), *unknown_differences(*told)]:
        words = line.replace("in what was saved", "in the first").removesuffix("here") + "in the second"
        console.print(f"the runs are set up differently: {words}", soft_wrap=True)
    if (step := first_parting(a, b)) is not None:
        console.print(f"by their digest traces, the runs have parted by step {step}", soft_wrap=True)
    found = differences(a, b)
    if found:
        console.print(table(found))
    console.print(count(found) if found else "the same bits in every leaf")
    return 1 if found else 0
