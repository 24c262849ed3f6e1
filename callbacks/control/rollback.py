"""Undoes a bad batch, and skips it from then on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import attrs
from torch import Tensor
from torch.nn.utils import get_total_norm

from ...core.callback import Callback
from ...core.context import STEP_SCOPED, Context, boundary
from ...core.record import evolve, is_static
from ...data.reader import is_done
from ..checks import check_integer, check_number
from ..gradients.clipping import gradients
from .terminate_on_nan import loss

State = dict[str, Any]

_BEFORE_CHECKPOINTS = 1e6
_WARM_UP, _DECAY = 20, 0.95


def rollback(
    when: Callable[[Context], bool] | None = None,
    *,
    spike: float | None = None,
    back: int = 1,
    skip: int = 1,
    every: int = 1,
    lr_factor: float = 1.0,
    max_rollbacks: int = 10,
    id: str = "rollback",
) -> Callback:
    """Undoes a batch that spoils training, and goes on as if the run had never seen it.

    It decides in ``batch_end``, after all callbacks but those that save (weight 1e6). A batch is bad if its loss, a
    gradient or an updated parameter is NaN or infinite; if the loss is a spike; or if ``when`` says so. Training then
    goes on from an earlier context, which may be one of the epoch before, state of the other callbacks included, and
    passes the bad batch over, as ``Loop(skip_batches=...)`` does: with ``lr_factor=1`` all that follows is, bit for
    bit, a run with that set. ``ctx.callbacks[id]["skipped"]`` has the numbers of the batches. `csv_log`
    and `json_log` follow; what other objects wrote to files stays there.

    Looking waits for the device: nothing on a CPU, a synchronisation per batch on an accelerator.

    Args:
        when: a pure function of the context of ``batch_end``, ``last_loss``, ``grads`` and ``batch`` included.
        spike: a loss is a spike if it exceeds the running mean of losses by more than this many running standard
            deviations, after the first 20 batches; about 6 is a careful choice. Off by default.
        back: goes back to before the last ``back`` batches, or more if ``every`` has it so, or if a window of
            ``accumulate`` is to be closed by another batch, or to the beginning of the run.
        skip: how many batches are passed over, the bad one and those before it; the others are trained on again.
        every: a context is kept at the beginning of an epoch and after every ``every``-th of its batches: there are
            about ``back / every + 1`` in memory and in every checkpoint, each as large as the parameters and the
            optimizer's state that differ from the present.
        lr_factor: what the learning rate of every group is multiplied with when going back. A schedule that computes
            the rate from the first one undoes that at its next step.
        max_rollbacks: at the next bad batch after so many the callback gives up; a run may go on with another number.
        id: the name of the slot, unique in a loop.

    Raises:
        TypeError, ValueError: an argument that can't work; in `init`: a learning rate to lower that the optimizer does
            not have.
        FloatingPointError: while training, if it gives up; `context_of` the error is the boundary before the batch.

    Resuming:
        The contexts to go back to and the batches to pass over are part of the context: a resumed run goes back where
        an uninterrupted one does, to the same bits.

    Mirrors the restarts in Chowdhery et al., "PaLM", 2022, section 5.1, which went back about 100 steps and skipped
    200 to 500 batches.

    >>> import functional_loop as fl
    >>> from functional_loop.callbacks.control.rollback import rollback
    >>> from functional_loop.examples.digits import loop
    >>> unlucky = rollback(when=lambda ctx: ctx.global_step == 7, back=3)
    >>> ctx = fl.train(fl.init(fl.evolve(loop(epochs=1), callbacks=[unlucky])))
    >>> ctx.callbacks["rollback"]["skipped"]
    [7]
    >>> never = fl.train(fl.init(fl.evolve(loop(epochs=1), skip_batches={7})))
    >>> bool(fl.tree_equal(ctx.params, never.params))
    True
    """
    if when is not None and not callable(when):
        raise TypeError(f"rollback: when is a function of the context, not {when!r}")
    if spike is not None:
        check_number("rollback", "spike", spike, least=0)
    check_integer("rollback", "back", back, least=1)
    check_integer("rollback", "skip", skip, least=1)
    check_integer("rollback", "every", every, least=1)
    check_integer("rollback", "max_rollbacks", max_rollbacks, least=0)
    check_number("rollback", "lr_factor", lr_factor, least=0, most=1)
    if skip > back:
        raise ValueError(f"rollback: skip={skip} batches can't be passed over by going back={back}; give a larger back")

    def start(ctx: Context) -> State:
        if lr_factor != 1 and any("lr" not in group for group in ctx.optimizer_state["groups"]):
            raise ValueError(f"rollback: {ctx.loop.optimizer.cls.__name__} has no lr for lr_factor to lower")
        return {"kept": [], "losses": {"count": 0, "mean": 0.0, "variance": 0.0}, "skipped": [], "rollbacks": 0}

    def begin_epoch(ctx: Context) -> Context:
        return ctx.with_callback_state(id, keep(boundary(ctx, "epoch_begin"), ctx.callbacks[id]))

    def decide(ctx: Context) -> Context:
        state, value = ctx.callbacks[id], loss(ctx)
        if reason := why(ctx, state, value):
            return go_back(ctx, state, reason)
        if spike is not None:
            state = {**state, "losses": _with_loss(state["losses"], value)}
        return ctx.with_callback_state(id, keep(boundary(ctx, "batch_end"), state) if ctx.step % every == 0 else state)

    def keep(ctx: Context, state: State) -> State:
        """``state`` with ``ctx`` as the newest to go back to, of those that the next batch may need."""
        first = with_closed_window(state, far_enough(state, ctx.global_step + 1))
        return _keep(ctx, id, {**state, "kept": state["kept"][first:]})

    def far_enough(state: State, batch: int) -> int:
        """Which of the contexts that are kept is the newest that is far enough before a batch."""
        far = [i for i, old in enumerate(state["kept"]) if batch - old["context"]["global_step"] >= back]
        return far[-1] if far else 0

    def rest_of_epoch(ctx: Context, state: State, i: int) -> range | None:
        """The batches after the ``i``-th context that is kept, to the end of its epoch if that is known."""
        here = state["kept"][i]["context"]
        later = [old["context"]["global_step"] for old in state["kept"][i:] if old["context"]["epoch"] > here["epoch"]]
        if not later and not is_done(ctx):
            return None
        return range(here["global_step"] + 1, (later[0] if later else ctx.global_step) + 1)

    def with_closed_window(state: State, i: int) -> int:
        """Which of the contexts that are kept, up to the ``i``-th, is the newest in which no window is open."""
        return next((j for j in range(min(i, len(state["kept"]) - 1), -1, -1) if _is_closed(state["kept"][j])), 0)

    def why(ctx: Context, state: State, value: float) -> str:
        if not math.isfinite(value):
            return f"the loss is {value}"
        grads, moved = gradients(ctx).values(), [ctx.params[name] for name in ctx.trainable]
        if not _are_finite([*grads, *moved]):
            return f"the {'updated parameters' if _are_finite([*grads]) else 'gradients'} are not finite"
        if spike is not None and _is_spike(state["losses"], value, spike):
            return f"the loss {value:.6g} is a spike"
        return "it was found bad by when(ctx)" if when is not None and when(ctx) else ""

    def go_back(ctx: Context, state: State, reason: str) -> Context:
        if state["rollbacks"] >= max_rollbacks or not state["kept"]:
            raise FloatingPointError(
                f"batch {ctx.global_step} of the run is bad ({reason}), after {state['rollbacks']} rollbacks that "
                f"passed over the batches {state['skipped']}; context_of(error) is the context before this batch"
            )
        newest = far_enough(state, ctx.global_step)
        bad = range(ctx.global_step - skip + 1, ctx.global_step + 1)
        rest = rest_of_epoch(ctx, state, newest)
        if rest is not None and {*rest} <= {*state["skipped"], *bad}:
            # Nothing is left of that epoch that could close a window.
            newest = with_closed_window(state, newest)
        kept = [_lowered(old, lr_factor) for old in state["kept"][: newest + 1]]
        earlier = kept[-1]["context"]
        bad = range(max(bad.start, earlier["global_step"] + 1), bad.stop)
        state = {
            "kept": kept,
            "losses": kept[-1]["losses"],
            "skipped": sorted({*state["skipped"], *bad}),
            "rollbacks": state["rollbacks"] + 1,
        }
        return _restored(ctx, earlier, id, state)

    # Not how often it goes back: a run that gave up may go on with more.
    settings = {"when": when, "spike": spike, "back": back, "skip": skip, "every": every, "lr_factor": lr_factor}
    return Callback(
        id,
        init=start,
        weight=_BEFORE_CHECKPOINTS,
        kind="rollback",
        settings=settings,
        skips=lambda state: state["skipped"],
        epoch_begin=begin_epoch,
        batch_end=decide,
    )


_FIELDS = tuple(
    field.name
    for field in attrs.fields(Context)  # type: ignore[arg-type]
    if not is_static(field) and field.name not in (*STEP_SCOPED, "callbacks", "seed", "stage", "step_valid")
)
"""What an earlier context may differ in, but for the states of the callbacks."""


def _keep(ctx: Context, id: str, state: State) -> State:
    """``state`` with ``ctx`` as the newest context to go back to."""
    others = {other: slot for other, slot in ctx.callbacks.items() if other != id}
    kept = {name: _packed(getattr(ctx, name)) for name in _FIELDS} | {"callbacks": others}
    return {**state, "kept": [*state["kept"], {"context": kept, "losses": state["losses"]}]}


def _restored(ctx: Context, kept: State, id: str, state: State) -> Context:
    """The context that was kept, but for ``state``, and for clocks, which don't go back."""
    volatile = {c.id: ctx.callbacks[c.id] for c in ctx.loop.callbacks if c.volatile}
    fields = {name: _unpacked(kept[name]) for name in _FIELDS}
    step_scoped = {"batch": (), "y_hats": (), "grads": ()}
    return evolve(ctx, **fields, **step_scoped, callbacks={**kept["callbacks"], **volatile, id: state})


