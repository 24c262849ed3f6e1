"""What is drawn in the backward pass: a function of the seed of the step, in every way of training."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import functional_loop as fl

from .sample_loops import data, full_loop, make_loop


class HookedNoise(nn.Module):
    """Noise on the gradient of a hidden layer, by a hook."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.first, self.drop, self.last, self.source = nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2), source

    def noise(self, grad: Tensor) -> Tensor:
        match self.source:
            case "torch":
                return torch.randn_like(grad)
            case "numpy":
                return grad.new_tensor(np.random.randn(*grad.shape))
        return torch.full_like(grad, random.random())

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(self.first(x).tanh())
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: grad + 0.1 * self.noise(grad))
        return self.last(hidden)


class NoisyGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * torch.rand_like(grads[0])


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(NoisyGradient.apply(self.first(x)))


class Checkpointed(nn.Module):
    """Dropout that is computed again in the backward pass, by the mask of the forward pass or by another one."""

    def __init__(self, preserve: bool) -> None:
        super().__init__()
        self.body, self.last = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Tanh()), nn.Linear(8, 2)
        self.preserve = preserve

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.body, x, use_reentrant=False, preserve_rng_state=self.preserve)
        return self.last(hidden)


NETWORKS: dict[str, Any] = {
    "a hook, torch": lambda: HookedNoise("torch"),
    "a hook, numpy": lambda: HookedNoise("numpy"),
    "a hook, random": lambda: HookedNoise("random"),
    "a function": Functional,
    "a checkpoint": lambda: Checkpointed(True),
    "a checkpoint that draws anew": lambda: Checkpointed(False),
}


def disturb(number: int) -> None:
    """Leave the process's generators where no run has left them."""
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_way_of_training_draws_the_same(kind: str) -> None:
    loop = make_loop(network=NETWORKS[kind])
    hooked = make_loop(network=NETWORKS[kind], callbacks=[fl.Callback("log", batch_end=lambda ctx: ctx)])
    start, digests = fl.init(loop, seed=1), []

    def one_by_one() -> fl.Context:
        ctx = next(ctx for ctx in fl.iterate(start) if ctx.stage == "epoch_begin")
        source: Any = loop.train
        batches = [batch for batch, _ in source.fetch(1, 1, 0, ())]
        for batch in batches:
            ctx = fl.train_step(ctx, batch)
        return fl.train(ctx)

    ways = [
        lambda: fl.train(start),
        lambda: [*fl.iterate(start)][-1],
        lambda: fl.train(fl.init(hooked, seed=1)),
        lambda: fl.train(fl.load_state_dict(fl.init(loop), fl.state_dict(fl.train(start, steps=2)))),
        one_by_one,
        lambda: fl.unstack(fl.train(fl.stack([start, fl.init(loop, seed=2)], mode="exact")))[0],
    ]
    for number, way in enumerate(ways):
        disturb(number)
        before = torch.get_rng_state()
        digests.append(fl.digest(way()))
        assert torch.equal(torch.get_rng_state(), before)
    assert len(set(digests)) == 1


@pytest.mark.parametrize("kind", NETWORKS)
def test_accumulated_gradients_draw_the_same(kind: str) -> None:
    start = fl.init(full_loop(network=NETWORKS[kind], callbacks=[]), seed=1)
    disturb(1)
    expected = fl.digest(fl.train(start))
    disturb(2)
    assert fl.digest([*fl.iterate(start)][-1]) == expected


def test_unrolled_training_draws_the_same() -> None:
    x, y = data(3)
    loop = make_loop(network=Functional, optimizer=fl.optimizer(torch.optim.SGD, lr=0.1))
    ctx = next(ctx for ctx in fl.iterate(fl.init(loop)) if ctx.stage == "epoch_begin")
    stepped = fl.train_step(ctx, (x, y))
    disturb(1)
    unrolled = fl.unroll(ctx, [(x, y)], checkpoint=True)
    torch.testing.assert_close(unrolled.params, stepped.params, rtol=0, atol=1e-6)
