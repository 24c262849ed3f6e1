"""Which checkpoints to keep: the newest ones, those of the best validation scores, and one every so many steps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import attrs

from ..core.record import did_you_mean
from ..engine.loop import Loop

_SCORED = ("valid_end", "epoch_end", "epoch_begin")
"""Stages after which the last validation scores are those of the parameters."""


def _as_pair(keep_best: str | tuple[str, int] | None) -> tuple[str, int] | None:
    return (keep_best, 1) if isinstance(keep_best, str) else keep_best


@attrs.frozen
class Retention:
    """What a store keeps of the checkpoints of a run.

    Args:
        keep_last: how many of the newest steps; ``None`` for all, or with one of the other two for the newest alone.
        keep_best: id of a validation measure, or the id and how many steps of the best scores to keep beside those.
        every: number of steps, at each multiple of which the first checkpoint that is there is kept for good.

    Raises:
        ValueError: a number is less than 1, or ``keep_best`` is something else.
    """

    keep_last: int | None = None
    keep_best: tuple[str, int] | None = attrs.field(default=None, converter=_as_pair)
    every: int | None = None

    def __attrs_post_init__(self) -> None:
        for name, number in (("keep_last", self.keep_last), ("every", self.every)):
            if number is not None and not _is_count(number):
                raise ValueError(f"{name} must be an integer of at least 1, or None, not {number!r}")
        if self.keep_best is not None and not _is_pair(self.keep_best):
            raise ValueError(
                "keep_best must be the id of a validation measure, a pair such as ('accuracy', 3) for the best three, "
                f"or None, not {self.keep_best!r}"
            )

    def check(self, loop: Loop) -> None:
        """Refuse a loop whose scores do not say which checkpoint is best.

        Raises:
            ValueError: there is no validation data, no such measure, or neither high nor low is better.
        """
        if self.keep_best is None:
            return
        name, measures = self.keep_best[0], {m.id: m for m in loop.measures_valid}
        if loop.valid is None:
            raise ValueError(f"keep_best={name!r} needs validation data: give the Loop valid=batches(...)")
        if name not in measures:
            raise ValueError(f"keep_best: there is no validation measure {name!r}{did_you_mean(name, measures)}")
        if measures[name].minimize is None:
            raise ValueError(
                f"keep_best: nothing says whether a low or a high {name!r} is better: "
                f"measure({name!r}, ..., minimize=True) or minimize=False"
            )

    def kept(self, checkpoints: Iterable[dict[str, Any]]) -> set[int]:
        """The values of ``global_step`` to keep, given the metadata of all checkpoints of a run."""
        checkpoints = list(checkpoints)
        steps = sorted({metadata["global_step"] for metadata in checkpoints})
        if self == Retention():
            return set(steps)
        name, count = self.keep_best or ("", 0)
        best = best_steps(checkpoints, name)[:count]
        return {*steps[-(self.keep_last or 1) :], *best, *milestones(steps, self.every)}


def milestones(steps: list[int], every: int | None) -> list[int]:
    """The first of the ascending ``steps`` at or after each multiple of ``every``, and before the next one.

    >>> milestones([23, 46, 69, 92, 115, 138, 161], every=50)
    [69, 115, 161]
    """
    firsts = {step // every: step for step in reversed(steps)} if every else {}
    return sorted(step for multiple, step in firsts.items() if multiple > 0)


def best_steps(checkpoints: Iterable[dict[str, Any]], measure: str) -> list[int]:
    """The steps that have a score of ``measure``, the best first; of equal scores the earlier one.

    A score counts where it is that of the parameters saved with it: at the end of an epoch that validated. NaN is none.

    >>> def metadata(step, loss):
    ...     scores = {"last_scores_valid": {"loss": loss}, "minimize": {"loss": True}}
    ...     return {"global_step": step, "stage": "epoch_end", **scores}
    >>> best_steps([metadata(3, 0.5), metadata(6, 0.2), metadata(9, 0.5)], "loss")
    [6, 3, 9]
    """
    ranked = []
    for metadata in checkpoints:
        score = metadata.get("last_scores_valid", {}).get(measure)
        minimize = metadata.get("minimize", {}).get(measure)
        if metadata["stage"] in _SCORED and None not in (score, minimize) and not math.isnan(score):
            ranked.append((score if minimize else -score, metadata["global_step"]))
    return [step for _, step in sorted(ranked)]


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str) and _is_count(value[1])
