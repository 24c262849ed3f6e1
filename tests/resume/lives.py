"""A process that is killed and started again by the same call, until it comes to its end."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import attrs

from tests.processes import server, set_up_process
from tests.resume.hard_loop import pollute_globals

Wait = Callable[[Connection], None]
"""Returns when it is time to kill, or when there is something to read: the result."""


def after(seconds: float) -> Wait:
    """Kill when training has gone on for so long."""

    def wait(result: Connection) -> None:
        result.poll(seconds)

    return wait


def in_a_save(folder: Path, number: int) -> Wait:
    """Kill as soon as the ``number``-th new temporary file is seen in ``folder``: in the middle of a save."""

    def wait(result: Connection) -> None:
        seen = set(temporary_files(folder))
        left = number
        while left and not result.poll(0):
            new = temporary_files(folder) - seen
            seen |= new
            left -= min(left, len(new))

    return wait


def temporary_files(folder: Path) -> set[str]:
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.name.endswith(".tmp")}
    return set()


@attrs.frozen
class Lives:
    """What came of them: the result of the last, and how many were killed."""

    result: Any
    kills: int


def outlive(program: Callable[..., Any], args: tuple[Any, ...], waits: Iterator[Wait]) -> Lives:
    """Call ``program(*args)`` in process after process, each killed after one of ``waits`` until one is through."""
    kills = 0
    while True:
        wait = next(waits, None)
        here, there = server().Pipe(duplex=False)
        process = server().Process(target=_live, args=(program, args, kills, there))
        process.start()
        there.close()
        here.recv()
        if wait is not None:
            wait(here)
        if wait is not None and not here.poll(0):
            # The data workers as well: they would notice seconds later, and the process be waited for as long.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.join()
        if process.exitcode == 0:
            return Lives(here.recv(), kills)
        assert process.exitcode == -signal.SIGKILL
        kills += 1


def _live(program: Callable[..., Any], args: tuple[Any, ...], life: int, pipe: Connection) -> None:
    """One life: say when it begins, and the result at the end."""
    os.setpgrp()
    set_up_process()
    # Nothing that was saved may be found damaged.
    warnings.simplefilter("error")
    pollute_globals(life)
    pipe.send("")
    pipe.send(program(*args))
