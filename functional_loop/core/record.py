"""Records: frozen classes that are pytree nodes in optree and in torch alike."""

from __future__ import annotations

import ctypes
import difflib
import struct
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from typing import Any, TypeVar, dataclass_transform

import attrs
import optree
import torch
import torch.utils._pytree as torch_pytree

T = TypeVar("T")

# Of every record class: its fields as a tuple, and where in the tuple each one is; faster than `attrs.evolve`.
_LAYOUTS: dict[type, tuple[Callable[[Any], tuple[Any, ...]], dict[str, int]]] = {}


def static(**kwargs: Any) -> Any:
    """A field of a `record` that is metadata of the tree, not a child: it has no leaves."""
    return attrs.field(metadata={"static": True}, **kwargs)


def is_static(field: attrs.Attribute[Any]) -> bool:
    return bool(field.metadata.get("static"))


@dataclass_transform(frozen_default=True, field_specifiers=(attrs.field, static))
def record(cls: type[T]) -> type[T]:
    """Class decorator: a frozen, slotted attrs class, registered as a pytree node in optree and in torch.

    All fields are children, but those declared with `static()`. Records compare and hash by identity, because
    ``==`` of tensors is no truth value; `tree_equal` compares them bit for bit.

    Raises:
        TypeError: a field has a mutable default, or a child field has a converter or validator, which would run
            again whenever the tree is rebuilt.

    >>> @record
    ... class Point:
    ...     x: torch.Tensor
    ...     y: torch.Tensor
    >>> doubled = tree_map(lambda t: 2 * t, Point(torch.tensor(1.0), torch.tensor(2.0)))
    >>> doubled.y
    tensor(4.)
    """
    made = attrs.frozen(eq=False)(cls)
    fields = attrs.fields(made)  # type: ignore[arg-type]
    for field in fields:
        if isinstance(field.default, (list, dict, set, torch.Tensor)):
            raise TypeError(f"{cls.__name__}.{field.name}: a mutable default would be shared by all records")
        if not is_static(field) and (field.converter is not None or field.validator is not None):
            raise TypeError(
                f"{cls.__name__}.{field.name}: converters and validators run again at every rebuild of the tree; "
                "check in a named constructor"
            )
    names = tuple(f.name for f in fields)
    children = tuple(f.name for f in fields if not is_static(f))
    statics = tuple(f.name for f in fields if is_static(f))
    order = [(children + statics).index(name) for name in names]
    _LAYOUTS[made] = (attrgetter(*names), {name: i for i, name in enumerate(names)})

    def flatten(node: T) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(node, name) for name in children], tuple(getattr(node, name) for name in statics)

    def unflatten(values: Iterable[Any], metadata: tuple[Any, ...]) -> T:
        everything = (*values, *metadata)
        return made(*(everything[i] for i in order))

    def flatten_with_entries(node: T) -> tuple[list[Any], tuple[Any, ...], tuple[str, ...]]:
        return (*flatten(node), children)

    def flatten_with_keys(node: T) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        values, metadata = flatten(node)
        return [(torch_pytree.GetAttrKey(n), v) for n, v in zip(children, values, strict=True)], metadata

    optree.register_pytree_node(
        made,  # type: ignore[arg-type]
        flatten_with_entries,  # type: ignore[arg-type]
        lambda metadata, values: unflatten(values, metadata),  # type: ignore[arg-type, return-value]
        path_entry_type=optree.GetAttrEntry,
        namespace=optree.registry.__GLOBAL_NAMESPACE,
    )
    torch_pytree.register_pytree_node(
        made,
        flatten,
        unflatten,
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        flatten_with_keys_fn=flatten_with_keys,
    )
    return made


def evolve(node: T, **changes: Any) -> T:
    """A copy of a record, or of a Loop, with some fields replaced.

    Raises:
        TypeError: a field of that name does not exist.

    >>> from functional_loop import Batch
    >>> evolve(Batch(x=1, y=2), y=3)
    Batch(x=1, y=3, index=())
    """
    if (layout := _LAYOUTS.get(type(node))) is None:
        return attrs.evolve(node, **changes)  # type: ignore[misc]
    values_of, index = layout
    values = list(values_of(node))
    for name, value in changes.items():
        if name not in index:
            raise TypeError(f"{type(node).__name__} has no field {name!r}{did_you_mean(name, index)}")
        values[index[name]] = value
    return type(node)(*values)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error message: the known word that is most like ``word``, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there is {', '.join(map(repr, known)) or 'none'}"


