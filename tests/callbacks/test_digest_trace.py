"""A trace of digests tells the step at which two runs part, and costs next to nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import functional_loop as fl
from functional_loop.callbacks import digest_trace, ema, first_parting, lr_step, t_clbk
from functional_loop.callbacks.logs.digest_trace import _checksum
from functional_loop.core.bits import bits
from tests.callbacks.laws import holds_for
from tests.sample_loops import full_loop, make_loop


def nudge(step: int, name: str = "lr", value: float = 0.5) -> fl.Callback:
    return fl.Callback(
        "nudge", batch_end=lambda ctx: ctx.with_hyperparameters(**{name: value}) if ctx.global_step == step else ctx
    )


def traced(*callbacks: fl.Callback, every: int = 1, seed: int = 0) -> fl.Context:
    return fl.train(fl.init(full_loop(callbacks=[digest_trace(every), *callbacks], epochs=4), seed))


def test_every_so_many_batches() -> None:
    slot = traced(every=3).callbacks["digest_trace"]
    assert slot["steps"] == [3, 6, 9, 12]
    assert len(set(slot["digests"])) == 4
    assert all(len(bytes.fromhex(digest)) == 16 for digest in slot["digests"])


@pytest.mark.parametrize("every", [1, 2, 5])
@pytest.mark.parametrize("step", [1, 2, 6, 7])
def test_runs_that_part_for_a_moment_are_found_at_the_next_digest(every: int, step: int) -> None:
    # The hyperparameter comes back a batch later, and never had an effect.
    parted = traced(nudge(step, "weight_decay", 0.01 + 2**-40), every=every)
    same = traced(every=every)
    expected = -(-step // every) * every
    assert first_parting(same, parted) == expected
    assert first_parting(parted, same) == expected
    assert first_parting(fl.state_dict(same), fl.state_dict(parted)) == expected
    assert first_parting(same, fl.state_dict(traced(every=every))) is None


def test_traces_of_other_lengths_and_periods_are_compared_where_both_have_a_digest() -> None:
    short = fl.train(fl.init(full_loop(callbacks=[digest_trace(1)], epochs=4)), steps=5)
    assert first_parting(short, traced()) is None
    assert first_parting(short, traced(nudge(3))) == 3
    assert first_parting(short, traced(nudge(9))) is None
    # Chains of other periods are other chains.
    assert first_parting(traced(every=2), traced(every=3)) == 6
    assert first_parting(fl.init(make_loop()), traced()) is None


def test_it_only_watches_and_sees_what_the_others_have_left() -> None:
    plain = full_loop(callbacks=[lr_step(1), ema(0.9)])
    watched = full_loop(callbacks=[digest_trace(1), lr_step(1), ema(0.9)])
    a, b = fl.train(fl.init(plain)), fl.train(fl.init(watched))
    assert fl.tree_equal((a.params, a.optimizer_state), (b.params, b.optimizer_state))


def test_it_resumes_and_forks(tmp_path: Path) -> None:
    holds_for(lambda: full_loop(callbacks=[digest_trace(2)]), tmp_path)


def checksum(tensor: torch.Tensor) -> bytes:
    return b"".join(_checksum(bits(tensor)))


@given(st.integers(0, 10_007 * 4 * 8 - 1))
def test_any_flipped_bit_of_a_large_tensor_is_seen(bit: int) -> None:
    tensor = torch.arange(10_007, dtype=torch.float32)
    flipped = tensor.clone()
    flipped.view(torch.uint8)[bit // 8] ^= 1 << bit % 8
    assert checksum(flipped) != checksum(tensor)


@given(st.integers(0, 3_000), st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool]))
def test_tensors_of_all_sizes_and_dtypes(size: int, dtype: torch.dtype) -> None:
    tensor = torch.arange(size).to(dtype)
    assert checksum(tensor) == checksum(tensor.clone())
    if size:
        other = tensor.clone()
        other[-1] = not other[-1]
        assert checksum(other) != checksum(tensor)


def test_rows_that_have_changed_places_are_seen() -> None:
    tensor = torch.randn(64, 1024)
    assert checksum(tensor.flip(0)) != checksum(tensor)
    assert checksum(tensor.t()) != checksum(tensor.t().contiguous().flip(0))
    assert checksum(tensor.t()) == checksum(tensor.t().contiguous())


def test_a_period_that_can_not_be_is_refused() -> None:
    with pytest.raises(ValueError, match="digest_trace: every must be an integer of at least 1, not 0"):
        digest_trace(every=0)
    assert t_clbk("digest_trace", every=7).generate().init(fl.init(make_loop()))["every"] == 7
