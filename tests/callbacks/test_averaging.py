from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

import functional_loop as fl
from functional_loop.callbacks.control.early_stopping import early_stopping
from functional_loop.callbacks.gradients.averaging import averaged, ema, swa
from functional_loop.callbacks.gradients.windows import updates
from tests.callbacks.laws import holds_for
from tests.sample_loops import full_loop, make_loop, same_bits
from tests.strategies import examples

EITHER = pytest.mark.parametrize("make", [ema, lambda **named: swa(2, **named)], ids=["ema", "swa"])
Make = Callable[..., fl.Callback]


def with_callbacks(loop: fl.Loop, *callbacks: fl.Callback) -> fl.Loop:
    return attrs.evolve(loop, callbacks=callbacks)


def torch_average(loop: fl.Loop, model: AveragedModel, is_due: Callable[[fl.Context], bool]) -> torch.nn.Module:
    """What `AveragedModel` makes of the weights of a run."""
    for ctx in fl.iterate(fl.init(loop)):
        if is_due(ctx):
            model.update_parameters(fl.to_module(ctx))
    return model.module  # type: ignore[return-value]


def of_floats(average: Any) -> Any:
    """An averaging function of torch that takes the newest of counts; torch's own fail at them, or round."""

    def update(averages: Any, new: Any, count: Any) -> None:
        if averages[0].is_floating_point():
            average(averages, new, count)
        else:
            averages[0].copy_(new[0])

    return update


@given(st.floats(0, 1), st.booleans(), st.integers(1, 2))
@examples(0.3)
def test_the_moving_average_is_torchs(decay: float, use_buffers: bool, accumulate: int) -> None:
    loop = make_loop(accumulate=accumulate)
    model = AveragedModel(
        fl.to_module(fl.init(loop)), multi_avg_fn=of_floats(get_ema_multi_avg_fn(decay)), use_buffers=use_buffers
    )
    module = torch_average(loop, model, lambda ctx: ctx.stage == "batch_end" and updates(ctx))
    ctx = averaged(fl.train(fl.init(with_callbacks(loop, ema(decay, use_buffers)))))
    assert same_bits(ctx, module)


@given(st.integers(1, 4), st.integers(1, 3), st.booleans())
@examples(0.3)
def test_the_mean_is_torchs(start: int, every: int, use_buffers: bool) -> None:
    loop = make_loop(epochs=5)
    model = AveragedModel(
        fl.to_module(fl.init(loop)), multi_avg_fn=of_floats(get_swa_multi_avg_fn()), use_buffers=use_buffers
    )
    due = range(start, 6, every)
    module = torch_average(loop, model, lambda ctx: ctx.stage == "epoch_end" and ctx.epoch in due)
    end = fl.train(fl.init(with_callbacks(loop, swa(start, every, use_buffers))))
    ctx = averaged(end, "swa")
    assert end.callbacks["swa"]["count"] == len(due)
    assert same_bits(ctx, module)


@EITHER
def test_buffers_of_integers_are_the_latest(make: Make) -> None:
    end = fl.train(fl.init(with_callbacks(make_loop(epochs=2), make(id="average"))))
    assert averaged(end, "average").buffers["1.num_batches_tracked"] == end.buffers["1.num_batches_tracked"]


@pytest.mark.parametrize("validate", [True, False])
@EITHER
def test_training_is_not_touched(make: Make, validate: bool) -> None:
    loop = full_loop(epochs=4, eval_freq=2)
    plain = [ctx for ctx in fl.iterate(fl.init(with_callbacks(loop))) if ctx.stage != "batch_valid_end"]
    both = [ctx for ctx in fl.iterate(fl.init(with_callbacks(loop, make(validate=validate)))) if not ctx.step_valid]
    for a, b in zip(plain, both, strict=True):
        if a.stage == "before_valid":
            continue
        for field in ("params", "buffers", "optimizer_state", "last_scores_train"):
            assert fl.tree_equal(getattr(a, field), getattr(b, field)), (a, field)


@pytest.mark.parametrize("accumulate", [1, 2])
@EITHER
def test_the_average_is_validated_if_asked(make: Make, accumulate: int) -> None:
    loop = full_loop(epochs=3, accumulate=accumulate)
    plain = with_callbacks(loop, make(id="average"))
    at_the_end = {ctx.epoch: ctx for ctx in fl.iterate(fl.init(plain)) if ctx.stage == "epoch_end"}
    validating = with_callbacks(loop, make(id="average", validate=True))
    for ctx in fl.iterate(fl.init(validating)):
        if ctx.stage == "valid_end":
            trained = at_the_end[ctx.epoch]
            has_average = trained.callbacks["average"]["count"]
            assert ctx.last_scores_valid == fl.validate(averaged(trained, "average") if has_average else trained)
            assert fl.tree_equal(ctx.callbacks, trained.callbacks)


