"""Law 1: a run that is cut, saved and loaded into a new loop ends in the digest of the run that never stopped.

``train(ctx, steps=n + m)`` equals ``train(load(save(train(ctx, steps=n))), steps=m)``, and so for a cut at every
boundary: in mid-epoch, in mid-validation, within an accumulation window. ``tests/resume`` holds it against fresh
interpreters, and against processes that are killed.
"""

from __future__ import annotations

import io
import tempfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import functional_loop as fl
from functional_loop.core.stages import BOUNDARIES
from tests.hooks import CALLBACKS
from tests.loops import MEASURES, SOURCES, Spec
from tests.strategies import boundaries, examples, seeds, specs

pytestmark = pytest.mark.filterwarnings("ignore:resuming in mid-epoch reads")


def through_torch_save(ctx: fl.Context, loop: fl.Loop) -> fl.Context:
    file = io.BytesIO()
    torch.save(fl.state_dict(ctx), file)
    file.seek(0)
    return fl.load_state_dict(fl.init(loop), torch.load(file, weights_only=True))


def through_store(ctx: fl.Context, loop: fl.Loop) -> fl.Context:
    with tempfile.TemporaryDirectory() as folder:
        fl.CheckpointStore(folder).save(ctx)
        return fl.resume(loop, folder, seed=ctx.seed)


ways = st.sampled_from([through_torch_save, through_store])


@given(specs(), seeds, ways, st.data())
def test_a_cut_at_any_boundary_leaves_no_trace(spec, seed, saved_and_loaded, data):
    whole = boundaries(spec.loop(), seed)
    place = data.draw(st.integers(0, len(whole) - 1))
    rest = list(fl.iterate(saved_and_loaded(whole[place], spec.loop())))
    assert [fl.digest(ctx) for ctx in rest] == [fl.digest(ctx) for ctx in whole[place + 1 :]]


@given(specs(), seeds, ways, st.data())
def test_n_steps_and_m_steps_are_n_plus_m_steps(spec, seed, saved_and_loaded, data):
    start = fl.init(spec.loop(), seed)
    total = fl.train(start).global_step
    n = data.draw(st.integers(0, total))
    m = data.draw(st.integers(0, total + 1 - n))
    part = saved_and_loaded(fl.train(start, steps=n), spec.loop())
    assert fl.digest(fl.train(part, steps=m)) == fl.digest(fl.train(start, steps=n + m))


@examples(0.5)
@given(specs(), seeds)
def test_a_run_cut_at_every_boundary_leaves_no_trace(spec, seed):
    whole = fl.train(fl.init(spec.loop(), seed))
    ctx = fl.init(spec.loop(), seed)
    while ctx.stage != "end":
        boundary = next(fl.iterate(ctx))
        ctx = through_torch_save(boundary, spec.loop())
    assert fl.digest(ctx) == fl.digest(whole)


@pytest.mark.parametrize("data", SOURCES)
def test_every_cut_of_a_run_with_everything_on(data):
    callbacks = tuple(name for name in CALLBACKS if name != "stopping")
    spec = Spec(data=data, rows=18, epochs=3, eval_freq=2, accumulate=3, measures=tuple(MEASURES), callbacks=callbacks)
    whole = boundaries(spec.loop(), seed=5)
    assert {ctx.stage for ctx in whole} == {"", *BOUNDARIES}
    assert any(ctx.accumulated for ctx in whole)
    every = whole[:: 4 if data == "workers" else 1]
    ends = {fl.digest(fl.train(through_torch_save(ctx, spec.loop()))) for ctx in every}
    assert ends == {fl.digest(whole[-1])}


@given(specs(eval_freq=1), seeds, st.integers(1, 3), st.data())
def test_a_run_may_be_made_longer(spec, seed, more, data):
    """Every epoch is evaluated, so that being the last makes none of them different."""
    longer = fl.evolve(spec, epochs=spec.epochs + more)
    short = [ctx for ctx in boundaries(spec.loop(), seed) if ctx.stage != "end"]
    part = short[data.draw(st.integers(0, len(short) - 1))]
    resumed = through_torch_save(part, longer.loop())
    assert fl.digest(fl.train(resumed)) == fl.digest(fl.train(fl.init(longer.loop(), seed)))
