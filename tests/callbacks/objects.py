"""Object callbacks for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import functional_loop as fl
from functional_loop.callbacks.objects.callback_set import CallbackSet


class CallbackSetCounter(CallbackSet):
    """Counts how often each stage has run, and keeps the counts."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def count(self, stage: str) -> None:
        self.counts[stage] = self.counts.get(stage, 0) + 1

    def on_begin(self) -> None:
        self.count("begin")

    def on_epoch_begin(self) -> None:
        self.count("epoch_begin")

    def on_after_backward(self) -> None:
        self.count("after_backward")

    def on_batch_end(self) -> None:
        self.count("batch_end")

    def on_batch_valid_end(self) -> None:
        self.count("batch_valid_end")

    def on_epoch_end(self) -> None:
        self.count("epoch_end")

    def on_end(self) -> None:
        self.count("end")

    def state_dict(self) -> dict[str, int]:
        return self.counts

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.counts = state_dict


class CallbackSetBatches(CallbackSet):
    """Counts batches."""

    def __init__(self) -> None:
        self.n = 0

    def on_batch_end(self) -> None:
        self.n += 1

    def state_dict(self) -> dict[str, int]:
        return {"n": self.n}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.n = state_dict["n"]


def doing(name: str = "Doing", **methods: Callable[[Any], None]) -> CallbackSet:
    """An object of a new class that has these methods."""
    return type(f"CallbackSet{name}", (CallbackSet,), methods)()


def watching(look: Callable[[Any], Any], stages: tuple[str, ...] = fl.STAGES) -> tuple[CallbackSet, list[Any]]:
    """An object that changes nothing, and a list of ``(stage, look(ctx))`` that grows while training."""
    seen: list[Any] = []

    def method(stage: str) -> Callable[[Any], None]:
        return lambda self: seen.append((stage, look(self.ctx)))

    return doing("Watching", **{f"on_{stage}": method(stage) for stage in stages}), seen


def digests(loop: fl.Loop, seed: int = 0) -> list[str]:
    """Of every boundary, when it is made; checks that no context changes later."""
    start = fl.init(loop, seed)
    run = [(start, fl.digest(start)), *((ctx, fl.digest(ctx)) for ctx in fl.iterate(start))]
    for ctx, digest in run:
        assert fl.digest(ctx) == digest, f"changed later: {ctx}"
    return [digest for _, digest in run]