@pytest.mark.parametrize("validate", [True, False])
@EITHER
def test_it_resumes_anywhere_and_its_forks_do_not_mix(make: Make, validate: bool, tmp_path: Path) -> None:
    holds_for(lambda: with_callbacks(full_loop(epochs=3), make(validate=validate)), tmp_path)


@EITHER
def test_weights_come_back_where_a_validation_is_not_finished(make: Make) -> None:
    loop = with_callbacks(full_loop(epochs=3, eval_freq=2), make(validate=True))
    interrupted = [ctx for ctx in fl.iterate(fl.init(loop)) if ctx.stage == "batch_valid_end"][-1]
    assert interrupted.epoch == 3
    longer = attrs.evolve(loop, epochs=6)
    resumed = fl.load_state_dict(fl.init(longer), fl.state_dict(interrupted))
    assert fl.tree_equal(fl.train(resumed).params, fl.train(fl.init(longer)).params)


@EITHER
def test_weights_come_back_where_the_rest_of_a_validation_is_made_with_them(make: Make) -> None:
    loop, plain = (with_callbacks(full_loop(epochs=3), make(validate=validate)) for validate in (True, False))
    interrupted = [ctx for ctx in fl.iterate(fl.init(loop)) if ctx.stage == "batch_valid_end"][-1]
    with pytest.raises(fl.StateDictError, match="/validate: True in what was saved, False here"):
        fl.load_state_dict(fl.init(plain), fl.state_dict(interrupted))
    resumed = fl.load_state_dict(fl.init(plain), fl.state_dict(interrupted), allow="callbacks/*")
    assert fl.tree_equal(fl.train(resumed).params, fl.train(fl.init(loop)).params)


@EITHER
def test_averages_are_the_same_in_mid_validation(make: Make) -> None:
    loop = with_callbacks(full_loop(epochs=2), make(id="average", validate=True))
    *_, inside, after = (ctx for ctx in fl.iterate(fl.init(loop)) if ctx.stage in ("batch_valid_end", "valid_end"))
    assert (inside.stage, after.stage) == ("batch_valid_end", "valid_end")
    for field in ("params", "buffers"):
        assert fl.tree_equal(getattr(averaged(inside, "average"), field), getattr(averaged(after, "average"), field))


def test_early_stopping_keeps_the_averages_that_were_validated() -> None:
    loop = with_callbacks(full_loop(epochs=3), early_stopping(9), ema(0.5, validate=True))
    end = fl.train(fl.init(loop))
    slot = end.callbacks["early_stopping"]
    assert fl.validate(end) == {"error": slot["best_score"]}
    assert fl.validate(averaged(end)) == end.last_scores_valid


def test_before_anything_is_averaged_there_is_no_average() -> None:
    ctx = fl.train(fl.init(with_callbacks(make_loop(), swa(2))), steps=2)
    with pytest.raises(ValueError, match="callback 'swa' has averaged nothing yet, at epoch 1, step 2"):
        averaged(ctx, "swa")


def test_an_average_that_is_not_there_is_an_error() -> None:
    ctx = fl.init(with_callbacks(full_loop(), ema(id="slow"), early_stopping(1)))
    with pytest.raises(KeyError, match="no averaging callback 'slwo' in this loop; did you mean 'slow'"):
        averaged(ctx, "slwo")
    with pytest.raises(KeyError, match="no averaging callback 'early_stopping'"):
        averaged(ctx, "early_stopping")


@EITHER
def test_a_validation_that_can_not_be_is_refused_before_training(make: Make) -> None:
    with pytest.raises(ValueError, match="validate=True needs validation data"):
        fl.init(with_callbacks(make_loop(), make(validate=True)))
    with pytest.raises(ValueError, match="only one callback can validate with its average, not a and b"):
        fl.init(with_callbacks(full_loop(), ema(validate=True, id="a"), make(validate=True, id="b")))
    fl.init(with_callbacks(full_loop(), ema(validate=True, id="a"), make(id="b")))


def test_bad_arguments_are_refused_by_name() -> None:
    for make, message in [
        (lambda: ema(1.5), "ema: decay must be a number from 0 to 1, not 1.5"),
        (lambda: ema(-0.5), "ema: decay must be a number from 0 to 1"),
        (lambda: swa(0), "swa: start must be an integer of at least 1, not 0"),
        (lambda: swa(1, every=0), "swa: every must be an integer of at least 1, not 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError, match="swa: validate is True or False"):
        swa(1, validate="yes")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="ema: use_buffers is True or False"):
        ema(use_buffers=0)  # type: ignore[arg-type]
