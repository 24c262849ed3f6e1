"""``bisect``: where two runs part."""

from __future__ import annotations

import argparse

from ..core.errors import CheckpointError, StateDictError
from ..replay.bisect import Parting, bisect
from ..replay.replay import NoSuchPlaceError
from .console import make_console
from .found import checkpoints_of, loop_of
from .leaves import count, table
from .usage import UsageError, in_one_line

_WHICH = ("the first run", "the second run")


def run(options: argparse.Namespace, command: str) -> int:
    """0 if the runs are the same as far as both go, 1 if they part."""
    console = make_console()
    folders = options.a, options.b
    paths = checkpoints_of(folders[0]), checkpoints_of(folders[1])
    targets = options.target, options.target_b or options.target
    loops = loop_of(folders[0], targets[0], options.trust), loop_of(folders[1], targets[1], options.trust)
    try:
        parting = bisect(loops, paths)
    except (CheckpointError, StateDictError, FileNotFoundError) as error:
        raise UsageError(in_one_line(error)) from None
    except NoSuchPlaceError as error:
        raise UsageError(f"the runs have not the same steps in an epoch, to compare them by: {error}") from None
    console.print(_sentence(parting), soft_wrap=True)
    if parting:
        console.print(table(parting.differences))
        console.print(count(parting.differences))
    return 1 if parting else 0


def _sentence(parting: Parting) -> str:
    if not parting:
        return f"The runs are the same, bit for bit, as far as both go: {parting.place}."
    if parting.equal is None:
        return "The runs differ from the start."
    if parting.unfaithful:
        which = " and ".join(_WHICH[n] for n in parting.unfaithful)
        return (
            f"The runs part after {parting.equal} and by {parting.place}, and chance has parted them: what {which} "
            "saved there is not what its replay gives."
        )
    return f"The runs are the same up to {parting.equal}, and part at {parting.place}."
