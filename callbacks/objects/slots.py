"""Between an object callback and its slot in a context."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...core.copies import clone_tree
from ...core.plain import check_plain

if TYPE_CHECKING:
    from .callback_set import CallbackSet


def give(callback: CallbackSet, slot: Any) -> None:
    """Give an object the state in its slot, unless it is the one that the object has."""
    if slot is not callback.known_state:
        load(callback, slot)


def load(callback: CallbackSet, slot: Any) -> None:
    """Give an object a state; ``()``, for one that had none yet, as ``None``."""
    from .callback_set import CallbackSet

    if slot != () or type(callback).load_state_dict is not CallbackSet.load_state_dict:
        callback.load_state_dict(None if slot == () else clone_tree(slot))
    note(callback, slot)


def note(callback: CallbackSet, slot: Any) -> None:
    """Remember which state an object has; ``None`` for one that is in no context."""
    object.__setattr__(callback, "known_state", slot)


def state_of(callback: CallbackSet, when: str) -> Any:
    """A copy of an object's state, which the object can't reach."""
    state = callback.state_dict()
    if state is None:
        return ()
    check_plain(state, f"the state_dict() of {type(callback).__name__} {when}")
    return clone_tree(state)
