"""The context as object callbacks see it: names to read, and some to write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...core.batch import Batch, as_batch
from ...core.context import Context, first_output
from ...core.copies import clone_tree, tree_was_written
from ...core.record import did_you_mean, evolve
from ...engine.network import has_tensors
from .peers import Peers

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
_COPIED = ("last_loss", "last_scores_train", "last_scores_valid", "batch", "y_hats")
_MIRRORED = ("params", "buffers", "grads")
_MADE = (
    *("y_hat", "trainable", "optimizer_state", "network", "optimizer", "loss_fn"),
    *("callbacks", "context", "learner", "prediction_encoder"),
)
FIELDS = (*_OF_THE_LOOP, *_PLAIN, *_COPIED, *_MIRRORED, *_MADE)
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
    What is read is a copy, made when it is asked for: contexts from before do not change, whatever is done to it.

    Write: ``terminate = True``; ``batch``, ``last_loss`` and the last scores, by assignment or in place; and, in place,
    ``y_hats``, ``params``, ``buffers``, ``grads`` (in ``on_after_backward``), ``network`` (parameters, buffers,
    ``requires_grad_``, and ``.grad`` in ``on_after_backward``), ``optimizer`` (``param_groups``, ``state``) and the
    attributes of other callbacks that keep a state. All of it goes into the next context. A copy that is to be changed
    without effect is a ``clone()``. The tree ``optimizer_state`` is for reading.

    Mirrors the ``ContextTorch`` of R's mlr3torch.
    """

    __slots__ = ("_callback", "_copies", "_ctx", "_mirror", "_peers", "_states", "_training")

    def __init__(self, ctx: Context, mirror: Mirror, callback: CallbackSet, training: bool) -> None:
        set_slot = object.__setattr__
        set_slot(self, "_ctx", ctx)
        set_slot(self, "_mirror", mirror)
        set_slot(self, "_callback", callback)
        set_slot(self, "_training", training)
        set_slot(self, "_copies", {})
        set_slot(self, "_states", [])
        set_slot(self, "_peers", None)

    def __getattr__(self, name: str) -> Any:
        if name in _PLAIN:
            return getattr(self._ctx, name)
        if name in self._callback.environment:
            return self._callback.environment[name]
        if name in _OF_THE_LOOP:
            return getattr(self._ctx.loop, _OF_THE_LOOP[name])
        if name in _COPIED:
            if name not in self._copies:
                self._copies[name] = _copy(getattr(self._ctx, name))
            return self._copies[name]
        if name == "y_hat":
            return first_output(self.y_hats)
        if name in FIELDS and self._callback.ctx is not self:
            raise AttributeError(f"ctx.{name} can be read only while the hook that was given this ctx runs")
        if name in _MIRRORED:
            value = getattr(self._ctx, name)
            return value if value == () else self._mirror.tensors(name, self._ctx)
        if name == "loss_fn":
            loss = self._ctx.loop.loss
            return self._mirror.loss(self._ctx, self._training) if has_tensors(loss) else loss
        if name == "trainable":
            return self._mirror.trainable(self._ctx)
        if name == "optimizer_state":
            return self._optimizer_state()
        if name in ("network", "optimizer"):
            return getattr(self._mirror, name)(self._ctx, self._training)
        if name == "callbacks":
            if self._peers is None:
                object.__setattr__(self, "_peers", Peers(self._ctx, self._callback.id))
            return self._peers
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
        self._copies.pop(name, None)
        object.__setattr__(self, "_ctx", evolve(self._ctx, **{name: _checked(name, value)}))

    @property
    def context(self) -> Context:
        """The pure context, with everything that has been written so far, in place or by field.

        Raises:
            ValueError: something was written that has no place in a context.
        """
        for state, copy in self._states:
            if tree_was_written(copy, state):
                raise ValueError(
                    "ctx.optimizer_state was changed in place, which has no effect: change the param_groups or the "
                    "state of ctx.optimizer (or a clone of what ctx.optimizer_state gave)"
                )
        ctx: Context = self._mirror.changes(self._ctx)
        found = {
            name: _checked(name, copy)
            for name, copy in self._copies.items()
            if tree_was_written(_parts(copy), _parts(getattr(ctx, name)))
        }
        if self._peers is not None and (slots := self._peers.changes()):
            found["callbacks"] = {**ctx.callbacks, **slots}
        return evolve(ctx, **found) if found else ctx

    def _optimizer_state(self) -> Any:
        state = self.context.optimizer_state
        if not self._states or self._states[-1][0] is not state:
            self._states.append((state, clone_tree(state)))
        return self._states[-1][1]

    def __dir__(self) -> list[str]:
        return sorted(FIELDS)

    def __repr__(self) -> str:
        return f"<ctx at {self._ctx!r}>"


def _parts(value: Any) -> Any:
    return (value.x, value.y, value.index) if isinstance(value, Batch) else value


def _copy(value: Any) -> Any:
    return Batch(*map(clone_tree, _parts(value))) if isinstance(value, Batch) else clone_tree(value)


def _checked(name: str, value: Any) -> Any:
    """A value for a field, as a copy that the callback can't reach."""
    if name == "batch":
        return _copy(as_batch(value))
    kinds: dict[str, tuple[Any, str]] = {
        "terminate": (bool, "True or False"),
        "last_scores_train": (dict, "a dict of scores by measure id"),
        "last_scores_valid": (dict, "a dict of scores by measure id"),
    }
    kind, what = kinds.get(name, (object, ""))
    if not isinstance(value, kind):
        raise TypeError(f"ctx.{name} is {what}, not {value!r}")
    return (
        {id: _score(f"ctx.{name}[{id!r}]", each) for id, each in value.items()} if kind is dict else clone_tree(value)
    )


def _score(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} is a number, not {value!r}") from None
