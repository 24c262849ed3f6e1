"""Copies for code that may write to them: the originals keep their values, and writes are found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from functional_loop.core.copies import clone_tree, tree_was_written, was_written
from functional_loop.core.record import tree_equal

WRITES: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda t: t.mul_(2),
    "an element": lambda t: t.__setitem__((0, 0), 9.0),
    "through data": lambda t: t.data.add_(1),
    "through a view": lambda t: t[1:].fill_(5),
    "through a transposed view": lambda t: t.t()[0].fill_(5),
    "through numpy": lambda t: t.numpy().fill(3),
    "through a list of tensors": lambda t: torch._foreach_mul_([t], 3.0),
    "by copy": lambda t: t.copy_(torch.full_like(t, 4)),
    "out": lambda t: torch.ones(2, 3, out=t),
    "random": lambda t: t.uniform_(),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=list(WRITES))
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "a view"])
def test_the_original_keeps_its_values_whatever_is_written_to_the_copy(
    write: Callable[[Tensor], object], layout: str
) -> None:
    mine = torch.arange(1.0, 7.0).view(2, 3)
    if layout == "transposed":
        mine = torch.arange(1.0, 7.0).view(3, 2).t()
    if layout == "a view":
        mine = torch.arange(1.0, 13.0).view(4, 3)[1:3]
    before = mine.clone()
    copy = clone_tree(mine)
    assert tree_equal(copy, before)
    assert not was_written(copy, mine)
    write(copy)
    assert torch.equal(mine, before)
    assert was_written(copy, mine)
    assert not was_written(clone_tree(mine), mine)


def test_the_copy_keeps_its_values_whatever_is_written_to_the_original() -> None:
    mine = torch.ones(3)
    copy = clone_tree(mine)
    mine.zero_()
    assert copy.tolist() == [1, 1, 1]
    assert was_written(copy, mine)


def test_copies_are_apart_from_each_other() -> None:
    mine = torch.ones(3)
    first, second = clone_tree(mine), clone_tree(mine)
    third = clone_tree(first)
    first.zero_()
    assert (mine.tolist(), second.tolist(), third.tolist()) == ([1, 1, 1],) * 3


def test_writing_the_same_bits_is_no_change() -> None:
    mine = torch.tensor([1.0, float("nan")])
    copy = clone_tree(mine)
    copy.copy_(mine.clone())
    assert not was_written(copy, mine)


@pytest.mark.parametrize(("before", "after"), [(0.0, -0.0), (float("nan"), 0.0), (1.0, 1.0000001)])
def test_a_change_of_bits_is_a_change(before: float, after: float) -> None:
    mine = torch.tensor([before])
    copy = clone_tree(mine)
    copy[0] = after
    assert was_written(copy, mine)


def test_other_shapes_and_types_are_changes() -> None:
    mine = torch.ones(2, 3)
    assert was_written(mine.view(3, 2), mine)
    assert was_written(mine.double(), mine)


def test_a_graph_is_not_copied() -> None:
    leaf = torch.ones(2, requires_grad=True)
    copy = clone_tree(2 * leaf)
    assert not copy.requires_grad
    assert clone_tree(leaf).grad_fn is None


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.bfloat16, torch.complex64])
def test_every_type_and_the_empty_tensor_can_be_copied(dtype: torch.dtype) -> None:
    for mine in (torch.ones(3, dtype=dtype), torch.ones((), dtype=dtype), torch.ones(0, dtype=dtype)):
        assert tree_equal(clone_tree(mine), mine)
        assert not was_written(clone_tree(mine), mine)


def test_a_tree_is_new_with_its_tensors() -> None:
    mine = {"a": [torch.ones(2), 1], "b": {"c": (torch.zeros(1), "x")}, "d": (), "e": None}
    copy = clone_tree(mine)
    assert tree_equal(copy, mine)
    copy["a"][0].zero_()
    copy["a"].append(2)
    copy["b"]["c"][0].fill_(9)
    copy["b"]["new"] = 1
    assert tree_equal(mine, {"a": [torch.ones(2), 1], "b": {"c": (torch.zeros(1), "x")}, "d": (), "e": None})


class Outputs(NamedTuple):
    mean: torch.Tensor
    scale: torch.Tensor


def test_a_named_tuple_stays_one() -> None:
    mine = Outputs(torch.ones(2), torch.zeros(2))
    copied = clone_tree(mine)
    assert type(copied) is Outputs
    copied.mean.zero_()
    assert mine.mean.tolist() == [1, 1]


@pytest.mark.parametrize(
    "write",
    [
        lambda tree: tree["a"][0].add_(1),
        lambda tree: tree["a"].append(1),
        lambda tree: tree["b"].pop("c"),
        lambda tree: tree.update(d=1),
        lambda tree: tree.update(d=torch.ones(1)),
    ],
)
def test_a_tree_that_is_written_to_anywhere_is_found(write: Callable[[Any], object]) -> None:
    mine = {"a": [torch.ones(2), 1], "b": {"c": torch.zeros(1)}, "d": float("nan")}
    copy = clone_tree(mine)
    assert not tree_was_written(copy, mine)
    write(copy)
    assert tree_was_written(copy, mine)


@pytest.mark.parametrize("layout", ["coo", "neg", "conj", "expanded", "on 64 bits", "odd"])
def test_tensors_of_every_layout_are_compared_by_their_bits(layout: str) -> None:
    mine = {
        "coo": lambda: torch.eye(3).to_sparse(),
        "neg": lambda: torch.tensor([1 + 2j]).conj().imag,
        "conj": lambda: torch.tensor([1 + 2j]).conj(),
        "expanded": lambda: torch.ones(1).expand(3),
        "on 64 bits": lambda: torch.arange(4.0).t(),
        "odd": lambda: torch.arange(6, dtype=torch.int8).view(2, 3).t(),
    }[layout]()
    copy = clone_tree(mine)
    assert not was_written(copy, mine)
    values = copy._values() if copy.is_sparse else copy
    values[0] = 7
    assert was_written(copy, mine)
