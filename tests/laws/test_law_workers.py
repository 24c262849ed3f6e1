"""The number of data-loading workers can't change a bit."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

import functional_loop as fl
from tests.loops import Augmented, Spec, tensors
from tests.strategies import boundaries, examples, seeds, specs


def with_workers(spec: Spec, number: int, **options: Any) -> fl.Loop:
    def source(rows: int, batch_size: int, **order: Any) -> fl.BatchSource:
        return fl.batches(Augmented(*tensors(rows)), batch_size=batch_size, num_workers=number, **order, **options)

    return spec.loop(
        train=source(spec.rows, spec.batch_size, shuffle=spec.shuffle, drop_last=spec.drop_last),
        valid=source(spec.valid_rows, 2) if spec.valid_rows else None,
    )


@examples(0.2)
@given(specs(), seeds, st.integers(1, 2), st.sampled_from([None, 1, 4]))
def test_the_number_of_workers_changes_nothing(spec, seed, number, prefetch_factor):
    alone = [fl.digest(ctx) for ctx in boundaries(with_workers(spec, 0), seed)]
    helped = [fl.digest(ctx) for ctx in boundaries(with_workers(spec, number, prefetch_factor=prefetch_factor), seed)]
    assert helped == alone


@examples(0.2)
@given(specs(), seeds, st.lists(st.integers(0, 2), min_size=3, max_size=3), st.data())
def test_a_run_may_go_on_with_another_number_of_workers(spec, seed, numbers, data):
    first, second, third = numbers
    whole = boundaries(with_workers(spec, first), seed)
    cut = whole[data.draw(st.integers(0, len(whole) - 1))]
    part = fl.load_state_dict(fl.init(with_workers(spec, second)), fl.state_dict(cut))
    part = fl.train(part, steps=2)
    rest = fl.load_state_dict(fl.init(with_workers(spec, third)), fl.state_dict(part))
    assert fl.digest(fl.train(rest)) == fl.digest(whole[-1])
