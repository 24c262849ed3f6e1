"""``python -m bench COMMAND``: run a benchmark, print its table, and write it as JSON if asked to."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import hooks, step
from .report import table, write_json
from .timing import DifferentWorkError

COMMANDS = {"step": step, "hooks": hooks}
"""Modules with a docstring, ``add_arguments(parser)``, and ``run(args)``, which yields the rows."""


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    # Threads of several sizes of work would drown the differences between loops.
    torch.set_num_threads(1)
    rows = []
    try:
        for row in COMMANDS[args.command].run(args):
            print(*row.values(), sep="  ", file=sys.stderr)
            rows.append(row)
    except DifferentWorkError as error:
        print(f"python -m bench {args.command}: {error}", file=sys.stderr)
        return 1
    print(table(rows))
    if args.json is not None:
        write_json(args.json, args.command, rows)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of functional_loop.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").partition("\n")[0]
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        command.add_argument("--json", type=Path, metavar="FILE", help="write the rows and the environment there")
        module.add_arguments(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
