"""Law 6: what only looks changes nothing.

An observing callback that is added or removed leaves the digest of everything else as it was; with or without
validation and measures, parameters, buffers, optimizer and slots go the same way.
"""

from __future__ import annotations

import io
import random

import numpy as np
import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import functional_loop as fl
from tests.hooks import CALLBACKS, observer
from tests.loops import MEASURES, tensors
from tests.strategies import boundaries, examples, seeds, specs

pytestmark = pytest.mark.filterwarnings("ignore:resuming in mid-epoch reads")


def draw_random_numbers(ctx: fl.Context) -> None:
    torch.rand(3), np.random.rand(3), random.random()


def reseed(ctx: fl.Context) -> None:
    torch.manual_seed(ctx.step), np.random.seed(ctx.step), random.seed(ctx.step)


def predict(ctx: fl.Context) -> None:
    fl.predict(ctx, tensors(3)[0])


def score(ctx: fl.Context) -> None:
    x, y = tensors(5)
    measured = fl.evolve(ctx.loop, measures_valid=[MEASURES["mean"]])
    fl.validate(fl.evolve(ctx, loop=measured), fl.batches(x, y, batch_size=2))


def train_a_fork(ctx: fl.Context) -> None:
    """Start another run of the same loop, in the middle of this one."""
    silent = fl.evolve(ctx.loop, callbacks=())
    fl.train(fl.init(silent, seed=1), steps=1)


def save(ctx: fl.Context) -> None:
    torch.save(ctx.params, io.BytesIO())


looks = st.sampled_from([repr, optree.tree_flatten, draw_random_numbers, reseed, predict, score, train_a_fork, save])


@given(specs(), seeds, looks, st.floats(-2, 2), st.data())
def test_an_observer_leaves_no_trace(spec, seed, look, weight, data):
    callbacks = [CALLBACKS[name]() for name in spec.callbacks if name != "observer"]
    plain = boundaries(spec.loop(callbacks=callbacks), seed)
    watching = fl.Callback("watching", weight=weight, **observer(look).hooks)
    place = data.draw(st.integers(0, len(callbacks)))
    if look is train_a_fork and spec.data == "stateful loader":
        return  # Such a loader has one state, and refuses a second reader.
    watched = boundaries(spec.loop(callbacks=[*callbacks[:place], watching, *callbacks[place:]]), seed)
    assert [fl.digest(ctx) for ctx in watched] == [fl.digest(ctx) for ctx in plain]


def trajectory(loop: fl.Loop, seed: int) -> list[dict[str, object]]:
    """What training consists of, after every batch."""
    names = ("params", "buffers", "optimizer_state", "callbacks", "last_loss", "accumulated", "trainable", "data")
    return [
        {name: getattr(ctx, name) for name in names}
        for ctx in fl.iterate(fl.init(loop, seed))
        if ctx.stage == "batch_end"
    ]


@given(specs(), specs(), seeds)
def test_validation_and_measures_change_nothing(spec, other, seed):
    # These two look at validation.
    spec = fl.evolve(spec, callbacks=tuple(name for name in spec.callbacks if name not in ("counter", "history")))
    evaluation = {"valid_rows": other.valid_rows, "measures": other.measures, "eval_freq": other.eval_freq}
    one = trajectory(spec.loop(), seed)
    another = trajectory(fl.evolve(spec, **evaluation).loop(), seed)
    assert fl.tree_equal(one, another)


@examples(0.5)
@given(specs(), seeds)
def test_owning_the_loop_changes_nothing(spec, seed):
    """`iterate`, `train` in one go, and `train` one batch at a time are the same training."""
    start = fl.init(spec.loop(), seed)
    *_, last = fl.iterate(start)
    stepwise = start
    while stepwise.stage != "end":
        stepwise = fl.train(stepwise, steps=1)
    assert fl.digest(last) == fl.digest(fl.train(start)) == fl.digest(stepwise)
