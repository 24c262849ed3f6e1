"""`batches`: the one way to make a source of batches, from tensors, a dataset or a loader."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch.utils.data import Dataset, IterableDataset

from ..core.batch import Batch, BatchSource, as_batch, to_device
from ..core.record import did_you_mean
from .datasets import DatasetSource, from_dataset
from .loaders import LoaderSource, from_loader
from .tensors import TensorSource, from_tensors

__all__ = ["Batch", "BatchSource", "as_batch", "batches", "to_device"]

Tensors = torch.Tensor | tuple[Any, ...] | dict[str, Any]


@overload
def batches(  # type: ignore[overload-overlap]  # a tensor can be iterated too, but is not a loader
    x: Tensors,
    /,
    y: Tensors | None = None,
    *,
    batch_size: int = 32,
    shuffle: bool = False,
    drop_last: bool = False,
    sampler: Iterable[int] | None = None,
    weights: Any = None,
    bootstrap: bool = False,
    hash_content: bool = False,
) -> TensorSource: ...
@overload
def batches(
    dataset: Dataset[Any],
    /,
    *,
    batch_size: int = 32,
    shuffle: bool = False,
    drop_last: bool = False,
    sampler: Iterable[int] | None = None,
    weights: Any = None,
    bootstrap: bool = False,
    num_workers: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    to_batch: Callable[[Any], Any] | None = None,
    pin_memory: bool = False,
    prefetch_factor: int | None = None,
    multiprocessing_context: Any = None,
    timeout: float = 0,
) -> DatasetSource: ...
@overload
def batches(loader: Iterable[Any], /, *, to_batch: Callable[[Any], Any] | None = None) -> LoaderSource: ...
def batches(data: Any, /, y: Any = None, **options: Any) -> BatchSource:
    """A source of batches, each a function of (seed, epoch, step) alone.

    The data is one of three things:

    - **tensors** in memory: a tensor, or a tuple or dict of tensors, whose first dimension is the rows;
    - a **map-style dataset**: a ``torch.utils.data.Dataset``, or another object with ``__getitem__`` and a length
      (a list of samples: ``torch.utils.data.Subset(samples, range(len(samples)))``);
    - a **loader**: a ``DataLoader``, or any iterable that gives the batches of an epoch whenever it is iterated.

    Args:
        data: tensors, dataset or loader.
        y: for tensors: the targets, tensors of as many rows; ``None`` for none.
        batch_size: rows per batch. No option but ``to_batch`` is for loaders, which have decided already.
        shuffle: whether each epoch has a random order of its own.
        drop_last: whether to leave out a last batch that is smaller.
        sampler: row numbers of an epoch, any iterable with a length. It is read once per epoch, under the seed of the
            epoch, and has the same length in all.
        weights: one number per row; an epoch is as many draws as there are rows, with replacement.
        bootstrap: whether every epoch is of one and the same sample of the rows, drawn with replacement from the seed
            of the run, of as many rows: so that the members of an ensemble are those of bagging. Rows that are not in
            ``source.order(seed, epoch)`` are out of the bag of that seed.
        hash_content: for tensors: whether a saved run may continue only on data of the same bits.
        num_workers: for datasets, as all that follow: processes that make the batches. It can't change a bit.
        collate_fn: makes a batch of a list of samples; left out, ``torch.utils.data.default_collate``.
        to_batch: makes a `Batch`, or what `as_batch` takes, of what ``collate_fn`` or the loader gave.
        pin_memory: whether batches are in page-locked memory, where there is an accelerator.
        prefetch_factor, multiprocessing_context, timeout: as for ``torch.utils.data.DataLoader``.

    Random transforms of a dataset (torch, numpy, `random`) run under a seed per batch, on one thread; a dataset is a
    function of row and seed, and is asked again for the first batch of a process, where another answer is an error, and
    for that in which it first draws from numpy or `random`. Every dataset, sampler, collate function and loader that
    has ``set_epoch`` is told the epoch, also those within others.

    A loader runs under seeds too. What it says of its length is an estimate: one batch is read ahead to find the end of
    an epoch. To resume in mid-epoch, it is read again from the start of the epoch, unless it has ``state_dict`` and
    ``load_state_dict``, as those of torchdata: then its state is part of the run. Not part of it is what its workers
    draw, or a sampler of one's own. A hash of the next batch is saved with the run, and a loader that gives another one
    is an error.

    Raises:
        TypeError: the data is none of the three or can be read only once; an option is unknown or of a wrong type.
        ValueError: there are no rows or no batches, lengths or options contradict each other, or the order would
            depend on more than the seed and the epoch.

    >>> x, y = torch.randn(100, 3), torch.randn(100)
    >>> len(batches(x, y, batch_size=32, shuffle=True))
    4
    """
    make = _maker_for(data)
    arguments = {"y": y, **options} if y is not None else options
    known = [name for name, p in inspect.signature(make).parameters.items() if p.default is not p.empty]
    for name in arguments:
        if name not in known:
            raise TypeError(f"batches of {_KINDS[make]} take no {name}{did_you_mean(name, known)}")
    return make(data, **arguments)


_KINDS: dict[Callable[..., BatchSource], str] = {
    from_tensors: "tensors",
    from_dataset: "a dataset",
    from_loader: "a loader",
}


def _maker_for(data: Any) -> Callable[..., BatchSource]:
    name = type(data).__name__
    if isinstance(data, IterableDataset):
        raise TypeError(f"{name} is an IterableDataset, whose rows have no numbers; pass a DataLoader of it")
    if type(data).__module__.partition(".")[0] in ("numpy", "pandas"):
        raise TypeError(f"the data is a {name}; pass tensors, such as torch.as_tensor(array)")
    if isinstance(data, (torch.Tensor, tuple, dict)):
        return from_tensors
    if isinstance(data, Dataset) or (_has(data, "__getitem__", "__len__") and not isinstance(data, (list, str, bytes))):
        return from_dataset
    if _has(data, "__next__"):
        raise TypeError(
            f"the data is a {name}, which can be read only once; pass what it was made from: a DataLoader, a list of "
            "batches, or an object whose __iter__ starts anew"
        )
    if _has(data, "__iter__") and not isinstance(data, (str, bytes)):
        return from_loader
    raise TypeError(f"batches takes tensors, a map-style dataset or a loader, not {name}")


def _has(data: Any, *methods: str) -> bool:
    return all(hasattr(type(data), method) for method in methods)
