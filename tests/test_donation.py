"""A donated context is used up, and says so; whatever shares its tensors stays as it was."""

from __future__ import annotations

import weakref

import pytest
import torch

import functional_loop as fl
from functional_loop.callbacks import ema
from tests.test_span import OPTIMIZERS, loop_of


def started(name: str, **more: object) -> tuple[fl.Context, list[fl.Batch]]:
    loop = loop_of(name, **more)
    ctx = next(c for c in fl.iterate(fl.init(loop)) if c.stage == "epoch_begin")
    return ctx, [batch for batch, _ in loop.train.fetch(0, 1, 0, ())]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_donated_steps_have_the_bits_of_others(name: str) -> None:
    ctx, batches = started(name)
    donated, _ = started(name)
    for batch in batches:
        ctx, donated = fl.train_step(ctx, batch), fl.train_step(donated, batch, donate=True)
        assert fl.digest(donated) == fl.digest(ctx)


def test_whoever_uses_it_again_is_told_what_to_do() -> None:
    ctx, batches = started("fused AdamW")
    fl.train_step(ctx, batches[0], donate=True)
    uses = [
        fl.digest,
        fl.state_dict,
        fl.train,
        fl.to_module,
        lambda c: fl.predict(c, torch.zeros(2, 3)),
        lambda c: fl.train_step(c, batches[1]),
    ]
    for use in [*uses, lambda c: c.params["last.weight"], lambda c: list(c.params)]:
        with pytest.raises(fl.DonatedError, match=r"epoch 1, step 0\) was donated.*leave out donate=True"):
            use(ctx)
    assert "epoch=1" in repr(ctx)


def test_what_shares_its_tensors_stays_as_it_was() -> None:
    ctx, batches = started("fused AdamW", callbacks=[ema()])
    earlier, alias = fl.evolve(ctx, terminate=True), ctx.params["last.weight"].numpy()
    before, values = fl.digest(earlier), alias.copy()
    for batch in batches:
        ctx = fl.train_step(ctx, batch, donate=True)
    assert fl.digest(earlier) == before
    assert (alias == values).all()


@pytest.mark.parametrize("donate", [True, False])
def test_its_memory_is_free_when_the_network_is_called(donate: bool) -> None:
    free: list[bool] = []

    def loss(y_hat: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        free.append(held() is None)
        return (y_hat - y).square().mean()

    ctx, batches = started("fused AdamW", loss=loss, valid=None)
    held = weakref.ref(ctx.params["last.weight"])
    fl.train_step(ctx, batches[0], donate=donate)
    assert set(free) == {donate}


def test_a_step_that_fails_gives_it_back() -> None:
    ctx, batches = started("fused AdamW")
    before = fl.digest(ctx)
    with pytest.raises(RuntimeError):
        fl.train_step(ctx, (torch.zeros(2, 5), batches[0].y), donate=True)
    assert fl.digest(ctx) == before
    fl.train_step(ctx, batches[0])
