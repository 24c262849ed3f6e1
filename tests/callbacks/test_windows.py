from __future__ import annotations

import pytest

import functional_loop as fl
from functional_loop.callbacks.gradients.windows import updates
from tests.sample_loops import make_loop, recorder


@pytest.mark.parametrize(
    ("accumulate", "expected"), [(1, [True] * 3), (2, [False, True, True]), (5, [False, False, True])]
)
@pytest.mark.parametrize("trainable", [True, False])
def test_batches_that_update(accumulate: int, expected: list[bool], trainable: bool) -> None:
    seen: list[tuple[str, bool]] = []
    stages = ("after_backward", "batch_end")
    loop = make_loop(epochs=1, accumulate=accumulate, callbacks=[recorder(seen, updates, stages)])
    ctx = fl.init(loop)
    fl.train(ctx if trainable else fl.evolve(ctx, trainable=()))
    for stage in stages:
        assert [value for where, value in seen if where == stage] == expected


def test_a_batch_updates_where_the_parameters_move() -> None:
    start = fl.init(make_loop(accumulate=2))
    batches = [ctx for ctx in fl.iterate(start) if ctx.stage == "batch_end"]
    for before, ctx in zip([start, *batches], batches, strict=False):
        assert updates(ctx) == (not fl.tree_equal(before.params, ctx.params))
