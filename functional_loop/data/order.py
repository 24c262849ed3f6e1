"""The order in which the rows of a dataset are read: a function of (seed, epoch)."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from hashlib import sha256
from typing import Any

import attrs
import torch

from ..core.record import tensor_bytes
from ..core.rng import fold_in, seeded
from .epochs import Epochs


@attrs.define(eq=False)
class Order:
    """Row numbers of an epoch, as a function of (seed, epoch).

    They come one after the other, shuffled, drawn by weights, or from a sampler. With ``bootstrap`` they are those of a
    sample, with replacement and of as many rows, that is a function of the seed.

    The order drawn last is remembered, so that a run in small pieces doesn't draw it for every piece.
    """

    rows: int
    shuffle: bool = False
    weights: torch.Tensor | None = None
    sampler: Any = None
    bootstrap: bool = False
    weights_sha256: str = attrs.field(init=False, repr=False)
    _length: int = attrs.field(init=False, repr=False)
    _last: tuple[tuple[int, int], torch.Tensor] | None = attrs.field(default=None, init=False, repr=False)

    @weights_sha256.default
    def _hash_weights(self) -> str:
        return "" if self.weights is None else sha256(tensor_bytes(self.weights)).hexdigest()

    @_length.default
    def _count(self) -> int:
        # Once, because that of a sampler may follow the epoch that it was told last.
        return self.rows if self.sampler is None else len(self.sampler)

    def __len__(self) -> int:
        return self._length

    def __call__(self, seed: int, epoch: int) -> torch.Tensor:
        """The row numbers of ``epoch``, an int64 tensor that is shared and must not be written to."""
        # One read and one write of a whole pair: threads that draw different epochs can't mix them.
        last = self._last
        if last is not None and last[0] == (seed, epoch):
            return last[1]
        drawn = self._draw(seed, epoch)
        drawn = self._resample(seed)[drawn] if self.bootstrap else drawn
        self._last = ((seed, epoch), drawn)
        return drawn

    def _draw(self, seed: int, epoch: int) -> torch.Tensor:
        if self.sampler is not None:
            return self._sample(seed, epoch)
        generator = torch.Generator().manual_seed(fold_in(seed, "order", epoch))
        if self.weights is not None:
            return torch.multinomial(self.weights, self.rows, replacement=True, generator=generator)
        if self.shuffle:
            return torch.randperm(self.rows, generator=generator, device="cpu")
        return torch.arange(self.rows, device="cpu")

    def _resample(self, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(fold_in(seed, "bootstrap", 0))
        return torch.randint(self.rows, (self.rows,), generator=generator, device="cpu")

    def _sample(self, seed: int, epoch: int) -> torch.Tensor:
        Epochs(self.sampler).tell(seed, epoch)
        with seeded(fold_in(seed, "order", epoch)):
            drawn = torch.tensor([operator.index(i) for i in self.sampler], dtype=torch.int64, device="cpu")
        if len(drawn) != len(self):
            raise ValueError(
                f"sampler: its length was {len(self)} when the source was made, but in epoch {epoch} it gave "
                f"{len(drawn)} indices; batches(DataLoader(..., batch_sampler=...)) may have epochs of other lengths"
            )
        if len(drawn) and not 0 <= int(drawn.min()) <= int(drawn.max()) < self.rows:
            raise ValueError(f"sampler: in epoch {epoch} it gave indices outside 0 to {self.rows - 1}")
        return drawn


def make_order(rows: int, shuffle: bool, sampler: Iterable[int] | None, weights: Any, bootstrap: bool) -> Order:
    """Check the arguments of ``batches`` that decide the order, and make it.

    Raises:
        TypeError: ``shuffle`` or ``bootstrap`` is not a bool, ``sampler`` has no length or can be read only once.
        ValueError: more than one of the first three, ``bootstrap`` of rows that are drawn, an empty sampler or one with
            a generator of its own, or weights that are not one finite number ≥ 0 per row.
    """
    for name, flag in (("shuffle", shuffle), ("bootstrap", bootstrap)):
        if type(flag) is not bool:
            raise TypeError(f"{name} must be True or False, not {flag!r}")
    chosen = [
        n
        for n, on in [
            ("shuffle", shuffle),
            ("sampler", sampler is not None),
            ("weights", weights is not None),
        ]
        if on
    ]
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(chosen)} exclude each other: each decides the order of the rows")
    if bootstrap and chosen not in ([], ["shuffle"]):
        raise ValueError(f"bootstrap and {chosen[0]} exclude each other: both decide which rows are read how often")
    if sampler is not None:
        _check_sampler(sampler)
    return Order(rows, shuffle, None if weights is None else _checked_weights(weights, rows), sampler, bootstrap)


def _check_sampler(sampler: Any) -> None:
    if not (hasattr(sampler, "__iter__") and hasattr(sampler, "__len__")) or hasattr(sampler, "__next__"):
        raise TypeError(
            f"sampler must be an iterable of row numbers with a length, not {type(sampler).__name__}: "
            "a list, a tensor or a torch.utils.data.Sampler"
        )
    if not len(sampler):
        raise ValueError("sampler is empty")
    for part in (sampler, getattr(sampler, "sampler", None)):
        if getattr(part, "generator", None) is not None:
            raise ValueError(
                f"sampler: {type(part).__name__} has a generator of its own, so its order would depend on how "
                "often it was read; leave generator= out: the order follows from the seed of the run and the epoch"
            )


def _checked_weights(weights: Any, rows: int) -> torch.Tensor:
    made = torch.as_tensor(weights, dtype=torch.float64, device="cpu").detach().clone()
    if made.shape != (rows,):
        raise ValueError(f"weights must be one number per row, of shape ({rows},), not {tuple(made.shape)}")
    if not bool(torch.isfinite(made).all()) or bool((made < 0).any()) or not bool(made.any()):
        raise ValueError("weights must be finite, not negative and not all zero")
    if rows > _MOST_WEIGHTS:
        raise ValueError(f"weights: torch.multinomial draws from at most {_MOST_WEIGHTS} rows, not {rows}")
    return made


_MOST_WEIGHTS = 2**24
