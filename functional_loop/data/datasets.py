"""Batches of a map-style dataset: made in this process or by workers, with the same bits."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ..checkpoint.settings import settings_of
from ..core.batch import Batch, as_batch, copied
from ..core.errors import region
from ..core.hashes import hash_of
from ..core.record import evolve
from ..core.rng import fold_in
from ..core.seeding import Seeding
from ..purity.reachable import changed, state_of
from .epochs import Epochs
from .samples import sample_of
from .tensors import IndexedSource, checked_order

Key = tuple[list[int], int]


@attrs.frozen(eq=False)
class BatchMaker(Dataset[Batch]):
    """Makes the batch of a key: its row numbers, and the seed under which they are fetched and collated.

    The seed travels with the row numbers, so that it doesn't matter which process makes the batch. A dataset that draws
    from numpy or `random` is asked twice for the first batch for which it does, see `Seeding`.

    The first batch of a process is made twice, and compared: a state that the dataset keeps, such as a generator of its
    own, would make the batches of a resumed run others.
    """

    dataset: Any
    collate_fn: Callable[[list[Any]], Any] | None
    to_batch: Callable[[Any], Any] | None
    _seeding: Seeding = attrs.field(factory=lambda: Seeding(everything=False), init=False, repr=False)
    _repeats: list[bool] = attrs.field(factory=list, init=False, repr=False)

    def __getitem__(self, key: Key) -> Batch:
        with _one_thread():
            batch = self._made(key)
            if not self._repeats:
                self._check_repeats(batch, key)
            return batch

    def note_repeats(self) -> None:
        """Note that a batch has come: processes that are started from now on compare no more."""
        self._repeats[:] = [True]

    def _made(self, key: Key) -> Batch:
        rows, seed = key
        return self._seeding.call(lambda: self._collate(self._fetch(rows)), seed)

    def _check_repeats(self, batch: Batch, key: Key) -> None:
        if hash_of(batch.x, batch.y) != hash_of((again := self._made(key)).x, again.y):
            roots = {"dataset": self.dataset, "collate_fn": self.collate_fn, "to_batch": self.to_batch}
            before = state_of(roots)
            self._made(key)
            paths = changed(before, state_of(roots))
            what = f" It has changed {', '.join(paths[:5])}." if paths else ""
            raise ValueError(
                "a batch that is made twice of the same rows, under the same seed, differs: a run could neither be "
                f"repeated nor resumed.{what} What the dataset, collate_fn or to_batch draws is from the global "
                "generators of torch, numpy or random, which are seeded for every batch, and from none of their own; "
                "they keep no state from one call to the next"
            )
        self.note_repeats()

    def _fetch(self, rows: list[int]) -> list[Any]:
        fetch_many = getattr(self.dataset, "__getitems__", None)
        return fetch_many(rows) if fetch_many else [self.dataset[row] for row in rows]

    def _collate(self, rows: list[Any]) -> Batch:
        item = (self.collate_fn or default_collate)(rows)
        batch = as_batch(self.to_batch(item) if self.to_batch else item)
        # Only the default is known to copy. What else makes a batch may give the dataset's own tensors, to which a
        # network must not write, or one buffer that it fills again and again.
        return batch if self.collate_fn is None and self.to_batch is None else copied(batch)


@region
def _one_thread() -> Generator[None]:
    """Torch on one thread, as in a worker: the sums of several threads are rounded in another order."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _leave_signals_to_the_main_process(worker: int) -> None:
    """Ctrl-C in a terminal reaches all processes: a worker goes on, so that the run can stop at a batch.

    SIGTERM, by which workers are ended, works again where the main process has a handler that workers inherit.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@attrs.frozen(eq=False)
class DatasetSource(IndexedSource):
    """The rows of a map-style dataset; ``workers`` are the arguments of `DataLoader` about processes."""

    _make: BatchMaker = attrs.field(repr=False)
    pin_memory: bool
    workers: dict[str, Any]
    _sampled: list[dict[str, str]] = attrs.field(init=False, factory=list, repr=False)

    def fetch(self, seed: int, epoch: int, start: int, state: Any) -> Iterator[tuple[Batch, Any]]:
        epochs = Epochs(self._make)
        # Now, because workers get copies.
        epochs.tell(seed, epoch)
        if epochs and (rows := len(self._make.dataset)) != self._order.rows:
            raise ValueError(
                f"the dataset had {self._order.rows} rows when the source was made, and has {rows} in epoch {epoch}; "
                "batches(DataLoader(...)) may have epochs of other lengths"
            )
        own = Tensor.pin_memory if self._pins else Tensor.clone
        # Workers take keys ahead. To have the row numbers sent back by them would cost more than to remember them.
        taken: deque[Tensor] = deque()
        keys = self._keys(seed, epoch, start, taken)
        made = self._made_by_workers(keys) if self.workers["num_workers"] else self._made_here(keys)
        for _ in range(start, self.length):
            epochs.remind(seed, epoch)
            # Not `for batch in made`: a StopIteration of the dataset, from a worker too, would end it.
            batch, index = next(made), taken.popleft()
            self._make.note_repeats()
            yield (batch if isinstance(batch.index, Tensor) else evolve(batch, index=own(index))), ()

    def fingerprint(self) -> dict[str, Any]:
        made = {"kind": "dataset", **super().fingerprint()}
        functions = {"collate_fn": self._make.collate_fn, "to_batch": self._make.to_batch}
        return made | {name: settings_of(function) for name, function in functions.items() if function is not None}

    def sample(self) -> dict[str, str]:
        if not self._sampled:
            given = self.workers["num_workers"], self.workers["multiprocessing_context"]
            self._sampled.append(sample_of(self._make.dataset, *given))
        return self._sampled[0]

    def _keys(self, seed: int, epoch: int, start: int, taken: deque[Tensor]) -> Iterator[Key]:
        """The keys of an epoch's batches, whose row numbers are appended to ``taken``."""
        for step, index in enumerate(self._indices(seed, epoch, start), start + 1):
            taken.append(index)
            yield index.tolist(), fold_in(seed, "augmentation", (epoch - 1) * self.length + step)

    def _made_here(self, keys: Iterator[Key]) -> Iterator[Batch]:
        for key in keys:
            batch = self._make[key]
            yield batch.pin_memory() if self._pins else batch

    def _made_by_workers(self, keys: Iterator[Key]) -> Iterator[Batch]:
        return iter(
            DataLoader(
                self._make,
                batch_size=None,
                sampler=keys,
                pin_memory=self._pins,
                worker_init_fn=_leave_signals_to_the_main_process,
                generator=torch.Generator(),  # or it would draw the workers' seeds from the global one
                **self.workers,
            )
        )

    @property
    def _pins(self) -> bool:
        return self.pin_memory and torch.accelerator.is_available()


