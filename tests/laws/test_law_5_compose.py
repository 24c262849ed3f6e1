"""Law 5: ``compose`` is associative with the identity; a stateless hook leaves ``ctx.callbacks`` alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import functional_loop as fl
from tests import hooks
from tests.strategies import boundaries, examples, places, seeds, specs

pytestmark = pytest.mark.filterwarnings("ignore:resuming in mid-epoch reads")

SLOTS = ("ema", "counter", "best", "history")
STATELESS = [name for name in hooks.CALLBACKS if name not in SLOTS]


def double(ctx: fl.Context) -> fl.Context:
    return fl.evolve(ctx, params=fl.tree_map(lambda p: 2 * p, ctx.params))


def add_one(ctx: fl.Context) -> fl.Context:
    return fl.evolve(ctx, params=fl.tree_map(lambda p: p + 1, ctx.params))


def freeze(ctx: fl.Context) -> fl.Context:
    return fl.evolve(ctx, trainable=ctx.trainable[1:])


pure_hooks = st.sampled_from(
    [
        double,
        add_one,
        freeze,
        lambda ctx: ctx.with_hyperparameters(lr=0.5),
        fl.when(lambda ctx: ctx.epoch > 1, double),
        fl.every(2, add_one),
        hooks.ema().hooks["batch_end"],
        hooks.counter().hooks["begin"],
    ]
)


@given(places(callbacks=SLOTS), st.lists(pure_hooks, max_size=6), st.data())
def test_it_does_not_matter_how_hooks_are_grouped(place, drawn, data):
    ctx = place.context()
    a, b = sorted(data.draw(st.tuples(st.integers(0, len(drawn)), st.integers(0, len(drawn)))))
    first, second, third = (fl.compose(*part) for part in (drawn[:a], drawn[a:b], drawn[b:]))
    left = fl.compose(fl.compose(first, second), third)(ctx)
    right = fl.compose(first, fl.compose(second, third))(ctx)
    one_by_one = ctx
    for hook in drawn:
        one_by_one = hook(one_by_one)
    assert fl.tree_equal(left, one_by_one)
    assert fl.tree_equal(right, one_by_one)


@given(places(), pure_hooks.filter(lambda hook: hook in (double, add_one, freeze)))
def test_composing_nothing_is_the_identity(place, hook):
    ctx = place.context()
    identity = fl.compose()
    assert identity(ctx) is ctx
    assert fl.tree_equal(fl.compose(identity, hook, identity)(ctx), hook(ctx))


@examples(0.5)
@given(specs(), seeds, st.lists(st.sampled_from([double, add_one, freeze]), max_size=4), st.sampled_from(fl.STAGES))
def test_one_callback_of_composed_hooks_equals_many_callbacks(spec, seed, drawn, stage):
    # A frozen network is refused, and so is the end of all parameters.
    drawn = [hook for hook in drawn if hook is not freeze or stage == "end"]
    one = [fl.Callback("one", **{stage: fl.compose(*drawn)})]
    many = [fl.Callback(str(number), **{stage: hook}) for number, hook in enumerate(drawn)]
    others = list(spec.loop().callbacks)
    digests = {fl.digest(fl.train(fl.init(spec.loop(callbacks=others + own), seed))) for own in (one, many)}
    assert len(digests) == 1


@given(specs(), seeds, st.lists(st.sampled_from(STATELESS), unique=True).map(tuple))
def test_stateless_callbacks_have_empty_slots_at_every_boundary(spec, seed, names):
    for ctx in boundaries(fl.evolve(spec, callbacks=names).loop(), seed):
        assert ctx.callbacks == dict.fromkeys(names, ())


@given(specs(), seeds, st.sampled_from(STATELESS))
def test_a_stateless_hook_leaves_the_slots_of_others_alone(spec, seed, name):
    """At the stages it is made for, on the contexts that it meets there."""
    callback = hooks.CALLBACKS[name]()
    unequal = []

    def watched(hook):
        def run(ctx):
            after = hook(ctx)
            if not fl.tree_equal(after.callbacks, ctx.callbacks):
                unequal.append(ctx)
            return after

        return run

    spied = fl.Callback(name, **{stage: watched(hook) for stage, hook in callback.hooks.items()})
    slots = [hooks.CALLBACKS[id]() for id in SLOTS]
    fl.train(fl.init(spec.loop(callbacks=[*slots, spied]), seed))
    assert not unequal
