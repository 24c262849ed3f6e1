"""Batches that are passed over: the run is the one that never saw them, and all others keep their places."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import functional_loop as fl
from functional_loop.callbacks import rollback
from tests.sample_loops import data, full_loop, make_loop, mlp, recorder, same_bits
from tests.strategies import examples, specs

# Not the callback that looks at the loss at the end of an epoch, which may have none.
SPECS = specs().map(lambda spec: attrs.evolve(spec, callbacks=tuple(name for name in spec.callbacks if name != "best")))
NUMBERS = st.frozensets(st.integers(1, 8), max_size=4)

pytestmark = pytest.mark.filterwarnings("ignore:resuming in mid-epoch")


def test_the_parameters_are_those_of_a_loop_by_hand_that_leaves_them_out() -> None:
    x, y = data(3)
    loop = make_loop(network=mlp(), train=fl.batches(x, y, batch_size=4), skip_batches={2, 4})
    module = mlp().train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for number, rows in enumerate([slice(0, 4), slice(4, 8), slice(8, 10)] * 2, 1):
        if number not in (2, 4):
            optimizer.zero_grad()
            nn.functional.mse_loss(module(x[rows]), y[rows]).backward()
            optimizer.step()
    assert same_bits(fl.train(fl.init(loop)), module)


@given(SPECS, NUMBERS)
@examples(0.5)
def test_only_the_place_changes_and_no_hook_runs(spec: Any, numbers: frozenset[int]) -> None:
    seen: list[Any] = []
    look = recorder(seen, lambda ctx: ctx.global_step, ("batch_begin", "after_backward", "batch_end"))
    loop = spec.loop(skip_batches=numbers, callbacks=[*spec.loop().callbacks, look])
    before = None
    for ctx in fl.iterate(fl.init(loop, seed=2)):
        if before is not None and ctx.stage == "batch_end" and ctx.global_step in numbers:
            place = {"step": before.step, "global_step": before.global_step, "stage": before.stage, "data": before.data}
            assert fl.digest(fl.evolve(ctx, **place)) == fl.digest(before)
        before = ctx
    assert not {number for _, number in seen} & numbers
    assert {number for _, number in seen} == set(range(1, ctx.global_step + 1)) - numbers


@given(SPECS, NUMBERS, st.integers(0, 8))
@examples(0.5)
def test_a_run_resumes_at_any_batch(spec: Any, numbers: frozenset[int], steps: int) -> None:
    end = fl.train(fl.init(spec.loop(skip_batches=numbers), seed=2))
    part = fl.train(fl.init(spec.loop(skip_batches=numbers), seed=2), steps=steps)
    taken_up = fl.load_state_dict(fl.init(spec.loop(skip_batches=numbers)), fl.state_dict(part))
    assert fl.digest(fl.train(taken_up)) == fl.digest(end)


def test_a_batch_found_bad_can_be_skipped_when_the_run_is_resumed() -> None:
    ctx = fl.train(fl.init(full_loop(), seed=3), steps=2)
    skipping = full_loop(skip_batches={4})
    resumed = fl.train(fl.load_state_dict(fl.init(skipping), fl.state_dict(ctx)))
    assert fl.digest(resumed) == fl.digest(fl.train(fl.init(skipping, seed=3)))


def test_a_window_is_made_of_the_batches_that_are_trained_on() -> None:
    seen: list[Any] = []
    look = recorder(seen, lambda ctx: (ctx.step, ctx.accumulated == ()), ("after_backward",))
    x, y = data(3)
    source = fl.batches(x, y, batch_size=2)
    fl.train(fl.init(make_loop(train=source, epochs=1, accumulate=2, callbacks=[look], skip_batches={2})))
    assert [place for _, place in seen] == [(1, False), (3, True), (4, False), (5, True)]


def test_batches_of_ones_own_take_the_places_that_are_not_skipped() -> None:
    x, y = data(3)
    skipping = make_loop(train=fl.batches(x, y, batch_size=4), epochs=1, skip_batches={2})
    ctx = next(c for c in fl.iterate(fl.init(skipping)) if c.stage == "epoch_begin")
    for rows in (slice(0, 4), slice(8, 10)):
        ctx = fl.train_step(ctx, (x[rows], y[rows]))
    assert ctx.step == 3
    assert fl.tree_equal(ctx.params, fl.train(fl.init(skipping)).params)


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"skip_batches holds numbers of batches of the run, .* not 0"):
        make_loop(skip_batches=[3, 0])
    with pytest.raises(TypeError, match="skip_batches is a set of batch numbers, not 3"):
        make_loop(skip_batches=3)


def test_ensembles_refuse_it() -> None:
    with pytest.raises(ValueError, match="skip_batches of the Loop passes batches over, which the members"):
        fl.stack([fl.init(make_loop(skip_batches={1}))])
    with pytest.raises(ValueError, match="callback 'rollback' of the Loop passes batches over"):
        fl.stack([fl.init(make_loop(callbacks=[rollback()]))])
    stacked = fl.stack([fl.init(make_loop())])
    with pytest.raises(ValueError, match="skip_batches of the Loop passes batches over"):
        fl.train(fl.evolve(stacked, loop=make_loop(skip_batches={1})))
