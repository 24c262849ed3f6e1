"""A run that goes on in another process, with other hashes and other global random numbers, ends in the same digest."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import functional_loop as fl
from tests.processes import in_a_fresh_process
from tests.resume.hard_loop import SEED, hard_spec, pollute_globals
from tests.strategies import boundaries, examples, seeds, specs

pytestmark = pytest.mark.filterwarnings("ignore:resuming in mid-epoch reads")

ROOT = Path(__file__).parents[2]


def run_hard_loop(folder: Path, *arguments: str, hash_seed: str) -> str:
    """The digest that a fresh interpreter prints."""
    command = [sys.executable, "-m", "tests.resume.hard_loop", str(folder), *arguments]
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("data", ["dataset", "workers"])
def test_a_hard_run_in_pieces_in_fresh_interpreters(tmp_path, data):
    pollute_globals(99)
    whole = fl.digest(fl.train(fl.init(hard_spec(data).loop(), SEED)))
    part = run_hard_loop(tmp_path, "--steps=13", f"--data={data}", "--global-seed=1", hash_seed="1")
    assert part != whole
    assert run_hard_loop(tmp_path, f"--data={data}", "--global-seed=2", hash_seed="random") == whole


def trained_from_file(spec, path: Path) -> str:
    sd = torch.load(path, weights_only=True)
    pollute_globals(sd["global_step"])
    return fl.digest(fl.train(fl.load_state_dict(fl.init(spec.loop()), sd)))


def trained_from_store(spec, folder: Path) -> str:
    pollute_globals(1)
    return fl.digest(fl.train(fl.CheckpointStore(folder).load(spec.loop())))


@examples(0.25)
@given(specs(), seeds, st.integers(0, 1000), st.booleans())
def test_any_run_goes_on_in_a_fresh_process(spec, seed, number, by_torch):
    whole = boundaries(spec.loop(), seed)
    cut = whole[number % len(whole)]
    with tempfile.TemporaryDirectory() as folder:
        if by_torch:
            path = Path(folder) / "run.pt"
            torch.save(fl.state_dict(cut), path)
            digest = in_a_fresh_process(trained_from_file, spec, path)
        else:
            fl.CheckpointStore(folder).save(cut)
            digest = in_a_fresh_process(trained_from_store, spec, Path(folder))
    assert digest == fl.digest(whole[-1])


@pytest.mark.slow
@pytest.mark.parametrize("data", ["dataset", "workers", "tensors"])
def test_every_cut_of_a_hard_run_in_a_fresh_process(tmp_path, data):
    spec = hard_spec(data)
    whole = boundaries(spec.loop(), SEED)
    path = tmp_path / "run.pt"
    for cut in whole:
        torch.save(fl.state_dict(cut), path)
        assert in_a_fresh_process(trained_from_file, spec, path) == fl.digest(whole[-1]), cut
