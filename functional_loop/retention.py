"""Which checkpoints to keep: the newest ones, and those of the best validation scores."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import attrs

from .loop import Loop
from .record import did_you_mean

_SCORED = ("valid_end", "epoch_end", "epoch_begin")
"""Stages after which the last validation scores are those of the parameters."""


def _as_pair(keep_best: str | tuple[str, int] | None) -> tuple[str, int] | None:
    return (keep_best, 1) if isinstance(keep_best, str) else keep_best


@attrs.frozen
class Retention:
    """What a store keeps of the checkpoints of a run.

    Args:
        keep_last: how many of the newest steps; ``None`` for all, or with ``keep_best`` for the newest alone.
        keep_best: id of a validation measure, or the id and how many steps of the best scores to keep beside those.

    Raises:
        ValueError: a number is less than 1, or ``keep_best`` is something else.
    """

    keep_last: int | None = None
    keep_best: tuple[str, int] | None = attrs.field(default=None, converter=_as_pair)

    def __attrs_post_init__(self) -> None:
        if self.keep_last is not None and not _is_count(self.keep_last):
            raise ValueError(f"keep_last must be an integer of at least 1, or None, not {self.keep_last!r}")
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
        if self.keep_best is None:
            return set(steps if self.keep_last is None else steps[-self.keep_last :])
        name, count = self.keep_best
        return {*steps[-(self.keep_last or 1) :], *best_steps(checkpoints, name)[:count]}


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
