from __future__ import annotations

import itertools
import math
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import functional_loop as fl
from functional_loop.callbacks import CallbackSetCheckpoint, lr_step, rollback, t_clbk
from tests.callbacks.laws import forks_do_not_mix, holds_for, resumes_everywhere
from tests.sample_loops import data, full_loop, make_loop
from tests.strategies import examples, specs

pytestmark = pytest.mark.filterwarnings("ignore:resuming in mid-epoch")


def spoiling(*numbers: int, value: float = math.nan) -> fl.Callback:
    """Targets that make the loss ``value``, in the batches of these numbers."""

    def spoil(ctx: fl.Context) -> fl.Context:
        if ctx.global_step not in numbers:
            return ctx
        y = fl.tree_map(lambda y: torch.full_like(y, value), ctx.batch.y)
        return fl.evolve(ctx, batch=fl.evolve(ctx.batch, y=y))

    return fl.Callback("spoil", batch_begin=spoil)


def without(ctx: fl.Context, id: str = "rollback") -> dict[str, Any]:
    """What is saved of a context, but for the state of a callback."""
    sd = fl.state_dict(ctx)
    callbacks = {other: state for other, state in sd["callbacks"].items() if other != id}
    return {name: sd[name] for name in sd if name != "fingerprint"} | {"callbacks": callbacks}


def is_same(a: fl.Context, b: fl.Context) -> Any:
    return fl.tree_equal(without(a), without(b))


# Not the callback that looks at the loss at the end of an epoch, which may have none.
SPECS = specs().map(lambda spec: attrs.evolve(spec, callbacks=tuple(name for name in spec.callbacks if name != "best")))
BACK = st.integers(1, 4)
BAD = st.sets(st.integers(1, 9), max_size=3)


@given(SPECS, BACK, BACK, BAD, st.integers(1, 3))
@examples(1.0)
def test_a_run_that_goes_back_is_one_that_never_saw_the_batches(
    spec: Any, back: int, skip: int, bad: set[int], every: int
) -> None:
    def loop(*added: Any, **changes: Any) -> fl.Loop:
        return spec.loop(callbacks=[*spec.loop().callbacks, *added], **changes)

    guard = rollback(when=lambda ctx: ctx.global_step in bad, back=max(back, skip), skip=skip, every=every)
    ctx = fl.train(fl.init(loop(guard), seed=5))
    skipped = ctx.callbacks["rollback"]["skipped"]
    assert bad & set(range(1, ctx.global_step + 1)) <= set(skipped) or skip > 1
    never = fl.train(fl.init(loop(rollback(), skip_batches=skipped), seed=5))
    assert is_same(ctx, never)


def test_it_goes_back_further_where_no_batch_is_left_that_could_close_a_window() -> None:
    # Back to the first of two batches of an epoch, with an open window, of which the second is passed over too.
    x, y = data(3)
    guard = rollback(when=lambda ctx: ctx.global_step == 3, back=2, skip=2)
    changes: dict[str, Any] = {"train": fl.batches(x[:4], y[:4], batch_size=2), "accumulate": 2, "epochs": 2}
    ctx = fl.train(fl.init(make_loop(callbacks=[guard], **changes)))
    assert ctx.callbacks["rollback"]["skipped"] == [2, 3]
    never = fl.train(fl.init(make_loop(callbacks=[rollback()], skip_batches={2, 3}, **changes)))
    assert is_same(ctx, never)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_that_is_not_finite_is_undone(value: float, accumulate: int) -> None:
    loop = full_loop(callbacks=[spoiling(2, 6, value=value), rollback()], accumulate=accumulate, epochs=3)
    never = full_loop(callbacks=[rollback()], accumulate=accumulate, epochs=3, skip_batches={2, 6})
    ctx = fl.train(fl.init(loop))
    assert ctx.callbacks["rollback"]["skipped"] == [2, 6]
    assert ctx.callbacks["rollback"]["rollbacks"] == 2
    assert is_same(ctx, fl.train(fl.init(never)))


@pytest.mark.parametrize("stage", ["after_backward", "batch_end"])
def test_gradients_and_parameters_that_are_not_finite_are_undone(stage: str) -> None:
    field = {"after_backward": "grads", "batch_end": "params"}[stage]

    def spoil(ctx: fl.Context) -> fl.Context:
        if ctx.global_step != 4:
            return ctx
        return fl.evolve(ctx, **{field: {name: t * math.nan for name, t in getattr(ctx, field).items()}})

    loop = make_loop(callbacks=[fl.Callback("spoil", **{stage: spoil}), rollback()])
    ctx = fl.train(fl.init(loop))
    assert ctx.callbacks["rollback"]["skipped"] == [4]
    assert is_same(ctx, fl.train(fl.init(make_loop(callbacks=[rollback()], skip_batches={4}))))


