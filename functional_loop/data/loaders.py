"""Batches of any loader: a DataLoader, or another iterable that can be read once per epoch."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate

from ..checkpoint.settings import settings_of
from ..core.batch import Batch, BatchSource, as_batch, copied
from ..core.plain import check_plain
from ..core.rng import fold_in, seeded
from .epochs import Epochs
from .loader_ends import END, iter_of, next_item
from .node_loaders import NodeLoader
from .samples import sample_of

# Who reads a loader with a state, by the id of the loader, which the reader keeps alive.
_readers: dict[int, object] = {}
_EXACT = "batches(dataset, ...) resumes at once and exactly"


@attrs.frozen(eq=False)
class LoaderSource(BatchSource):
    """A loader that is read from its start in every epoch: resuming in mid-epoch replays the epoch."""

    loader: Any
    to_batch: Callable[[Any], Any] | None
    claimed: int | None
    """The length that the loader says it has."""

    @property
    def length(self) -> None:
        return None

    @property
    def expected_length(self) -> int | None:
        return self.claimed

    def fetch(self, seed: int, epoch: int, start: int, state: Any) -> Iterator[tuple[Batch, Any]]:
        if start:
            _warn_of_replay(start)
        for batch in self._read(seed, epoch, skip=start):
            yield batch, ()

    def fingerprint(self) -> dict[str, Any]:
        loader = self.loader
        return {
            "kind": "loader",
            "length": _length(getattr(loader, "dataset", None)),
            "batches": self.claimed,
            "batch_size": getattr(loader, "batch_size", None),
            "shuffle": type(getattr(loader, "sampler", None)).__name__ == "RandomSampler",
            "drop_last": getattr(loader, "drop_last", None),
            **({} if self.to_batch is None else {"to_batch": settings_of(self.to_batch)}),
        }

    def sample(self) -> dict[str, str]:
        if not isinstance(self.loader, DataLoader):
            return sample_of(self.loader) if isinstance(self.loader, (list, tuple)) else {}
        return sample_of(self.loader.dataset, self.loader.num_workers, self.loader.multiprocessing_context)

    def _read(self, seed: int, epoch: int, *, done: int = 0, skip: int = 0, restart: bool = False) -> Iterator[Batch]:
        """The rest of an epoch of which the loader has given ``done`` batches already.

        Whatever the loader draws, it draws under the seed of its place. The first ``skip`` batches are dropped.
        With ``restart``, a loader that has nothing left is at the end of the epoch before, and starts this one.
        """
        place = fold_in(seed, "loader", epoch)
        with seeded(place):
            iterator = self._start(seed, epoch)
        for step in itertools.count(done + 1):
            with seeded(fold_in(place, "batch", step)):
                item = next_item(iterator)
                if item is END and restart and step == 1:
                    iterator = self._start(seed, epoch)
                    item = next_item(iterator)
                if item is END:
                    return
                batch = self._batch(item) if step > done + skip else None
            if batch is not None:
                yield batch

    def _start(self, seed: int, epoch: int) -> Iterator[Any]:
        Epochs(self.loader).tell(seed, epoch)
        return iter_of(self.loader)

    def _batch(self, item: Any) -> Batch:
        batch = as_batch(self.to_batch(item) if self.to_batch else item)
        return batch if self.to_batch is None and _makes_copies(self.loader) else copied(batch)


@attrs.frozen(eq=False)
class StatefulLoaderSource(LoaderSource):
    """A loader with ``state_dict`` and ``load_state_dict``: its state is carried, and resuming loads it.

    One run at a time can read the loader. A run that leaves it puts it back into the state it was found in.
    """

    found: dict[str, Any]

    def fetch(self, seed: int, epoch: int, start: int, state: Any) -> Iterator[tuple[Batch, Any]]:
        fresh = state == ()
        if start and fresh:
            _warn_of_replay(start)
        elif start:
            _warn_of_workers(self.loader)
        # Two sources of one `torchdata.nodes.Loader` share the root of its nodes.
        key, reader = id(getattr(self.loader, "root", self.loader)), object()
        _readers[key] = reader
        try:
            self.loader.load_state_dict(copy.deepcopy(self.found) if fresh else _unpacked(state))
            done, skip = (0, start) if fresh else (start, 0)
            for batch in self._read(seed, epoch, done=done, skip=skip, restart=not fresh):
                yield batch, _packed_state(self.loader)
                if _readers.get(key) is not reader:
                    raise RuntimeError(
                        f"another run has begun to read this {type(self.loader).__name__}, which has but one state; "
                        "give each run a loader of its own, or use batches(dataset, ...), which runs can share"
                    )
        finally:
            if _readers.get(key) is reader:
                del _readers[key]
                self.loader.load_state_dict(copy.deepcopy(self.found))

    def _start(self, seed: int, epoch: int) -> Iterator[Any]:
        # This generator is a part of the loader's state, so that loading in mid-epoch overrides the seed.
        generator: Any = getattr(getattr(self.loader, "sampler", None), "generator", None)
        if generator is not None:
            generator.manual_seed(fold_in(seed, "order", epoch))
        if isinstance(self.loader, NodeLoader):
            self.loader.seed_order(fold_in(seed, "order", epoch))
        return super()._start(seed, epoch)


def from_loader(loader: Any, *, to_batch: Callable[[Any], Any] | None = None) -> LoaderSource:
    """Batches of a loader; see ``batches``."""
    if to_batch is not None and not callable(to_batch):
        raise TypeError(f"to_batch must be a function, not {to_batch!r}")
    if type(loader).__module__.startswith("torchdata.nodes") and hasattr(loader, "root"):
        loader = NodeLoader(loader)
    stateful = _has_state(loader) and not _skips_blindly(loader)
    if isinstance(loader, DataLoader):
        _check_data_loader(loader, stateful)
    length = _length(loader)
    if length == 0:
        raise ValueError(f"the {type(loader).__name__} has no batches")
    if not stateful:
        return LoaderSource(loader, to_batch, length)
    # Those of torchdata start anew when they load nothing; others are asked where they start.
    found = {} if isinstance(loader, (DataLoader, NodeLoader)) else _unpacked(_packed_state(loader))
    return StatefulLoaderSource(loader, to_batch, length, found)


def _check_data_loader(loader: DataLoader[Any], stateful: bool) -> None:
    """Refuse what would make the batches depend on more than (seed, epoch, step)."""
    if loader.persistent_workers:
        raise ValueError(
            "the DataLoader has persistent_workers=True, so what its workers draw would depend on the epochs before; "
            "leave it out"
        )
    if loader.num_workers and not loader.in_order:
        raise ValueError("the DataLoader has in_order=False, so its order would depend on the speed of its workers")
    parts: list[Any] = [loader, loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)]
    for part in parts:
        if not hasattr(part, "generator"):
            continue
        carried = stateful and part is not loader and type(part).__module__.startswith("torchdata.")
        if part.generator is not None and not carried:
            raise ValueError(
                f"the generator of the {type(part).__name__} would make the order depend on how often it was read; "
                "leave generator= out, and the order follows from the seed of the run and the epoch"
            )
        if stateful and part is not loader and not carried:
            raise ValueError(
                f"the state of the {type(loader).__name__} doesn't hold the order of its {type(part).__name__}, "
                f"so it can't resume; use shuffle=True, or batches(dataset, sampler=...)"
            )


def _has_state(part: Any) -> bool:
    return hasattr(part, "state_dict") and hasattr(part, "load_state_dict")


def _skips_blindly(loader: Any) -> bool:
    """Whether a loader of torchdata is over a stream that has no state.

    It then reads again from the start as we do, but counts what it skips twice, so that a second resume goes wrong.
    """
    dataset = getattr(loader, "dataset", None)
    return isinstance(dataset, IterableDataset) and not _has_state(dataset) and not _has_state(iter(dataset))


def _length(sized: Any) -> int | None:
    try:
        return len(sized)
    except (TypeError, NotImplementedError):
        return None


def _makes_copies(loader: Any) -> bool:
    """Whether batches are known to be new tensors. Others may be the dataset's own, or a buffer that is filled again,
    and workers share them."""
    return isinstance(loader, DataLoader) and loader.collate_fn is default_collate


def _warn_of_replay(start: int) -> None:
    warnings.warn(
        f"resuming in mid-epoch reads {start} batches again, because the loader has no state to start from; {_EXACT}",
        stacklevel=3,
    )


def _warn_of_workers(loader: Any) -> None:
    if getattr(loader, "num_workers", 0):
        warnings.warn(
            f"what the workers of the {type(loader).__name__} draw at random is not in its state, so random "
            f"transforms start anew when resuming in mid-epoch; {_EXACT}, random transforms included",
            stacklevel=3,
        )


_TUPLE = "__tuple__"


def _packed_state(loader: Any) -> Any:
    """A copy of the loader's state in plain containers; a tuple becomes ``{"__tuple__": [...]}``."""
    packed = _packed(loader.state_dict())
    check_plain(packed, f"the state of the {type(loader).__name__}")
    return packed


def _packed(node: Any) -> Any:
    match node:
        case torch.Tensor():
            return node.detach().clone()
        case dict():
            return {key: _packed(value) for key, value in node.items()}
        case list():
            return [_packed(value) for value in node]
        case tuple() if type(node) is tuple:
            return {_TUPLE: [_packed(value) for value in node]}
    return node


def _unpacked(node: Any) -> Any:
    """The inverse of `_packed`: new containers and tensors."""
    match node:
        case torch.Tensor():
            return node.clone()
        case dict() if list(node) == [_TUPLE]:
            return tuple(_unpacked(value) for value in node[_TUPLE])
        case dict():
            return {key: _unpacked(value) for key, value in node.items()}
        case list():
            return [_unpacked(value) for value in node]
    return node
