"""The console that commands print to."""

from __future__ import annotations

import sys

from rich.console import Console

_WIDTH = 200  # of tables, where no terminal has a width


def make_console() -> Console:
    """Standard output; on what is no terminal, lines are wide enough for tables."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False, markup=False, emoji=False)
