"""Only what is in ``ctx.trainable`` is updated, whatever a hook makes of it, and whenever."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import functional_loop as fl
from tests.strategies import boundaries, seeds, specs

pytestmark = pytest.mark.filterwarnings("ignore:resuming in mid-epoch reads")


def changing_subset(stage: str) -> fl.Callback:
    """Trains other parameters at every visit of ``stage``, at least the last one."""

    def choose(ctx: fl.Context) -> fl.Context:
        with fl.seeded(fl.fold_in(ctx.seed, "subset", ctx.global_step)):
            chosen = (torch.rand(len(ctx.params)) < 0.5).tolist()
        *names, last = ctx.params
        return fl.evolve(ctx, trainable=(*(name for name, on in zip(names, chosen) if on), last))

    return fl.Callback("changing_subset", **{stage: choose})


# LBFGS moves all parameters along one direction, as it does in torch when requires_grad is changed.
momentum = ["sgd", "adamw", "adamw, fused", "rmsprop", "nadam", "asgd", "rprop"]


@given(specs(), st.sampled_from(momentum), st.sampled_from(["epoch_begin", "batch_begin", "batch_end"]), seeds)
def test_frozen_parameters_do_not_move(spec, optimizer, stage, seed):
    spec = fl.evolve(spec, optimizer=optimizer, callbacks=())
    before = None
    for ctx in boundaries(spec.loop(callbacks=[changing_subset(stage)]), seed):
        if ctx.stage == "batch_end" and stage != "batch_end":
            frozen = ctx.params.keys() - set(ctx.trainable)
            assert all(torch.equal(ctx.params[name], before.params[name]) for name in frozen)
        elif ctx.stage == "batch_end":
            frozen = ctx.params.keys() - set(before.trainable)
            assert all(torch.equal(ctx.params[name], before.params[name]) for name in frozen)
        before = ctx
