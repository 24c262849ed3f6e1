from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from hypothesis import example, given
from hypothesis import strategies as st

import functional_loop as fl
from functional_loop.callbacks.schedules.schedule import StandIn, from_plain, to_plain
from functional_loop.core.plain import check_plain

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3) | st.just(max)
KEYS = st.text(max_size=3) | st.integers()
TREES = st.recursive(
    LEAVES,
    lambda tree: (
        st.lists(tree, max_size=3) | st.lists(tree, max_size=3).map(tuple) | st.dictionaries(KEYS, tree, max_size=3)
    ),
    max_leaves=10,
)


@given(TREES)
@example({"()": None})
@example({"(sparse)": {"()": 1}})
def test_states_become_plain_and_come_back(tree: Any) -> None:
    plain = to_plain({"state": tree})
    check_plain(plain, "the state")
    assert from_plain(plain, {"state": tree}) == {"state": tree}


def test_types_of_containers_come_from_the_state_that_is_filled() -> None:
    milestones = Counter({3: 2, 7: 1})
    restored = from_plain(to_plain({"milestones": milestones, "pair": (1, 2)}), {"milestones": Counter(), "pair": ()})
    assert restored == {"milestones": milestones, "pair": (1, 2)}
    assert type(restored["milestones"]) is Counter


def test_tensors_are_copies() -> None:
    rate = torch.tensor(0.5)
    plain = to_plain({"rates": [rate]})
    restored = from_plain(plain, {"rates": []})
    restored["rates"][0].zero_()
    rate.fill_(2)
    assert plain["rates"][0].item() == 0.5


def test_a_stand_in_leaves_the_hyperparameters_alone() -> None:
    groups = [{"lr": torch.tensor(0.5), "betas": [0.9, 0.99]}]
    stand_in = StandIn(groups)
    stand_in.param_groups[0]["lr"].fill_(1.0)
    stand_in.param_groups[0]["betas"] = (0.5, 0.99)
    stand_in.param_groups[0]["initial_lr"] = 0.25
    new, beside = stand_in.split(groups)
    assert fl.tree_equal(groups, [{"lr": torch.tensor(0.5), "betas": [0.9, 0.99]}])
    assert fl.tree_equal(new, [{"lr": torch.tensor(1.0), "betas": [0.5, 0.99]}])
    assert beside == [{"initial_lr": 0.25}]
