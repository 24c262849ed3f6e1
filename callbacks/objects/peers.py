"""The other callbacks, as an object callback sees them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...core.context import Context
from ...core.copies import tree_was_written
from ...core.record import did_you_mean
from . import slots


class Peers(Mapping[str, Any]):
    """The callbacks of a loop but for one, by id: objects, with the state that they have in a context, and pure ones.

    An object is given its state when it is asked for. What is then written to its attributes goes into its slot, if its
    ``state_dict()`` has it. The state of a pure callback is in ``context.callbacks``.

    Raises:
        KeyError: the loop has no other callback of that id.
        ValueError: of an ensemble, the callback has a state for every member.
    """

    def __init__(self, ctx: Context, own: str) -> None:
        self._ctx = ctx
        self._callbacks = {callback.id: callback for callback in ctx.loop.callbacks if callback.id != own}
        self._given: dict[str, Any] = {}

    def __getitem__(self, id: str) -> Any:
        if id not in self._callbacks:
            raise KeyError(f"no other callback {id!r} in this loop{did_you_mean(id, self._callbacks)}")
        callback = self._callbacks[id]
        source = callback.source
        if not hasattr(source, "known_state"):
            return source or callback
        if id not in self._given:
            slot = self._ctx.callbacks[id]
            if self._ctx.ensemble is not None and not callback.whole and slot != ():
                raise ValueError(
                    f"callback {id!r} has a state for every member of this ensemble: see "
                    "unstack(self.ctx.context)[i].callbacks"
                )
            slots.give(source, slot)
            # Should the hook fail, what the object then has is no state of any context.
            slots.note(source, None)
            self._given[id] = slot
        return source

    def __setitem__(self, id: str, value: Any) -> None:
        raise TypeError(f"ctx.callbacks[{id!r}] can't be assigned to: callbacks are given to the Loop")

    def __iter__(self) -> Iterator[str]:
        return iter(self._callbacks)

    def __len__(self) -> int:
        return len(self._callbacks)

    def __repr__(self) -> str:
        return f"<the other callbacks: {', '.join(map(repr, self._callbacks)) or 'none'}>"

    def changes(self) -> dict[str, Any]:
        """The slots of the objects that were written to."""
        found = {}
        for id, slot in self._given.items():
            source = self._callbacks[id].source
            state = slots.state_of(source, "after another callback had asked for it")
            if tree_was_written(state, slot):
                found[id] = slot = state
            slots.note(source, slot)
        return found
