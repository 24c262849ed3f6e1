"""The context as object callbacks see it: names to read, and some to write."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..batch import Batch, as_batch
from ..context import Context
from ..lending import clone_tree, lend_tree, tree_was_written
from ..network import has_tensors
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
    "total_epochs": "epochs",
    "eval_freq": "eval_freq",
    "device": "device",
}
_PLAIN = ("epoch", "step", "step_valid", "global_step", "seed", "terminate")
_WITH_TENSORS = ("last_loss", "last_scores_train", "last_scores_valid", "batch", "y_hat", "y_hats")
_MIRRORED = ("params", "buffers", "grads", "trainable", "optimizer_state")
_MADE = ("network", "optimizer", "loss_fn", "callbacks", "context", "learner", "prediction_encoder")
FIELDS = (*_OF_THE_LOOP, *_PLAIN, *_WITH_TENSORS, *_MIRRORED, *_MADE)
WRITABLE = ("terminate", "batch", "last_loss", "last_scores_train", "last_scores_valid")
_WRITTEN_IN_PLACE = {
    "params": "ctx.network",
    "buffers": "ctx.network",
    "grads": "the .grad of ctx.network's parameters",
    "trainable": "requires_grad_() of ctx.network's parameters",
    "optimizer_state": "ctx.optimizer",
    "network": "it in place, such as by load_state_dict()",
    "optimizer": "its param_groups and state in place",
}


class ContextView:
    """What ``self.ctx`` is inside a hook of a `CallbackSet`: the state of training, to read and partly to write.

    Read: ``epoch, step, step_valid, global_step, seed, total_epochs, eval_freq, device, batch, y_hat, y_hats,
    last_loss, last_scores_train, last_scores_valid, terminate, measures_train, measures_valid, loss_fn, loader_train,
    loader_valid`` (with ``len``), ``task_train, task_valid, learner, prediction_encoder, callbacks`` (the other
    callbacks by id), ``params, buffers, grads, optimizer_state, trainable``, and ``context``, the pure context
    itself. ``network`` and ``optimizer`` are a real ``nn.Module`` and ``torch.optim.Optimizer``, made when first
    asked for. If the loss has parameters, ``loss_fn`` is a module with their values, and the optimizer is over both.
    What is read is a copy (which costs memory only when it is written to), so that no harm comes of changing it.

    Write: ``terminate = True``; ``batch`` (also in place), ``last_loss`` and the last scores; and, in place,
    ``network`` (parameters, buffers, ``requires_grad_``, and ``.grad`` in ``on_after_backward``) and ``optimizer``
    (``param_groups``, ``state``). All of it goes into the next context; contexts from before do not change.

    Mirrors the ``ContextTorch`` of R's mlr3torch.
    """

    __slots__ = ("_batch", "_callback", "_ctx", "_mirror", "_training")

    def __init__(self, ctx: Context, mirror: Mirror, callback: CallbackSet, training: bool) -> None:
        set_slot = object.__setattr__
        set_slot(self, "_ctx", ctx)
        set_slot(self, "_mirror", mirror)
        set_slot(self, "_callback", callback)
        set_slot(self, "_training", training)
        set_slot(self, "_batch", None)

    def __getattr__(self, name: str) -> Any:
        if name in _PLAIN:
            return getattr(self._ctx, name)
        if name in self._callback.environment:
            return self._callback.environment[name]
        if name in _OF_THE_LOOP:
            return getattr(self._ctx.loop, _OF_THE_LOOP[name])
        if name == "batch" and self._ctx.batch != ():
            if self._batch is None:
                object.__setattr__(self, "_batch", _map_parts(lend_tree, self._ctx.batch))
            return self._batch
        if name in _WITH_TENSORS:
            return lend_tree(getattr(self._ctx, name))
        if name in _MIRRORED:
            return lend_tree(getattr(self.context, name))
        if name == "loss_fn":
            return (
                self._mirror.loss(self._ctx, self._training)
                if has_tensors(self._ctx.loop.loss)
                else self._ctx.loop.loss
            )
        if name in ("network", "optimizer"):
            return getattr(self._mirror, name)(self._ctx, self._training)
        if name == "callbacks":
            return {c.id: c.source or c for c in self._ctx.loop.callbacks if c.id != self._callback.id}
        if name in _MADE:
            return None
        raise AttributeError(f"ctx has no field {name!r}{did_you_mean(name, FIELDS)}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in FIELDS:
            raise AttributeError(f"ctx has no field {name!r} to write to{did_you_mean(name, WRITABLE)}")
        if name in _WRITTEN_IN_PLACE:
            raise AttributeError(f"ctx.{name} can't be assigned to; change {_WRITTEN_IN_PLACE[name]}")
        if name not in WRITABLE:
            raise AttributeError(f"ctx.{name} belongs to the loop and can't be written to; {', '.join(WRITABLE)} can")
        if self._callback.ctx is not self:
            raise AttributeError(f"ctx.{name} can be written to only while the hook that was given this ctx runs")
        if name == "batch":
            object.__setattr__(self, "_batch", None)
        object.__setattr__(self, "_ctx", evolve(self._ctx, **{name: _checked(name, value)}))

    @property
    def context(self) -> Context:
        """The pure context, with everything that has been written so far, in place or by field."""
        ctx: Context = self._mirror.changes(self._ctx)
        if self._batch is not None and tree_was_written(_parts(self._batch), _parts(ctx.batch)):
            ctx = evolve(ctx, batch=_map_parts(clone_tree, self._batch))
        return ctx

    def __dir__(self) -> list[str]:
        return sorted(FIELDS)

    def __repr__(self) -> str:
        return f"<ctx at {self._ctx!r}>"


def _parts(batch: Batch) -> tuple[Any, Any, Any]:
    return batch.x, batch.y, batch.index


def _map_parts(function: Callable[[Any], Any], batch: Batch) -> Batch:
    return Batch(*map(function, _parts(batch)))


def _checked(name: str, value: Any) -> Any:
    """A value for a field, as a copy that the callback can't reach."""
    if name == "batch":
        return _map_parts(clone_tree, as_batch(value))
    kinds: dict[str, tuple[Any, str]] = {
        "terminate": (bool, "True or False"),
        "last_scores_train": (dict, "a dict of scores by measure id"),
        "last_scores_valid": (dict, "a dict of scores by measure id"),
    }
    kind, what = kinds.get(name, (object, ""))
    if not isinstance(value, kind):
        raise TypeError(f"ctx.{name} is {what}, not {value!r}")
    return clone_tree(value)
