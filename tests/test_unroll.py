"""Unrolled training has the numbers of training, and the gradients of finite differences."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck

import functional_loop as fl
from tests.sample_loops import data, make_loop
from tests.strategies import examples

OPTIMIZERS: dict[str, fl.Optimizer] = {
    "sgd": fl.optimizer(torch.optim.SGD, lr=0.1, weight_decay=0.01),
    "momentum": fl.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.1, maximize=True),
    "nesterov": fl.optimizer(torch.optim.SGD, lr=0.1, momentum=0.8, nesterov=True),
    "adam": fl.optimizer(torch.optim.Adam, lr=0.05, weight_decay=0.1, eps=1e-3),
    "amsgrad": fl.optimizer(torch.optim.Adam, lr=0.05, amsgrad=True, eps=1e-3, maximize=True),
    "adamw": fl.optimizer(torch.optim.AdamW, lr=0.05, eps=1e-3, fused=True),
    "groups": fl.optimizer(torch.optim.AdamW, lr=0.05, groups=[{"params": "*.bias", "lr": 0.2, "weight_decay": 0.5}]),
}


class Scaled(nn.Module):
    """Dropout, a buffer that is read, and one that follows the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.dropout = nn.Dropout(0.3)
        self.register_buffer("scale", torch.ones(4))
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return self.second(self.dropout(torch.tanh(self.first(x - self.mean))) * self.scale)


def start(optimizer: str = "adamw", network: Callable[[], nn.Module] = Scaled, **changes: Any) -> fl.Context:
    loop = make_loop(network=lambda: network().double(), optimizer=OPTIMIZERS[optimizer], **changes)
    return next(c for c in fl.iterate(fl.init(loop, seed=1)) if c.stage == "epoch_begin")


def three_batches() -> list[fl.Batch]:
    x, y = (tensor.double() for tensor in data(3))
    return [fl.Batch(x[rows], y[rows]) for rows in (slice(0, 4), slice(4, 8), slice(8, 10))]


def meta_loss(ctx: fl.Context) -> Tensor:
    return fl.loss_function(ctx, three_batches()[0])(ctx.params)


def with_lr(ctx: fl.Context, lr: Tensor) -> fl.Context:
    return ctx.with_hyperparameters(lr=lr)


# ---- values


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_numbers_are_those_of_training(optimizer: str, checkpoint: bool) -> None:
    ctx = start(optimizer)
    unrolled = fl.detached(fl.unroll(ctx, three_batches(), checkpoint=checkpoint))
    for batch in three_batches():
        ctx = fl.train_step(ctx, batch)
    assert (unrolled.step, unrolled.global_step) == (ctx.step, ctx.global_step)
    for field in ("params", "buffers", "optimizer_state", "last_loss"):
        torch.testing.assert_close(getattr(unrolled, field), getattr(ctx, field), rtol=1e-9, atol=1e-12)


def test_it_goes_on_from_a_context_in_mid_training_and_training_goes_on_from_it() -> None:
    ctx = fl.train_step(start(), three_batches()[0])
    middle = fl.detached(fl.unroll(ctx, three_batches()[1:2]))
    torch.testing.assert_close(fl.train(middle).params, fl.train(fl.train_step(ctx, three_batches()[1])).params)


def test_frozen_parameters_stay() -> None:
    ctx = fl.evolve(start(), trainable=("second.weight", "second.bias"))
    after = fl.unroll(ctx, three_batches())
    moved = {name for name in ctx.params if not torch.equal(ctx.params[name], after.params[name])}
    assert moved == {"second.weight", "second.bias"}


def test_the_argument_is_left_alone() -> None:
    ctx = start()
    before = fl.digest(ctx)
    fl.unroll(ctx, three_batches())
    assert fl.digest(ctx) == before


# ---- gradients


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradients_of_everything_are_those_of_finite_differences(optimizer: str, checkpoint: bool) -> None:
    ctx = start(optimizer)
    group = ctx.optimizer_state["groups"][0]
    numbers = {name: value for name, value in group.items() if type(value) is float}
    betas = group.get("betas", [])
    names, values = [*ctx.params, *ctx.buffers], [*ctx.params.values(), *ctx.buffers.values()]

    def after_training(*inputs: Tensor) -> Tensor:
        tensors, rest = dict(zip(names, inputs)), inputs[len(names) :]
        hyper: dict[str, Any] = dict(zip(numbers, rest)) | ({"betas": list(rest[-2:])} if betas else {})
        here = fl.evolve(
            ctx, params={n: tensors[n] for n in ctx.params}, buffers={n: tensors[n] for n in ctx.buffers}
        ).with_hyperparameters(0, **hyper)
        after = fl.unroll(here, three_batches(), checkpoint=checkpoint)
        return meta_loss(after) + after.buffers["mean"].sum()

    scalars = [torch.tensor(v, dtype=torch.float64) for v in (*numbers.values(), *betas)]
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (*values, *scalars)]
    assert gradcheck(after_training, inputs, eps=1e-6, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "momentum"])
