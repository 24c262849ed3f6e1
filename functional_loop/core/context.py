"""The Context: everything that changes while training, as one frozen value."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
from torch import Tensor

from .errors import attached_context
from .record import did_you_mean, evolve, record, static
from .stages import BOUNDARIES

if TYPE_CHECKING:
    from ..engine.loop import Loop

T = TypeVar("T")


@attrs.frozen
class Place:
    """Where a run is."""

    epoch: int
    step: int
    step_valid: int
    global_step: int
    stage: str
    terminate: bool


@attrs.frozen
class Ensemble:
    """What makes a context a stacked one.

    Args:
        mode: ``"auto"``, ``"vectorised"`` or ``"exact"``; see `stack`.
        batch_hooks: ``"vectorised"`` or ``"each"``; see `stack`.
        ends: the place of every member that has finished; ``None`` for those that are where the context says.
        terminating: the members that will finish with this epoch, where not all will.
    """

    mode: str
    batch_hooks: str
    ends: tuple[Place | None, ...] = attrs.field(repr=False)
    terminating: frozenset[int] = frozenset()

    @property
    def members(self) -> int:
        return len(self.ends)


@record
class Context:
    """The state of training: a frozen record and a pytree, whose tensors are never written to.

    `init` makes one, the functions of the loop and the stage hooks take one and return the next. Between stages it
    holds durable fields only, and is a legal checkpoint. Fields that have no value yet are ``()``.

    >>> import torch, functional_loop as fl
    >>> x = torch.arange(8.0).unsqueeze(1)
    >>> loop = fl.Loop(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss, fl.optimizer(torch.optim.SGD, lr=0.01),
    ...                train=fl.batches(x, 2 * x, batch_size=4), epochs=1)
    >>> start = fl.init(loop, seed=0)
    >>> ctx = fl.train(start, steps=1)
    >>> ctx
    Context(epoch=1, step=1, global_step=1, stage='batch_end', seed=0)
    >>> start.step
    0
    """

    loop: Loop = static(repr=False)
    """What does not change: network, loss, optimizer, data, measures, callbacks."""
    params: dict[str, Tensor]
    """Parameters by the names of ``network.named_parameters()``; those of a loss that has any begin with ``loss.``."""
    buffers: dict[str, Tensor]
    """Buffers by the names of ``network.named_buffers()``, and of the loss."""
    optimizer_state: dict[str, Any]
    """``{"groups": [hyperparameters of a group, ...], "slots": {parameter name: state}}``."""
    callbacks: dict[str, Any]
    """State of every callback by its id; ``()`` if it keeps none."""
    seed: int
    epoch: int = 0
    """0 in ``begin``, then 1, 2, ..."""
    step: int = 0
    """Training batches of this epoch: 1, 2, ... in the batch stages."""
    step_valid: int = 0
    """Validation batches of this epoch; 0 outside validation."""
    global_step: int = 0
    """Training batches of the run."""
    stage: str = ""
    """The last stage completed."""
    terminate: bool = False
    """Training ends before the next epoch."""
    trainable: tuple[str, ...] = ()
    """Names of the parameters that are updated."""
    last_loss: Tensor | tuple[()] = ()
    """Loss of the last training batch, a scalar tensor."""
    last_scores_train: dict[str, float] | tuple[()] = ()
    """Scores by measure id; ``()`` in an epoch that does not evaluate."""
    last_scores_valid: dict[str, float] | tuple[()] = ()
    """Scores by measure id; ``()`` in an epoch that does not evaluate."""
    measures: dict[str, Any] = ()  # type: ignore[assignment]
    """Running accumulators of the measures, under ``train`` and ``valid``."""
    accumulated: dict[str, Tensor] | tuple[()] = ()
    """Gradient sums of an open accumulation window."""
    data: Any = ()
    """Where loaders are, by ``train`` and, within a validation, ``valid``; ``()`` where no source needs it."""
    batch: Any = ()
    """The `Batch` at hand; ``()`` outside the batch stages, like the following two."""
    y_hats: Any = ()
    """What the network returned, detached: a tensor, or tensors in a tuple, dict or object."""
    grads: dict[str, Tensor] | tuple[()] = ()
    """Gradients by parameter name; a parameter that the loss does not depend on has none."""
    running: str | tuple[()] = ()
    """The stage whose hooks are running; ``()`` between stages."""
    ensemble: Ensemble | None = static(default=None)
    """Of a stacked context (see `stack`): how many members it has and where each is, if not at this place."""

    @property
    def y_hat(self) -> Any:
        """The first output of the network."""
        return first_output(self.y_hats)

    def with_callback_state(self, id: str, state: Any) -> Context:
        """A copy in which the callback ``id`` has another state.

        Raises:
            KeyError: the loop has no callback of that id.
        """
        if id not in self.callbacks:
            raise KeyError(f"no callback {id!r} in this loop{did_you_mean(id, self.callbacks)}")
        return evolve(self, callbacks={**self.callbacks, id: state})

    def with_hyperparameters(self, group: int | None = None, **values: Any) -> Context:
        """A copy in which the optimizer has other hyperparameters, in one parameter group or in all.

        Of a stacked context a value may be a tensor of shape ``(members,)``.

        Raises:
            ValueError: a tensor for another number of members.
            IndexError: there is no such group.
            KeyError: the optimizer has no such hyperparameter.

        >>> from functional_loop.examples.digits import loop
        >>> import functional_loop as fl
        >>> ctx = fl.init(loop(), seed=0)
        >>> ctx.with_hyperparameters(lr=0.5).optimizer_state["groups"][0]["lr"]
        0.5
        """
        for name, value in values.items():
            if self.ensemble is not None and isinstance(value, Tensor) and value.shape != (self.ensemble.members,):
                raise ValueError(
                    f"{name} is a tensor of shape {list(value.shape)}; one with a value for every member of this "
                    f"ensemble is of shape {[self.ensemble.members]}"
                )
        groups = list(self.optimizer_state["groups"])
        for i in range(len(groups)) if group is None else [group]:
            for name in values:
                if name not in groups[i]:
                    raise KeyError(f"no hyperparameter {name!r} in group {i}{did_you_mean(name, groups[i])}")
            groups[i] = {**groups[i], **values}
        return evolve(self, optimizer_state={**self.optimizer_state, "groups": groups})

    def __repr__(self) -> str:
        place = {name: getattr(self, name) for name in ("epoch", "step", "global_step", "stage", "seed")}
        place |= {"terminate": True} if self.terminate else {}
        place |= {"members": self.ensemble.members} if self.ensemble is not None else {}
        return f"Context({', '.join(f'{name}={value!r}' for name, value in place.items())})"


STEP_SCOPED = ("batch", "y_hats", "grads", "running")
"""Fields that have a value inside a batch or a stage only, and are never saved."""


def boundary(ctx: Context, stage: str) -> Context:
    """The context after ``stage``, for the last hook of that stage to save what it was given: a legal checkpoint.

    Raises:
        ValueError: ``stage`` is not the one whose hooks are running, or one from whose end a run can't be continued; or
            hooks come later in the stage, of callbacks that are not ``last``, and may change what would be saved.

    >>> from functional_loop.examples.digits import loop
    >>> import functional_loop as fl
    >>> saved = []
    >>> def save(ctx):
    ...     saved.append(fl.state_dict(fl.boundary(ctx, "epoch_end")))
    ...     return ctx
    >>> saving = fl.evolve(loop(epochs=1), callbacks=[fl.Callback("save", epoch_end=save, last=True)])
    >>> ctx = fl.train(fl.init(saving))
    >>> saved[0]["stage"]
    'epoch_end'
    """
    if stage != ctx.running or stage not in BOUNDARIES:
        raise ValueError(
            f"boundary: {stage!r} has no boundary here, where hooks of {ctx.running!r} are running; only the stage "
            f"that is running has one, and only {', '.join(BOUNDARIES)}"
        )
    if later := [id for id in hooks_after(ctx) if not _is_last(ctx, id)]:
        raise ValueError(
            f"boundary: {later[0]!r} runs later in {stage!r} than {_running.id!r} and may change what this would save: "
            f"Callback({_running.id!r}, last=True) runs after all others"
        )
    return after(ctx, stage)


def _is_last(ctx: Context, id: str) -> bool:
    return any(callback.last for callback in ctx.loop.callbacks if callback.id == id)


class _Running(threading.local):
    id: str = ""


_running = _Running()
"""The id of the callback whose hook runs in this thread."""


def run_as(id: str, hook: Callable[[Context], T], ctx: Context) -> T:
    """``hook(ctx)``, as a hook of the callback ``id``."""
    before, _running.id = _running.id, id
    try:
        return hook(ctx)
    finally:
        _running.id = before


def hooks_after(ctx: Context) -> list[str]:
    """The ids of the callbacks whose hooks come after the running one in its stage."""
    ids = [id for id, _ in ctx.loop.hooks[str(ctx.running)]]
    return ids[ids.index(_running.id) + 1 :] if _running.id in ids else []


def context_of(error: BaseException) -> Context | None:
    """The last boundary context before ``error``, or ``None`` if it was not raised while training.

    Training can be continued from it, or it can be saved: it is a legal checkpoint. Where a hook trains another loop,
    it is that of the run that the error has left last.

    >>> context_of(ValueError("raised somewhere else")) is None
    True
    """
    ctx: Context | None = attached_context(error)
    return ctx


def after(ctx: Context, stage: str, **changes: Any) -> Context:
    """What the stage that follows ``stage`` starts from, with other ``changes``."""
    step_valid = ctx.step_valid if stage == "batch_valid_end" else 0
    changes |= {"stage": stage, "step_valid": step_valid, "batch": (), "y_hats": (), "grads": (), "running": ()}
    return evolve(ctx, **changes)


def check_context(ctx: Context, function: str) -> None:
    """Refuse what is not a context with a TypeError."""
    if not isinstance(ctx, Context):
        raise TypeError(f"{function} takes a Context, not {type(ctx).__name__}")


def check_boundary(ctx: Context, function: str) -> None:
    """Refuse what is not a context, or one from inside a stage, which can't be continued from.

    Raises:
        TypeError, ValueError: as said.
    """
    check_context(ctx, function)
    if any(getattr(ctx, name) != () for name in STEP_SCOPED):
        raise ValueError(
            f"{function} takes a context from between two stages; this one was taken by a hook of stage "
            f"{ctx.running!r} (epoch {ctx.epoch}, step {ctx.step}), after which other hooks and the batch go on. The "
            "last hook of a stage can take boundary(ctx, stage) instead"
        )


def first_output(y_hats: Any) -> Any:
    """The first of several outputs of a network, or the only one."""
    if isinstance(y_hats, dict):
        return next(iter(y_hats.values()))
    return y_hats[0] if isinstance(y_hats, (tuple, list)) and y_hats else y_hats
