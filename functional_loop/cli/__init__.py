"""The command line: ``functional-loop train TARGET --run DIR``, ``functional-loop export FILE OUT``."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from ..record import did_you_mean
from . import export
from .usage import Parser, UsageError

_FLAGS = ("--run", "--seed", "--epochs", "--every-steps", "--help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: what follows the name of the program; by default those that it was started with.

    Returns:
        The exit code: 0 when trained to the end, 1 after an error while training, 2 when the command can't be done as
        given, 130 and 143 when stopped by Ctrl-C or SIGTERM.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(arguments)
    except UsageError as error:
        if error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        print(f"functional-loop: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("functional-loop: stopped", file=sys.stderr)
        return 130


def _run(arguments: list[str]) -> int:
    options = _parse(arguments)
    if options.command == "export":
        return export.export(options.file, options.out)
    for extra in ("rich", "matplotlib"):
        if importlib.util.find_spec(extra) is None:
            raise UsageError(f"the command line needs {extra}: pip install functional-loop[cli]")
    from .target import load_loop
    from .train import train

    loop = load_loop(options.target, options.epochs)
    return train(loop, options.run, options.seed, options.every_steps, command=_command_line(arguments))


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser("functional-loop", description="Train PyTorch models, and continue where training stopped.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{train,export}")
    train = commands.add_parser(
        "train",
        allow_abbrev=False,
        help="train a loop, or continue a run",
        description="Train a loop, or continue the run in DIR from where it stopped. The same command continues a run.",
    )
    train.add_argument(
        "target", metavar="TARGET", help="module:name or file.py:name of a Loop, or of a function that makes one"
    )
    train.add_argument("--run", metavar="DIR", type=Path, required=True, help="the folder of the run")
    train.add_argument("--seed", metavar="N", type=int, default=0, help="everything random is a function of it (0)")
    train.add_argument("--epochs", metavar="N", type=_natural, help="in place of the loop's own number of epochs")
    train.add_argument("--every-steps", metavar="N", type=_positive, help="save every N batches, not only every epoch")
    export.add_parser(commands)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        train.error(f"unknown argument {unknown[0]}{did_you_mean(unknown[0], _FLAGS)}")
    return options


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an integer of at least 0, not {text!r}")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, not {text!r}")
    return int(text)


def _command_line(arguments: list[str]) -> str:
    """What to type to run the same command again."""
    as_module = Path(sys.argv[0]).name == "__main__.py"
    program = ["python", "-m", "functional_loop"] if as_module else ["functional-loop"]
    return shlex.join([*program, *arguments])
