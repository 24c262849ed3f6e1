"""``inspect``: what is in a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.tree import Tree
from torch import Tensor

from ..core.place import Place
from ..core.plain import decode
from ..replay.differences import describe
from .console import make_console
from .found import read, showing
from .report import format_score

_MOST = 6  # items of a list
_OWN_LINES = ("version", "fingerprint", "seed", "epoch", "step", "step_valid", "global_step", "stage")


def run(options: argparse.Namespace, command: str) -> int:
    """Print the place in the run, the scores, and a tree of names, shapes, dtypes and sizes."""
    console = make_console()
    file, state, metadata = read(options.file)
    with showing(file):
        _show(console, file, state, metadata)
    return 0


def _show(console: Console, file: Path, state: dict[str, Any], metadata: dict[str, Any]) -> None:
    environment = metadata.get("environment", {})
    versions = [f"{name} {environment[name]}" for name in ("functional_loop", "torch") if name in environment]
    members, place = state.get("members", [state]), Place.of(state)
    seeds = ("seed " if len(members) == 1 else "seeds ") + ", ".join(str(member["seed"]) for member in members)
    scores = [_scores(member) or "none" for member in members]
    lines = {
        "file": f"{file}, {size(file.stat().st_size)}, every bit verified",
        "place": f"{place}; {seeds}" + (", finished" if place.stage == "end" else ""),
        **({f"member {i}": line for i, line in enumerate(scores)} if "members" in state else {"scores": scores[0]}),
        "written by": ", ".join(versions) or "unknown",
    }
    for name, line in lines.items():
        console.print(f"{name + ':':11} {line}", soft_wrap=True)
    rest = {name: decode(value) for name, value in state.items() if name not in _OWN_LINES}
    tree = Tree(f"state, {size(_bytes(rest))} of tensors")
    _grow(tree, rest)
    console.print(tree, soft_wrap=True)


def _scores(state: dict[str, Any]) -> str:
    parts = (("train", state["last_scores_train"]), ("valid", state["last_scores_valid"]))
    scores = [f"{part}.{id} {format_score(x)}" for part, rows in parts for id, x in dict(decode(rows)).items()]
    loss = decode(state["last_loss"])
    return "  ".join([*scores, *([f"loss {format_score(loss.item())}"] if isinstance(loss, Tensor) else [])])


def _grow(tree: Tree, node: Any) -> None:
    children = list(node.items() if isinstance(node, dict) else enumerate(node))
    shown = children if isinstance(node, dict) else children[:_MOST]
    for name, child in shown:
        if isinstance(child, (dict, list, tuple)) and child:
            inside = f", {size(nbytes)}" if (nbytes := _bytes(child)) else ""
            _grow(tree.add(f"{name}  ({len(child)}{inside})"), child)
        elif isinstance(child, Tensor):
            value = f" = {child.item()}" if child.numel() == 1 and not child.is_sparse else ""
            tree.add(f"{name}  {describe(child)}  {size(_bytes(child))}{value}")
        else:
            tree.add(f"{name}  {child!r}")
    if len(children) > len(shown):
        tree.add(f"… and {len(children) - len(shown)} more")


def _bytes(node: Any) -> int:
    if isinstance(node, Tensor):
        return node._indices().nbytes + node._values().nbytes if node.is_sparse else node.nbytes
    if isinstance(node, dict):
        return sum(map(_bytes, node.values()))
    return sum(map(_bytes, node)) if isinstance(node, (list, tuple)) else 0


def size(nbytes: int) -> str:
    """Bytes in binary units.

    >>> size(12), size(2048), size(5 * 2**30)
    ('12 B', '2.0 KiB', '5.0 GiB')
    """
    number, units = float(nbytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while number >= 1024 and len(units) > 1:
        number /= 1024
        units.pop(0)
    return f"{number:.0f} B" if units[0] == "B" else f"{number:.1f} {units[0]}"
