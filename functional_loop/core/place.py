"""Places in a run, in the order in which training passes them."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import attrs
from torch import Tensor

from ..ensembles.ensemble import member_seeds
from .context import Context, check_boundary
from .record import did_you_mean
from .stages import BOUNDARIES, STAGES

if TYPE_CHECKING:
    from ..engine.loop import Loop

_ORDER = ("", *STAGES)
_STAGES = frozenset({"", *BOUNDARIES})


@attrs.frozen(order=True)
class Place:
    """A boundary of a run; of two places, the smaller is passed first.

    >>> Place.of({"global_step": 3, "epoch": 1, "stage": "batch_end", "step_valid": 0})
    step 3, after batch_end of epoch 1
    """

    global_step: int
    epoch: int
    _rank: int
    step_valid: int

    @classmethod
    def of(cls, at: Context | Mapping[str, Any]) -> Place:
        """The place of a context, or of its state dict; of an ensemble, that of the members that still train."""
        if isinstance(at, Mapping):
            members: list[Mapping[str, Any]] = at.get("members", [at])
            going = [member for member in members if member["stage"] != "end"]
            here = going[0] if going else max(members, key=lambda member: member["global_step"])
            return cls(here["global_step"], here["epoch"], _ORDER.index(here["stage"]), here["step_valid"])
        return cls(at.global_step, at.epoch, _ORDER.index(at.stage), at.step_valid)

    @property
    def stage(self) -> str:
        """The last stage completed; ``""`` before the run."""
        return _ORDER[self._rank]

    def __repr__(self) -> str:
        if self.stage in ("", "begin", "end"):
            return f"step {self.global_step}, " + {"": "before the run"}.get(self.stage, f"after {self.stage}")
        batch = f" {self.step_valid}" if self.step_valid else ""
        return f"step {self.global_step}, after {self.stage}{batch} of epoch {self.epoch}"


_COUNTS = ("epoch", "step", "step_valid", "global_step")
_FIELDS = (*_COUNTS, "stage", "seed", "terminate")
_fields_of = attrgetter(*_FIELDS)
_BEFORE = ("", "begin")
_OF_BATCHES = ("epoch_begin", "batch_end")


def check_place(ctx: Context, function: str) -> None:
    """Refuse what is not a context from between two stages, and one whose place is none in its loop.

    Raises:
        TypeError, ValueError: as said.

    >>> from functional_loop.examples.digits import loop
    >>> import functional_loop as fl
    >>> fl.train(fl.evolve(fl.init(loop()), epoch=1, step=99, global_step=99, stage="batch_end"))
    Traceback (most recent call last):
        ...
    ValueError: train can't go on from epoch 1, step 99, global_step 99, stage 'batch_end': step: 99, and an epoch has
    23 batches
    """
    check_boundary(ctx, function)
    if ctx.ensemble is None:
        _refuse_misplaced(_fields_of(ctx), ctx.loop, function)
        return
    # A member that has finished has a place of its own.
    for place, seed in zip(ctx.ensemble.ends, member_seeds(ctx), strict=True):
        at = place or ctx
        counts = at.epoch, at.step, at.step_valid, at.global_step
        _refuse_misplaced((*counts, at.stage, seed, at.terminate), ctx.loop, function)


def _refuse_misplaced(at: tuple[Any, ...], loop: Loop, function: str) -> None:
    if wrong := _why_none(loop, *at):
        shown = zip(_FIELDS, at, strict=True)
        where = ", ".join(f"{name} {n!r:.100}" for name, n in shown if name in (*_COUNTS, "stage") and n != 0)
        raise ValueError(f"{function} can't go on from {where}: {wrong}")


def misplaced(at: Mapping[str, Any], loop: Loop) -> list[str]:
    """Why the place of a state dict is none from which ``loop`` can go on."""
    wrong = _why_none(loop, *(at[name] for name in _FIELDS))
    return [wrong] if wrong else []


def _why_none(
    loop: Loop, epoch: Any, step: Any, step_valid: Any, global_step: Any, stage: Any, seed: Any, terminate: Any
) -> str:
    """What is wrong with a place, by the name of the field; ``""`` if nothing is."""
    # `train_step` asks at every step, and messages take time.
    if not (type(epoch) is type(step) is type(step_valid) is type(global_step) is type(seed) is int):
        given = {"epoch": epoch, "step": step, "step_valid": step_valid, "global_step": global_step, "seed": seed}
        return "; ".join(f"{name}: {n!r:.100}, must be of type int" for name, n in given.items() if type(n) is not int)
    if type(terminate) is not bool:
        return f"terminate: {terminate!r:.100}, must be of type bool"
    if type(stage) is not str or stage not in _STAGES:
        return f"stage: {stage!r:.100} is not a stage to continue after{did_you_mean(str(stage), BOUNDARIES)}"
    if epoch < 0 or step < 0 or step_valid < 0 or global_step < 0:
        given = {"epoch": epoch, "step": step, "step_valid": step_valid, "global_step": global_step}
        return "; ".join(f"{name}: {n}, must not be negative" for name, n in given.items() if n < 0)
    if stage in _OF_BATCHES:
        length = loop.train.length
        if length is not None and step > length:
            return f"step: {step}, and an epoch has {length} batches"
        if stage == "epoch_begin" and step:
            return f"step: {step}, and no batch is done after 'epoch_begin'"
    elif stage in _BEFORE:
        if epoch or step:
            return f"{'step' if step else 'epoch'}: {step or epoch}, and {stage!r} is before the first epoch"
    elif not step and stage != "end":
        return f"step: 0, and after {stage!r} it is 1 or more"
    if not epoch and stage not in (*_BEFORE, "end"):
        return f"epoch: 0, and after {stage!r} it is 1 or more"
    # Every epoch has a batch. How many those before had is not known: a run may have gone on with other data.
    if global_step < step + max(epoch - 1, 0):
        return f"global_step: {global_step}, and step {step} of epoch {epoch} comes after more batches"
    if epoch < 2 and global_step != step:
        return f"global_step: {global_step}, and step {step} of epoch {epoch} comes after fewer batches"
    if (step_valid > 0) is not (stage == "batch_valid_end"):
        return f"step_valid: {step_valid}, and it is 1 or more after 'batch_valid_end', else 0"
    if step_valid and loop.valid is not None and loop.valid.length is not None and step_valid > loop.valid.length:
        return f"step_valid: {step_valid}, and a validation has {loop.valid.length} batches"
    return ""


def check_not_moved(before: Context, after: Context, stage: str, of_all: bool = False) -> None:
    """Refuse what a hook of ``stage`` has made of a context if it is at another place of the run.

    A hook of ``batch_end`` may go back to an earlier place, with all that counts batches.

    Args:
        of_all: it was run once for all members of an ensemble, of which ``terminate`` may be a tensor.

    Raises:
        ValueError: it is.
        TypeError: ``terminate`` is no bool.
    """
    # Under vmap seeds are tensors: not to be compared by their values.
    old, new = _place_of(before), _place_of(after)
    if old != new and not (stage == "batch_end" and _is_earlier(before, after)):
        changed = [name for name, a, b in zip(_FIELDS, old, new, strict=False) if a is not b and a != b]
        moved = "; ".join(
            f"{name}: {getattr(after, name)!r:.100}, and it is {getattr(before, name)!r} here" for name in changed
        )
        raise ValueError(
            f"a hook can't move the run: {moved}. The loop counts by itself: evolve(ctx, terminate=True) ends a run, "
            "and a hook of 'batch_end' may go back to an earlier context, as rollback does"
        )
    if type(after.terminate) is not bool and not (of_all and isinstance(after.terminate, Tensor)):
        raise TypeError(f"terminate: {after.terminate!r:.100}, must be of type bool")


_place_of = attrgetter(*_FIELDS[:-1])


def _is_earlier(before: Context, after: Context) -> bool:
    epoch, step, step_valid, global_step, _, *others = _fields_of(after)
    if type(after.seed) is not int or after.seed != before.seed:
        return False
    if _why_none(before.loop, epoch, step, step_valid, global_step, "batch_end", *others):
        return False
    fewer: int = before.global_step - global_step
    return bool(fewer > 0 and (epoch < before.epoch or (epoch == before.epoch and before.step - step == fewer)))
