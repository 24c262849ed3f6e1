from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import functional_loop as fl
from functional_loop.callbacks.control.terminate_on_nan import terminate_on_nan
from tests.callbacks.laws import holds_for
from tests.sample_loops import data, full_loop, make_loop

BAD_STEP = 5


def failing(*callbacks: fl.Callback, value: float = math.nan, step: int = BAD_STEP, **changes: Any) -> fl.Loop:
    """A loop whose loss is ``value`` at one step: the second batch of the second epoch."""

    def spoil(ctx: fl.Context) -> fl.Context:
        if ctx.global_step != step:
            return ctx
        return fl.evolve(ctx, batch=fl.evolve(ctx.batch, y=torch.full_like(ctx.batch.y, value)))

    spoiling = fl.Callback("spoil", batch_begin=spoil)
    return full_loop(**{"epochs": 4, "callbacks": [spoiling, *callbacks]} | changes)


def is_finite(params: dict[str, Tensor]) -> bool:
    return all(bool(p.isfinite().all()) for p in params.values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_it_raises_before_the_update_and_the_error_carries_the_context_before(value: float) -> None:
    loop = failing(terminate_on_nan(), value=value)
    with pytest.raises(FloatingPointError, match=f"the loss is {value}") as raised:
        fl.train(fl.init(loop))
    ctx = fl.context_of(raised.value)
    assert ctx is not None
    assert (ctx.global_step, ctx.stage) == (BAD_STEP - 1, "batch_end")
    assert fl.digest(ctx) == fl.digest(fl.train(fl.init(loop), steps=BAD_STEP - 1))
    assert is_finite(ctx.params)


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_it_terminates_with_the_parameters_from_before(accumulate: int) -> None:
    loop = failing(terminate_on_nan(action="terminate"), accumulate=accumulate)
    ctx = fl.train(fl.init(loop))
    before = fl.train(fl.init(loop), steps=BAD_STEP - 1)
    assert (ctx.epoch, ctx.stage) == (2, "end")
    assert ctx.callbacks["terminate_on_nan"] == {"step": BAD_STEP}
    assert fl.tree_equal(ctx.params, before.params)


def test_without_it_the_parameters_are_lost() -> None:
    assert not is_finite(fl.train(fl.init(failing())).params)


def test_it_looks_at_every_nth_batch() -> None:
    loop = failing(terminate_on_nan(every=4, action="terminate"))
    assert fl.train(fl.init(loop)).callbacks["terminate_on_nan"] == {"step": 8}
    untouched = failing(terminate_on_nan(every=BAD_STEP - 1), epochs=2)
    assert fl.train(fl.init(untouched)).epoch == 2


def test_a_sound_run_is_not_touched() -> None:
    plain = fl.train(fl.init(make_loop()))
    for action in ("raise", "terminate"):
        watched = fl.train(fl.init(make_loop(callbacks=[terminate_on_nan(action=action)])))
        assert fl.tree_equal(watched.params, plain.params)


def test_training_goes_on_from_the_error_with_other_data() -> None:
    with pytest.raises(FloatingPointError) as raised:
        fl.train(fl.init(failing(terminate_on_nan())))
    ctx = fl.context_of(raised.value)
    assert ctx is not None
    sound = fl.evolve(ctx, loop=failing(terminate_on_nan(), step=-1))
    assert fl.train(sound).epoch == 4


@pytest.mark.parametrize("action", ["raise", "terminate"])
def test_it_resumes_anywhere_and_its_forks_do_not_mix(action: str, tmp_path: Path) -> None:
    step = BAD_STEP if action == "terminate" else -1
    holds_for(lambda: failing(terminate_on_nan(action=action), step=step, epochs=3), tmp_path)


def test_a_run_that_it_terminated_resumes_to_no_further_epoch() -> None:
    loop = failing(terminate_on_nan(action="terminate"))
    stopped = [ctx for ctx in fl.iterate(fl.init(loop)) if ctx.stage == "epoch_end"][-1]
    longer = fl.evolve(loop, epochs=50)
    assert fl.train(fl.load_state_dict(fl.init(longer), fl.state_dict(stopped))).epoch == 2


def test_lbfgs_stays_where_it_was() -> None:
    x, y = data(3)
    y[3] = math.nan
    lbfgs = fl.optimizer(torch.optim.LBFGS, max_iter=3)
    loop = make_loop(
        optimizer=lbfgs, train=fl.batches(x, y, batch_size=2), callbacks=[terminate_on_nan(1, "terminate")]
    )
    assert is_finite(fl.train(fl.init(loop)).params)


def test_bad_arguments_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="terminate_on_nan: every must be an integer of at least 1, not 0"):
        terminate_on_nan(0)
    with pytest.raises(ValueError, match="terminate_on_nan: action is 'raise' or 'terminate', not 'stop'"):
        terminate_on_nan(action="stop")
