"""Steps with hooks: contexts stay what they were, and memory of large tensors is used again where nothing sees it."""

from __future__ import annotations

import copy
import os
import pickle
import weakref
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from torch import nn

import functional_loop as fl
from functional_loop.optim import mover
from functional_loop.optim import reuse as pages
from tests.sample_loops import data, make_loop

ADAM = {"default": {}, "fused": {"fused": True}, "amsgrad": {"amsgrad": True}}
OPTIMIZERS = {
    **{f"AdamW {name}": fl.optimizer(torch.optim.AdamW, lr=1e-4, **flags) for name, flags in ADAM.items()},
    "SGD": fl.optimizer(torch.optim.SGD, lr=1e-4),
    "momentum": fl.optimizer(torch.optim.SGD, lr=1e-4, momentum=0.9, nesterov=True),
}


@pytest.fixture(autouse=True, params=[1, mover.LARGE], ids=["all are large", "none is large"])
def large(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(mover, "LARGE", request.param)
    return bool(request.param == 1)


def loop_of(optimizer: str = "AdamW default", **changes: Any) -> fl.Loop:
    # The second layer is small enough to lie side by side with others, the first is not.
    with fl.seeded(0):
        network = nn.Sequential(nn.Linear(3, 6000), nn.Tanh(), nn.Linear(6000, 2))
    source = fl.batches(*data(3), batch_size=2)
    return make_loop(network=network, optimizer=OPTIMIZERS[optimizer], train=source, epochs=2, **changes)


def slot(ctx: fl.Context) -> Any:
    return ctx.optimizer_state["slots"]["2.bias"]


def graph(ctx: fl.Context) -> Any:
    with torch.enable_grad():
        return (ctx.params["2.bias"] * torch.ones(2, requires_grad=True)).sum()


HOLDERS: dict[str, tuple[Callable[[fl.Context], Any], Callable[[Any], Any]]] = {
    "the context": (lambda ctx: ctx, lambda kept: kept.params["2.bias"]),
    "the parameters": (lambda ctx: ctx.params, lambda kept: kept["2.bias"]),
    "a parameter": (lambda ctx: ctx.params["2.bias"], lambda kept: kept),
    "a large parameter": (lambda ctx: ctx.params["0.weight"], lambda kept: kept),
    "the slots of a parameter": (slot, lambda kept: kept["exp_avg"]),
    "a slot": (lambda ctx: slot(ctx)["exp_avg_sq"], lambda kept: kept),
    "a counter": (lambda ctx: slot(ctx)["step"], lambda kept: kept),
    "a view": (lambda ctx: ctx.params["2.bias"][:1], lambda kept: kept),
    "a detached tensor": (lambda ctx: ctx.params["2.weight"].detach(), lambda kept: kept),
    "an array": (lambda ctx: ctx.params["2.weight"].numpy(), torch.from_numpy),
    "a part of an array": (lambda ctx: ctx.params["2.weight"].numpy()[1], torch.from_numpy),
    "a storage": (lambda ctx: ctx.params["0.weight"].untyped_storage(), lambda kept: torch.tensor(list(kept)[:64])),
    "a graph": (
        graph,
        lambda kept: torch.autograd.grad(
            kept, kept.grad_fn.next_functions[0][0].next_functions[1][0].variable, retain_graph=True
        )[0],
    ),
    "a closure": (lambda ctx: lambda: ctx, lambda kept: kept().params["2.bias"]),
    "a tuple of dicts": (lambda ctx: ({"a": [ctx.params["2.bias"]]},), lambda kept: kept[0]["a"][0]),
    "an iterator": (lambda ctx: iter(ctx.params.values()), lambda kept: copy.copy(kept).__next__()),
}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("flags", ["default", "fused"])
def test_what_a_hook_keeps_stays_as_it_was(holder: str, flags: str) -> None:
    take, read = HOLDERS[holder]
    kept: list[tuple[Any, torch.Tensor]] = []

    def keep(ctx: fl.Context) -> fl.Context:
        if ctx.global_step in (2, 3, 5):
            held = take(ctx)
            kept.append((held, read(held).clone()))
        return ctx

    fl.train(fl.init(loop_of(f"AdamW {flags}", callbacks=[fl.Callback("keep", batch_end=keep)])))
    assert len(kept) == 3
    for held, before in kept:
        assert torch.equal(read(held), before)


def test_what_a_hook_has_a_weak_reference_to_is_gone_or_as_it_was() -> None:
    kept: list[tuple[Any, torch.Tensor]] = []

    def keep(ctx: fl.Context) -> fl.Context:
        kept.append((weakref.ref(ctx.params["2.bias"]), ctx.params["2.bias"].clone()))
        for ref, before in kept:
            assert ref() is None or torch.equal(ref(), before)
        return ctx

    fl.train(fl.init(loop_of(callbacks=[fl.Callback("keep", batch_end=keep)])))
    assert len(kept) == 10


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_with_hooks_have_the_bits_of_steps_without(optimizer: str) -> None:
    changing = fl.Callback(
        "look", batch_begin=lambda ctx: ctx, after_backward=lambda ctx: ctx, batch_end=lambda ctx: ctx
    )
    alone = fl.train(fl.init(loop_of(optimizer)))
    looked_at = fl.train(fl.init(loop_of(optimizer, callbacks=[changing])))
    assert fl.tree_equal(alone.params, looked_at.params)
    assert fl.tree_equal(alone.optimizer_state, looked_at.optimizer_state)


def places_of(loop: fl.Loop) -> list[int]:
    """Where the largest parameter of every context is, each context being dropped."""
    places = []
    contexts = fl.iterate(fl.init(loop))
    for ctx in contexts:
        if ctx.stage == "batch_end":
            places.append(ctx.params["0.weight"].data_ptr())
        del ctx
    return places


def test_memory_of_large_tensors_is_used_again_in_turns(large: bool) -> None:
    if large:
        places = places_of(loop_of())
        assert len(places) == 10
        assert places == places[:2] * 5


def test_a_large_tensor_keeps_its_layout() -> None:
    for tensor in (torch.randn(4, 6).t(), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.ones(7)):
        for dtype in (torch.float32, torch.float64, torch.int64):
            before = tensor.to(dtype, memory_format=torch.preserve_format)
            copied = pages.Pages().copy(before)
            assert copied.dtype is dtype
            assert copied.stride() == before.stride()
            assert torch.equal(copied, before)
            assert copied.data_ptr() % 64 == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="another process shares nothing without fork")
