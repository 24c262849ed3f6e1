"""A run that is killed at random moments and started again until it ends has the digest of the undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import warnings
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

import functional_loop as fl
from tests.loops import Spec
from tests.processes import server, set_up_process
from tests.resume.hard_loop import SEED, hard_spec, pollute_globals, train_here


def live(spec: Spec, folder: Path, save_every: int, life: int, pipe: Connection) -> None:
    """One life: say when training begins, and the digest at the end."""
    os.setpgrp()
    set_up_process()
    # Nothing that was saved may be found damaged.
    warnings.simplefilter("error")
    pollute_globals(life)
    pipe.send("")
    pipe.send(fl.digest(train_here(spec, folder, save_every)))


def outlive(spec: Spec, folder: Path, save_every: int, delays: list[float]) -> tuple[str, int]:
    """The digest of the last life, and how many were cut short, each after one of ``delays``, in seconds."""
    for life, delay in enumerate([*delays, None]):
        here, there = server().Pipe(duplex=False)
        process = server().Process(target=live, args=(spec, folder, save_every, life, there))
        process.start()
        there.close()
        here.recv()
        if delay is not None and not here.poll(delay):
            # The data workers as well: they would notice seconds later, and the process be waited for as long.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.join()
        if process.exitcode == 0:
            return here.recv(), life
        assert process.exitcode == -signal.SIGKILL
    raise AssertionError("the last life is not killed")


def check(spec: Spec, folder: Path, save_every: int, delays: list[float]) -> int:
    digest, kills = outlive(spec, folder, save_every, delays)
    assert digest == fl.digest(fl.train(fl.init(spec.loop(), SEED)))
    return kills


@pytest.mark.parametrize(("data", "save_every"), [("dataset", 1), ("tensors", 5), ("workers", 2)])
def test_a_run_that_is_killed_some_times(tmp_path, data, save_every):
    chance = random.Random(save_every)
    kills = check(hard_spec(data, epochs=12), tmp_path, save_every, [chance.uniform(0, 0.3) for _ in range(5)])
    assert kills


@pytest.mark.slow
@pytest.mark.parametrize("data", ["dataset", "tensors", "workers"])
@pytest.mark.parametrize("save_every", [1, 2, 7])
def test_a_run_that_is_killed_many_times(tmp_path, data, save_every):
    chance = random.Random(save_every)
    kills = check(hard_spec(data, epochs=40), tmp_path, save_every, [chance.expovariate(10) for _ in range(200)])
    assert kills > 5
