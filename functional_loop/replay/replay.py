"""Replay: training again what was trained before, to see that it gives the same bits."""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import attrs

from ..checkpoint import file as checkpoint_file
from ..checkpoint.belonging import malformed
from ..checkpoint.migrations import migrate
from ..checkpoint.state import StateDict, load_state_dict, member_states, start_of, state_dict
from ..core.callback import Callback
from ..core.context import Context
from ..core.errors import CheckpointError, StateDictError, add_note, loading
from ..core.place import Place
from ..core.plain import decode
from ..core.record import evolve
from ..core.stages import BOUNDARIES
from ..engine.loop import Loop
from ..engine.train import iterate
from .differences import Difference, differences

_NAME = re.compile(r"step-([0-9]{8,})(-end)?\.safetensors")


def quiet(loop: Loop) -> Loop:
    """``loop`` without the hooks of those callbacks that a replay leaves out; their slots stay as they are.

    Those are the callbacks that say so (``replays``): objects that keep no state and do not change training, which are
    there for the files and the screen that they write to, and volatile ones.

    >>> from functional_loop.callbacks import progress, history
    >>> from functional_loop.examples.digits import loop
    >>> quiet(evolve(loop(), callbacks=[progress(), history()])).callbacks
    (Callback('progress'), Callback('history', epoch_end))
    """
    return evolve(loop, callbacks=[c if c.replays else _without_hooks(c) for c in loop.callbacks])


def _without_hooks(callback: Callback) -> Callback:
    return callback.remade(resume=None, **dict.fromkeys(callback.hooks))


class NoSuchPlaceError(ValueError):
    """Training does not come to the place to which it was to be replayed."""


def replay(ctx: Context, until: Context | StateDict | Place) -> Context:
    """Train on from ``ctx`` to the place of ``until``, without a trace in files or on the screen.

    Args:
        ctx: any boundary context.
        until: a later context of the run, its state dict, or its place.

    Raises:
        NoSuchPlaceError: training from ``ctx`` does not come to that place; a ValueError.

    >>> import functional_loop as fl
    >>> from functional_loop.examples.digits import loop
    >>> early = fl.train(fl.init(loop(), seed=1), steps=3)
    >>> late = fl.train(early, steps=4)
    >>> fl.digest(fl.replay(early, until=late)) == fl.digest(late)
    True
    """
    goal = until if isinstance(until, Place) else Place.of(until)
    reached = _train_to(ctx, goal)
    if (at := Place.of(reached)) != goal:
        raise NoSuchPlaceError(f"replay: training from {Place.of(ctx)} comes to {at}, and not to {goal}")
    return reached


def _train_to(ctx: Context, goal: Place) -> Context:
    """The first boundary at or behind ``goal``, or the end of the run."""
    if Place.of(ctx) >= goal:
        return ctx
    reached = ctx
    with closing(walk_quietly(ctx)) as boundaries:
        for reached in boundaries:
            if Place.of(reached) >= goal:
                break
    return evolve(reached, loop=ctx.loop)


def walk_quietly(ctx: Context) -> Generator[Context]:
    """`iterate` without a trace in files or on the screen."""
    return iterate(evolve(ctx, loop=quiet(ctx.loop)))


@attrs.frozen
class Segment:
    """What came of the replay from one checkpoint to the next; true where it gave the same bits.

    Attributes:
        start, stop: the places of the two checkpoints.
        differences: the leaves in which the replay (first) and the later checkpoint (second) differ.
    """

    start: Place
    stop: Place
    differences: tuple[Difference, ...]

    def __bool__(self) -> bool:
        return not self.differences


