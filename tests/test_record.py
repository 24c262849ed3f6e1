"""Records are frozen, are nodes of both pytree libraries, and are compared bit for bit."""

from __future__ import annotations

import math
from typing import Any

import attrs
import optree
import pytest
import torch
import torch.utils._pytree as torch_pytree
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import functional_loop as fl
from functional_loop.core.record import did_you_mean, leaves_with_paths, tensor_bytes


@fl.record
class Point:
    y: Any
    x: Any = ()
    label: str = fl.static(default="")


@fl.record
class Place:
    y: Any
    x: Any = ()


POINT = Point(torch.tensor([1.0, 2.0]), {"b": torch.tensor(3.0), "a": (torch.tensor(4), 5)}, "here")


def test_a_record_is_frozen() -> None:
    for name in ("x", "label", "new"):
        with pytest.raises((attrs.exceptions.FrozenInstanceError, AttributeError)):
            setattr(POINT, name, 1)
    with pytest.raises((attrs.exceptions.FrozenInstanceError, AttributeError)):
        del POINT.x


def test_records_compare_and_hash_by_identity() -> None:
    twin = fl.evolve(POINT)
    assert POINT == POINT
    assert twin != POINT
    assert len({POINT, twin}) == 2


def test_optree_round_trip_with_paths() -> None:
    leaves, treespec = optree.tree_flatten(POINT)
    back = optree.tree_unflatten(treespec, leaves)
    assert isinstance(back, Point)
    assert fl.tree_equal(back, POINT)
    assert back.label == "here"
    assert optree.tree_paths(POINT) == [("y",), ("x", "a", 0), ("x", "a", 1), ("x", "b")]


def test_torch_round_trip_with_paths() -> None:
    leaves, treespec = torch_pytree.tree_flatten(POINT)
    back = torch_pytree.tree_unflatten(leaves, treespec)
    assert isinstance(back, Point)
    assert fl.tree_equal(back, POINT)
    assert back.label == "here"
    paths = [torch_pytree.keystr(path) for path, _ in torch_pytree.tree_flatten_with_path(POINT)[0]]
    assert paths == [".y", ".x['b']", ".x['a'][0]", ".x['a'][1]"]


def test_tree_map_of_both_libraries_keeps_the_record_and_its_metadata() -> None:
    for tree_map in (fl.tree_map, optree.tree_map, torch_pytree.tree_map):
        doubled = tree_map(lambda leaf: 2 * leaf, POINT)
        assert isinstance(doubled, Point)
        assert doubled.label == "here"
        assert torch.equal(doubled.y, torch.tensor([2.0, 4.0]))
        assert doubled.x["a"][1] == 10


def test_records_go_through_transforms_of_functions() -> None:
    line = Point(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0]), "line")

    def squares(point: Point) -> Tensor:
        return (point.x**2).sum() + point.y.sum()

    slope = torch.func.grad(squares)(line)
    assert isinstance(slope, Point)
    assert torch.equal(slope.x, 2 * line.x)
    assert slope.label == "line"
    swapped = torch.func.vmap(lambda point: Point(point.x, point.y + 1))(line)
    assert isinstance(swapped, Point)
    assert torch.equal(swapped.y, line.x)
    assert torch.equal(swapped.x, line.y + 1)


def test_evolve_replaces_fields_in_a_copy() -> None:
    changed = fl.evolve(POINT, x=1, label="there")
    assert (changed.x, changed.label) == (1, "there")
    assert changed.y is POINT.y
    assert POINT.label == "here"
    with pytest.raises(TypeError, match="Point has no field 'lable'; did you mean 'label'"):
        fl.evolve(POINT, lable="x")


@pytest.mark.parametrize("default", [[], {}, set(), torch.zeros(1)], ids=lambda default: type(default).__name__)
def test_a_mutable_default_is_refused(default: Any) -> None:
    with pytest.raises(TypeError, match=r"Wrong.items: a mutable default"):
        fl.record(type("Wrong", (), {"items": default, "__annotations__": {"items": "Any"}}))


@pytest.mark.parametrize("footgun", ["converter", "validator"])
def test_what_would_run_at_every_rebuild_is_refused(footgun: str) -> None:
    field = attrs.field(**{footgun: lambda *args: args[-1]})
    with pytest.raises(TypeError, match=r"Wrong.child: .*every rebuild of the tree"):
        fl.record(type("Wrong", (), {"child": field, "__annotations__": {"child": "Any"}}))


def test_metadata_may_have_a_converter() -> None:
    made: Any = fl.record(type("Fine", (), {"tag": fl.static(converter=str), "__annotations__": {"tag": "str"}}))
    assert made(3).tag == "3"


