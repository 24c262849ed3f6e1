"""What names, keys and places refer to in all that functions and objects reach, so that it can be put back."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Collection, Generator, Iterator, Mapping
from typing import Any

from ..core.errors import region
from .reachable import has_attributes, names_of, reachable

Names = Collection[str] | None
"""The keys of a dict that count, or all."""

_ABSENT = object()


class Bindings:
    """What attributes, keys, places, closures and globals that are reached from ``roots`` refer to now.

    What is written to in place, such as the values of a tensor, is not kept.

    Args:
        roots: by path.
        own: identities of modules whose parameters and buffers are left out.

    >>> model = types.SimpleNamespace(cache={}, calls=0)
    >>> before = Bindings({"model": model})
    >>> model.cache["a"], model.calls = 1, 2
    >>> before.put_back()
    >>> model
    namespace(cache={}, calls=0)
    """

    def __init__(self, roots: Mapping[str, Any], own: Collection[int] = ()) -> None:
        self._roots, self._own = roots, own
        self._kept = [
            (container, names, _read(container, names))
            for _, value in reachable(roots, own)
            for container, names in _containers(value)
        ]

    def put_back(self) -> None:
        for container, names, content in self._kept:
            _write(container, names, content)

    @region
    def put_back_meanwhile(self) -> Generator[None]:
        """A region at whose begin all is put back, and at whose end it is again as it was before the region."""
        now = Bindings(self._roots, self._own)
        self.put_back()
        try:
            yield
        finally:
            now.put_back()

    def numbers(self) -> dict[tuple[int, Any], int | float]:
        """The numbers among them, by the identity of what they are in and their name, key or place there."""
        return {
            (id(container), key): value
            for container, _, content in self._kept
            for key, value in content.items()
            if type(value) in (int, float)
        }

    def set_numbers(self, numbers: Mapping[tuple[int, Any], int | float]) -> None:
        """Set some of the numbers."""
        for container, names, content in self._kept:
            ours = {key: numbers[id(container), key] for key in content if (id(container), key) in numbers}
            if ours:
                _write(container, names, {**_read(container, names), **ours})


def _containers(value: Any) -> Iterator[tuple[Any, Names]]:
    if isinstance(value, (dict, list, set, deque)):
        yield value, None
    if isinstance(value, types.FunctionType):
        yield value.__globals__, frozenset(names_of(value))
        yield from ((cell, None) for cell in value.__closure__ or ())
    if has_attributes(value):
        yield vars(value), None


def _read(container: Any, names: Names) -> dict[Any, Any]:
    match container:
        case dict():
            return dict(container) if names is None else {name: container.get(name, _ABSENT) for name in names}
        case types.CellType():
            try:
                return {"": container.cell_contents}
            except ValueError:
                return {"": _ABSENT}
    return dict(enumerate(container))


def _write(container: Any, names: Names, content: dict[Any, Any]) -> None:
    now = _read(container, names)
    if now.keys() == content.keys() and all(now[key] is value for key, value in content.items()):
        return
    match container:
        case dict():
            for key in now:
                if content.get(key, _ABSENT) is _ABSENT:
                    container.pop(key, None)
            container.update((key, value) for key, value in content.items() if value is not _ABSENT)
        case types.CellType():
            if content[""] is _ABSENT:
                del container.cell_contents
            else:
                container.cell_contents = content[""]
        case set():
            container.clear()
            container.update(content.values())
        case _:
            container.clear()
            container.extend(content.values())
