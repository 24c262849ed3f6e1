"""``set_epoch``: datasets, samplers and loaders are told which epoch it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from weakref import ref

from ..core.rng import fold_in, seeded

_INSIDE = ("batch_sampler", "sampler", "dataset", "collate_fn", "to_batch")
"""Attributes by which loaders, samplers and datasets hold others, in torch and in what follows its habits."""


class Epochs:
    """All that has a method ``set_epoch``: ``part`` itself and what it is made of, the innermost first.

    >>> class Curriculum(list):
    ...     def set_epoch(self, epoch): print("epoch", epoch)
    >>> from torch.utils.data import ConcatDataset, Subset
    >>> Epochs(ConcatDataset([Subset(Curriculum("ab"), [0]), Curriculum("cd")])).tell(0, 3)
    epoch 3
    epoch 3
    """

    def __init__(self, part: Any) -> None:
        self._parts = list(_parts(part, set()))

    def __bool__(self) -> bool:
        return bool(self._parts)

    def tell(self, seed: int, epoch: int) -> None:
        """Call ``set_epoch(epoch)`` of every part; what it draws is a function of seed and epoch."""
        for part in self._parts:
            with seeded(fold_in(seed, "set_epoch", epoch)):
                part.set_epoch(epoch)
            _note(part, (seed, epoch))

    def remind(self, seed: int, epoch: int) -> None:
        """Tell them again, if another run or source that shares one has told it another epoch since."""
        if any(_told(part) not in ((seed, epoch), None) for part in self._parts):
            self.tell(seed, epoch)


def _parts(part: Any, seen: set[int]) -> Iterator[Any]:
    if part is None or id(part) in seen:
        return
    seen.add(id(part))
    several = getattr(part, "datasets", ())
    several = several.values() if isinstance(several, dict) else several if isinstance(several, (list, tuple)) else ()
    for child in (*(getattr(part, name, None) for name in _INSIDE), *several):
        yield from _parts(child, seen)
    if callable(getattr(part, "set_epoch", None)):
        yield part


_notes: dict[int, tuple[ref[Any], tuple[int, int]]] = {}
"""By the id of a part the seed and epoch that it was told last: parts need not be hashable."""


def _note(part: Any, told: tuple[int, int]) -> None:
    key = id(part)
    # Of what allows no weak reference it is not known whether it lives.
    with suppress(TypeError):
        _notes[key] = ref(part, lambda _: _notes.pop(key, None)), told


def _told(part: Any) -> tuple[int, int] | None:
    found = _notes.get(id(part))
    return found[1] if found is not None and found[0]() is part else None