def test_spikes_are_found_if_asked_and_only_then() -> None:
    x, y = data(3)
    source = fl.batches(x, y, batch_size=4, shuffle=True)

    def run(spike: float | None) -> fl.Context:
        guard = rollback(spike=spike)
        return fl.train(fl.init(make_loop(train=source, epochs=15, callbacks=[spoiling(40, value=50.0), guard])))

    assert run(8.0).callbacks["rollback"]["skipped"] == [40]
    assert run(None).callbacks["rollback"]["skipped"] == []
    never = fl.train(fl.init(make_loop(train=source, epochs=15, callbacks=[rollback(spike=8.0)], skip_batches={40})))
    assert is_same(run(8.0), never)
    assert run(8.0).callbacks["rollback"]["losses"] == never.callbacks["rollback"]["losses"]


def test_the_boundaries_go_back_too() -> None:
    loop = make_loop(callbacks=[spoiling(3), rollback(back=2)], epochs=1)
    places = [(ctx.stage, ctx.global_step) for ctx in fl.iterate(fl.init(loop)) if ctx.stage == "batch_end"]
    assert places == [("batch_end", n) for n in (1, 2, 1, 2, 3)]
    assert fl.train(fl.init(loop), steps=3).global_step == 3


def test_batches_before_the_bad_one_can_be_passed_over_too() -> None:
    ctx = fl.train(fl.init(make_loop(callbacks=[spoiling(3), rollback(back=2, skip=2)])))
    assert ctx.callbacks["rollback"]["skipped"] == [2, 3]
    ctx = fl.train(fl.init(make_loop(callbacks=[spoiling(4), rollback(back=3, skip=3)])))
    assert ctx.callbacks["rollback"]["skipped"] == [2, 3, 4]


