"""Places in a run, in the order in which training passes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from .context import Context
from .stages import STAGES

_ORDER = ("", *STAGES)


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
