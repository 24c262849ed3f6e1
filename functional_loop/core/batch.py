"""One batch, and the sources that make every batch a function of (seed, epoch, step)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from .record import evolve, record, tree_map


@record
class Batch:
    """The rows that one step works on.

    Args:
        x: input of the network: a tensor, or a tuple or dict of tensors.
        y: target of the loss, of the same kinds; ``()`` where there is none.
        index: row numbers of the batch in its dataset, an int64 tensor; ``()`` where rows have no numbers.

    >>> Batch(x=torch.zeros(2, 3), y=torch.tensor([0, 1])).y
    tensor([0, 1])
    """

    x: Any
    y: Any = ()
    index: Any = ()

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory. A ``DataLoader`` calls this for batches that it does not know."""
        return _map_tensors(torch.Tensor.pin_memory, self)


def copied(batch: Batch) -> Batch:
    """The batch with copies of its tensors, which may be written to."""
    return _map_tensors(torch.Tensor.clone, batch)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on ``device``; the same object where they are there already.

    >>> batch = Batch(x=torch.zeros(2, 3))
    >>> to_device(batch, torch.device("cpu")) is batch
    True
    """
    if _is_on(device, batch.x) and _is_on(device, batch.y) and _is_on(device, batch.index):
        return batch
    # A copy to the host that doesn't block could be read before it has arrived.
    non_blocking = device.type != "cpu"
    return _map_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking), batch)


def _is_on(device: torch.device, part: Any) -> bool:
    if isinstance(part, torch.Tensor):
        # The first is faster.
        return part.is_cpu if device.type == "cpu" else part.device == device
    children = part.values() if isinstance(part, dict) else part if isinstance(part, (tuple, list)) else ()
    return all(_is_on(device, child) for child in children)


def _map_tensors(function: Callable[[torch.Tensor], torch.Tensor], batch: Batch) -> Batch:
    mapped: Batch = tree_map(lambda leaf: function(leaf) if isinstance(leaf, torch.Tensor) else leaf, batch)
    return mapped


_HOW_TO_CONVERT = (
    "pass to_batch=, a function that makes a fl.Batch of it, such as "
    'to_batch=lambda item: fl.Batch(x=item["image"], y=item["label"])'
)


def as_batch(item: Any) -> Batch:
    """What a loader or a collate function gave, as a `Batch`.

    A `Batch` stays as it is; a tensor, or a tuple or list of one element, is ``x``; a pair is ``x, y``; a
    mapping with the keys ``"x"`` and ``"y"``, and ``"index"`` if wanted, is what its keys say.

    Raises:
        TypeError: ``item`` is something else; the message says what to do.

    >>> as_batch([torch.zeros(2, 3), torch.ones(2)]).y
    tensor([1., 1.])
    """
    match item:
        case Batch():
            return item
        case torch.Tensor() | [_]:
            made = Batch(item if isinstance(item, torch.Tensor) else item[0])
        case [x, y]:
            made = Batch(x, y)
        case Mapping() if {"x", "y"} <= item.keys() <= {"x", "y", "index"}:
            made = Batch(**item)
        case Mapping():
            raise TypeError(f"a batch is a dict with the keys {list(item)}, not x and y; {_HOW_TO_CONVERT}")
        case tuple() | list():
            raise TypeError(f"a batch has {len(item)} parts, not x and y; {_HOW_TO_CONVERT}")
        case _:
            raise TypeError(f"a batch is of type {type(item).__name__}; {_HOW_TO_CONVERT}")
    return evolve(made, x=_tensors("x", made.x), y=_tensors("y", made.y))


def _tensors(name: str, value: Any) -> Any:
    match value:
        case torch.Tensor() | tuple() | dict():
            return value
        case list():
            return tuple(value)
        case Mapping():
            return dict(value)
    raise TypeError(f"{name} of a batch is of type {type(value).__name__}, not tensors; {_HOW_TO_CONVERT}")


class BatchSource(ABC):
    """Where the batches of a run come from: each is a function of (seed, epoch, step) alone.

    Sources are values: fetching changes nothing, and any number of runs can share one. `batches` makes them.

    Attributes:
        length: batches per epoch, ``None`` if that is not certain: the end of an epoch is then found by reading ahead.
        expected_length: an estimate, for displays and schedules; ``len(source)`` is the same, or a TypeError if there
            is none.
    """

    @property
    @abstractmethod
    def length(self) -> int | None: ...

    @property
    def expected_length(self) -> int | None:
        return self.length

    @abstractmethod
    def fetch(self, seed: int, epoch: int, start: int, state: Any) -> Iterator[tuple[Batch, Any]]:
        """Batches ``start + 1``, ``start + 2``, … of ``epoch``, each with the state of the source after it.

        The tensors of a batch are given away: the source writes to them no more.

        Args:
            seed: the seed of the run.
            epoch: 1, 2, …
            start: how many batches of this epoch have been consumed already.
            state: the state after the last batch consumed, in this epoch or the one before; ``()`` at the
                start of a run, and always for sources that keep none.
        """

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What must be equal for a saved run to continue on this source: plain values only."""

    def sample(self) -> dict[str, str]:
        """A hash of some rows that are spread over the data, if they can be known: ``rows`` as they are in memory,
        or ``samples`` that are computed."""
        return {}

    def __len__(self) -> int:
        if self.expected_length is None:
            raise TypeError("the number of batches per epoch is unknown")
        return self.expected_length

    def __bool__(self) -> bool:
        return True
