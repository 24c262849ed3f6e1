"""Where two runs part: the first step and leaf, found from their checkpoints and by replay."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import attrs

from ..checkpoint import file as checkpoint_file
from ..checkpoint.state import StateDict, start_of, state_dict
from ..core.context import Context
from ..core.errors import loading
from ..core.place import Place
from ..core.record import evolve
from ..engine.loop import Loop
from .differences import Difference
from .replay import load, read_state, replay, replayed_differences, saved_files, walk_quietly


@attrs.frozen
class Parting:
    """Where two runs part; true if they do.

    Attributes:
        equal: the last place that is known to be equal in both; ``None`` if they differ from the start.
        place: the first place at which they differ; where they don't, the last one that both have.
        differences: the leaves in which they differ there, first run first.
        unfaithful: which of the runs, 0 or 1, saved something else there than its replay gives. Then it was chance that
            parted them (a kernel that is not deterministic, a fault of the machine), somewhere between the two places.
    """

    equal: Place | None
    place: Place
    differences: tuple[Difference, ...] = ()
    unfaithful: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.differences)


class _Run:
    """A loop, and the states that are on disk of it."""

    def __init__(self, loop: Loop, path: str | os.PathLike[str]) -> None:
        self.files: dict[Place, Path] = {}
        for file in saved_files(path):
            metadata = checkpoint_file.read_metadata(file)
            # From a run's end nothing goes on, and the end of the epoch before it says as much.
            if metadata["stage"] != "end":
                self.files[_place(file, metadata)] = file
                self.loop = evolve(loop, epochs=metadata.get("epochs", loop.epochs))
        if not self.files:
            raise FileNotFoundError(f"no checkpoint of a run in {path}")

    def at(self, place: Place | None) -> Context:
        """The context at ``place``: as it was saved, or else trained again from the last that was saved before."""
        before = [saved for saved in self.files if place is not None and saved <= place]
        nearest = max(before) if before else min(self.files)
        state = self._read(nearest)
        with loading(self.files[nearest]):
            ctx = load(self.loop, state) if before else start_of(self.loop, state)
        return replay(ctx, until=place) if place is not None else ctx

    def state(self, place: Place | None) -> StateDict:
        return self._read(place) if place in self.files else state_dict(self.at(place))

    def _read(self, place: Place) -> StateDict:
        return read_state(self.files[place])[0]


_PLACE = ("global_step", "epoch", "stage")


def _place(file: Path, metadata: dict[str, Any]) -> Place:
    validating = metadata["stage"] == "batch_valid_end"
    return Place.of(read_state(file)[0] if validating else {**{n: metadata[n] for n in _PLACE}, "step_valid": 0})


def bisect(loops: tuple[Loop, Loop], paths: tuple[str | os.PathLike[str], str | os.PathLike[str]]) -> Parting:
    """The first place and leaves at which two runs part.

    Of n places at which one of them saved a checkpoint, log2(n) are compared, to find two neighbours between which the
    runs part; where one run has no checkpoint it is trained again from the one before, quietly. Between the neighbours
    both are trained again, in step. It takes for granted that runs that have parted don't meet again, and that the
    members of an ensemble began with the hyperparameters of the loop.

    Args:
        loops: what was trained, as it was trained then: the loops may differ.
        paths: the two folders of checkpoints.

    Raises:
        FileNotFoundError: a folder has no checkpoint.
        CheckpointError, StateDictError: a checkpoint is damaged, or belongs to another loop.
        NoSuchPlaceError: one run does not come to a place of the other, as its epochs have other numbers of batches.

    >>> import tempfile
    >>> import functional_loop as fl
    >>> from functional_loop.callbacks import checkpoint
    >>> from functional_loop.examples.digits import loop
    >>> def halve_at_17(ctx):
    ...     return ctx.with_hyperparameters(lr=0.001) if ctx.global_step == 17 else ctx
    >>> def run(*callbacks):
    ...     path = tempfile.mkdtemp()
    ...     saving = fl.evolve(loop(epochs=2), callbacks=[*callbacks, checkpoint(path, every_steps=10)])
    ...     _ = fl.train(fl.init(saving))
    ...     return saving, path
    >>> (a, path_a), (b, path_b) = run(), run(fl.Callback("halve", batch_end=halve_at_17))
    >>> parting = fl.bisect((a, b), (path_a, path_b))
    >>> parting.place, str(parting.differences[0])
    (step 17, after batch_end of epoch 1, 'optimizer/groups/0/lr: 0.003 against 0.001')
    """
    a, b = (_Run(loop, path) for loop, path in zip(loops, paths, strict=True))
    if found := _compare(a, b, None):
        return Parting(None, Place.of(a.at(None)), found)
    shared = min(max(a.files), max(b.files))
    places: list[Place | None] = [None, *sorted(place for place in {*a.files, *b.files} if place <= shared)]
    # Equal at `equal`, and different from `parted` on.
    equal, parted = 0, len(places)
    while parted - equal > 1:
        middle = (equal + parted) // 2
        if _compare(a, b, places[middle]):
            parted = middle
        else:
            equal = middle
    if parted == len(places):
        return Parting(shared, shared)
    stop = places[parted]
    assert stop is not None
    return _walk(a, b, places[equal], stop)


def _compare(a: _Run, b: _Run, place: Place | None) -> tuple[Difference, ...]:
    return _differences(a, b, a.state(place), b.state(place))


def _differences(a: _Run, b: _Run, left: StateDict, right: StateDict) -> tuple[Difference, ...]:
    return tuple(replayed_differences([a.loop, b.loop], left, right))


def _walk(a: _Run, b: _Run, start: Place | None, stop: Place) -> Parting:
    """Train both again from ``start``, where they are equal, towards ``stop``, where what they saved is not."""
    contexts = a.at(start), b.at(start)
    equal = begun = Place.of(contexts[0])
    with closing(walk_quietly(contexts[0])) as walk_a, closing(walk_quietly(contexts[1])) as walk_b:
        for ctx_a, ctx_b in zip(walk_a, walk_b, strict=False):
            if found := _differences(a, b, state_dict(ctx_a), state_dict(ctx_b)):
                return Parting(equal, min(Place.of(ctx_a), Place.of(ctx_b)), found)
            contexts = ctx_a, ctx_b
            if Place.of(ctx_a) >= stop:
                break
            equal = Place.of(ctx_a)
    # Both replays agree, so that at least one of the two is not what was saved.
    pairs: Iterable[tuple[int, _Run, Context]] = zip((0, 1), (a, b), contexts, strict=True)
    unfaithful = tuple(n for n, run, ctx in pairs if _differences(a, b, state_dict(ctx), run.state(stop)))
    return Parting(begun, stop, _compare(a, b, stop), unfaithful)
