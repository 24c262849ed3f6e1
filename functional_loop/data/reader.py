"""Reading of a source: where its epoch ends, and whether it has come back to its place."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from itertools import count, islice
from typing import Any, NamedTuple
from weakref import ref

from ..core.batch import Batch, BatchSource
from ..core.context import Context
from ..core.hashes import hash_of

TRAINING, VALIDATION = "train", "valid"
"""The parts of ``ctx.data``."""


class Item(NamedTuple):
    """A batch, ``ctx.data`` after it, and whether it is the last of its epoch."""

    batch: Batch
    data: Any
    last: bool


class Reader:
    """Reads the rest of an epoch of a source, once.

    Where a source does not know its length (``len`` of a loader is an estimate), the end of an epoch is found by
    reading one batch ahead.

    The place in a source is a part of ``ctx.data``, unless the source knows its length and has no state: ``epoch`` and
    ``step`` of the last batch, and the ``state`` of the source after it. Of a source of unknown length also the hashes
    of the ``next`` batch of the epoch, ``""`` after its last, and of the ``first``, and the state with which the epoch
    was ``begun``, if it has one: what is read from a saved place must have these hashes.

    Args:
        source: what to read.
        part: `TRAINING` or `VALIDATION`.
        seed: of the run.
        epoch: 1, 2, ...
        start: how many batches of the epoch are done.
        data: ``ctx.data`` after them.

    Attributes:
        ended: whether the last batch has been given.
        ahead: batches that `take_before` has read ahead.
    """

    def __init__(self, source: BatchSource, part: str, seed: int, epoch: int, start: int, data: Any) -> None:
        self._source, self._part, self._seed, self._epoch, self._start = source, part, seed, epoch, start
        self._data = data
        place = data.get(part, {}) if data else {}
        # Of another pass over the epoch if it is further on: `overfit` reads the first one again and again.
        is_here = bool(place) and place["epoch"] == epoch and place["step"] <= start
        self._here = place if is_here else {}
        self._before = {} if is_here else place
        self.ended = start == source.length or self._here.get("next") == ""
        self.ahead: deque[Item] = deque()
        # Generators, in which no StopIteration of other code passes for the end of an epoch.
        self._items = self._ahead() if source.length is None else self._counted(source.length)

    def take(self) -> Item | None:
        """The next batch; ``None`` after the last."""
        return next(self._items, None)

    def take_before(self, number: int, skipped: frozenset[int]) -> Item | None:
        """The next batch, the ``number``-th of the run; it is the last of its epoch too if all those after it are among
        the numbers that are ``skipped``."""
        item = self.ahead.popleft() if self.ahead else self.take()
        if item is None or item.last:
            return item
        for i in count():
            if number + i + 1 not in skipped:
                return item
            if i == len(self.ahead) and (following := self.take()) is not None:
                self.ahead.append(following)
            if i == len(self.ahead) or self.ahead[i].last:
                return item._replace(last=True)
        raise AssertionError

    def close(self) -> None:
        """Let go of the data."""
        self._items.close()

    def _fetch(self) -> tuple[int, Iterator[tuple[Batch, Any]]]:
        """How many batches are done at the place, and those that follow; `train_step` may have gone on without."""
        place = self._here or self._before
        done = self._here["step"] if self._here else 0 if place else self._start
        return done, iter(self._source.fetch(self._seed, self._epoch, done, place.get("state", ())))

    def _counted(self, length: int) -> Generator[Item]:
        if self.ended:
            return
        done, batches = self._fetch()
        for step in range(done + 1, length + 1):
            item = next(batches, None)
            if item is None:
                raise ValueError(f"{self._called} ended after {step - 1} batches, and its length is {length}")
            if step == length and next(batches, None) is not None:
                raise ValueError(f"{self._called} went on after {length} batches, which is its length")
            self.ended = step == length
            if step > self._start:
                batch, state = item
                data = self._data if state == () else self._data_at(step, state=state)
                yield Item(batch, data, self.ended)

    def _ahead(self) -> Generator[Item]:
        if self.ended:
            return
        if self._before.get("first"):
            self._check_epoch_before()
        done, batches = self._fetch()
        item = next(batches, None)
        following = "" if item is None else _hash(item[0])
        if following != self._here.get("next", following):
            raise self._lost(done + 1)
        kept = {name: self._here[name] for name in ("first", "begun") if name in self._here}
        if not done and not self._here:
            kept = {"first": following, **({"begun": self._before["state"]} if self._before.get("state", ()) else {})}
        self._note_first("" if "begun" in kept else kept.get("first", ""))
        for step in count(done + 1):
            if item is None:
                self.ended = True
                return
            batch, state = item
            place = {"state": state, **kept}
            failure = None
            try:
                item = next(batches, None)
            except Exception as error:
                # What goes wrong in reading ahead goes wrong at the next batch.
                failure = error
            else:
                place["next"] = "" if item is None else _hash(item[0])
                self.ended = item is None
            if step > self._start:
                yield Item(batch, self._data_at(step, **place), self.ended)
            if failure is not None:
                raise failure

    def _data_at(self, step: int, **place: Any) -> Any:
        others = {part: other for part, other in self._data.items() if part != self._part} if self._data else {}
        return {**others, self._part: {"epoch": self._epoch, "step": step, **place}}

    def _check_epoch_before(self) -> None:
        """Read the first batch of the epoch before again, if this process is not the one that has read it last.

        Twice, because a loader with a generator of its own may start with the batch that was first, but once only.
        """
        epoch = self._before["epoch"]
        if _read_in_this_process(self._source).last.get(self._seed) == epoch:
            return
        for _ in range(2):
            batches: Any = self._source.fetch(self._seed, epoch, 0, self._before.get("begun", ()))
            with closing(batches):
                for batch, _ in islice(batches, 1):
                    if _hash(batch) != self._before["first"]:
                        raise self._lost(1, epoch)

    def _note_first(self, first: str) -> None:
        """Refuse an epoch that begins with another batch than when this process read it before."""
        read, at = _read_in_this_process(self._source), (self._part, self._seed, self._epoch)
        read.last[self._seed] = self._epoch
        if first and read.first.setdefault(at, first) != first:
            del read.first[at]
            raise self._lost(1)

    @property
    def _called(self) -> str:
        return f"epoch {self._epoch} of the {CALLED[self._part]}"

    def _lost(self, step: int, epoch: int | None = None) -> RuntimeError:
        return RuntimeError(
            f"the {CALLED[self._part]} did not come back to its place: batch {step} of epoch "
            f"{self._epoch if epoch is None else epoch} is not the one that was read before. A loader must give "
            "the same batches for the same seed and epoch: it draws from torch, numpy or random and has no generator "
            "or counter of its own, or it has state_dict() and load_state_dict() that bring it back; batches(dataset, "
            "...) resumes by itself"
        )


CALLED = {TRAINING: "training data", VALIDATION: "validation data"}


class _Read(NamedTuple):
    """What this process has read of a source."""

    last: dict[int, int]
    """By seed, the epoch that was begun last."""
    first: dict[tuple[str, int, int], str]
    """By part, seed and epoch, the hash of the first batch, of epochs that began without a state of the source."""


_known: dict[int, tuple[ref[BatchSource], _Read]] = {}


def _read_in_this_process(source: BatchSource) -> _Read:
    # By id, because the sources of others need not be hashable.
    key = id(source)
    if key not in _known:
        _known[key] = ref(source, lambda _: _known.pop(key, None)), _Read({}, {})
    return _known[key][1]


def as_places(data: Any, epoch: int, step: int) -> Any:
    """``ctx.data`` after batch ``step`` of ``epoch``, of which earlier versions saved the state of a loader alone."""
    if data == () or (isinstance(data, dict) and data and data.keys() <= {TRAINING, VALIDATION}):
        return data
    return {TRAINING: {"epoch": epoch if step else epoch - 1, "step": step, "state": data}}


def without_hashes(data: Any) -> Any:
    """``ctx.data`` for other data, which go on at the same number of batches."""
    hashes = ("next", "first")
    return {part: {k: v for k, v in place.items() if k not in hashes} for part, place in dict(data).items()} or ()


def without_validation(data: Any) -> Any:
    """``ctx.data`` after validation, whose place is no longer needed."""
    if not data or VALIDATION not in data:
        return data
    return {part: place for part, place in data.items() if part != VALIDATION} or ()


def _hash(batch: Batch) -> str:
    return hash_of(batch.x, batch.y, batch.index)


def is_done(ctx: Context) -> bool:
    """Whether the epoch is known to have no training batch left."""
    return Reader(ctx.loop.train, TRAINING, ctx.seed, ctx.epoch, ctx.step, ctx.data).ended


def check_epoch_done(ctx: Context) -> None:
    """Refuse an epoch without batches, and one whose last gradients would be lost, with a ValueError."""
    if ctx.step == 0:
        raise ValueError(f"the training data gave no batch in epoch {ctx.epoch}")
    if ctx.accumulated != ():
        raise ValueError(
            f"the accumulation window is open at the end of epoch {ctx.epoch}, after step {ctx.step}, and its "
            "gradients would be lost: train_step(ctx, batch, last=True) says that a batch is the last of its epoch; "
            "where the batches that follow are passed over, go on from a context before the window"
        )


def check_validated(ctx: Context) -> None:
    """Refuse a validation without batches, with a ValueError."""
    if ctx.step_valid == 0:
        raise ValueError(f"the validation data gave no batch in epoch {ctx.epoch}")
