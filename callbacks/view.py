"""The context as object callbacks see it: names to read, and some to write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..context import Context
from ..record import did_you_mean, evolve

if TYPE_CHECKING:
    from .callback_set import CallbackSet
    from .mirror import Mirror

_OF_THE_LOOP = {
    "task_train": "train",
    "task_valid": "valid",
    "loader_train": "train",
    "loader_valid": "valid",
    "measures_train": "measures_train",
    "measures_valid": "measures_valid",
    "loss_fn": "loss",
    "total_epochs": "epochs",
    "eval_freq": "eval_freq",
    "device": "device",
}
_OF_THE_CONTEXT = (
    *("epoch", "step", "step_valid", "global_step", "seed", "last_loss", "last_scores_train", "last_scores_valid"),
    *("y_hat", "y_hats", "batch", "grads", "params", "buffers", "optimizer_state", "trainable", "terminate"),
)
_WRITABLE = (
    *("terminate", "params", "buffers", "optimizer_state", "trainable", "grads", "batch"),
    *("last_loss", "last_scores_train", "last_scores_valid"),
)
_MADE = ("network", "optimizer", "callbacks", "context", "learner", "prediction_encoder")
FIELDS = (*_OF_THE_LOOP, *_OF_THE_CONTEXT, *_MADE)


class ContextView:
    """What ``self.ctx`` is inside a hook of a `CallbackSet`: the state of training, to read and partly to write.

    Read: ``epoch, step, step_valid, global_step, seed, total_epochs, eval_freq, device, batch, y_hat, y_hats,
    last_loss, last_scores_train, last_scores_valid, terminate, measures_train, measures_valid, loss_fn, loader_train,
    loader_valid`` (with ``len``), ``task_train, task_valid, learner, prediction_encoder, callbacks`` (the other
    callbacks by id), what the pure context has: ``params, buffers, grads, optimizer_state, trainable``, and
    ``context``, the pure context itself. ``network`` and ``optimizer`` are a real ``nn.Module`` and
    ``torch.optim.Optimizer``, made when first asked for.

    Write: ``terminate = True``; in place to ``network`` (parameters, buffers, ``requires_grad_``, and ``.grad`` in
    ``on_after_backward``) and ``optimizer`` (``param_groups``, ``state``); or whole fields of the pure context. All of
    it goes into the next context; contexts from before do not change.

    Mirrors the ``ContextTorch`` of R's mlr3torch.
    """

    __slots__ = ("_callback", "_ctx", "_mirror", "_training", "_written")

    def __init__(self, ctx: Context, mirror: Mirror, callback: CallbackSet, training: bool) -> None:
        set_slot = object.__setattr__
        set_slot(self, "_ctx", ctx)
        set_slot(self, "_mirror", mirror)
        set_slot(self, "_callback", callback)
        set_slot(self, "_training", training)
        set_slot(self, "_written", {})

    def __getattr__(self, name: str) -> Any:
        if name in self._written:
            return self._written[name]
        if name in self._callback.environment:
            return self._callback.environment[name]
        if name in _OF_THE_CONTEXT:
            return getattr(self._ctx, name)
        if name in _OF_THE_LOOP:
            return getattr(self._ctx.loop, _OF_THE_LOOP[name])
        if name in ("network", "optimizer"):
            return getattr(self._mirror, name)(self._ctx, self._training)
        if name == "callbacks":
            return {c.id: c.source or c for c in self._ctx.loop.callbacks if c.id != self._callback.id}
        if name == "context":
            return self.collect()
        if name in _MADE:
            return None
        raise AttributeError(f"ctx has no field {name!r}{did_you_mean(name, FIELDS)}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in FIELDS:
            raise AttributeError(f"ctx has no field {name!r} to write to{did_you_mean(name, _WRITABLE)}")
        if name in ("network", "optimizer"):
            raise AttributeError(f"ctx.{name} can't be replaced; change it in place, such as by load_state_dict()")
        if name not in _WRITABLE:
            raise AttributeError(f"ctx.{name} belongs to the loop and can't be written to; {', '.join(_WRITABLE)} can")
        if name == "terminate":
            value = bool(value)
        self._written[name] = value

    def __dir__(self) -> list[str]:
        return sorted(FIELDS)

    def __repr__(self) -> str:
        return f"<ctx at {self._ctx!r}>"

    def collect(self) -> Context:
        """The context with everything that was written, in place or by field."""
        ctx = self._mirror.changes(self._ctx)
        return evolve(ctx, **self._written) if self._written else ctx
