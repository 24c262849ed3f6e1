"""Draws from numpy and `random` are noticed, whatever their generators keep, and cost no step more than another."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import functional_loop as fl
from functional_loop.core import draws
from functional_loop.core.draws import DrawWatch

DRAWS: dict[str, Callable[[], object]] = {
    "one normal": np.random.randn,
    "two normals": lambda: np.random.randn(2),
    "three normals": lambda: np.random.randn(3),
    "a uniform": np.random.rand,
    "as many words as a state has": lambda: np.random.rand(312),
    "a permutation": lambda: np.random.permutation(5),
    "a seed": lambda: np.random.seed(5),
    "a normal that is kept": lambda: np.random.set_state(
        {**np.random.get_state(legacy=False), "has_gauss": 1, "gauss": 0.25}
    ),
    "random": random.random,
    "random normal": lambda: random.gauss(0, 1),
    "random shuffle": lambda: random.shuffle([1, 2, 3]),
}


@pytest.fixture(params=["known", "of random unknown", "of numpy unknown"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is known of the memory of the generators, on this interpreter or on others."""
    name: str = request.param
    if name == "of random unknown":
        monkeypatch.setattr(draws, "_python", None)
    elif name == "of numpy unknown":
        monkeypatch.setattr(draws, "_find_numpy", lambda *_: (None, None))
        monkeypatch.setattr(draws, "_numpy", (None, None, None))
    assert draws.is_costly() is (name != "known")
    return name


@pytest.mark.parametrize("kept", [0, 1])
@pytest.mark.parametrize("draw", DRAWS)
def test_every_draw_is_noticed_and_put_back(layout: str, draw: str, kept: int) -> None:
    np.random.seed(0)
    np.random.randn(2 + kept)
    random.seed(0)
    for _ in range(kept):
        random.gauss(0, 1)
    watch, before = DrawWatch(), draws._comparable(draws.states())
    for _ in range(2):
        watch.look()
        assert not watch.has_moved()
        DRAWS[draw]()
        assert watch.has_moved()
        assert watch.put_back()
        assert not watch.put_back()
        assert draws._comparable(draws.states()) == before


def test_another_generator_of_numpy_is_watched_too() -> None:
    own = np.random.get_bit_generator()
    watch = DrawWatch()
    watch.look()
    try:
        np.random.set_bit_generator(np.random.PCG64(1))
        assert not draws.is_costly()
        watch.look()
        assert not watch.has_moved()
        expected = np.random.rand()
        assert watch.put_back()
        assert np.random.rand() == expected
    finally:
        np.random.set_bit_generator(own)


def test_only_the_generator_whose_memory_is_known_is_read() -> None:
    assert draws._find_python(random.SystemRandom()) is None
    assert draws._find_python(None) is None
    assert draws._find_numpy(np, np.random.PCG64()) == (None, None)


class Drawing(nn.Linear):
    """A network that draws from all three generators."""

    def forward(self, x: Tensor) -> Tensor:
        noise: Tensor = super().forward(x) * (1 + np.random.randn() + random.gauss(0, 1)) + torch.randn(1)
        return noise


@pytest.mark.parametrize("network", [nn.Linear, Drawing])
@pytest.mark.parametrize("kept", [0, 1])
def test_training_is_the_same_and_leaves_the_generators_alone(layout: str, network: Any, kept: int) -> None:
    x = torch.randn(12, 3)
    loop = fl.Loop(
        lambda: network(3, 1),
        lambda y_hat, y: (y_hat.squeeze(1) - y).square().mean(),
        fl.optimizer(torch.optim.SGD, lr=0.1),
        fl.batches(x, x.sum(1), batch_size=4, shuffle=True),
        epochs=2,
    )
    np.random.seed(0)
    np.random.randn(2 + kept)
    before = draws._comparable(draws.states())
    trained = fl.train(fl.init(loop, seed=1))
    assert draws._comparable(draws.states()) == before
    np.random.rand()
    *_, looked_at = fl.iterate(fl.init(loop, seed=1))
    again = fl.train(fl.train(fl.init(loop, seed=1), steps=4))
    assert fl.digest(trained) == fl.digest(looked_at) == fl.digest(again)
