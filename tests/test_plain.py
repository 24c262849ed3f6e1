"""Plain trees: what may be saved, and tuples as plain types."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import functional_loop as fl
from functional_loop.core.plain import check_plain, decode, encode

leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(())
plain = st.recursive(
    leaves, lambda nodes: st.lists(nodes) | st.dictionaries(st.text().filter(lambda key: key != "()"), nodes)
)
with_tuples = st.recursive(
    leaves,
    lambda nodes: (
        st.lists(nodes) | st.dictionaries(st.text().filter(lambda key: key != "()"), nodes) | st.tuples(nodes, nodes)
    ),
)


def types_in(node: Any) -> set[type]:
    if isinstance(node, dict):
        return {dict}.union(*map(types_in, node), *map(types_in, node.values()))
    return {type(node)}.union(*map(types_in, node)) if isinstance(node, (list, tuple)) else {type(node)}


@given(plain)
def test_plain_trees_pass(tree: Any) -> None:
    check_plain(tree, "it")


@given(with_tuples)
def test_decode_is_the_inverse_of_encode(tree: Any) -> None:
    assert fl.tree_equal(decode(encode(tree)), tree)
    assert repr(decode(encode(tree))) == repr(tree)


@given(with_tuples)
def test_encoded_trees_are_plain(tree: Any) -> None:
    assert types_in(encode(tree)) <= {dict, list, int, float, bool, str, type(None)}


def test_encode_and_decode_make_new_containers_of_the_same_tensors() -> None:
    tree = {"a": [torch.ones(2)], "b": {}}
    for made in (encode(tree), decode(tree)):
        assert made is not tree
        assert made["a"] is not tree["a"]
        assert made["b"] is not tree["b"]
        assert made["a"][0] is tree["a"][0]


class Number(int):
    pass


class Words(dict[str, int]):
    pass


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (object(), "it is of type object"),
        ({"a": [1, {2}]}, r"\['a'\]\[1\] is of type set"),
        ({"a": (1, 2)}, r"\['a'\] is of type tuple"),
        ({"a": {1: 2}}, r"\['a'\]\[1\] is under a key of type int"),
        ([Number(3)], r"\[0\] is of type Number"),
        ([Words()], r"\[0\] is of type Words"),
        ([b"bytes"], r"\[0\] is of type bytes"),
        ([1j], r"\[0\] is of type complex"),
        ({"x": {"()": 1}}, r"\['x'\] is a dict of the reserved key"),
    ],
)
def test_anything_else_is_refused_by_its_path(tree: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"^the slot can't be saved: {message}.*use dicts"):
        check_plain(tree, "the slot")
