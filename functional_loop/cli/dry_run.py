"""``dry-run``: what a loop would do, told without doing it."""

from __future__ import annotations

import argparse
import sys
import traceback

from ..purity.dry_run import dry_run
from .target import load_loop


def run(options: argparse.Namespace, command: str) -> int:
    """Print what a run of the loop that ``options.target`` names will be.

    Returns:
        The exit code: 0, or 1 when the loop can't be run.

    Raises:
        UsageError: there is no such target.
    """
    loop = load_loop(options.target, options.epochs, options.overfit)
    try:
        found = dry_run(loop, options.seed, real_batch=options.real_batch)
    except Exception as error:
        traceback.print_exception(error)
        print(f"functional-loop: {options.target} can't be run: {type(error).__name__}", file=sys.stderr)
        return 1
    print(found)
    return 0
