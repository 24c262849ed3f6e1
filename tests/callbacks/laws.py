"""What holds for every shipped callback, as functions that a test calls with a function that makes a loop."""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path

import functional_loop as fl

Make = Callable[[], fl.Loop]


def resumes_everywhere(make: Make, seed: int = 3) -> None:
    """A run taken up at any boundary, in a fresh loop, ends as the uninterrupted one."""
    start = fl.init(make(), seed)
    contexts = [start, *fl.iterate(start)]
    for ctx in contexts:
        taken_up = fl.load_state_dict(fl.init(make()), fl.state_dict(ctx))
        assert fl.digest(taken_up) == fl.digest(ctx)
        assert fl.digest(fl.train(taken_up)) == fl.digest(contexts[-1]), ctx


def survives_the_store(make: Make, folder: Path, seed: int = 3) -> None:
    """A run saved to disk at any batch ends as the uninterrupted one."""
    store = fl.CheckpointStore(folder)
    start = fl.init(make(), seed)
    contexts = [ctx for ctx in fl.iterate(start) if ctx.stage in ("batch_end", "batch_valid_end")]
    end = fl.digest(fl.train(start))
    for ctx in contexts:
        store.save(ctx)
        loaded = fl.CheckpointStore(folder).load(make())
        assert fl.digest(loaded) == fl.digest(ctx)
        assert fl.digest(fl.train(loaded)) == end, ctx


def forks_do_not_mix(make: Make) -> None:
    """Two runs of one loop, boundary by boundary in turn, are two separate runs; and a fork leaves its origin alone."""
    loop = make()
    origin = fl.train(fl.init(loop, seed=1), steps=2)
    before = fl.digest(origin)
    for a, b in zip_longest(fl.iterate(fl.init(loop, seed=1)), fl.iterate(fl.init(loop, seed=2))):
        last_a, last_b = a or last_a, b or last_b  # noqa: F821  (from the round before)
    assert fl.digest(last_a) == fl.digest(fl.train(fl.init(make(), seed=1))) == fl.digest(fl.train(origin))
    assert fl.digest(last_b) == fl.digest(fl.train(fl.init(make(), seed=2)))
    assert fl.digest(origin) == before


def holds_for(make: Make, folder: Path) -> None:
    """All of it."""
    resumes_everywhere(make)
    survives_the_store(make, folder)
    forks_do_not_mix(make)
