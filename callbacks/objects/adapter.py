"""The adapter between object callbacks and the pure loop: for every stage a function of the context."""

from __future__ import annotations

import functools
from types import FunctionType
from typing import TYPE_CHECKING, Any

from ...core.callback import Callback
from ...core.context import Context
from ...core.mentions import Mentions, mentions_of_class, mentions_of_function, methods_of
from ...core.stages import STAGES
from . import slots
from .mirror import Mirror
from .view import WRITABLE, ContextView

if TYPE_CHECKING:
    from .callback_set import CallbackSet

_EVALUATING = ("batch_valid_begin", "batch_valid_end", "valid_end")


_PARTS = {"network", "optimizer", "params", "buffers", "grads", "y_hats", "batch", "param_groups"}


def _changes_training(callback: CallbackSet) -> bool:
    """Whether methods, or what they call, write to fields of ``self.ctx``, or to tensors or parameter groups in
    place."""
    cls: type = type(callback)
    own = mentions_of_class(cls)
    for function in (*methods_of(cls).values(), *(callback._settings or {}).values()):
        own |= mentions_of_function(function) if isinstance(function, FunctionType) else Mentions()
    in_place = own.writes_in_place or "load_state_dict" in own.names
    return (
        not own.written.isdisjoint({*WRITABLE, "grad", "data", "requires_grad"})
        or (in_place and not own.names.isdisjoint(_PARTS))
        or (bool(own.changed) and "param_groups" in own.names)
    )


class Adapter:
    """Runs one `CallbackSet` as pure hooks.

    Per stage: give the object the state in its slot, unless that is the one it produced last; hand it a view of the
    context; call it; put what it wrote into the context, and its state into the slot.
    """

    def __init__(self, callback: CallbackSet) -> None:
        self.callback = callback
        self.id = callback.id
        self._mirror: Mirror | None = None
        self._pristine = slots.state_of(callback, "before training")
        slots.note(callback, self._pristine)

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
            settings=self.callback._settings,
            source=self.callback,
            whole=self.callback.whole,
            vectorises=self.callback.vectorises,
            last=self.callback.last,
            **hooks,
        )

    def _replays(self, keeps_state: bool) -> bool:
        declared = self.callback.replays
        if declared is not None:
            return declared
        return not self.callback.volatile and (keeps_state or _changes_training(self.callback))

    def _hook(self, stage: str, ctx: Context) -> Context:
        slot = ctx.callbacks[self.id]
        slots.give(self.callback, slot)
        # Should the hook fail, what the object then has is no state of any context.
        slots.note(self.callback, None)
        after = self._call(stage, ctx)
        state = slots.state_of(self.callback, f"after on_{stage}")
        slots.note(self.callback, state)
        return after if state == () == slot else after.with_callback_state(self.id, state)

    def _resume(self, ctx: Context) -> Context:
        """Enter a continued run: what ``on_begin`` builds is there when the state comes, what it writes is dropped."""
        if "begin" in self.callback.stages:
            slots.note(self.callback, None)
            self._call("begin", ctx)
            slots.load(self.callback, ctx.callbacks[self.id])
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


def _base() -> type[CallbackSet]:
    from .callback_set import CallbackSet

    return CallbackSet
