"""`self.ctx.callbacks`: the other callbacks, with the state that they have in the context at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import functional_loop as fl
from functional_loop.callbacks.objects.callback_set import CallbackSet
from tests.callbacks.laws import holds_for
from tests.callbacks.objects import CallbackSetBatches, digests, doing
from tests.sample_loops import counter, make_loop


class CallbackSetWatching(CallbackSet):
    """Keeps what it sees of a peer."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def look(self) -> None:
        self.seen = [*self.seen, self.ctx.callbacks["batches"].n]

    def on_batch_begin(self) -> None:
        self.look()

    def on_batch_end(self) -> None:
        self.look()

    def on_epoch_end(self) -> None:
        self.look()

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = state_dict["seen"]


@pytest.mark.parametrize("first", [True, False])
def test_a_peer_has_the_state_of_the_context_also_after_a_resume_a_fork_and_a_step_back(
    first: bool, tmp_path: Path
) -> None:
    def loop() -> fl.Loop:
        parts: list[Any] = [CallbackSetWatching(), CallbackSetBatches()]
        return make_loop(callbacks=parts if first else parts[::-1])

    ctx = fl.train(fl.init(loop()))
    before = [0, 0, 1, 1, 2, 2, 3, 3, 3, 4, 4, 5, 5, 6]
    after = [0, 1, 1, 2, 2, 3, 3, 3, 4, 4, 5, 5, 6, 6]
    assert ctx.callbacks["watching"]["seen"] == (before if first else after)
    holds_for(loop, tmp_path)


def test_one_loop_goes_back_and_forth() -> None:
    loop = make_loop(callbacks=[CallbackSetWatching(), CallbackSetBatches()])
    run = [fl.init(loop), *fl.iterate(fl.init(loop))]
    for ctx in (run[5], run[1], run[8], run[0]):
        assert fl.digest(fl.train(ctx)) == fl.digest(run[-1])


@pytest.mark.parametrize("first", [True, False])
def test_what_is_written_to_a_peer_goes_into_its_slot(first: bool) -> None:
    def write(self: Any) -> None:
        self.ctx.callbacks["batches"].n += 100

    def pure(ctx: fl.Context) -> fl.Context:
        return ctx.with_callback_state("batches", {"n": ctx.callbacks["batches"]["n"] + 100})

    def loop(writing: Any) -> fl.Loop:
        parts = [writing, CallbackSetBatches()]
        return make_loop(callbacks=parts if first else parts[::-1])

    by_object = loop(doing("Writing", on_batch_end=write, on_epoch_end=write))
    by_hook = loop(fl.Callback("writing", batch_end=pure, epoch_end=pure))
    assert digests(by_object) == digests(by_hook)
    middle = fl.train(fl.init(by_object), steps=2)
    other = loop(doing("Writing", on_batch_end=write, on_epoch_end=write))
    resumed = fl.load_state_dict(fl.init(other), fl.state_dict(middle))
    assert fl.digest(fl.train(resumed)) == fl.digest(fl.train(fl.init(by_object)))


def test_what_was_written_to_a_peer_by_a_hook_that_failed_is_forgotten() -> None:
    def write(self: Any) -> None:
        self.ctx.callbacks["batches"].n = 100
        if failing:
            raise RuntimeError("failed")

    failing = True
    loop = make_loop(callbacks=[doing("Writing", on_epoch_end=write), CallbackSetBatches()], epochs=1)
    with pytest.raises(RuntimeError, match="failed") as caught:
        fl.train(fl.init(loop))
    assert fl.context_of(caught.value).callbacks["batches"] == {"n": 3}
    failing = False
    assert fl.train(fl.context_of(caught.value)).callbacks["batches"] == {"n": 100}


def test_looking_at_peers_changes_nothing() -> None:
    looking = doing("Looking", **{f"on_{s}": lambda self: dict(self.ctx.callbacks) for s in fl.STAGES})
    peers = [CallbackSetBatches(), counter(), fl.Callback("none", batch_end=lambda ctx: ctx)]
    with_it, without = (make_loop(callbacks=[*parts, *peers]) for parts in ([looking], []))
    assert digests(with_it) == digests(without)


def test_pure_callbacks_and_those_without_a_state_are_there_too() -> None:
    pure, idle = counter(), doing("Idle", on_batch_end=lambda self: None)
    seen: list[Any] = []

    def look(self: Any) -> None:
        seen.append((self.ctx.callbacks["counter"], self.ctx.callbacks["idle"], len(self.ctx.callbacks)))
        assert set(self.ctx.callbacks) == {"counter", "idle"}
        assert self.ctx.context.callbacks["counter"] == self.ctx.global_step

    fl.train(fl.init(make_loop(callbacks=[doing("Looking", on_epoch_end=look), pure, idle])))
    assert seen == [(pure, idle, 2)] * 2


def test_a_peer_that_is_not_there_is_refused_by_name() -> None:
    looking = doing("Looking", on_begin=lambda self: self.ctx.callbacks["batchs"])
    loop = make_loop(callbacks=[looking, CallbackSetBatches()])
    with pytest.raises(KeyError, match="no other callback 'batchs' in this loop; did you mean 'batches'"):
        fl.train(fl.init(loop))


def test_members_have_the_peers_of_their_own() -> None:
    loop = make_loop(callbacks=[CallbackSetWatching(), CallbackSetBatches()])
    start = [fl.init(loop, seed=s) for s in (0, 1)]
    ensemble = fl.unstack(fl.train(fl.stack(start, batch_hooks="each")))
    assert [c.callbacks["watching"] for c in ensemble] == [fl.train(c).callbacks["watching"] for c in start]


def test_one_that_is_for_all_members_is_told_where_their_states_are() -> None:
    class CallbackSetWhole(CallbackSet):
        whole = True

        def on_epoch_end(self) -> None:
            self.ctx.callbacks["batches"]

    loop = make_loop(callbacks=[CallbackSetWhole(), CallbackSetBatches()])
    assert fl.train(fl.init(loop)).epoch == 2
    ensemble = fl.stack([fl.init(loop, seed=s) for s in (0, 1)], batch_hooks="each")
    with pytest.raises(ValueError, match=r"'batches' has a state for every member .* unstack\(self\.ctx\.context\)"):
        fl.train(ensemble)


def test_tensors_of_a_peer_are_its_own() -> None:
    class CallbackSetSums(CallbackSet):
        def __init__(self) -> None:
            self.total = torch.zeros(2)

        def on_batch_end(self) -> None:
            self.total += 1

        def state_dict(self) -> dict[str, Any]:
            return {"total": self.total}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.total = state_dict["total"]

    def write(self: Any) -> None:
        self.ctx.callbacks["sums"].total.mul_(2)

    loop = make_loop(callbacks=[CallbackSetSums(), doing("Writing", on_batch_end=write)])
    digests(loop)
    assert fl.train(fl.init(loop)).callbacks["sums"]["total"].tolist() == [126, 126]
