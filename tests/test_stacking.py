"""Laws of stacking trees: apart again they are what they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import functional_loop as fl
from functional_loop.ensembles.foreach_rules import ForeachApart
from functional_loop.ensembles.stacking import Known, Members, combine, split, vectorised

leaves = st.one_of(
    st.integers(-3, 3),
    st.floats(allow_nan=True, width=32),
    st.booleans(),
    st.none(),
    st.sampled_from(["a", "b"]),
    st.just(()),
    st.lists(st.floats(width=32), min_size=1, max_size=3).map(torch.tensor),
    st.integers(0, 5).map(torch.tensor),
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["x", "y", "z"]), inner)),
    max_leaves=6,
)


@given(st.lists(trees, min_size=1, max_size=4))
def test_split_undoes_combine(members: list[Any]) -> None:
    for apart, member in zip(split(combine(members), len(members)), members, strict=True):
        assert fl.tree_equal(apart, member)


@given(st.lists(trees, min_size=1, max_size=4))
def test_what_did_not_change_is_not_stacked_again(members: list[Any]) -> None:
    stacked, known = combine(members), Known()
    again = combine(split(stacked, len(members), known), known)
    for one, other in zip(
        torch.utils._pytree.tree_leaves(stacked), torch.utils._pytree.tree_leaves(again), strict=True
    ):
        assert one is other or not isinstance(one, torch.Tensor)


def test_floats_that_differ_are_a_tensor_where_that_is_asked_for() -> None:
    stacked = combine([{"lr": 0.1, "n": 1}, {"lr": 0.3, "n": 2}], numbers=True)
    assert stacked["lr"].dtype is torch.float64
    assert stacked["n"] == Members((1, 2))
    assert split(stacked, 2, numbers=True) == [{"lr": 0.1, "n": 1}, {"lr": 0.3, "n": 2}]


def test_vectorised_is_a_call_per_member() -> None:
    def function(tree: Any) -> Any:
        return {
            "sum": (tree["x"] * tree["scale"]).sum(),
            "same": tree["same"],
            "count": len(tree["x"]),
            "new": (1, "a"),
        }

    members = [{"x": torch.arange(3.0) + i, "scale": 0.5 * i, "same": "text"} for i in range(3)]
    stacked = combine(members)
    assert fl.tree_equal(split(vectorised(function, (stacked,), 3), 3), [function(member) for member in members])


def test_vectorised_leaves_what_is_unchanged_as_it_is() -> None:
    tree = {"x": torch.ones(2, 3), "y": torch.ones(2), "seed": Members((1, 2))}
    made = vectorised(lambda t: {**t, "y": t["y"] + 1}, (tree,), 2)
    assert made["x"] is tree["x"]
    assert made["seed"] is tree["seed"]
    assert made["y"].tolist() == [2.0, 2.0]


def test_vectorised_refuses_what_needs_values() -> None:
    with pytest.raises(RuntimeError):
        vectorised(lambda t: t.sum().item(), (torch.ones(2, 3),), 2)


@pytest.mark.parametrize(
    "function",
    [
        lambda ts: torch._foreach_norm(ts),
        lambda ts: torch._foreach_add(ts, 2.0),
        lambda ts: torch._foreach_mul(ts, ts),
        lambda ts: torch._foreach_sub(ts, ts, alpha=0.5),
        lambda ts: [torch.nn.utils.get_total_norm(ts)],
    ],
)
def test_operators_on_lists_run_under_vmap(function: Any) -> None:
    tensors = [torch.randn(3, 4), torch.randn(3)]
    with ForeachApart():
        together = torch.func.vmap(lambda *ts: tuple(function(list(ts))))(*tensors)
    for i in range(3):
        for one, other in zip(function([t[i] for t in tensors]), together, strict=True):
            torch.testing.assert_close(one, other[i])