def verify(loop: Loop, path: str | os.PathLike[str], from_start: bool = False) -> Iterator[Segment]:
    """Train again from every checkpoint in the folder ``path`` to the next, and compare, leaf by leaf.

    Nothing is written. Segments are independent, as each starts from what was saved: a run in which one bit was wrong
    once differs in one segment. An ensemble is trained again as it was trained, with all its members.

    Args:
        loop: the loop that was trained; each segment has the ``epochs`` that the later checkpoint was made with.
        path: the folder of checkpoints.
        from_start: whether to train the first segment too, from the start of the run to the first checkpoint. Of an
            ensemble that is a start from its seeds: where members began with other hyperparameters, it differs.

    Raises:
        FileNotFoundError: there are fewer checkpoints than a segment needs.
        CheckpointError: a checkpoint is damaged.
        StateDictError: the checkpoints belong to another loop; the differences are listed.

    >>> import tempfile
    >>> import functional_loop as fl
    >>> from functional_loop.callbacks import checkpoint
    >>> from functional_loop.examples.digits import loop
    >>> path = tempfile.mkdtemp()
    >>> saving = fl.evolve(loop(epochs=2), callbacks=[checkpoint(path, every_steps=20)])
    >>> ctx = fl.train(fl.init(saving, seed=1))
    >>> [bool(segment) for segment in fl.verify(saving, path)]
    [True, True, True, True]
    """
    files = saved_files(path)
    if len(files) < (1 if from_start else 2):
        need = "a checkpoint" if from_start else "two checkpoints, or the start of the run"
        raise FileNotFoundError(f"a replay needs {need}, and {path} holds {len(files) or 'none'}")
    state: StateDict | None = None
    last = None
    for file in files:
        found, metadata = read_state(file)
        loop = evolve(loop, epochs=metadata.get("epochs", loop.epochs))
        if state is None:
            with loading(file):
                load(loop, found)  # refuses another run's
        if state is not None or from_start:
            with loading(last or file):
                ctx = load(loop, state) if state is not None else start_of(loop, found)
            yield _replayed(ctx, found)
        # From a run's end nothing goes on; where it had more epochs later, they went on from the epoch before.
        if Place.of(found).stage != "end":
            state, last = found, file


def _replayed(ctx: Context, stop: StateDict) -> Segment:
    again = _train_to(ctx, Place.of(stop))
    return Segment(Place.of(ctx), Place.of(stop), tuple(replayed_differences([ctx.loop], state_dict(again), stop)))


def replayed_differences(loops: Sequence[Loop], a: StateDict, b: StateDict) -> list[Difference]:
    """`differences` but for what a replay can't tell: states of callbacks that it leaves out, and the word of a clock.

    A volatile callback may have ended the run, so that ``terminate`` is not compared where there is one.
    """
    callbacks = [callback for loop in loops for callback in loop.callbacks]
    left_out = {f"callbacks/{callback.id}" for callback in callbacks if not callback.replays}
    if any(callback.volatile for callback in callbacks):
        left_out.add("terminate")
    return [d for d in differences(a, b) if _of_one_run(d.path) not in left_out]


def _of_one_run(path: str) -> str:
    """The first two parts of a path, in the state of the member if it is that of an ensemble."""
    parts = path.split("/")
    return "/".join(parts[2:4] if parts[0] == "members" else parts[:2])


def read_state(file: Path) -> tuple[StateDict, dict[str, Any]]:
    """The state in a checkpoint, as this version of functional_loop saves it, and the metadata."""
    state, metadata = checkpoint_file.read(file)
    with _nonsense_refused(file):
        if "members" not in state:
            return _checked(migrate(state)), metadata
        members = [_checked(migrate(member)) for member in member_states(state)]
        how = state["ensemble"]
        if not members or how.keys() != {"mode", "batch_hooks"} or not all(isinstance(how[key], str) for key in how):
            raise ValueError("it has no members, or does not say how they are trained")
    common = {key: members[0][key] for key in state if key not in ("ensemble", "members")}
    own = [{key: value for key, value in member.items() if key not in common} for member in members]
    return {**common, "ensemble": state["ensemble"], "members": own}, metadata


def _checked(state: StateDict) -> StateDict:
    if found := malformed(state):
        raise ValueError("; ".join(found[:3]))
    if state["stage"] not in ("", *BOUNDARIES):
        raise ValueError(f"stage {state['stage']!r:.100}")
    decode(state)  # of a sparse tensor the parts may not be those of one
    return state


@contextmanager
def _nonsense_refused(file: Path) -> Iterator[None]:
    """What no run has saved is a `CheckpointError`, whatever fails over it."""
    try:
        yield
    except StateDictError as error:
        add_note(error, f"while loading {file}")
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{file} is no checkpoint of a run: {type(error).__name__}: {error}") from error


def load(loop: Loop, state: StateDict) -> Context:
    """The context that ``state`` was taken from."""
    return load_state_dict(start_of(loop, state), state)


def saved_files(path: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints in the folder ``path`` in the order in which they were reached, by their names."""
    folder = Path(path)
    named = [(_NAME.fullmatch(file.name), file) for file in folder.iterdir()] if folder.is_dir() else []
    return [file for _, _, file in sorted((int(name[1]), name[2] or "", file) for name, file in named if name)]
