"""Random numbers of hooks are a function of (seed, callback, stage, place), whichever generator they come from."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import functional_loop as fl
from functional_loop.callbacks import CallbackSet
from tests.processes import in_a_fresh_process
from tests.sample_loops import full_loop, make_loop

STAGES = [stage for stage in fl.STAGES if stage != "exit"]
SOURCES: dict[str, Callable[[], float]] = {
    "torch": lambda: float(torch.rand(())),
    "numpy": lambda: float(np.random.rand()),
    "random": random.random,
    "a normal of numpy": lambda: float(np.random.randn()),
}
Drawn = list[list[Any]]


def noting(draw: Callable[[], float], stages: list[str], id: str = "noting", every: int = 1) -> fl.Callback:
    """Appends to its slot what it draws, in every ``every``-th batch."""

    def hook(stage: str) -> fl.Hook:
        def note(ctx: fl.Context) -> fl.Context:
            if ctx.global_step % every:
                return ctx
            return ctx.with_callback_state(id, [*ctx.callbacks[id], [stage, ctx.global_step, draw()]])

        return note

    return fl.Callback(id, init=lambda ctx: [["init", 0, draw()]], **{stage: hook(stage) for stage in stages})


def pollute(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def global_states() -> bytes:
    return pickle.dumps((torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()))


@pytest.fixture(autouse=True)
def _generators_of_the_process() -> Iterator[None]:
    pollute(0)
    before = global_states()
    yield
    assert global_states() == before


def drawn(ctx: fl.Context, id: str = "noting") -> Drawn:
    slot: Drawn = ctx.callbacks[id]
    return slot


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("every", [1, 4])
def test_what_hooks_draw_repeats_in_every_way_of_training(source: str, every: int) -> None:
    def loop() -> fl.Loop:
        return full_loop(callbacks=[noting(SOURCES[source], STAGES, every=every)])

    start = fl.init(loop(), seed=5)
    whole = fl.train(start)
    numbers = [number for *_, number in drawn(whole)]
    assert len(set(numbers)) == len(numbers) > 4
    assert fl.digest(fl.train(start)) == fl.digest(whole)
    assert fl.digest(list(fl.iterate(fl.init(loop(), seed=5)))[-1]) == fl.digest(whole)
    half = fl.train(fl.init(loop(), seed=5), steps=4)
    pollute(1)
    # The hooks of this loop have never been called, so that they are not yet known to draw.
    assert fl.digest(fl.train(fl.load_state_dict(fl.init(loop()), fl.state_dict(half)))) == fl.digest(whole)
    pollute(0)
    assert drawn(fl.train(fl.init(loop(), seed=6))) != drawn(whole)


def _resumed(source: str, sd: dict[str, Any]) -> str:
    pollute(17)
    loop = full_loop(callbacks=[noting(SOURCES[source], STAGES, every=3)])
    return fl.digest(fl.train(fl.load_state_dict(fl.init(loop), sd)))


@pytest.mark.parametrize("source", ["torch", "numpy"])
def test_what_hooks_draw_repeats_in_a_fresh_process(source: str) -> None:
    loop = full_loop(callbacks=[noting(SOURCES[source], STAGES, every=3)])
    half = fl.train(fl.init(loop, seed=5), steps=2)
    assert in_a_fresh_process(_resumed, source, fl.state_dict(half)) == fl.digest(fl.train(half))


@pytest.mark.parametrize("source", SOURCES)
def test_other_callbacks_that_draw_change_nothing(source: str) -> None:
    own = noting(SOURCES[source], STAGES)
    others = [noting(draw, STAGES, id=f"other {i}") for i, draw in enumerate(SOURCES.values())]
    alone = fl.train(fl.init(full_loop(callbacks=[own])))
    among = fl.train(fl.init(full_loop(callbacks=[others[0], own, *others[1:]])))
    assert drawn(among) == drawn(alone)
    assert fl.tree_equal(among.params, alone.params)
    assert drawn(among, "other 0") != drawn(alone)


def test_a_hook_that_begins_to_draw_late_is_run_again_with_the_whole_batch() -> None:
    calls: list[int] = []

    def note(ctx: fl.Context) -> fl.Context:
        calls.append(ctx.global_step)
        return (
            ctx if ctx.global_step < 3 else ctx.with_callback_state("late", [*ctx.callbacks["late"], random.random()])
        )

    late = fl.Callback("late", init=lambda ctx: [], batch_end=note)
    ctx = fl.train(fl.init(make_loop(callbacks=[late])))
    assert ctx.callbacks["late"] == fl.train(fl.init(make_loop(callbacks=[late]))).callbacks["late"]
    assert sorted(set(calls)) == [1, 2, 3, 4, 5, 6]


def test_a_network_that_writes_to_its_input_gets_what_it_got_before_when_a_batch_runs_again() -> None:
    class Halving(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.mul_(0.5))

    def late(ctx: fl.Context) -> fl.Context:
        if ctx.global_step > 2:
            torch.rand(())
        return ctx

    def trained(**changes: Any) -> fl.Context:
        return fl.train(fl.init(make_loop(network=lambda: Halving(3, 2), **changes)))

    assert fl.tree_equal(trained(callbacks=[fl.Callback("late", batch_end=late)]).params, trained().params)


def test_a_hook_that_draws_and_fails_is_reported_as_its_error() -> None:
    def fail(ctx: fl.Context) -> fl.Context:
        if ctx.global_step == 3:
            raise KeyError(f"drew {random.random()}")
        return ctx

    messages = []
    for seed in (1, 2):
        random.seed(seed)
        with pytest.raises(KeyError, match="drew") as caught:
            fl.train(fl.init(make_loop(callbacks=[fl.Callback("fails", batch_end=fail)])))
        messages.append(str(caught.value))
    pollute(0)
    assert messages[0] == messages[1]


class CallbackSetMixup(CallbackSet):
    """Draws, keeps a state, and changes the batch."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_batch_begin(self) -> None:
        share = float(np.random.beta(0.4, 0.4))
        self.seen = [*self.seen, share]
        x = self.ctx.batch.x
        self.ctx.batch = fl.evolve(self.ctx.batch, x=share * x + (1 - share) * x[torch.randperm(len(x))])

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = state_dict["seen"]