def test_fields_may_hold_metadata_before_children() -> None:
    made: Any = fl.record(type("Mixed", (), {"tag": fl.static(), "__annotations__": {"tag": "str", "child": "Any"}}))
    back = optree.tree_map(lambda leaf: leaf + 1, made("a", 1))
    assert (back.tag, back.child) == ("a", 2)


def nan(bits: int) -> Tensor:
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.tensor(0.0), torch.tensor(-0.0)),
        (torch.tensor(1.0), torch.tensor(1.0, dtype=torch.float64)),
        (torch.tensor(1), torch.tensor(True)),
        (torch.tensor([1.0]), torch.tensor(1.0)),
        (torch.zeros(0, 2), torch.zeros(2, 0)),
        (nan(0x7FC00000), nan(0x7FC00001)),
        (torch.tensor(1.0), 1.0),
        (1, True),
        (1, 1.0),
        ("a", "b"),
        (None, ()),
        ([], ()),
    ],
)
def test_tree_equal_tells_leaves_apart(a: Any, b: Any) -> None:
    assert not fl.tree_equal({"k": [0, a]}, {"k": [0, b]})
    assert "['k'][1]" in repr(fl.tree_equal({"k": [0, a]}, {"k": [0, b]}))


@pytest.mark.parametrize(
    "value", [0.0, math.nan, math.inf, None, (), "", 1 + 2j, torch.tensor(math.nan), torch.zeros(0)]
)
def test_tree_equal_of_equal_leaves(value: Any) -> None:
    twin = value.clone() if isinstance(value, Tensor) else value
    assert fl.tree_equal([value], [twin])


def test_tree_equal_compares_bits_of_numbers() -> None:
    assert not fl.tree_equal({"k": 0.0}, {"k": -0.0})


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((1, 2), [1, 2]),
        (Point(1, 2), Place(1, 2)),
        ({"a": 1}, {"a": 1, "b": 2}),
        ([1, 2], [1]),
        ({"0": 1}, [1]),
    ],
)
def test_tree_equal_tells_containers_apart(a: Any, b: Any) -> None:
    assert not fl.tree_equal(a, b)
    assert not fl.tree_equal(b, a)


def test_tree_equal_does_not_look_at_memory_or_the_order_of_keys() -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    assert fl.tree_equal({"a": 1, "m": matrix}, {"m": matrix.t().contiguous().t(), "a": 1})
    assert fl.tree_equal(matrix.to(torch.complex64).conj(), matrix.to(torch.complex64).conj().resolve_conj())


def test_tree_equal_prints_the_first_difference() -> None:
    a = {"w": torch.tensor([1.0, 2.0, 3.0])}
    assert repr(fl.tree_equal(a, {"w": torch.tensor([1.0, 2.5, 5.0])})) == (
        "different at ['w']: 2 of 3 elements differ, by 2 at most"
    )
    assert repr(fl.tree_equal({"v": 1, **a}, {"v": 1})) == "different at ['w']: missing in the second tree"
    assert repr(fl.tree_equal({"v": 1}, {"v": 1, **a})) == "different at ['w']: missing in the first tree"
    assert repr(fl.tree_equal(a, a)) == "equal"


def test_the_difference_printed_is_the_first_of_many() -> None:
    many = {f"{i:02}": i for i in range(50)}
    assert "['01']" in repr(fl.tree_equal(many, {"00": 0}))
    assert "['01']" in repr(fl.tree_equal({"00": 0}, many))


trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(()),
    lambda nodes: st.lists(nodes) | st.dictionaries(st.text(), nodes) | st.tuples(nodes, nodes),
)


@given(trees)
def test_tree_equal_is_reflexive(tree: Any) -> None:
    assert fl.tree_equal(tree, fl.tree_map(lambda leaf: leaf, tree))


@given(trees)
def test_every_leaf_has_a_path_that_leads_to_it(tree: Any) -> None:
    for path, leaf in leaves_with_paths(tree):
        assert eval(f"tree{path}", {"tree": tree}) is leaf


@given(st.lists(st.floats(width=32)), st.booleans())
def test_tensor_bytes_are_those_of_numpy(values: list[float], reverse: bool) -> None:
    tensor = torch.tensor(values)
    tensor = tensor.flip(0)[::2] if reverse and values else tensor
    assert bytes(tensor_bytes(tensor)) == tensor.numpy().tobytes()


def test_did_you_mean() -> None:
    assert did_you_mean("epoch_ends", ["epoch_end", "end"]) == "; did you mean 'epoch_end'?"
    assert did_you_mean("zzz", ["a", "b"]) == "; there is 'a', 'b'"
    assert did_you_mean("zzz", []) == "; there is none"