def test_a_process_that_is_forked_does_not_see_what_is_written_later() -> None:
    own = pages.Pages()
    tensor = own.copy(own.copy(torch.ones(3)))
    (ready, go), (heard, say) = os.pipe(), os.pipe()
    if (child := os.fork()) == 0:
        os.read(ready, 1)
        os.write(say, bytes([int(tensor.sum())]))
        os._exit(0)
    del tensor
    for _ in range(4):
        own.copy(torch.zeros(3))
    os.write(go, b".")
    assert os.read(heard, 1) == bytes([3])
    os.waitpid(child, 0)
    for end in (ready, go, heard, say):
        os.close(end)


def test_iterate_gives_contexts_that_stay_as_they_are() -> None:
    kept = [(ctx, fl.digest(ctx)) for ctx in fl.iterate(fl.init(loop_of()))]
    assert all(fl.digest(ctx) == before for ctx, before in kept)
    some = [(ctx, fl.digest(ctx)) for i, ctx in enumerate(fl.iterate(fl.init(loop_of()))) if i % 3 == 0]
    assert [before for _, before in some] == [before for _, before in kept][::3]
    assert all(fl.digest(ctx) == before for ctx, before in some)


def test_iterate_holds_on_to_no_context_that_it_has_passed() -> None:
    start = fl.init(loop_of())
    passed = [weakref.ref(start)]
    contexts = fl.iterate(start)
    del start
    for ctx in contexts:
        assert all(ref() is None for ref in passed[:-1])
        passed.append(weakref.ref(ctx))


def test_what_another_process_may_see_stays_as_it_is() -> None:
    kept: list[tuple[Any, torch.Tensor]] = []

    def show(ctx: fl.Context) -> fl.Context:
        if ctx.global_step == 3:
            # What another process would be given.
            sent = pickle.loads(ForkingPickler.dumps(ctx.params["0.weight"]))
            kept.append((sent, ctx.params["0.weight"].clone()))
        return ctx

    fl.train(fl.init(loop_of(callbacks=[fl.Callback("show", batch_end=show)])))
    for theirs, before in kept:
        assert theirs.is_shared()
        assert torch.equal(theirs, before)


def test_a_schedule_changes_what_moves_the_same_tensors() -> None:
    rates = []

    def decay(ctx: fl.Context) -> fl.Context:
        rates.append(ctx.optimizer_state["groups"][0]["lr"])
        return ctx.with_hyperparameters(lr=rates[-1] * 0.9)

    scheduled = loop_of(callbacks=[fl.Callback("decay", batch_end=decay)])
    end = fl.train(fl.init(scheduled))
    assert len(set(rates)) == len(rates)
    again = fl.init(scheduled)
    for _ in rates:
        # Every step by itself remembers nothing.
        again = fl.train(fl.load_state_dict(again, copy.deepcopy(fl.state_dict(again))), steps=1)
    assert fl.digest(fl.train(again)) == fl.digest(end)


@pytest.mark.parametrize("stage", ["batch_begin", "after_backward", "batch_end"])
def test_an_error_carries_the_last_boundary_as_it_was(stage: str) -> None:
    def fail(ctx: fl.Context) -> fl.Context:
        if ctx.global_step == 4:
            raise RuntimeError("no more")
        return ctx

    failing = loop_of(callbacks=[fl.Callback("fail", **{stage: fail})])
    with pytest.raises(RuntimeError, match="no more") as error:
        fl.train(fl.init(failing))
    last = fl.context_of(error.value)
    assert last is not None
    assert fl.digest(last) == fl.digest(fl.train(fl.init(failing), steps=3))


def test_what_a_hook_does_to_slots_that_it_was_given_is_not_seen_later() -> None:
    seen: list[bool] = []

    def cheat(ctx: fl.Context) -> fl.Context:
        seen.append("note" in slot(ctx))
        if ctx.global_step != 3:
            return ctx
        before = {name: dict(slots) for name, slots in ctx.optimizer_state["slots"].items()}
        slot(ctx)["note"] = torch.ones(1)
        return fl.evolve(ctx, optimizer_state={**ctx.optimizer_state, "slots": before})

    fl.train(fl.init(loop_of(callbacks=[fl.Callback("cheat", batch_end=cheat)])))
    assert len(seen) == 10
    assert not any(seen)