@pytest.mark.parametrize("back", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("every", [1, 2, 5])
@pytest.mark.parametrize("skip", [1, 2])
def test_it_goes_back_to_an_earlier_epoch(back: int, every: int, skip: int) -> None:
    """An epoch has three batches, of which the fourth and the eighth are the first of one and the second of another."""
    history = t_clbk("history")
    guard = rollback(back=max(back, skip), every=every, skip=skip)
    loop = full_loop(callbacks=[history, spoiling(4, 8), guard], epochs=4)
    start = fl.init(loop)
    contexts = list(fl.iterate(start))
    ctx = contexts[-1]
    assert ctx.callbacks["rollback"]["rollbacks"] >= 2
    skipped = ctx.callbacks["rollback"]["skipped"]
    assert {4, 8} <= set(skipped)
    never = fl.evolve(loop, callbacks=[history, spoiling(), rollback()], skip_batches=skipped)
    assert is_same(ctx, fl.train(fl.init(never)))
    if every == 1 and back > 1:
        first = next(b for a, b in itertools.pairwise(contexts) if b.global_step < a.global_step)
        assert first.global_step == max(4 - back, 0)
    for at in contexts:
        assert fl.digest(fl.train(fl.load_state_dict(start, fl.state_dict(at)))) == fl.digest(ctx)


def test_going_back_by_a_whole_epoch_is_noticed() -> None:
    loop = full_loop(callbacks=[spoiling(5), rollback(back=3)], epochs=2)
    places = [(ctx.epoch, ctx.step) for ctx in fl.iterate(fl.init(loop)) if ctx.stage == "batch_end"]
    assert places == [(1, 1), (1, 2), (1, 3), (2, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]
    ctx = fl.train(fl.init(loop))
    assert is_same(ctx, fl.train(fl.init(fl.evolve(loop, callbacks=[spoiling(), rollback()], skip_batches={5}))))


def test_it_keeps_no_more_than_it_needs() -> None:
    for back, every in ((1, 1), (4, 1), (4, 2), (1, 9)):
        loop = full_loop(callbacks=[rollback(back=back, every=every)], epochs=6)
        kept = [len(ctx.callbacks["rollback"]["kept"]) for ctx in fl.iterate(fl.init(loop))]
        # An epoch of three batches adds its beginning.
        assert max(kept) <= back // every + 2 + back // 3 + 1


def test_the_learning_rate_is_lowered_every_time() -> None:
    x, y = data(3)
    source = fl.batches(x, y, batch_size=1)
    guard = rollback(when=lambda ctx: ctx.global_step in (4, 5), back=2, lr_factor=0.5)
    ctx = fl.train(fl.init(make_loop(train=source, epochs=1, network=torch.nn.Linear(3, 2), callbacks=[guard])))
    assert ctx.callbacks["rollback"]["skipped"] == [4, 5]
    assert ctx.optimizer_state["groups"][0]["lr"] == 0.1 * 0.5**2


def test_a_lowered_rate_goes_on_through_a_schedule_that_multiplies() -> None:
    callbacks = [lr_step(1, gamma=0.1), rollback(when=lambda ctx: ctx.global_step == 2, lr_factor=0.5)]
    ctx = fl.train(fl.init(make_loop(callbacks=callbacks)))
    assert ctx.optimizer_state["groups"][0]["lr"] == pytest.approx(0.1 * 0.5 * 0.1**2)


def test_it_gives_up_after_so_many() -> None:
    loop = make_loop(callbacks=[spoiling(2, 3, 4), rollback(max_rollbacks=2)])
    with pytest.raises(
        FloatingPointError, match=r"batch 4 of the run is bad \(the loss is nan\), after 2 rollbacks"
    ) as e:
        fl.train(fl.init(loop))
    ctx = fl.context_of(e.value)
    assert ctx is not None
    assert ctx.global_step == 3
    assert all(bool(p.isfinite().all()) for p in ctx.params.values())


def test_it_resumes_anywhere_and_its_forks_do_not_mix(tmp_path: Path) -> None:
    holds_for(lambda: full_loop(callbacks=[spoiling(3, 5), rollback(lr_factor=0.9)]), tmp_path)
    far = partial(full_loop, callbacks=[spoiling(3, 5), rollback(back=3, lr_factor=0.9)])
    resumes_everywhere(far)
    forks_do_not_mix(far)


def test_a_checkpoint_from_before_the_rollback_leads_to_the_same_end(tmp_path: Path) -> None:
    def loop() -> fl.Loop:
        return make_loop(callbacks=[CallbackSetCheckpoint(tmp_path, every_steps=1), spoiling(3), rollback(back=2)])

    contexts = list(fl.iterate(fl.init(loop())))
    # Batch 2 was saved, and is to be trained on again.
    (went_back,) = (i for i, ctx in enumerate(contexts) if ctx.stage == "batch_end" and ctx.global_step == 1 and i > 3)
    for path in tmp_path.iterdir():
        path.unlink()
    store = fl.CheckpointStore(tmp_path)
    for ctx in contexts[1 : went_back + 1]:
        store.save(ctx)
    assert store.steps() == [0, 1, 2]
    assert fl.digest(fl.train(fl.resume(loop(), tmp_path))) == fl.digest(contexts[-1])


@given(SPECS, st.integers(0, 9), BAD, BACK)
@examples(0.5)
def test_a_run_killed_at_any_boundary_goes_on_to_the_same_end(spec: Any, at: int, bad: set[int], back: int) -> None:
    def start() -> fl.Context:
        guard = rollback(when=lambda ctx: ctx.global_step in bad, back=back)
        return fl.init(spec.loop(callbacks=[*spec.loop().callbacks, guard]), seed=5)

    contexts = list(fl.iterate(start()))
    ctx = contexts[at % len(contexts)]
    assert fl.digest(fl.train(fl.load_state_dict(start(), fl.state_dict(ctx)))) == fl.digest(contexts[-1])


def test_what_is_saved_is_never_the_spoiled_context(tmp_path: Path) -> None:
    def loop() -> fl.Loop:
        return make_loop(callbacks=[CallbackSetCheckpoint(tmp_path, every_steps=1), spoiling(2), rollback()])

    end = fl.train(fl.init(loop()), steps=2)
    resumed = fl.CheckpointStore(tmp_path).load(loop(), step=1)
    assert resumed.callbacks["rollback"]["skipped"] == [2]
    assert fl.digest(fl.train(resumed)) == fl.digest(fl.train(end))


def test_batches_of_ones_own_go_on_behind_the_bad_one() -> None:
    x, y = data(3)
    source = fl.batches(x, y, batch_size=4)
    loop = make_loop(train=source, callbacks=[spoiling(2), rollback()], epochs=1)
    ctx = next(c for c in fl.iterate(fl.init(loop)) if c.stage == "epoch_begin")
    steps = []
    for rows in (slice(0, 4), slice(4, 8), slice(8, 10)):
        ctx = fl.train_step(ctx, (x[rows], y[rows]))
        steps.append(ctx.step)
    assert steps == [1, 1, 3]
    assert fl.tree_equal(ctx.params, fl.train(fl.init(loop)).params)


def test_clocks_do_not_go_back() -> None:
    def count(ctx: fl.Context) -> fl.Context:
        return ctx.with_callback_state("clock", ctx.callbacks["clock"] + 1)

    clock = fl.Callback("clock", init=lambda ctx: 0, volatile=True, batch_end=count)
    ctx = fl.train(fl.init(make_loop(callbacks=[clock, spoiling(2), rollback()], epochs=1)))
    assert ctx.callbacks["clock"] == 3


def test_bad_arguments_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match="rollback: when is a function of the context, not 3"):
        rollback(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rollback: skip=2 batches can't be passed over by going back=1"):
        rollback(skip=2)
    with pytest.raises(ValueError, match="rollback: lr_factor must be a number from 0 to 1, not 2"):
        rollback(lr_factor=2)
    with pytest.raises(ValueError, match="rollback: spike must be a number of at least 0, not -1"):
        rollback(spike=-1)
    for name in ("back", "skip", "every"):
        with pytest.raises(ValueError, match=f"rollback: {name} must be an integer of at least 1, not 0"):
            rollback(**{name: 0})  # type: ignore[arg-type]


def test_a_descriptor_with_a_weight_of_its_own_passes_batches_over_too() -> None:
    described = fl.evolve(t_clbk("rollback"), weight=5.0)
    ctx = fl.train(fl.init(make_loop(callbacks=[spoiling(2), described])))
    assert ctx.loop.callbacks[1].weight == 5.0
    assert ctx.callbacks["rollback"]["skipped"] == [2]
