"""Random numbers are functions of (seed, stream, position), and drawing them leaves no trace."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import functional_loop as fl
from functional_loop.core.rng import torch_seeded
from tests.sample_loops import full_loop


def global_states() -> tuple[Any, ...]:
    numpy_state = np.random.get_state(legacy=False)["state"]
    return torch.get_rng_state().tolist(), random.getstate(), numpy_state["key"].tolist(), numpy_state["pos"]


def draw() -> tuple[float, float, float]:
    return torch.rand(()).item(), random.random(), float(np.random.rand())


@given(st.integers(), st.text(), st.integers(0, 2**80))
def test_fold_in_is_a_function_with_values_that_any_library_takes_as_a_seed(
    seed: int, stream: str, position: int
) -> None:
    folded = fl.fold_in(seed, stream, position)
    assert folded == fl.fold_in(seed, stream, position)
    assert 0 <= folded < 2**32


@given(st.integers(), st.integers(0, 2**40))
def test_successive_positions_have_different_seeds(seed: int, start: int) -> None:
    start -= start % 2**32 % 1000
    block = range(start, start + 1000)
    if start >> 32 == (start + 999) >> 32:
        assert len({fl.fold_in(seed, "dropout", position) for position in block}) == 1000


def test_seeds_streams_and_positions_are_told_apart() -> None:
    values = {
        fl.fold_in(seed, stream, position) for seed in range(-5, 5) for stream in "ab" for position in (0, 1, 2**32)
    }
    assert len(values) == 60


def test_fold_in_is_part_of_the_format_of_saved_runs() -> None:
    assert [fl.fold_in(0, "dropout", position) for position in (0, 1)] == [1907004337, 2662913763]


@pytest.mark.parametrize(("seed", "position"), [(0.0, 0), (True, 0), ("0", 0), (0, 1.0), (0, True), (None, 0)])
def test_only_integers_are_seeds(seed: Any, position: Any) -> None:
    with pytest.raises(TypeError, match="integers"):
        fl.fold_in(seed, "dropout", position)


def test_negative_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        fl.fold_in(0, "dropout", -1)


def test_a_seeded_region_repeats_itself_and_leaves_no_trace() -> None:
    before = global_states()
    with fl.seeded(7):
        first = draw()
        with fl.seeded(8):
            other = draw()
        second = draw()
    with fl.seeded(7):
        assert draw() == first
        assert draw() == second
    assert other not in (first, second)
    assert global_states() == before


def test_a_seeded_region_leaves_no_trace_after_an_error() -> None:
    before = global_states()

    def interrupted() -> None:
        with fl.seeded(7):
            draw()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert global_states() == before


@pytest.mark.parametrize("seed", [-1, 2**32, 2**70])
def test_a_seed_out_of_range_changes_nothing(seed: int) -> None:
    before = global_states()
    with pytest.raises((ValueError, OverflowError, RuntimeError)), fl.seeded(seed):
        pass
    assert global_states() == before


def test_torch_seeded_draws_like_seeded() -> None:
    before = global_states()
    with torch_seeded(5):
        fast = torch.rand(3)
    with fl.seeded(5):
        assert torch.equal(torch.rand(3), fast)
    assert global_states() == before


def test_training_neither_uses_nor_moves_the_global_states() -> None:
    loop = full_loop()
    digests = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        before = global_states()
        digests.add(fl.digest(fl.train(fl.init(loop, seed=0))))
        assert global_states() == before
    assert len(digests) == 1


WITHOUT_NUMPY = """
import sys, warnings
sys.modules["numpy"] = None
warnings.simplefilter("ignore")
import torch, functional_loop as fl
x = torch.ones(4, 2)
network = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Dropout())
loss = torch.nn.functional.mse_loss
loop = fl.Loop(network, loss, fl.optimizer(torch.optim.SGD, lr=0.1), fl.batches(x, x[:, :1]), epochs=1)
ctx = fl.train(fl.init(loop))
with fl.seeded(3):
    assert len(fl.digest(ctx)) == 64
"""


def test_the_core_works_without_numpy() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_NUMPY], check=True)
