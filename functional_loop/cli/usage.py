"""What a person can put right: errors that the command line tells in one line."""

from __future__ import annotations

import argparse
from typing import NoReturn


class UsageError(Exception):
    """A command that can't be done as given; its message is the one line that is printed.

    One with a ``__cause__`` comes from the person's own code, whose traceback is printed as well.
    """


class Parser(argparse.ArgumentParser):
    """A parser that raises a `UsageError` where argparse prints its usage and exits."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")