def from_dataset(
    dataset: Any,
    *,
    batch_size: int = 32,
    shuffle: bool = False,
    drop_last: bool = False,
    sampler: Any = None,
    weights: Any = None,
    bootstrap: bool = False,
    num_workers: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    to_batch: Callable[[Any], Any] | None = None,
    pin_memory: bool = False,
    prefetch_factor: int | None = None,
    multiprocessing_context: Any = None,
    timeout: float = 0,
) -> DatasetSource:
    """Batches of a map-style dataset; see ``batches``."""
    order = checked_order(len(dataset), batch_size, shuffle, drop_last, sampler, weights, bootstrap)
    for name, function in [("collate_fn", collate_fn), ("to_batch", to_batch)]:
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a function, not {function!r}")
    if type(num_workers) is not int or num_workers < 0:
        raise ValueError(f"num_workers must be an int of at least 0, not {num_workers!r}")
    workers = {
        "num_workers": num_workers,
        "prefetch_factor": prefetch_factor,
        "multiprocessing_context": multiprocessing_context,
        "timeout": timeout,
    }
    if not num_workers:
        for name, value in workers.items():
            if value:
                raise ValueError(f"{name}={value!r} is for workers, but num_workers is 0")
    return DatasetSource(order, batch_size, drop_last, BatchMaker(dataset, collate_fn, to_batch), pin_memory, workers)
