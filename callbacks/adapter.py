"""The adapter between object callbacks and the pure loop: for every stage a function of the context."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from ..context import Context
from ..lending import clone_tree
from ..plain import check_plain
from ..stages import STAGES, Callback
from .mirror import Mirror
from .view import ContextView

if TYPE_CHECKING:
    from .callback_set import CallbackSet

_EVALUATING = ("batch_valid_begin", "batch_valid_end", "valid_end")


class Adapter:
    """Runs one `CallbackSet` as pure hooks.

    Per stage: give the object the state in its slot, unless that is the one it produced last; hand it a view of the
    context; call it; put what it wrote into the context, and its state into the slot.
    """

    def __init__(self, callback: CallbackSet) -> None:
        self.callback = callback
        self.id = callback.id
        self._mirror: Mirror | None = None
        self._pristine = self._state("before training")
        self._knows(self._pristine)

    def as_callback(self) -> Callback:
        kind = type(self.callback)
        keeps_state = kind.state_dict is not _base().state_dict
        stages = [s for s in STAGES if s in self.callback.stages or (s == "begin" and keeps_state)]
        hooks: dict[str, Any] = {stage: functools.partial(self._hook, stage) for stage in stages}
        return Callback(
            self.id,
            init=(lambda ctx: self._pristine) if keeps_state else None,
            weight=self.callback.weight,
            kind=f"{kind.__module__}.{kind.__qualname__}",
            resume=self._resume,
            volatile=self.callback.volatile,
            replays=self._replays(keeps_state),
            source=self.callback,
            whole=self.callback.whole,
            vectorises=self.callback.vectorises,
            **hooks,
        )

    def _replays(self, keeps_state: bool) -> bool:
        declared = self.callback.replays
        return declared if declared is not None else keeps_state and not self.callback.volatile

    def _hook(self, stage: str, ctx: Context) -> Context:
        slot = ctx.callbacks[self.id]
        if slot is not self.callback.known_state:
            self._load(slot)
        # Should the hook fail, what the object then knows is no state of any context.
        self._knows(None)
        after = self._call(stage, ctx)
        state = self._state(f"after on_{stage}")
        self._knows(state)
        return after if state == () == slot else after.with_callback_state(self.id, state)

    def _resume(self, ctx: Context) -> Context:
        """Enter a continued run: what ``on_begin`` builds is there when the state comes, what it writes is dropped."""
        if "begin" in self.callback.stages:
            self._knows(None)
            self._call("begin", ctx)
            self._load(ctx.callbacks[self.id])
        return ctx

    def _call(self, stage: str, ctx: Context) -> Context:
        method = getattr(self.callback, f"on_{stage}", None)
        if method is None:
            return ctx
        if self._mirror is None or self._mirror.loop is not ctx.loop:
            self._mirror = Mirror(ctx.loop)
        training = stage not in _EVALUATING
        self._mirror.show(ctx, training)
        view = ContextView(ctx, self._mirror, self.callback, training)
        self.callback.ctx = view
        try:
            method()
            return view.context
        finally:
            self.callback.ctx = None  # type: ignore[assignment]
            self._mirror.release()

    def _load(self, slot: Any) -> None:
        """Give the object a state; ``()``, for one that had none yet, as ``None``."""
        if slot != () or type(self.callback).load_state_dict is not _base().load_state_dict:
            self.callback.load_state_dict(None if slot == () else clone_tree(slot))
        self._knows(slot)

    def _knows(self, slot: Any) -> None:
        object.__setattr__(self.callback, "known_state", slot)

    def _state(self, when: str) -> Any:
        """A copy of the object's state, which it can't reach."""
        state = self.callback.state_dict()
        if state is None:
            return ()
        check_plain(state, f"the state_dict() of {type(self.callback).__name__} {when}")
        return clone_tree(state)


def _base() -> type[CallbackSet]:
    from .callback_set import CallbackSet

    return CallbackSet
