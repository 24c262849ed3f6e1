"""The end of a DataLoader, as apart from a ``StopIteration`` of the dataset or the collate function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from traceback import walk_tb
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

END: Any = object()
"""What `next_item` gives after the last item."""


def next_item(iterator: Iterator[Any]) -> Any:
    """The next item of a loader's iterator, or `END`.

    Raises:
        StopIteration: it came from the dataset or the collate function of a DataLoader, which made no end of it.
    """
    try:
        return next(iterator)
    except _StoppedError as error:
        raise StopIteration(str(error)) from error
    except StopIteration as stop:
        if _is_of_the_data(stop):
            raise
        return END


def iter_of(loader: Any) -> Iterator[Any]:
    """``iter(loader)``, with a collate function of workers whose ``StopIteration`` comes through."""
    if not (isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset) and loader.num_workers):
        return iter(loader)
    # For torch it is the end of the stream, where it comes from a worker that reads one.
    collate_fn = loader.collate_fn
    loader.collate_fn = _Collate(collate_fn)
    try:
        return iter(loader)
    finally:
        loader.collate_fn = collate_fn


class _StoppedError(RuntimeError):
    """A ``StopIteration`` on its way out of a worker."""


class _Collate:
    def __init__(self, collate_fn: Callable[[Any], Any]) -> None:
        self.collate_fn = collate_fn

    def __call__(self, rows: Any) -> Any:
        try:
            return self.collate_fn(rows)
        except StopIteration as stop:
            raise _StoppedError(f"StopIteration({stop}) in the collate function") from stop


def _is_of_the_data(stop: StopIteration) -> bool:
    """Whether a ``StopIteration`` of a DataLoader was raised by the dataset or the collate function.

    That can be told by where it has come through: what reads a map-style dataset knows no end, and what reads a stream
    collates when it has rows. Where torch names these in another way, it ends the epoch, as in any loop over a loader.
    """
    for frame, _ in walk_tb(stop.__traceback__):
        module = frame.f_globals.get("__name__")
        if module == "torch._utils" and frame.f_code.co_name == "reraise":
            return True
        if module == "torch.utils.data._utils.fetch" and frame.f_code.co_name == "fetch":
            reads_stream = "Iterable" in type(frame.f_locals.get("self")).__name__
            return not reads_stream or ("data" in frame.f_locals and not _raises(frame, stop))
    return False


def _raises(frame: Any, stop: StopIteration) -> bool:
    """Whether ``stop`` was raised in ``frame`` itself, and not in what it has called."""
    last = None
    for each, _ in walk_tb(stop.__traceback__):
        last = each
    return last is frame
