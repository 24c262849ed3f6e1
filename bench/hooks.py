"""Time that a hook adds to a step of ``fl.train``: of an object callback (the shim), and of a pure one.

A run is one epoch of a small network over batches that are made already, with some callbacks of a kind and, in turns,
without; the difference is divided by the number of times that a hook ran. Both have one pure hook at ``batch_end``, as
without hooks no batch has a context. Times are microseconds, on one thread. "none" has no other
callback on either side: how far off the others can be by chance. "other stage" has object callbacks that have nothing
to do in a batch. The last rows are whole runs with own data against the hand-written loop with a
DataLoader and the same flags: with four pure hooks at each of the twelve stages, a context at every stage.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, TypeAlias

import attrs
import torch

import functional_loop as fl
from functional_loop.callbacks.objects.callback_set import CallbackSet

from . import step
from .report import Chart
from .sources import ready
from .step import LEARNING_RATE
from .timing import add_timing, compare
from .workloads import WORKLOADS

Make: TypeAlias = Callable[[str], Any]
CHART = Chart(("callback",), ("run / hand-written",), "time of a run with callbacks / hand-written loop")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of callbacks (default: all)"
    )
    parser.add_argument("--callbacks", type=int, default=8, help="callbacks in a run (default: %(default)s)")
    add_timing(parser, repeats=50, seconds=5, clock="cpu")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name in args.kinds:
        case = Case(KINDS[name], args.callbacks)
        times = compare(case.ours, case.theirs, args.repeats, args.clock, args.seconds, per=case.hooks * 1e-6)
        added = [ours - theirs for ours, theirs in zip(times.ours, times.theirs, strict=True)]
        yield {
            "callback": name,
            "µs a hook, of minima": round(min(times.ours) - min(times.theirs), 2),
            "median": round(statistics.median(added), 2),
            "step with / without": round(times.median_ratio, 3),
        }
    for name, make in EVERY_STAGE.items():
        for flags in ("default", "fused"):
            whole = EveryStage(make, flags)
            whole.check()
            times = compare(whole.ours, whole.theirs, args.repeats, args.clock, args.seconds, per=whole.steps * 1e-6)
            yield {
                "callback": f"{name}, AdamW {flags}",
                "run / hand-written": round(times.median_ratio, 3),
                "of minima": round(times.ratio_of_minima, 3),
            }


class CallbackSetCounting(CallbackSet):
    """A small state: counts batches."""

    def __init__(self, id: str) -> None:
        self._id = id
        self.batches = 0

    def on_batch_end(self) -> None:
        self.batches += 1

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches = state_dict["batches"]


class CallbackSetNamed(CallbackSet):
    def __init__(self, id: str) -> None:
        self._id = id


class CallbackSetPerEpoch(CallbackSetNamed):
    """Nothing to do in a batch."""

    def on_epoch_end(self) -> None: ...


class CallbackSetIdle(CallbackSetNamed):
    """No state, and nothing to do."""

    def on_batch_end(self) -> None: ...


class CallbackSetReading(CallbackSetNamed):
    """Reads what most callbacks read."""

    def on_batch_end(self) -> None:
        ctx = self.ctx
        _ = ctx.epoch, ctx.total_epochs, ctx.global_step, ctx.last_loss, ctx.batch


class CallbackSetWriting(CallbackSetNamed):
    """Writes a field."""

    def on_batch_end(self) -> None:
        self.ctx.terminate = False


class CallbackSetOptimizer(CallbackSetNamed):
    """Looks at the optimizer, as a schedule does."""

    def on_batch_end(self) -> None:
        _ = self.ctx.optimizer.param_groups[0]["lr"]


class CallbackSetNetwork(CallbackSetNamed):
    """Looks at the parameters of the network."""

    def on_batch_end(self) -> None:
        _ = next(self.ctx.network.parameters())


def counting(id: str) -> fl.Callback:
    def update(ctx: fl.Context) -> fl.Context:
        return ctx.with_callback_state(id, {"batches": ctx.callbacks[id]["batches"] + 1})

    return fl.Callback(id, init=lambda ctx: {"batches": 0}, batch_end=update)


def idle(id: str) -> fl.Callback:
    return fl.Callback(id, batch_end=lambda ctx: ctx)


def everywhere(id: str) -> fl.Callback:
    hooks: dict[str, Any] = dict.fromkeys(fl.STAGES, lambda ctx: ctx)
    return fl.Callback(id, **hooks)


def counting_everywhere(id: str) -> fl.Callback:
    def update(ctx: fl.Context) -> fl.Context:
        return ctx.with_callback_state(id, {"calls": ctx.callbacks[id]["calls"] + 1})

    hooks: dict[str, Any] = dict.fromkeys(fl.STAGES, update)
    return fl.Callback(id, init=lambda ctx: {"calls": 0}, **hooks)


EVERY_STAGE: dict[str, Make | None] = {
    "without callbacks": None,
    "12 stages x 4 pure, nothing": everywhere,
    "12 stages x 4 pure, small state": counting_everywhere,
}
KINDS: dict[str, Make | None] = {
    "none": None,
    "pure, nothing": idle,
    "pure, small state": counting,
    "object, other stage": CallbackSetPerEpoch,
    "object, nothing": CallbackSetIdle,
    "object, small state": CallbackSetCounting,
    "object, reads": CallbackSetReading,
    "object, writes": CallbackSetWriting,
    "object, optimizer": CallbackSetOptimizer,
    "object, network": CallbackSetNetwork,
}


class Case:
    """A run with callbacks of a kind, and the same run without; both have a hook that looks at every batch."""

    def __init__(self, make: Make | None, number: int) -> None:
        workload = WORKLOADS["mlp"]
        source = ready(workload).ours
        optimizer = fl.optimizer(torch.optim.AdamW, lr=LEARNING_RATE, fused=True)
        self.hooks = number * len(source)
        first = idle("first")
        self.without = fl.Loop(workload.network(), workload.loss, optimizer, source, epochs=1, callbacks=[first])
        callbacks = [make(f"callback {i}") for i in range(number)] if make is not None else []
        self.with_callbacks = attrs.evolve(self.without, callbacks=[first, *callbacks])
        self.seeds = count()

    def ours(self) -> Callable[[], fl.Context]:
        return self._run(self.with_callbacks)

    def theirs(self) -> Callable[[], fl.Context]:
        return self._run(self.without)

    def _run(self, loop: fl.Loop) -> Callable[[], fl.Context]:
        start = fl.init(loop, next(self.seeds))
        return lambda: fl.train(start)


class EveryStage(step.Case):
    """A run with callbacks at every stage, and the hand-written loop."""

    def __init__(self, make: Make | None, flags: str) -> None:
        super().__init__(WORKLOADS["mlp"], step.SETTINGS["own"], step.FLAGS[flags])
        callbacks = [make(f"callback {i}") for i in range(4)] if make is not None else []
        self.loop = attrs.evolve(self.loop, callbacks=callbacks)
