"""Gradients of single rows against a loop over the rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import functional_loop as fl
from tests.sample_loops import data, make_loop, noisy_mlp
from tests.strategies import examples


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(3, 4), nn.Linear(3, 4), nn.Parameter(torch.ones(()))
        self.head = nn.Sequential(nn.GroupNorm(2, 4), nn.Dropout(0.5), nn.Linear(4, 2))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.scale * self.head(self.a(a) + self.b(b))


def start(**changes: Any) -> fl.Context:
    x, y = data(3)
    return fl.init(make_loop(**{"network": TwoInputs, "train": fl.batches((x, x), y)} | changes), seed=4)


def batch(rows: int = 7) -> fl.Batch:
    x, y = data(3)
    return fl.Batch((x[:rows], x.flip(0)[:rows]), y[:rows])


@given(st.integers(1, 10), st.one_of(st.none(), st.integers(1, 12)))
@examples(0.3)
def test_they_are_those_of_every_row_alone(rows: int, chunk_size: int | None) -> None:
    ctx = start(network=lambda: TwoInputs().double())
    x, y = fl.tree_map(Tensor.double, (batch(rows).x, batch(rows).y))
    given_batch, (a, b) = fl.Batch(x, y), x
    gradients = fl.per_sample_gradients(ctx, given_batch, chunk_size=chunk_size)
    for i in range(rows):
        row = slice(i, i + 1)
        alone = torch.func.grad(fl.loss_function(ctx, ((a[row], b[row]), y[row])))(ctx.params)
        torch.testing.assert_close({name: grad[i] for name, grad in gradients.items()}, alone)
    mean = torch.func.grad(fl.loss_function(ctx, given_batch))(ctx.params)
    torch.testing.assert_close({name: grad.mean(0) for name, grad in gradients.items()}, mean)


def test_every_row_has_dropout_of_its_own_which_is_a_function_of_the_place() -> None:
    (x, _), y = batch(1).x, batch(1).y
    same = fl.Batch((x.repeat(8, 1), x.repeat(8, 1)), y.repeat(8, 1))
    for chunk_size in (None, 2):
        made = fl.per_sample_gradients(start(), same, training=True, chunk_size=chunk_size)
        assert len(made["head.2.weight"].unique(dim=0)) > 2
        torch.rand(3)
        assert fl.tree_equal(fl.per_sample_gradients(start(), same, training=True, chunk_size=chunk_size), made)


def test_only_trainable_parameters_have_any() -> None:
    ctx = fl.evolve(start(), trainable=("head.2.bias",))
    assert list(fl.per_sample_gradients(ctx, batch())) == ["head.2.bias"]
    with pytest.raises(ValueError, match="no parameter is trainable"):
        fl.per_sample_gradients(fl.evolve(ctx, trainable=()), batch())


def test_norms_are_over_all_parameters() -> None:
    gradients = fl.per_sample_gradients(start(), batch())
    for i, norm in enumerate(fl.per_sample_norms(gradients)):
        flat = torch.cat([grad[i].flatten() for grad in gradients.values()])
        torch.testing.assert_close(norm, flat.norm())


def test_networks_that_mix_rows_are_refused_while_training() -> None:
    ctx = start(network=noisy_mlp(), train=fl.batches(*data(3)))
    x, y = data(3)
    assert fl.per_sample_gradients(ctx, (x, y))
    with pytest.raises(ValueError, match="BatchNorm1d at '1' mixes the rows"):
        fl.per_sample_gradients(ctx, (x, y), training=True)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="chunk_size must be a positive integer or None, not 0"):
        fl.per_sample_gradients(start(), batch(), chunk_size=0)
    with pytest.raises(ValueError, match="the batch has no rows"):
        fl.per_sample_gradients(start(), batch(0))
    with pytest.raises(ValueError, match="at least two rows"):
        fl.gradient_noise_scale(start(), batch(1))


def test_the_noise_scale_is_that_of_gradients_of_a_known_spread() -> None:
    """The gradient of a row is w - x: its mean is that of -x at w = 0, and its variance that of x."""

    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(50))

        def forward(self, x: Tensor) -> Tensor:
            return x - self.bias

    generator = torch.Generator().manual_seed(0)
    x = 1 + 3 * torch.randn(4000, 50, generator=generator)
    source = fl.batches(x)
    ctx = fl.init(make_loop(network=Bias, train=source, loss=lambda y_hat, y: y_hat.square().sum(1).mean() / 2))
    found = fl.gradient_noise_scale(ctx, fl.Batch(x), chunk_size=1000)
    assert found["variance"].item() == pytest.approx(50 * 9, rel=0.02)
    assert found["squared_norm"].item() == pytest.approx(50, rel=0.05)
    assert found["noise_scale"].item() == pytest.approx(9, rel=0.05)
    # Without bias: means over small batches say the same.
    parts = [fl.gradient_noise_scale(ctx, fl.Batch(part)) for part in x.split(4)]
    for name in ("variance", "squared_norm"):
        mean = torch.stack([part[name] for part in parts]).mean().item()
        assert mean == pytest.approx(found[name].item(), rel=0.15)
