from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import functional_loop as fl
from functional_loop.callbacks.gradients.clipping import clip_grad_norm, clip_grad_value
from tests.callbacks.laws import holds_for
from tests.sample_loops import epoch_of, full_loop, make_loop, same_bits
from tests.strategies import examples

NORMS = st.sampled_from([1.0, 2.0, 3.0, math.inf])


def hand_written(loop: fl.Loop, clip: Any) -> torch.nn.Module:
    """The ordinary loop with accumulation, which calls ``clip(parameters)`` before every update."""
    start = fl.init(loop)
    module = fl.to_module(start).train()
    optimizer = fl.to_optimizer(start, module)
    for epoch in range(1, loop.epochs + 1):
        batches = list(epoch_of(loop, epoch))
        for step, (x, y) in enumerate(batches, 1):
            loop.loss(module(x), y).backward()
            window = (step - 1) % loop.accumulate + 1
            if window == loop.accumulate or step == len(batches):
                for parameter in module.parameters():
                    if window > 1:
                        parameter.grad /= window
                clip(module.parameters())
                optimizer.step()
                optimizer.zero_grad()
    return module


@given(st.floats(0, 3), NORMS, st.integers(1, 3))
@examples(0.3)
def test_the_norm_is_clipped_as_torch_does_it(max_norm: float, norm_type: float, accumulate: int) -> None:
    loop = make_loop(accumulate=accumulate, callbacks=[clip_grad_norm(max_norm, norm_type)])
    module = hand_written(loop, lambda parameters: clip_grad_norm_(parameters, max_norm, norm_type))
    assert same_bits(fl.train(fl.init(loop)), module)


@given(st.floats(0, 0.3), st.integers(1, 3))
@examples(0.3)
def test_values_are_clipped_as_torch_does_it(clip_value: float, accumulate: int) -> None:
    loop = make_loop(accumulate=accumulate, callbacks=[clip_grad_value(clip_value)])
    module = hand_written(loop, lambda parameters: clip_grad_value_(parameters, clip_value))
    assert same_bits(fl.train(fl.init(loop)), module)


@pytest.mark.parametrize("clip", [clip_grad_norm(0.0), clip_grad_value(0.0)])
def test_only_what_the_optimizer_gets_is_clipped(clip: fl.Callback) -> None:
    seen: list[tuple[bool, bool]] = []

    def look(ctx: fl.Context) -> fl.Context:
        zero = all(not grad.any() for grad in dict(ctx.grads).values())
        seen.append((ctx.step in (2, 3), zero))
        return ctx

    loop = make_loop(accumulate=2, callbacks=[clip, fl.Callback("look", after_backward=look)])
    fl.train(fl.init(loop))
    assert all(updates == zero for updates, zero in seen)
    assert len(seen) == 6


def test_the_gradients_given_are_left_alone() -> None:
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(ctx: fl.Context) -> fl.Context:
        kept.extend((grad, grad.clone()) for grad in dict(ctx.grads).values())
        return ctx

    for clip in (clip_grad_norm(0.01), clip_grad_value(0.01)):
        fl.train(fl.init(make_loop(callbacks=[fl.Callback("keep", after_backward=keep), clip])))
    assert all(torch.equal(grad, copy) for grad, copy in kept)
    assert kept


def test_a_norm_that_is_not_finite_is_an_error_if_asked() -> None:
    def spoil(ctx: fl.Context) -> fl.Context:
        return fl.evolve(ctx, grads={name: grad * math.inf for name, grad in dict(ctx.grads).items()})

    spoiling = fl.Callback("spoil", after_backward=spoil)
    fl.train(fl.init(make_loop(callbacks=[spoiling, clip_grad_norm(1.0)])))
    with pytest.raises(RuntimeError, match="non-finite"):
        fl.train(fl.init(make_loop(callbacks=[spoiling, clip_grad_norm(1.0, error_if_nonfinite=True)])))


def test_clipped_runs_resume_anywhere_and_forks_do_not_mix(tmp_path: Path) -> None:
    holds_for(lambda: full_loop(callbacks=[clip_grad_norm(0.1), clip_grad_value(0.05)]), tmp_path)


def test_a_clipped_run_is_another_run() -> None:
    ctx = fl.train(fl.init(make_loop(callbacks=[clip_grad_norm(1.0)])), steps=1)
    with pytest.raises(fl.StateDictError, match="clip_grad_norm"):
        fl.load_state_dict(fl.init(make_loop()), fl.state_dict(ctx))


def test_an_optimizer_that_evaluates_gradients_itself_is_refused() -> None:
    lbfgs = fl.optimizer(torch.optim.LBFGS)
    for clip in (clip_grad_norm(1.0), clip_grad_value(1.0)):
        with pytest.raises(ValueError, match="LBFGS evaluates the gradients itself"):
            fl.init(make_loop(optimizer=lbfgs, callbacks=[clip]))


def test_bad_arguments_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="clip_grad_norm: max_norm must be a number of at least 0, not -1"):
        clip_grad_norm(-1)
    with pytest.raises(ValueError, match="clip_grad_norm: norm_type must be a number of at least 1, not 'two'"):
        clip_grad_norm(1.0, "two")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="clip_grad_norm: error_if_nonfinite is True or False"):
        clip_grad_norm(1.0, error_if_nonfinite=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="clip_grad_value: clip_value must be a number of at least 0, not nan"):
        clip_grad_value(math.nan)
