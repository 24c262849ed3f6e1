"""What a person can put right: errors that the command line tells in one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

from ..core.errors import notes_of


class UsageError(Exception):
    """A command that can't be done as given; its message is the one line that is printed.

    One with a ``__cause__`` comes from the person's own code, whose traceback is printed as well.
    """


class Parser(argparse.ArgumentParser):
    """A parser that raises a `UsageError` where argparse prints its usage and exits."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def in_one_line(error: Exception) -> str:
    """The message of ``error`` with the first of the differences that it lists, and its notes."""
    message, *differences = str(error).splitlines()
    shown = [line.strip().removeprefix("- ") for line in differences[:3]]
    more = [f"and {len(differences) - 3} more"] if len(differences) > 3 else []
    notes = f"({'; '.join(found)})" if (found := notes_of(error)) else ""
    return " ".join(part for part in (message, "; ".join(shown + more), notes) if part)