def tree_map(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Apply ``function`` to the leaves of one or more trees of the same structure (optree, ``None`` has no leaf).

    >>> tree_map(lambda a, b: a + b, {"w": 1, "b": [2, ()]}, {"w": 10, "b": [20, ()]})
    {'w': 11, 'b': [22, ()]}
    """
    return optree.tree_map(function, tree, *rest)


def leaves_with_paths(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of ``tree`` with its path in Python's notation; empty containers and ``None`` count as leaves.

    >>> list(leaves_with_paths({"a": [1, ()], "b": None}))
    [("['a'][0]", 1), ("['a'][1]", ()), ("['b']", None)]
    """
    found = children_of(tree)
    if not found:
        yield path, tree
    for key, child in found.items():
        yield from leaves_with_paths(child, path + key)


def is_record(node: Any) -> bool:
    return type(node) in _LAYOUTS


def children_of(node: Any) -> dict[str, Any]:
    """What a dict, list, tuple or record holds, by the end of its path in Python's notation; nothing for a leaf."""
    if isinstance(node, dict):
        return {f"[{key!r}]": value for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return {f"[{i}]": value for i, value in enumerate(node)}
    if is_record(node):
        fields = attrs.fields(type(node))
        return {f".{field.name}": getattr(node, field.name) for field in fields if not is_static(field)}
    return {}


@attrs.frozen(eq=False)
class Comparison:
    """Truth of a comparison, and the path and kind of the first difference."""

    path: str = ""
    reason: str = ""

    def __bool__(self) -> bool:
        return not self.reason

    def __repr__(self) -> str:
        return f"different at {self.path or 'the root'}: {self.reason}" if self.reason else "equal"


def tree_equal(a: Any, b: Any) -> Comparison:
    """Whether two trees have the same structure and the same bits in every leaf; static fields are not compared.

    NaNs of the same bits are equal, 0.0 and -0.0 are not. The result is true or false, and prints the first
    difference.

    >>> tree_equal({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([1.0, 3.0])})
    different at ['w']: 1 of 2 elements differ, by 1 at most
    """
    return _compare(a, b, "")


def _compare(a: Any, b: Any, path: str) -> Comparison:
    left, right = children_of(a), children_of(b)
    if not left or type(a) is not type(b):
        return Comparison(path, _difference(a, b))
    for key in {**left, **right}:
        if key not in left or key not in right:
            return Comparison(path + key, f"missing in the {'second' if key in left else 'first'} tree")
        if not (comparison := _compare(left[key], right[key], path + key)):
            return comparison
    return Comparison()


def _difference(x: Any, y: Any) -> str:
    if type(x) is not type(y):
        return f"{type(x).__name__} against {type(y).__name__}"
    if not isinstance(x, torch.Tensor):
        same = struct.pack("<d", x) == struct.pack("<d", y) if isinstance(x, float) else x == y
        return "" if same else f"{x!r} against {y!r}"
    for what in ("dtype", "shape", "device"):
        if getattr(x, what) != getattr(y, what):
            return f"{what} {getattr(x, what)} against {getattr(y, what)}"
    if tensor_bytes(x) == tensor_bytes(y):
        return ""
    unequal = x != y
    gap = (x.detach().to(torch.complex128 if x.is_complex() else torch.float64) - y.detach()).abs()
    return f"{int(unequal.sum())} of {x.numel()} elements differ, by {gap.nan_to_num().max().item():.3g} at most"


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of ``tensor`` in row-major order; no copy where it is contiguous and on the CPU."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    size = plain.numel() * plain.element_size()
    if not size:
        return memoryview(b"")
    view = (ctypes.c_ubyte * size).from_address(plain.data_ptr())
    view._keep_alive = plain  # type: ignore[attr-defined]
    return memoryview(view).cast("B")
