"""What a function was given, as it was: to see afterwards whether it was written to, and to put it back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import attrs
import torch
from torch import Tensor

from ..core.record import children_of, is_record, tensor_bytes


def nodes(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Everything in ``tree`` with its path, containers before what is in them; of a sparse tensor, its dense parts.

    >>> [path for path, _ in nodes({"a": [1]}, "tree")]
    ['tree', "tree['a']", "tree['a'][0]"]
    """
    if isinstance(tree, Tensor) and tree.is_sparse:
        yield f"{path}._indices()", tree._indices()
        yield f"{path}._values()", tree._values()
        return
    yield path, tree
    for key, child in children_of(tree).items():
        yield from nodes(child, path + key)


def storage_of(tensor: Tensor) -> int | None:
    """Which memory a tensor is a view of, by a number; ``None`` for kinds of tensors that have none of their own."""
    if tensor.layout is not torch.strided:
        return None
    with torch._C.DisableTorchFunction(), suppress(NotImplementedError, RuntimeError):
        # Not by address: a copy-on-write clone has that of its origin until it is written to.
        return int(tensor.untyped_storage()._cdata)
    return None


@attrs.frozen(eq=False)
class _Leaf:
    """A tensor, a second view of its memory, a copy of its values, and what else can be changed in place."""

    path: str
    tensor: Tensor
    view: Tensor
    copy: Tensor
    form: tuple[Any, ...]


def _form(tensor: Tensor) -> tuple[Any, ...]:
    grad = id(tensor.grad) if tensor.is_leaf and tensor.grad is not None else None
    return tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride(), tensor.requires_grad, grad


class Given:
    """The tensors and containers of some trees, as they are now.

    Args:
        trees: by the name with which their paths begin.

    >>> weights = {"w": torch.zeros(2)}
    >>> given = Given({"weights": weights})
    >>> weights["w"].numpy()[0] = 1.0
    >>> given.changes()
    [("weights['w']", 'values')]
    >>> given.put_back()
    >>> weights
    {'w': tensor([0., 0.])}
    """

    def __init__(self, trees: dict[str, Any]) -> None:
        self._leaves: list[_Leaf] = []
        self._containers: list[tuple[str, Any, dict[Any, Any]]] = []
        self._paths: dict[int, str] = {}
        for name, tree in trees.items():
            for path, node in nodes(tree, name):
                self._add(path, node)

    def _add(self, path: str, node: Any) -> None:
        if not isinstance(node, Tensor):
            if _is_container(node):
                self._containers.append((path, node, _items(node)))
        elif (storage := storage_of(node)) is not None:
            self._paths.setdefault(storage, path)
            view = node.detach()
            self._leaves.append(_Leaf(path, node, view, view.clone(), _form(node)))

    def path_of(self, tensor: Tensor) -> str | None:
        """Where in the trees there is a tensor that shares memory with ``tensor``."""
        storage = storage_of(tensor)
        return None if storage is None else self._paths.get(storage)

    def changes(self) -> list[tuple[str, str]]:
        """The path of everything that is not as it was, and what of it."""
        found = []
        for leaf in self._leaves:
            if _form(leaf.tensor) != leaf.form:
                found.append((leaf.path, "form"))
            elif not (_same_bits(leaf.view, leaf.copy) and _same_bits(leaf.tensor, leaf.copy)):
                found.append((leaf.path, "values"))
        for path, node, before in self._containers:
            now = _items(node)
            changed = [key for key in {**before, **now} if before.get(key, _ABSENT) is not now.get(key, _ABSENT)]
            found += [(path + (f".{key}" if is_record(node) else f"[{key!r}]"), "item") for key in changed]
        return found

    def put_back(self) -> None:
        """Make everything as it was, in place."""
        for leaf in self._leaves:
            if _form(leaf.tensor) != leaf.form or not _same_bits(leaf.tensor, leaf.copy):
                leaf.tensor.grad = None
                leaf.tensor.requires_grad_(False)
                leaf.tensor.data = leaf.view
                leaf.tensor.requires_grad_(leaf.form[4])
            if not _same_bits(leaf.view, leaf.copy):
                # Where several elements are one place in memory there is no way to write them.
                with suppress(RuntimeError):
                    leaf.view.copy_(leaf.copy)
        for _, node, before in self._containers:
            if isinstance(node, dict):
                node.clear()
                node.update(before)
            elif isinstance(node, list):
                node[:] = before.values()
            else:
                for name, value in before.items():
                    object.__setattr__(node, name, value)


_ABSENT = object()


def _is_container(node: Any) -> bool:
    """Whether something in it can be replaced; records are frozen, but not against all means."""
    return isinstance(node, (dict, list)) or is_record(node)


def _items(node: Any) -> dict[Any, Any]:
    if isinstance(node, dict):
        return dict(node)
    if isinstance(node, list):
        return dict(enumerate(node))
    return {key.removeprefix("."): child for key, child in children_of(node).items()}


def _same_bits(one: Tensor, other: Tensor) -> bool:
    # Bytes are compared much faster than views of memory are.
    return one.shape == other.shape and bytes(tensor_bytes(one)) == bytes(tensor_bytes(other))
