"""Curvature against Hessians that are made in full, of networks small enough for that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import functional_loop as fl
from tests.sample_loops import data, make_loop
from tests.strategies import examples


def start(**changes: Any) -> fl.Context:
    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.4), nn.Linear(4, 2)).double()

    return fl.init(make_loop(network=network, **changes), seed=2)


def batches() -> list[tuple[Tensor, Tensor]]:
    x, y = (tensor.double() for tensor in data(3))
    return [(x[:5], y[:5]), (x[5:], y[5:])]


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def full_hessian(ctx: fl.Context, batch: Any, training: bool = False) -> Tensor:
    loss = fl.loss_function(ctx, batch, training=training)
    blocks = torch.func.jacrev(torch.func.jacrev(loss))(fl.trainable_params(ctx))
    sizes = {name: ctx.params[name].numel() for name in ctx.trainable}
    rows = [torch.cat([blocks[a][b].reshape(sizes[a], sizes[b]) for b in sizes], 1) for a in sizes]
    return torch.cat(rows)


@pytest.mark.parametrize("training", [False, True])
@given(seed=st.integers(0, 2**31))
@examples(0.2)
def test_products_are_those_with_the_full_hessian(training: bool, seed: int) -> None:
    ctx, (batch, _) = start(), batches()
    generator = torch.Generator().manual_seed(seed)
    vector = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in ctx.params.items()}
    product = fl.hessian_vector_product(ctx, batch, vector, training=training)
    torch.testing.assert_close(flat(product), full_hessian(ctx, batch, training) @ flat(vector))


def test_only_trainable_parameters_count() -> None:
    ctx = fl.evolve(start(), trainable=("3.bias",))
    ones = {"3.bias": torch.ones(2).double()}
    torch.testing.assert_close(fl.hessian_vector_product(ctx, batches()[0], ones)["3.bias"], ones["3.bias"])
    with pytest.raises(ValueError, match=r"the vector is for .* the trainable parameters are \['3.bias'\]"):
        fl.hessian_vector_product(ctx, batches()[0], ctx.params)


@pytest.mark.parametrize("k", [1, 3, 26])
def test_the_largest_eigenvalues_are_those_of_the_full_hessian(k: int) -> None:
    ctx = start()
    hessian = torch.stack([full_hessian(ctx, batch) for batch in batches()]).mean(0)
    expected = torch.linalg.eigvalsh(hessian).flip(0)[:k]
    values, vectors = fl.top_eigenvalues(ctx, batches(), k, steps=26)
    torch.testing.assert_close(values, expected, rtol=1e-7, atol=1e-9)
    for value, vector in zip(values[:3], vectors[:3]):
        torch.testing.assert_close(hessian @ flat(vector), value * flat(vector), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(flat(vector).norm().item(), 1.0)


def test_few_steps_come_close_to_the_largest() -> None:
    ctx = start()
    expected = torch.linalg.eigvalsh(full_hessian(ctx, batches()[0]))[-1]
    (value,), _ = fl.top_eigenvalues(ctx, batches()[:1], steps=10)
    torch.testing.assert_close(value, expected, rtol=1e-2, atol=0)


def test_it_stops_where_the_start_reaches_no_further() -> None:
    ctx = fl.evolve(start(), trainable=("3.bias",))
    values, vectors = fl.top_eigenvalues(ctx, batches(), k=5)
    # The Hessian is the identity: one direction is all that can be told.
    torch.testing.assert_close(values, torch.ones(1).double())
    assert len(vectors) == 1


def test_the_result_is_a_function_of_the_context() -> None:
    ctx = start()
    first = fl.top_eigenvalues(ctx, batches(), steps=3)
    torch.rand(3)
    assert fl.tree_equal(fl.top_eigenvalues(ctx, batches(), steps=3), first)


def test_the_loss_in_training_mode_is_that_of_the_step() -> None:
    seen = []

    def look(ctx: fl.Context) -> fl.Context:
        f = fl.loss_function(ctx, ctx.batch, training=True)
        grads = torch.func.grad(f)(fl.trainable_params(ctx))
        torch.testing.assert_close(grads, ctx.grads)
        torch.testing.assert_close(f(ctx.params), ctx.last_loss)
        seen.append(ctx.step)
        return ctx

    x, y = (tensor.double() for tensor in data(3))
    source = fl.batches(x, y, batch_size=4)
    fl.train(start(train=source, epochs=1, callbacks=[fl.Callback("look", after_backward=look)]))
    assert seen == [1, 2, 3]


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        fl.top_eigenvalues(start(), [])
    with pytest.raises(ValueError, match="k must be from 1 to steps=5, not 6"):
        fl.top_eigenvalues(start(), batches(), 6, steps=5)
