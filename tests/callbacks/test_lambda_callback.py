"""lambda_callback: plain functions at stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import functional_loop as fl
from functional_loop.callbacks.objects.lambda_callback import lambda_callback
from tests.callbacks.laws import holds_for
from tests.sample_loops import counter, full_loop, make_loop


def test_functions_are_called_at_their_stages_with_the_state_of_training() -> None:
    seen: list[Any] = []
    functions = {f"on_{stage}": lambda ctx, s=stage: seen.append((s, ctx.epoch, ctx.step)) for stage in fl.STAGES}
    fl.train(fl.init(full_loop(epochs=1, callbacks=[lambda_callback(**functions)])))
    batches = [(stage, 1, step) for step in (1, 2, 3) for stage in ("batch_begin", "after_backward", "batch_end")]
    valid = [(stage, 1, 3) for _ in (1, 2) for stage in ("batch_valid_begin", "batch_valid_end")]
    assert seen == [
        *(("begin", 0, 0), ("epoch_begin", 1, 0), *batches, ("before_valid", 1, 3), *valid),
        *((stage, 1, 3) for stage in ("valid_end", "epoch_end", "end", "exit")),
    ]


def test_functions_can_write_to_the_context() -> None:
    def stop(ctx: Any) -> None:
        ctx.terminate = ctx.epoch == 2

    assert fl.train(fl.init(make_loop(epochs=5, callbacks=[lambda_callback(on_epoch_end=stop)]))).epoch == 2


def test_weight_and_id() -> None:
    seen: list[str] = []
    late = lambda_callback(id="late", on_epoch_end=lambda ctx: seen.append("late"))
    early = lambda_callback(id="early", on_epoch_end=lambda ctx: seen.append("early"))
    late.weight, early.weight = 1.0, -1.0
    loop = make_loop(epochs=1, callbacks=[late, early])
    fl.train(fl.init(loop))
    assert seen == ["early", "late"]
    assert [c.id for c in loop.callbacks] == ["late", "early"]


def test_a_misspelt_stage_is_refused_with_the_likely_one() -> None:
    with pytest.raises(TypeError, match="on_epoch_ends is not a stage; did you mean 'on_epoch_end'"):
        lambda_callback(on_epoch_ends=print)
    with pytest.raises(TypeError, match="'epoch_end' is not a stage; stages are given as on_epoch_end"):
        lambda_callback(epoch_end=print)


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(TypeError, match="on_epoch_end must be a function of the context, not 3"):
        lambda_callback(on_epoch_end=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give a function"):
        lambda_callback()


def test_the_laws(tmp_path: Path) -> None:
    def scale(ctx: Any) -> None:
        for parameter in ctx.network.parameters():
            parameter.data *= 0.9

    holds_for(lambda: full_loop(callbacks=[counter(), lambda_callback(on_batch_end=scale)]), tmp_path)
