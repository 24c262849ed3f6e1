"""Trees of several members as one tree: tensors with a leading member axis, and other values member by member."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import is_
from typing import Any

import attrs
import optree
import torch
from torch import Tensor

Known = dict[int, tuple[Sequence[Tensor], Tensor]]
"""Stacked tensors and the views that members have of them, by the identity of the first view."""


@attrs.frozen
class Members:
    """A value that is no tensor and not the same for all members of an ensemble: one for each.

    >>> seeds = Members((3, 4))
    >>> seeds[1], len(seeds), list(seeds)
    (4, 2, [3, 4])
    """

    values: tuple[Any, ...]

    def __getitem__(self, member: int) -> Any:
        return self.values[member]

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values)

    def __repr__(self) -> str:
        return f"Members({', '.join(map(repr, self.values))})"


def combine(trees: Sequence[Any], known: Known | None = None, numbers: bool = False) -> Any:
    """The trees of all members as one: tensors are stacked, what all have in common is kept once.

    Where members differ in more than the values of tensors, there is a `Members`.

    Args:
        known: from `split`: what no member has changed is not stacked again.
        numbers: whether floats that differ become a float64 tensor of shape ``(members,)``.

    >>> combine([{"w": torch.tensor(1.0), "n": 3}, {"w": torch.tensor(2.0), "n": 3}])
    {'w': tensor([1., 2.]), 'n': 3}
    >>> combine([{"best": 0.5, "rows": []}, {"best": 0.25, "rows": []}])
    {'best': Members(0.5, 0.25), 'rows': []}
    """
    first = trees[0]
    kind = type(first)
    if any(type(tree) is not kind for tree in trees):
        return Members(tuple(trees))
    if isinstance(first, Tensor):
        return _stacked(trees, known or {})
    if kind is dict and all(tree.keys() == first.keys() for tree in trees):
        return {key: combine([tree[key] for tree in trees], known, numbers) for key in first}
    if kind in (list, tuple) and all(len(tree) == len(first) for tree in trees):
        return kind(combine(values, known, numbers) for values in zip(*trees, strict=True))
    if attrs.has(kind) and kind is not Members:
        names = [field.name for field in attrs.fields(kind)]
        return kind(*(combine([getattr(tree, name) for tree in trees], known, numbers) for name in names))
    if kind in (dict, list, tuple):
        return Members(tuple(trees))
    if all(tree is first or repr(tree) == repr(first) for tree in trees):
        return first
    if numbers and kind is float:
        return torch.tensor(list(trees), dtype=torch.float64)
    return Members(tuple(trees))


def _stacked(tensors: Sequence[Tensor], known: Known) -> Tensor | Members:
    first = tensors[0]
    hit = known.get(id(first))
    if hit is not None and all(map(is_, tensors, hit[0])):
        return hit[1]
    forms = [(t.shape, t.dtype, t.device, t.layout) for t in tensors]
    if first.layout is not torch.strided or any(form != forms[0] for form in forms):
        return Members(tuple(tensors))
    return stacked(tensors)


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """As ``torch.stack``, with the layout of the tensors: kernels round by it, and fill memory in its order."""
    first = tensors[0]
    strides = first.stride()
    # Of tensors with gaps there is no such copy.
    if first.is_contiguous() or torch.empty_like(first).stride() != strides:
        return torch.stack(list(tensors))
    made = torch.empty_strided(
        (len(tensors), *first.shape), (first.numel(), *strides), dtype=first.dtype, device=first.device
    )
    return torch.stack(list(tensors), out=made)


def split(tree: Any, members: int, known: Known | None = None, numbers: bool = False) -> list[Any]:
    """The inverse of `combine`: the tree of every member. Tensors are views.

    Args:
        known: is filled for a `combine` that follows.

    >>> split({"w": torch.tensor([1.0, 2.0]), "n": 3}, 2)
    [{'w': tensor(1.), 'n': 3}, {'w': tensor(2.), 'n': 3}]
    """
    leaves, structure = flatten(tree)
    columns = [_column(leaf, members, known, numbers) for leaf in leaves]
    return [structure.unflatten([column[member] for column in columns]) for member in range(members)]


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """The leaves of a tree, of which ``None`` is one, and its structure."""
    return optree.tree_flatten(tree, none_is_leaf=True)


def _column(leaf: Any, members: int, known: Known | None, numbers: bool) -> Sequence[Any]:
    if isinstance(leaf, Members):
        return leaf.values
    if not isinstance(leaf, Tensor):
        return [leaf] * members
    if numbers and leaf.dtype is torch.float64 and leaf.dim() == 1:
        column: Sequence[Any] = leaf.tolist()
        return column
    column = leaf.unbind(0)
    if known is not None:
        known[id(column[0])] = column, leaf
    return column


def vectorised(function: Callable[..., Any], arguments: tuple[Any, ...], members: int) -> Any:
    """``function`` of stacked trees, as if it were called for every member and the results combined.

    It is called once, under ``torch.func.vmap``: tensors are those of one member to it, and numbers that differ between
    members are tensors.

    Raises:
        RuntimeError, TypeError, ...: ``function`` needs values (``.item()``, ``if``, ``float()``), which one call for
            all members can't have.

    >>> vectorised(lambda tree: {"total": tree["w"].sum()}, ({"w": torch.ones(2, 3)},), members=2)
    {'total': tensor([3., 3.])}
    """
    leaves, structure = flatten(arguments)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) or _are_numbers(leaf)]
    given = [_as_tensor(leaves[i]) for i in places]
    results: list[Any] = []
    made: list[int] = []

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        inside = list(leaves)
        for i, tensor in zip(places, tensors, strict=True):
            inside[i] = tensor
        outputs, results_structure = flatten(function(*structure.unflatten(inside)))
        unchanged = {id(tensor): leaves[i] for i, tensor in zip(places, tensors, strict=True)}
        kept = [unchanged.get(id(output), output) for output in outputs]
        made[:] = [i for i, output in enumerate(kept) if isinstance(output, Tensor) and output is outputs[i]]
        results[:] = [kept, results_structure]
        return tuple(kept[i] for i in made)

    mapped = torch.func.vmap(call, randomness="error")(*given) if given else call()
    outputs, results_structure = results
    for i, tensor in zip(made, mapped, strict=True):
        outputs[i] = tensor
    return results_structure.unflatten(outputs)


def _are_numbers(leaf: Any) -> bool:
    return isinstance(leaf, Members) and all(type(value) in (float, int) for value in leaf)


def _as_tensor(leaf: Any) -> Tensor:
    if isinstance(leaf, Tensor):
        return leaf
    return torch.tensor(list(leaf), dtype=torch.float64 if float in map(type, leaf) else torch.int64)
