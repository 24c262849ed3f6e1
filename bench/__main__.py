"""``python -m bench COMMAND``: run a benchmark, print its table, and write it as JSON or as a chart if asked to."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import compile as compiled
from . import data, ensemble, fallbacks, hooks, memory, paper, scale, step
from .peers import command as peers
from .report import environment, noise, table, write_json, write_png
from .timing import DifferentWorkError

COMMANDS = {
    "step": step,
    "data": data,
    "hooks": hooks,
    "fallbacks": fallbacks,
    "compile": compiled,
    "ensemble": ensemble,
    "memory": memory,
    "scale": scale,
    "paper": paper,
    "peers": peers,
}
"""Modules with a docstring, a ``CHART``, ``add_arguments(parser)``, and ``run(args)``, which yields the rows."""


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    command = COMMANDS[args.command]
    for path in filter(None, (args.json, args.png)):
        if not path.parent.is_dir():
            print(f"python -m bench {args.command}: there is no folder {path.parent}", file=sys.stderr)
            return 2
    # Threads of several sizes of work would drown the differences between loops.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        where = environment()
        rows = []
        for row in command.run(args):
            print(*row.values(), sep="  ", file=sys.stderr)
            rows.append(row)
    except DifferentWorkError as error:
        print(f"python -m bench {args.command}: {error}", file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(threads)
    print(table(rows), noise(where, getattr(args, "clock", None)), sep="\n\n")
    if args.json is not None:
        write_json(args.json, args.command, where, rows)
    if args.png is not None:
        write_png(args.png, command.CHART, rows)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of functional_loop.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").partition("\n")[0]
        # Percent signs are argparse's own.
        command = commands.add_parser(name, help=summary, description=(module.__doc__ or "").replace("%", "%%"))
        command.add_argument("--json", type=Path, metavar="FILE", help="write the rows and the environment there")
        command.add_argument("--png", type=Path, metavar="FILE", help="draw the rows there (needs matplotlib)")
        module.add_arguments(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