def test_object_callbacks_draw_under_seeds_too() -> None:
    whole = fl.train(fl.init(make_loop(callbacks=[CallbackSetMixup()])))
    assert len(whole.callbacks["mixup"]["seen"]) == whole.global_step
    half = fl.train(fl.init(make_loop(callbacks=[CallbackSetMixup()])), steps=2)
    pollute(3)
    again = fl.train(fl.load_state_dict(fl.init(make_loop(callbacks=[CallbackSetMixup()])), fl.state_dict(half)))
    pollute(0)
    assert fl.digest(again) == fl.digest(whole)


def test_callbacks_for_effects_are_called_once_and_what_they_draw_is_put_back() -> None:
    calls: list[tuple[str, int]] = []

    def hook(stage: str) -> fl.Hook:
        def draw(ctx: fl.Context) -> fl.Context:
            calls.append((stage, ctx.global_step))
            if ctx.global_step > 2:
                random.random()
                np.random.randn()
            return ctx

        return draw

    shown = fl.Callback("shown", replays=False, **{stage: hook(stage) for stage in fl.STAGES})
    plain = fl.train(fl.init(make_loop()))
    assert fl.digest(fl.train(fl.init(make_loop(callbacks=[shown])))) == fl.digest(plain)
    assert len(set(calls)) == len(calls)


def test_check_pure_takes_draws_from_global_generators_for_what_they_are() -> None:
    callbacks = [noting(draw, STAGES, id=f"draws {i}") for i, draw in enumerate(SOURCES.values())]
    checked = fl.train(fl.init(full_loop(callbacks=callbacks, check_pure=True)))
    assert fl.digest(checked) == fl.digest(fl.train(fl.init(full_loop(callbacks=callbacks))))


def add_noise(draw: Callable[[], Any]) -> fl.Callback:
    def noise(ctx: fl.Context) -> fl.Context:
        return fl.evolve(ctx, grads={name: grad + draw() for name, grad in ctx.grads.items()})

    return fl.Callback("noise", after_backward=noise)


def test_hooks_that_run_for_every_member_draw_what_they_draw_in_a_solo_run() -> None:
    def noise(ctx: fl.Context) -> fl.Context:
        return fl.evolve(ctx, grads={name: grad + torch.randn_like(grad) for name, grad in ctx.grads.items()})

    loop = make_loop(callbacks=[fl.Callback("noise", after_backward=noise), noting(SOURCES["numpy"], ["epoch_end"])])
    solo = [fl.init(loop, seed=seed) for seed in range(2)]
    for mode, exact in (("exact", True), ("vectorised", False)):
        members = fl.unstack(fl.train(fl.stack(solo, mode=mode, batch_hooks="each")))
        for member, start in zip(members, solo, strict=True):
            alone = fl.train(start)
            assert member.callbacks == alone.callbacks
            if exact:
                assert fl.digest(member) == fl.digest(alone)
            else:
                assert torch.allclose(member.last_loss, alone.last_loss, rtol=1e-3)


@pytest.mark.parametrize("source", SOURCES)
def test_hooks_that_run_once_for_all_members_may_not_draw(source: str) -> None:
    loop = make_loop(callbacks=[add_noise(SOURCES[source] if source != "torch" else lambda: torch.rand(()))])
    members = fl.stack([fl.init(loop, seed=seed) for seed in range(2)], mode="vectorised")
    with pytest.raises(RuntimeError) as caught:
        fl.train(members)
    assert "batch_hooks='each'" in "".join(caught.value.__notes__)