def _is_closed(old: State) -> bool:
    return bool(_unpacked(old["context"]["accumulated"]) == ())


def _lowered(old: State, factor: float) -> State:
    if factor == 1:
        return old
    optimizer_state = old["context"]["optimizer_state"]
    groups = [{**group, "lr": group["lr"] * factor} for group in optimizer_state["groups"]]
    return {**old, "context": {**old["context"], "optimizer_state": {**optimizer_state, "groups": groups}}}


_TUPLE = "a tuple"


def _packed(node: Any) -> Any:
    """A tree without tuples, which the state of a callback may not hold."""
    if isinstance(node, dict):
        # Most values are tensors, and there are many.
        return {key: value if type(value) is Tensor else _packed(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_packed(value) for value in node]
    return {_TUPLE: [_packed(value) for value in node]} if isinstance(node, tuple) and node else node


def _unpacked(node: Any) -> Any:
    if isinstance(node, dict):
        values = {key: _unpacked(value) for key, value in node.items()}
        return tuple(values[_TUPLE]) if list(values) == [_TUPLE] else values
    return [_unpacked(value) for value in node] if isinstance(node, list) else node


def _are_finite(tensors: list[Tensor]) -> bool:
    values = [t._values() if t.is_sparse else t for t in tensors if t.is_floating_point() or t.is_complex()]
    return math.isfinite(get_total_norm([v for v in values if v.numel()]).item())


def _with_loss(losses: State, value: float) -> State:
    """Running mean and variance, exponentially weighted, as if all weight lay on the losses so far."""
    count = losses["count"] + 1
    weight = max(1 - _DECAY, 1 / count)
    gap = value - losses["mean"]
    variance = (1 - weight) * (losses["variance"] + weight * gap * gap)
    return {"count": count, "mean": losses["mean"] + weight * gap, "variance": variance}


def _is_spike(losses: State, value: float, spike: float) -> bool:
    return bool(losses["count"] >= _WARM_UP and value - losses["mean"] > spike * math.sqrt(losses["variance"]))
