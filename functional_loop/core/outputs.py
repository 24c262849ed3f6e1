"""Outputs of a network: tensors in tuples, named tuples, lists, dicts, their subclasses, and data classes."""

from __future__ import annotations

import collections
import copy
import dataclasses
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs
from torch import Tensor

from .record import did_you_mean

_CLASS = "(class)"


def children(node: Any) -> dict[Any, Any] | None:
    """What a container holds, by key, index or name of a field; ``None`` for a leaf.

    >>> children(collections.namedtuple("Heads", "mean variance")(1, 2))
    {'mean': 1, 'variance': 2}
    """
    if isinstance(node, dict):
        return dict(node.items())
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return dict(zip(node._fields, node, strict=True))
    if isinstance(node, (tuple, list)):
        return dict(enumerate(node))
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
    if attrs.has(type(node)):
        return {field.name: getattr(node, field.name) for field in attrs.fields(type(node))}
    return None


def _rebuilt(node: Any, values: Sequence[Any]) -> Any:
    """A container of the class of ``node`` that holds ``values`` in the place of what that holds."""
    kind = type(node)
    if kind is dict:
        return dict(zip(node, values, strict=True))
    if isinstance(node, (tuple, list)):
        # A named tuple is made from one argument for every field.
        return getattr(kind, "_make", kind)(values)
    made = copy.copy(node)
    for key, value in zip(children(node) or (), values, strict=True):
        if isinstance(made, dict):
            made[key] = value
        else:
            object.__setattr__(made, key, value)
    return made


def map_outputs(function: Callable[..., Any], outputs: Any, *rest: Any) -> Any:
    """``function`` of the leaves of outputs of one form, in containers of the same classes.

    Raises:
        ValueError: they are not of one form.

    >>> map_outputs(lambda a, b: a + b, {"logits": 1, "states": (2,)}, {"logits": 10, "states": (20,)})
    {'logits': 11, 'states': (22,)}
    """
    if isinstance(outputs, Tensor) or (own := children(outputs)) is None:
        return function(outputs, *rest)
    others = [children(other) for other in rest]
    for other in others:
        if other is None or other.keys() != own.keys():
            raise ValueError(f"the outputs of one batch hold {list(own)}, those of another {list(other or ())}")
    columns = ((value, *(other[key] for other in others if other is not None)) for key, value in own.items())
    return _rebuilt(outputs, [map_outputs(function, *column) for column in columns])


def tree_detach(outputs: Any) -> Any:
    """Outputs of a network without their graph."""
    if isinstance(outputs, Tensor):
        return outputs.detach()
    return map_outputs(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, outputs)


def leaves(outputs: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf with its path.

    >>> list(leaves({"logits": 1, "states": (2, 3)}))
    [("['logits']", 1), ("['states'][0]", 2), ("['states'][1]", 3)]
    """
    if isinstance(outputs, Tensor) or (own := children(outputs)) is None:
        yield path, outputs
        return
    for key, value in own.items():
        yield from leaves(value, f"{path}[{key!r}]")


def is_of_objects(outputs: Any) -> bool:
    """Whether there is a container that other libraries of trees do not know: a subclass of dict, or a data class."""
    if isinstance(outputs, Tensor) or (own := children(outputs)) is None:
        return False
    known = isinstance(outputs, (tuple, list)) or type(outputs) in (dict, collections.OrderedDict)
    return not known or any(map(is_of_objects, own.values()))


def pick(outputs: Any, of: Any) -> Any:
    """The output that ``of`` says: a key, the name of an attribute, an index, or a function of all outputs.

    Raises:
        LookupError: there is no such output.

    >>> pick({"logits": 1}, "logits"), pick((1, 2), 1), pick((1, 2), sum)
    (1, 2, 3)
    """
    if callable(of):
        return of(outputs)
    own = None if isinstance(outputs, Tensor) else children(outputs)
    if own is None:
        raise LookupError(
            f"the network has no output {of!r}: it returns one {type(outputs).__name__}, so leave of= out"
        )
    if of in own:
        return own[of]
    if isinstance(of, int) and type(outputs) is not dict and -len(own) <= of < len(own):
        return list(own.values())[of]
    if isinstance(of, str) and not callable(found := getattr(outputs, of, print)):
        return found
    raise LookupError(f"the network has no output {of!r}{did_you_mean(str(of), map(str, own))}")


_seen: dict[tuple[str, tuple[Any, ...]], Any] = {}
"""Of classes whose objects became plain in this process, by name and keys: an object without what it held."""


def plain(outputs: Any) -> Any:
    """Outputs as dicts, lists and tuples alone, which can be saved; `restored` makes them what they were."""
    if isinstance(outputs, Tensor) or (own := children(outputs)) is None:
        return outputs
    parts, kind = {key: plain(value) for key, value in own.items()}, type(outputs)
    if kind is dict:
        return parts
    if kind in (tuple, list):
        return kind(parts.values())
    name = f"{kind.__module__}.{kind.__qualname__}"
    if type(_seen.get((name, tuple(own)))) is not kind:
        _seen[name, tuple(own)] = _rebuilt(outputs, [None] * len(own))
    form = "tuple" if isinstance(outputs, (tuple, list)) else "dict" if isinstance(outputs, dict) else "object"
    return {_CLASS: {"name": name, "form": form, "parts": {str(key): value for key, value in parts.items()}}}


def restored(tree: Any) -> Any:
    """The outputs that `plain` was given; of a class that this process has not met, an object that looks like its.

    >>> restored(plain(collections.namedtuple("Heads", "mean variance")(1, 2)))
    Heads(mean=1, variance=2)
    """
    if isinstance(tree, dict) and list(tree) == [_CLASS]:
        named = tree[_CLASS]
        parts = {key: restored(value) for key, value in named["parts"].items()}
        for (name, keys), empty in _seen.items():
            if name == named["name"] and [str(key) for key in keys] == list(parts):
                return _rebuilt(empty, list(parts.values()))
        return _stand_in(named["name"].rpartition(".")[2], named["form"], parts)
    if isinstance(tree, dict):
        return {key: restored(value) for key, value in tree.items()}
    return type(tree)(map(restored, tree)) if isinstance(tree, (tuple, list)) else tree


def _stand_in(name: str, form: str, parts: dict[str, Any]) -> Any:
    if form == "tuple":
        named = all(key.isidentifier() for key in parts)
        return collections.namedtuple(name, parts)(**parts) if named else tuple(parts.values())
    return _Named(parts) if form == "dict" else types.SimpleNamespace(**parts)


class _Named(dict[str, Any]):
    """A dict whose values are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None
