"""Law 2: a function of the loop leaves what it is given as it was: the same digest, no version counter has moved."""

from __future__ import annotations

import optree
import pytest
from hypothesis import given
from hypothesis import strategies as st

import functional_loop as fl
from tests.loops import Spec, made_under, make_network, tensors
from tests.strategies import boundaries, examples, places, seeds, specs, versions

pytestmark = pytest.mark.filterwarnings("ignore:resuming in mid-epoch reads")


@given(specs(), seeds)
def test_every_context_that_is_kept_stays_what_it_was(spec, seed):
    kept = [(ctx, fl.digest(ctx), versions(ctx)) for ctx in fl.iterate(fl.init(spec.loop(), seed))]
    assert all((fl.digest(ctx), versions(ctx)) == (digest, moved) for ctx, digest, moved in kept)


@given(places(), st.integers(0, 8))
def test_train_leaves_its_argument_alone(place, steps):
    ctx = place.context()
    before = fl.digest(ctx), versions(ctx)
    once = fl.train(ctx, steps=steps)
    assert (fl.digest(ctx), versions(ctx)) == before
    assert fl.digest(fl.train(ctx, steps=steps)) == fl.digest(once)


@examples(0.5)
@given(places(measures=("accuracy", "mean")))
def test_the_other_functions_leave_their_argument_alone(place):
    ctx = place.context()
    before = fl.digest(ctx), versions(ctx)
    x, y = tensors(3)
    fl.predict(ctx, x)
    if ctx.loop.measures_valid:
        fl.validate(ctx, fl.batches(x, y, batch_size=2))
    fl.state_dict(ctx)
    fl.load_state_dict(ctx, fl.state_dict(ctx))
    module = fl.to_module(ctx)
    fl.to_optimizer(ctx, module)
    if ctx.stage in ("epoch_begin", "batch_end") and next(fl.iterate(ctx)).stage == "batch_end":
        fl.train_step(ctx, (x, y))
    assert (fl.digest(ctx), versions(ctx)) == before


@examples(0.5)
@given(places())
def test_what_a_context_is_made_into_can_be_trained_by_hand(place):
    """The module and the optimizer are written to by their owner, and share no memory with the context."""
    ctx = place.context()
    before = fl.digest(ctx)
    module = fl.to_module(ctx)
    optimizer = fl.to_optimizer(ctx, module)
    x, y = tensors(4)

    def closure():
        optimizer.zero_grad()
        loss = (module(x)[:, 0] - y).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    for tensor in optree.tree_leaves(module.state_dict()):
        tensor.zero_()
    assert fl.digest(ctx) == before


@given(specs(data="tensors"), seeds)
def test_the_network_and_the_data_of_the_user_are_left_alone(spec, seed):
    x, y = tensors(spec.rows)
    network = made_under(lambda: make_network(spec.network, spec.dropout), seed=2)
    mine = [x, y, *network.state_dict().values()]
    before = [(tensor.clone(), tensor._version) for tensor in mine]
    source = fl.batches(x, y, batch_size=spec.batch_size, drop_last=spec.drop_last)
    fl.train(fl.init(spec.loop(network=network, train=source), seed))
    assert fl.tree_equal([(tensor, tensor._version) for tensor in mine], before)
    assert network.training
    assert all(p.grad is None and p.requires_grad for p in network.parameters())


def test_contexts_can_be_gone_back_to_in_any_order():
    whole = boundaries(Spec(callbacks=("ema", "schedule"), accumulate=2).loop())
    digests = [fl.digest(ctx) for ctx in whole]
    for place in reversed(range(len(whole) - 1)):
        assert fl.digest(next(fl.iterate(whole[place]))) == digests[place + 1]
