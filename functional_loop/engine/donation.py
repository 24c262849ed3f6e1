"""Contexts that are used up: their tensors are let go of, and a later look at them is an error."""

from __future__ import annotations

from typing import Any, NoReturn

from ..core.context import Context
from ..core.record import evolve

_TENSORS = ("params", "buffers", "optimizer_state", "callbacks", "measures", "last_loss", "accumulated")


class DonatedError(RuntimeError):
    """A context was used again after it had been donated."""


class _Donated:
    """What stands in a donated context in the place of its tensors."""

    __slots__ = ("_place",)

    def __init__(self, place: str) -> None:
        object.__setattr__(self, "_place", place)

    def _refuse(self, *_: Any) -> NoReturn:
        raise DonatedError(
            f"this context ({object.__getattribute__(self, '_place')}) was donated to train_step, which has let go of "
            "its tensors: go on with the context that train_step returned, or leave out donate=True to keep both"
        )

    __getattr__ = __getitem__ = __iter__ = __len__ = __contains__ = __eq__ = __ne__ = __bool__ = _refuse
    __hash__ = None  # type: ignore[assignment]


def take(ctx: Context) -> Context:
    """A context with the tensors of ``ctx``, which has none after it and refuses to be used."""
    taken = evolve(ctx)
    stand_in = _Donated(f"epoch {ctx.epoch}, step {ctx.step}")
    for name in _TENSORS:
        object.__setattr__(ctx, name, stand_in)
    return taken


def give_back(ctx: Context, taken: Context) -> None:
    """Undo `take`, with the tensors of ``taken``."""
    for name in _TENSORS:
        object.__setattr__(ctx, name, getattr(taken, name))
