"""Randomness of hooks: each draws under a seed of (seed of the run, callback, stage, place)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor

from .draws import DrawWatch
from .rng import fold_in, generators_lock, put_torch_back, torch_has_moved, torch_states
from .seeding import Seeding

if TYPE_CHECKING:
    from .context import Context

R = TypeVar("R")
Kind = Literal["train", "valid"]
BATCH_STAGES: dict[Kind, tuple[str, ...]] = {
    "train": ("batch_begin", "after_backward", "batch_end"),
    "valid": ("batch_valid_begin", "batch_valid_end"),
}

OF_BATCHES = (*BATCH_STAGES["train"], *BATCH_STAGES["valid"])


class HookSeeds:
    """Seeds the hooks of one loop.

    Seeding a hook takes some microseconds, which hooks that draw nothing need not pay: a batch runs unseeded, and the
    states of the global generators are compared afterwards. If they have moved, they are put back, the batch runs again
    with every hook under its seed, and the hooks that drew are seeded from then on. The first batch is seeded.

    Args:
        hooks: callback ids and hooks by stage.
        observers: ids of callbacks without effect on the run, whose hooks are called once and never again: what they
            draw from numpy or `random` is put back.
        always: whether all hooks are seeded at every call.
    """

    def __init__(self, hooks: Mapping[str, Sequence[Any]], observers: frozenset[str], always: bool) -> None:
        self._arguments = hooks, observers, always
        self.observers = observers
        self.drawing: set[tuple[str, str]] = set()
        """Stages and ids of the hooks that have been seen to draw."""
        self._seedings: dict[tuple[str, str], Seeding] = {}
        self.hooked: set[Kind] = {kind for kind, stages in BATCH_STAGES.items() if any(map(hooks.__getitem__, stages))}
        """Kinds of batches that have hooks."""
        self._settled: set[str] = set()
        self._of_thread = threading.local()

    def __reduce__(self) -> tuple[type[HookSeeds], tuple[Any, ...]]:
        return HookSeeds, self._arguments

    def batch(self, kind: Kind, run: Callable[[bool], R]) -> R:
        """``run(seeds)`` for one batch, where ``seeds`` says whether to seed all hooks in it.

        Hooks that drew unnoticed so far run twice.
        """
        if kind not in self.hooked:
            return run(False)
        if kind not in self._settled:
            result = run(True)
            if not self._arguments[-1]:
                self._settled.add(kind)
            return result
        watch = self.watch()
        with generators_lock:
            states = torch_states()
            watch.look()
        try:
            result = run(False)
        except Exception:
            # What a hook drew may be why it failed.
            if _put_back(states, watch):
                return run(True)
            raise
        except BaseException:
            _put_back(states, watch)
            raise
        return run(True) if _put_back(states, watch) else result

    def call(self, stage: str, id: str, hook: Callable[[Context], R], ctx: Context, seeds: bool) -> R:
        """``hook(ctx)``, under its seed if ``seeds`` or if the hook has been seen to draw."""
        key, observes = (stage, id), id in self.observers or stage in ("exit", "resume")
        known = key in self.drawing
        if not (seeds or known):
            return self._observed(hook, ctx) if observes else hook(ctx)
        if key not in self._seedings:
            self._seedings[key] = Seeding(everything=False, repeats=not observes)
        seeding, moved = self._seedings[key], False

        def watched() -> R:
            nonlocal moved
            states = torch_states()
            made = hook(ctx)
            moved = torch_has_moved(states)
            return made

        made = seeding.call((lambda: hook(ctx)) if known else watched, hook_seed(stage, id, ctx))
        if moved or seeding.everything:
            self.drawing.add(key)
        return made

    def _observed(self, hook: Callable[[Context], R], ctx: Context) -> R:
        watch = self.watch()
        watch.look()
        try:
            return hook(ctx)
        finally:
            watch.put_back()

    def watch(self) -> DrawWatch:
        """The watch of this thread."""
        if not hasattr(self._of_thread, "watch"):
            self._of_thread.watch = DrawWatch()
        watch: DrawWatch = self._of_thread.watch
        return watch


def hook_seed(stage: str, id: str, ctx: Context) -> int:
    """The seed of a hook: a function of the run's seed, the callback, the stage and the place in the run.

    Of all members of an ensemble together it is that of the first.
    """
    given: Any = ctx.seed
    seed = fold_in(given if type(given) is int else given[0], f"hook/{stage}/{id}", ctx.epoch)
    return fold_in(fold_in(seed, "step", ctx.global_step), "step_valid", ctx.step_valid)


def _put_back(states: dict[torch.Generator, Tensor], watch: DrawWatch) -> bool:
    """Put the global generators back, if anything was drawn; whether anything was."""
    with generators_lock:
        drawn = watch.put_back()
        if not torch_has_moved(states):
            return drawn
        put_torch_back(states)
        return True
