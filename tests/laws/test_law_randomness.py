"""Training neither uses nor moves the global states of torch, numpy and `random`: all follows from the seed."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import functional_loop as fl
from tests.loops import CLASSES, WIDTH, Spec
from tests.strategies import boundaries, examples, seeds, specs

pytestmark = pytest.mark.filterwarnings("ignore:resuming in mid-epoch reads")


def seed_globals(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def global_states() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), name, keys.tobytes(), *rest, random.getstate()


small_seeds = st.integers(0, 2**32 - 1)


@given(specs(), seeds, small_seeds)
def test_the_global_states_are_not_moved(spec, seed, polluted):
    loop = spec.loop()
    seed_globals(polluted)
    before = global_states()
    ctx = fl.init(loop, seed)
    assert global_states() == before
    for boundary in fl.iterate(ctx):
        assert global_states() == before, boundary


@given(specs(), seeds, small_seeds, small_seeds)
def test_the_global_states_are_not_used(spec, seed, polluted, otherwise):
    digests = set()
    for globally in (polluted, otherwise):
        seed_globals(globally)
        digests.add(fl.digest(fl.train(fl.init(spec.loop(), seed))))
    assert len(digests) == 1


@examples(0.5)
@given(specs(), seeds, st.lists(small_seeds, min_size=1))
def test_whoever_iterates_may_draw_and_seed(spec, seed, polluted):
    quiet = [fl.digest(ctx) for ctx in boundaries(spec.loop(), seed)][1:]
    digests = []
    for number, ctx in enumerate(fl.iterate(fl.init(spec.loop(), seed))):
        digests.append(fl.digest(ctx))
        seed_globals(polluted[number % len(polluted)])
    assert digests == quiet


@given(seeds, seeds)
def test_another_seed_is_another_run(one, another):
    spec = Spec(dropout=0.4)
    same = fl.digest(fl.train(fl.init(spec.loop(), one))) == fl.digest(fl.train(fl.init(spec.loop(), another)))
    assert same == (one == another)


class DrawsInSomeBatches(nn.Module):
    """Calls `random` and numpy where the data says so: not in every batch, and perhaps not in the first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * (random.random() + np.random.rand() if x[0, 0] > 0 else 1.0)


@examples(0.5)
@given(seeds, small_seeds, small_seeds, st.data())
def test_a_network_may_draw_from_numpy_and_random_in_some_batches_only(seed, polluted, otherwise, data):
    loop = Spec(rows=30, batch_size=3, epochs=2, valid_rows=9).loop(network=DrawsInSomeBatches)
    seed_globals(polluted)
    before = global_states()
    whole = boundaries(loop, seed)
    assert global_states() == before
    seed_globals(otherwise)
    cut = whole[data.draw(st.integers(0, len(whole) - 1))]
    assert fl.digest(fl.train(fl.evolve(cut, loop=fl.evolve(loop)))) == fl.digest(whole[-1])
