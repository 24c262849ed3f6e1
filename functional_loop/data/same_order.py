"""A source of batches whose order does not depend on the seed of the run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs

from ..core.batch import Batch, BatchSource


@attrs.frozen(eq=False)
class SameOrder(BatchSource):
    """See `same_order`."""

    source: BatchSource
    seed: int

    @property
    def length(self) -> int | None:
        return self.source.length

    @property
    def expected_length(self) -> int | None:
        return self.source.expected_length

    def fetch(self, seed: int, epoch: int, start: int, state: Any) -> Iterator[tuple[Batch, Any]]:
        return self.source.fetch(self.seed, epoch, start, state)

    def fingerprint(self) -> dict[str, Any]:
        return {**self.source.fingerprint(), "order_seed": self.seed}

    def sample(self) -> dict[str, str]:
        return self.source.sample()


def same_order(source: BatchSource, seed: int = 0) -> SameOrder:
    """``source`` in the order, and with the augmentations, that it has in a run of the seed ``seed``, in every run.

    So seeds differ in initialisation and dropout alone, and the members of an ensemble share one copy of each batch.

    Raises:
        TypeError: ``source`` is none, or ``seed`` is no integer.

    >>> import torch, functional_loop as fl
    >>> source = fl.same_order(fl.batches(torch.arange(6), batch_size=6, shuffle=True))
    >>> one, other = (next(source.fetch(seed, 1, 0, ()))[0].x for seed in (1, 2))
    >>> torch.equal(one, other)
    True
    """
    if not isinstance(source, BatchSource):
        raise TypeError(f"same_order takes what batches(...) makes, not {type(source).__name__}")
    if type(seed) is not int:
        raise TypeError(f"same_order: the seed is an integer, not {seed!r}")
    return SameOrder(source, seed)
