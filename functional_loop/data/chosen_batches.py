"""A few batches in place of all: to overfit them, or to try a loop out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

import attrs

from ..core.batch import Batch, BatchSource
from ..core.record import evolve

if TYPE_CHECKING:
    from ..engine.loop import Loop


@attrs.frozen(eq=False)
class FirstBatches(BatchSource):
    """The first batches of the first epoch of another source, in every epoch the same."""

    source: BatchSource
    number: int

    @property
    def length(self) -> int | None:
        return None if self.source.length is None else self.number

    @property
    def expected_length(self) -> int:
        return self.number

    def fetch(self, seed: int, epoch: int, start: int, state: Any) -> Iterator[tuple[Batch, Any]]:
        if start >= self.number:
            return
        # The state after the epoch before would be that of the source's second epoch.
        batches: Any = self.source.fetch(seed, 1, start, state if start else ())
        step = start
        with closing(batches):
            for step, item in enumerate(batches, start + 1):
                yield item
                if step == self.number:
                    return
        raise ValueError(f"overfit: an epoch has {step} batches, fewer than k={self.number}")

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "first batches", "length": self.number, "of": self.source.fingerprint()}

    def sample(self) -> dict[str, str]:
        return self.source.sample()


@attrs.frozen(eq=False)
class GivenBatches(BatchSource):
    """Batches that are there already."""

    batches: tuple[Batch, ...]

    @property
    def length(self) -> int:
        return len(self.batches)

    def fetch(self, seed: int, epoch: int, start: int, state: Any) -> Iterator[tuple[Batch, Any]]:
        for batch in self.batches[start:]:
            yield batch, ()

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "given batches", "length": self.length}


def overfit(loop: Loop, k: int = 1) -> Loop:
    """A Loop that trains on the first ``k`` batches of the first epoch, over and over.

    A network that can't drive the loss on a few batches to its minimum won't learn from all of them. Their rows,
    their order and their augmentation stay the same in all epochs; validation data stay as they are.

    Raises:
        TypeError: ``loop`` is not a Loop.
        ValueError: ``k`` is not an integer of at least 1, or more than an epoch has.

    >>> from functional_loop.examples.digits import loop
    >>> import functional_loop as fl
    >>> ctx = fl.train(fl.init(overfit(loop(epochs=3), 2)))
    >>> ctx.epoch, ctx.global_step
    (3, 6)
    """
    from ..engine.loop import Loop

    if not isinstance(loop, Loop):
        raise TypeError(f"overfit takes a Loop, not {type(loop).__name__}")
    if type(k) is not int or k < 1:
        raise ValueError(f"overfit: k must be an integer of at least 1, not {k!r}")
    length = loop.train.length
    if length is not None and k > length:
        raise ValueError(f"overfit: an epoch has {length} batches, fewer than k={k}")
    return evolve(loop, train=FirstBatches(loop.train, k))
