"""A run that is killed at random moments and started again until it ends has the digest of the undisturbed run."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import functional_loop as fl
from tests.loops import Spec
from tests.resume.hard_loop import SEED, hard_spec, train_here
from tests.resume.lives import after, outlive


def digest_here(spec: Spec, folder: Path, save_every: int) -> str:
    return fl.digest(train_here(spec, folder, save_every))


def check(spec: Spec, folder: Path, save_every: int, delays: list[float]) -> int:
    lives = outlive(digest_here, (spec, folder, save_every), map(after, delays))
    assert lives.result == fl.digest(fl.train(fl.init(spec.loop(), SEED)))
    return lives.kills


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
