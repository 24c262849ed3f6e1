"""Schedules: `torch.optim.lr_scheduler` objects as pure functions of their state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import attrs
import torch
from torch import Tensor

from ...checkpoint.comparing import compare
from ...core.callback import Callback, when
from ...core.context import Context
from ...core.errors import StateDictError, noting
from ...core.plain import RESERVED
from ...core.record import evolve, tree_map
from ...engine.loop import Loop
from ...optim.torch_update import copied, plain
from ..checks import check_choice
from ..gradients.windows import updates

State = dict[str, Any]
Groups = list[dict[str, Any]]

_SCALARS = (bool, int, float, str, type(None))


@attrs.frozen(eq=False)
class Schedule:
    """How to make a scheduler, and what must be the same where a run is continued.

    Args:
        build: makes the scheduler of an optimizer; what depends on the length of the run it takes from the loop.
        arguments: what it is made with, as it was given.
        settings: the same as plain values, with what is taken from the loop.
    """

    build: Callable[[torch.optim.Optimizer, Loop], Any]
    arguments: dict[str, Any]
    settings: Callable[[Loop], State]

    def start(self, loop: Loop, groups: Groups) -> tuple[Groups, State]:
        """Hyperparameters and state after the scheduler is made, which sets those of the first step."""
        optimizer = StandIn(groups)
        return _taken(self.build(optimizer, loop), optimizer, groups)

    def step(self, loop: Loop, groups: Groups, state: State, *scores: float) -> tuple[Groups, State]:
        """Hyperparameters and state after one step from ``state``."""
        optimizer = StandIn(groups)
        scheduler = self.build(optimizer, loop)
        scheduler.load_state_dict(from_plain(state["scheduler"], scheduler.state_dict()))
        # Only now, because to be made changes the hyperparameters of the optimizer.
        optimizer.show(groups, state["groups"])
        scheduler.step(*scores)
        return _taken(scheduler, optimizer, groups)

    def resettled(self, loop: Loop, groups: Groups, state: State) -> State:
        """The state of the schedule as it is made here, at the place that ``state`` has reached."""
        optimizer = StandIn(groups)
        optimizer.show(groups, state["groups"])
        fresh = to_plain(self.build(optimizer, loop).state_dict())
        reached = {key: value for key, value in state["scheduler"].items() if key in _REACHED}
        return {"scheduler": {**fresh, **reached}, "groups": optimizer.split(groups)[1]}


_REACHED = ("last_epoch", "_step_count", "_last_lr", "best", "num_bad_epochs", "cooldown_counter", "T_cur", "T_i")
"""What of the state of torch's schedulers says how far they are."""


def schedule_of(cls: Callable[..., Any], **arguments: Any) -> Schedule:
    """The schedule of a scheduler class and its arguments."""
    # As lists, tensors can be compared.
    settings = to_plain(tree_map(lambda leaf: leaf.tolist() if isinstance(leaf, Tensor) else leaf, arguments))
    return Schedule(lambda optimizer, loop: cls(optimizer, **arguments), arguments, lambda loop: settings)


def stateless(function: Callable[[Any], float]) -> Callable[[Any], float]:
    """A plain function that calls it: attributes of other callables are a state to torch, which it saves and sets."""

    def called(step: Any) -> float:
        return function(step)

    called.__wrapped__ = function  # type: ignore[attr-defined]
    return called


def _taken(scheduler: Any, optimizer: StandIn, groups: Groups) -> tuple[Groups, State]:
    new, beside = optimizer.split(groups)
    return new, {"scheduler": to_plain(scheduler.state_dict()), "groups": beside}


