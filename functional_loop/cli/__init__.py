"""The command line: ``functional-loop train TARGET --run DIR``, and commands that look into what was trained."""

from __future__ import annotations

import importlib
import importlib.util
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from .arguments import parse
from .usage import UsageError

_EXTRAS = ("rich", "matplotlib")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: what follows the name of the program; by default those that it was started with.

    Returns:
        The exit code: 0 when trained to the end, or when what was compared is the same; 1 after an error while
        training, or when it differs; 2 when the command can't be done as given; 130, 143 and 138 when stopped by
        Ctrl-C, SIGTERM or SIGUSR1.
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
    options = parse(arguments)
    for extra in _EXTRAS if options.command not in ("export", "dry-run") else ():
        if importlib.util.find_spec(extra) is None:
            raise UsageError(f"the command line needs {extra}: pip install functional-loop[cli]")
    # A module a command, imported when it is asked for: they need what the check above has looked for.
    module = importlib.import_module(f".{options.command.replace('-', '_')}", __name__)
    code: int = module.run(options, _command_line(arguments))
    return code


def _command_line(arguments: list[str]) -> str:
    """What to type to run the same command again."""
    as_module = Path(sys.argv[0]).name == "__main__.py"
    program = ["python", "-m", "functional_loop"] if as_module else ["functional-loop"]
    return shlex.join([*program, *arguments])
