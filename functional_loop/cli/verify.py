"""``verify``: train again what lies between the checkpoints of a run, and compare."""

from __future__ import annotations

import argparse

from ..core.errors import CheckpointError, StateDictError
from ..replay.replay import verify
from .console import make_console
from .found import checkpoints_of, loop_of
from .leaves import count, table
from .usage import UsageError, in_one_line


def run(options: argparse.Namespace, command: str) -> int:
    """0 if every segment of the run in ``options.folder`` gives the same bits again, 1 if one does not."""
    console = make_console()
    folder = checkpoints_of(options.folder)
    loop = loop_of(options.folder, options.target, options.trust)
    verdicts = []
    try:
        for segment in verify(loop, folder, options.from_start):
            verdicts.append(bool(segment))
            verdict = "the same bits" if segment else count(segment.differences)
            console.print(f"{segment.start}  →  {segment.stop}:  {verdict}", soft_wrap=True)
            if not segment:
                console.print(table(segment.differences))
    except CheckpointError as error:
        console.print(str(error), soft_wrap=True)
        return 1
    except (StateDictError, FileNotFoundError) as error:
        raise UsageError(in_one_line(error)) from None
    console.print(f"{sum(verdicts)} of {len(verdicts)} segments replay to the same bits", soft_wrap=True)
    return 0 if all(verdicts) else 1