class StandIn(torch.optim.Optimizer):
    """An optimizer of nothing, which holds the hyperparameters for a scheduler to change.

    Args:
        groups: the hyperparameters of every group, as a context has them.
    """

    # Schedulers warn if they step before the optimizer has; this one is stepped by the loop.
    _opt_called = True

    def __init__(self, groups: Groups) -> None:
        # Not that of the base class, which is for optimizers that step, and takes longer than a step of a schedule.
        self.defaults = as_in_torch(groups[0])
        self.param_groups = [{**as_in_torch(group), "params": []} for group in groups]

    def show(self, groups: Groups, own: Groups) -> None:
        """Take other hyperparameters, and what the scheduler keeps beside them (``initial_lr``, say)."""
        for shown, values, beside in zip(self.param_groups, groups, own, strict=True):
            shown |= as_in_torch(values) | as_in_torch(beside)

    def split(self, groups: Groups) -> tuple[Groups, Groups]:
        """The hyperparameters that ``groups`` has, and all others."""
        new, beside = [], []
        for shown, values in zip(self.param_groups, groups, strict=True):
            new.append({key: to_plain(shown[key]) for key in values})
            beside.append(to_plain({k: v for k, v in shown.items() if k not in values and k != "params"}))
        return new, beside

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing: schedulers want to know that there is a method."""


def as_in_torch(values: Mapping[str, Any]) -> dict[str, Any]:
    """Copies, with tuples (``betas``) for the lists that a context has."""
    return {key: value if type(value) in _SCALARS else _as_in_torch(value) for key, value in values.items()}


def _as_in_torch(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else copied(value)


def to_plain(node: Any) -> Any:
    """A state dict of torch as a plain tree: pairs for dicts whose keys can't be saved, ``()`` for values that can't.

    >>> to_plain({"milestones": {3: 1}, "betas": (0.9, 0.99), "scale": max})
    {'milestones': [[3, 1]], 'betas': [0.9, 0.99], 'scale': ()}
    """
    if type(node) in _SCALARS:
        return node
    if isinstance(node, dict):
        if all(isinstance(key, str) for key in node) and not (len(node) == 1 and set(node) <= set(RESERVED)):
            return {key: to_plain(value) for key, value in node.items()}
        return [[to_plain(key), to_plain(value)] for key, value in node.items()]
    if isinstance(node, (list, tuple)):
        return [to_plain(value) for value in node]
    return plain(node) if isinstance(node, (Real, Tensor)) else ()


def from_plain(saved: Any, like: Any) -> Any:
    """The inverse of `to_plain`, with containers of the types in ``like``, and what could not be saved from there.

    >>> from_plain({"milestones": [[3, 1]], "scale": ()}, {"milestones": {}, "scale": max})
    {'milestones': {3: 1}, 'scale': <built-in function max>}
    """
    if type(saved) in _SCALARS:
        return saved
    if isinstance(saved, tuple):
        return like
    if isinstance(like, dict) and isinstance(saved, (dict, list)):
        result = copy.copy(like)
        result.clear()
        for key, value in saved.items() if isinstance(saved, dict) else saved:
            result[key] = from_plain(value, like.get(key))
        return result
    if isinstance(saved, list):
        known = [*like, *saved[len(like) :]] if isinstance(like, (list, tuple)) else saved
        values = [from_plain(value, other) for value, other in zip(saved, known, strict=False)]
        return tuple(values) if isinstance(like, tuple) else values
    return copied(saved)


def schedule_callback(
    kind: str,
    id: str,
    schedule: Schedule,
    step_on: str = "epoch",
    *,
    score: Callable[[Context], float] | None = None,
    check: Callable[[Loop], None] | None = None,
) -> Callback:
    """The callback that starts a schedule in ``begin`` and then steps it.

    Args:
        kind: the name of the callback's class, and of the function that makes it.
        schedule: what to step.
        step_on: ``"epoch"`` steps at the end of every epoch, ``"batch"`` after every update of the parameters.
        score: gives the score that the schedule steps on; it then steps in epochs that evaluate only.
        check: refuses a loop that the schedule can't be for.
    """
    check_choice(kind, "step_on", step_on, ("epoch", "batch"))

    def settings(ctx: Context) -> State:
        return {"step_on": step_on, **schedule.settings(ctx.loop)}

    def try_out(ctx: Context) -> tuple[()]:
        with noting(lambda: f"in the schedule of callback {id!r}"):
            if check is not None:
                check(ctx.loop)
            schedule.start(ctx.loop, ctx.optimizer_state["groups"])
        return ()

    def start(ctx: Context) -> Context:
        groups, state = schedule.start(ctx.loop, ctx.optimizer_state["groups"])
        return put(ctx, groups, {"settings": settings(ctx), **state})

    def advance(ctx: Context) -> Context:
        if ctx.callbacks[id] == ():
            # It was not there in `begin`: it has come to a run that others began.
            ctx = start(ctx)
        state = ctx.callbacks[id]
        scores = () if score is None else (score(ctx),)
        groups, new = schedule.step(ctx.loop, ctx.optimizer_state["groups"], state, *scores)
        return put(ctx, groups, {"settings": state["settings"], **new})

    def put(ctx: Context, groups: Groups, state: State) -> Context:
        optimizer_state = {**ctx.optimizer_state, "groups": groups}
        return evolve(ctx.with_callback_state(id, state), optimizer_state=optimizer_state)

    def fits(ctx: Context) -> tuple[StateDictError | None, Context]:
        state = ctx.callbacks[id]
        if state == () or not (found := [*compare(state["settings"], settings(ctx))]):
            return None, ctx
        new = schedule.resettled(ctx.loop, ctx.optimizer_state["groups"], state)
        error = StateDictError(f"callback {id!r} can't continue a schedule of other settings:", found)
        return error, ctx.with_callback_state(id, {"settings": settings(ctx), **new})

    hooks: dict[str, Any] = {"batch_end": when(updates, advance)} if step_on == "batch" else {"epoch_end": advance}
    if score is not None:
        hooks = {"epoch_end": when(lambda ctx: ctx.loop.evaluates(ctx.epoch), advance)}
    made_with = schedule.arguments if score is not None else {**schedule.arguments, "step_on": step_on}
    return Callback(id, init=try_out, kind=kind, settings=made_with, fits=fits, source=schedule, begin=start, **hooks)
