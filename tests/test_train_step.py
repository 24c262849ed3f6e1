"""`train_step`: one batch of one's own, with the hooks of a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import functional_loop as fl
from functional_loop.core.stages import BOUNDARIES
from tests.sample_loops import data, full_loop, make_loop, recorder

X, Y = data(3)
VALID = fl.batches(X, Y, batch_size=6)


def train_steps(ctx: fl.Context) -> fl.Context:
    source: Any = ctx.loop.train
    for index in source.order(ctx.seed, ctx.epoch).split(4)[ctx.step :]:
        ctx = fl.train_step(ctx, fl.Batch(X[index], Y[index], index))
    return ctx


def test_train_step_is_one_batch_of_train() -> None:
    begun = next(ctx for ctx in fl.iterate(fl.init(full_loop())) if ctx.stage == "epoch_begin")
    by_hand = train_steps(begun)
    assert fl.digest(by_hand) == fl.digest(fl.train(begun, steps=3))
    assert fl.digest(train_steps(fl.train(begun, steps=1))) == fl.digest(by_hand)
    assert fl.digest(fl.train(by_hand)) == fl.digest(fl.train(begun))


def test_train_step_runs_the_hooks_of_a_batch_alone() -> None:
    seen: list[tuple[str, Any]] = []
    begun = next(
        ctx for ctx in fl.iterate(fl.init(make_loop(callbacks=[recorder(seen, repr)]))) if ctx.stage == "epoch_begin"
    )
    seen.clear()
    ctx = fl.train_step(begun, (X[:4], Y[:4]))
    assert [stage for stage, _ in seen] == ["batch_begin", "after_backward", "batch_end"]
    assert (ctx.stage, ctx.step, ctx.global_step) == ("batch_end", 1, 1)


@pytest.mark.parametrize("stage", ["", *[stage for stage in BOUNDARIES if stage not in ("epoch_begin", "batch_end")]])
def test_train_step_elsewhere_is_refused(stage: str) -> None:
    start = fl.init(make_loop(valid=VALID))
    ctx = next(ctx for ctx in [start, *fl.iterate(start)] if ctx.stage == stage)
    with pytest.raises(ValueError, match=f"after 'epoch_begin' or 'batch_end', not after '{stage or 'init'}'"):
        fl.train_step(ctx, (X, Y))


class WritingToItsInput(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.mul_(2))


def test_train_step_does_not_write_to_the_batch() -> None:
    begun = next(
        ctx for ctx in fl.iterate(fl.init(make_loop(network=WritingToItsInput(3, 2)))) if ctx.stage == "epoch_begin"
    )
    x = X.clone()
    fl.train_step(begun, (x, Y))
    assert torch.equal(x, X)
