"""Law 4: ``load_state_dict(init(loop), state_dict(ctx))`` equals ``ctx``; the state dict is plain, never written to."""

from __future__ import annotations

import copy
import io

import optree
import pytest
import torch
from hypothesis import given

import functional_loop as fl
from tests.strategies import places, seeds, versions

pytestmark = pytest.mark.filterwarnings("ignore:resuming in mid-epoch reads")

PLAIN = (dict, list, torch.Tensor, int, float, bool, str, type(None))


@given(places(), seeds)
def test_loading_what_was_saved_gives_the_context_back(place, another_seed):
    ctx = place.context()
    loaded = fl.load_state_dict(fl.init(ctx.loop, another_seed), fl.state_dict(ctx))
    assert fl.tree_equal(loaded, ctx)
    assert fl.digest(loaded) == fl.digest(ctx)


@given(places())
def test_a_state_dict_holds_plain_types_only(place):
    ctx = place.context()

    def check(node):
        assert type(node) in PLAIN
        if isinstance(node, dict):
            assert all(type(key) is str for key in node)
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            check(child)

    check(fl.state_dict(ctx))


@given(places())
def test_a_state_dict_is_read_by_torch_without_running_code(place):
    ctx = place.context()
    file = io.BytesIO()
    torch.save(fl.state_dict(ctx), file)
    file.seek(0)
    assert fl.tree_equal(torch.load(file, weights_only=True), fl.state_dict(ctx))


@given(places())
def test_loading_and_training_on_write_nothing_to_a_state_dict(place):
    ctx = place.context()
    sd = fl.state_dict(ctx)
    before, moved = copy.deepcopy(sd), versions(sd)
    fl.train(fl.load_state_dict(fl.init(ctx.loop), sd))
    assert fl.tree_equal(sd, before)
    assert versions(sd) == moved


@given(places())
def test_a_loaded_context_owns_its_tensors(place):
    ctx = place.context()
    sd = copy.deepcopy(fl.state_dict(ctx))
    loaded = fl.load_state_dict(fl.init(ctx.loop), sd)
    for leaf in optree.tree_leaves(sd):
        if isinstance(leaf, torch.Tensor):
            leaf.zero_()
    assert fl.digest(loaded) == fl.digest(ctx)