def test_a_gradient_of_exactly_zero_has_the_right_slope(optimizer: str) -> None:
    """Of a parameter w in the loss a * w, at a = 0: the slope of the update in a is known."""

    def network() -> nn.Module:
        return nn.Linear(1, 1, bias=False)

    def run(a: Tensor) -> Tensor:
        ctx = start(optimizer, network, loss=lambda y_hat, y: (y_hat * y).sum())
        after = fl.unroll(ctx, [fl.Batch(torch.ones(1, 1).double(), a.reshape(1, 1))])
        return after.params["weight"].sum()

    zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(run(zero), zero)
    expected = {"adam": -0.05 / 1e-3, "adamw": -0.05 / 1e-3, "momentum": 0.1}[optimizer]
    if optimizer == "adam":
        # The weight decay of Adam makes the gradient another than zero, unless the weight is zero.
        assert bool(slope.isfinite())
    else:
        torch.testing.assert_close(slope.item(), expected)


def test_func_transforms_give_the_gradients_of_autograd() -> None:
    ctx = start("adam")

    def outcome(params: dict[str, Tensor], lr: Tensor) -> Tensor:
        return meta_loss(fl.unroll(with_lr(fl.evolve(ctx, params=params), lr), three_batches()))

    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    params = {name: p.clone().requires_grad_() for name, p in ctx.params.items()}
    by_autograd = torch.autograd.grad(outcome(params, lr), [*params.values(), lr])
    by_func, slope = torch.func.grad(outcome, argnums=(0, 1))(ctx.params, lr.detach())
    torch.testing.assert_close([*by_func.values(), slope], list(by_autograd))
    many = torch.func.vmap(lambda lr: outcome(ctx.params, lr), randomness="same")(
        torch.tensor([0.05, 0.1], dtype=torch.float64)
    )
    torch.testing.assert_close(many[1], outcome(ctx.params, lr.detach()), rtol=1e-9, atol=0)


def test_truncation_reaches_back_so_far_and_no_further() -> None:
    ctx, batches = start("sgd"), three_batches()
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    params = {name: p.clone().requires_grad_() for name, p in ctx.params.items()}
    here = with_lr(fl.evolve(ctx, params=params), lr)
    whole, truncated = fl.unroll(here, batches), fl.unroll(here, batches, truncate=2)
    torch.testing.assert_close(truncated.params, whole.params)
    (slope,) = torch.autograd.grad(meta_loss(truncated), lr, retain_graph=True)
    by_hand = fl.unroll(with_lr(fl.detached(fl.unroll(here, batches[:1])), lr), batches[1:])
    torch.testing.assert_close(slope, torch.autograd.grad(meta_loss(by_hand), lr)[0])
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(meta_loss(truncated), list(params.values()))
    torch.testing.assert_close(fl.unroll(here, batches, truncate=9, checkpoint=True).params, whole.params)


def test_checkpoints_give_the_same_bits_of_gradients() -> None:
    ctx, batches = start("adamw"), three_batches() * 5
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    stored, computed_anew = (
        torch.autograd.grad(meta_loss(fl.unroll(with_lr(ctx, lr), batches, checkpoint=kind)), lr)[0]
        for kind in (False, True)
    )
    torch.testing.assert_close(stored, computed_anew, rtol=1e-12, atol=0)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_checkpoints_keep_the_square_root_of_the_steps(checkpoint: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not checkpoint:
        module = importlib.import_module("functional_loop.derivatives.unroll")
        monkeypatch.setattr(module, "checkpointed", lambda steps, *given, **_: steps(*given))
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.linear(x))
            made.append(weakref.ref(hidden))
            alive.append(sum(ref() is not None for ref in made))
            return hidden * hidden

    ctx = start("sgd", Counted)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    after = fl.unroll(with_lr(ctx, lr), three_batches() * 12, checkpoint=True)
    after.params["linear.weight"].sum().backward()
    assert max(alive) <= 7 if checkpoint else max(alive) == 36


@given(st.sampled_from(["sgd", "nesterov", "amsgrad"]), st.integers(0, 6), st.integers(1, 4))
@examples(0.3)
def test_unrolling_in_parts_is_unrolling_in_one(optimizer: str, steps: int, at: int) -> None:
    ctx, batches = start(optimizer), (three_batches() * 2)[:steps]
    parts = fl.unroll(fl.unroll(ctx, batches[:at]), batches[at:])
    assert fl.tree_equal(fl.detached(parts), fl.detached(fl.unroll(ctx, batches)))


# ---- what it refuses


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="RMSprop has no differentiable form; these have: SGD, Adam, AdamW"):
        fl.unroll(fl.init(make_loop(optimizer=fl.optimizer(torch.optim.RMSprop))), three_batches())
    with pytest.raises(ValueError, match="accumulate > 1"):
        fl.unroll(start(accumulate=2), three_batches())
    with pytest.raises(ValueError, match="truncate must be a positive integer or None, not 0"):
        fl.unroll(start(), three_batches(), truncate=0)
    with pytest.raises(ValueError, match="the loss takes the context of one run"):
        fl.unroll(fl.stack([ctx := start(), ctx]), three_batches())
