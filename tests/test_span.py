"""Batches between which nobody looks are stepped in place, and nobody can tell."""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import functional_loop as fl
from functional_loop.callbacks import ema
from functional_loop.engine.in_place import InPlaceSpan
from functional_loop.engine.solo import borrow_step

F = nn.functional


class Uneven(nn.Module):
    """Its last part gets a gradient in some batches only; one parameter has strides of its own, one is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.2))
        self.transposed = nn.Parameter(torch.randn(4, 4).t())
        self.last = nn.Linear(4, 4)
        self.unused = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) @ self.transposed
        return self.last(x) if x[0, 0] > 0 else x


OPTIMIZERS: dict[str, Callable[[], fl.Optimizer]] = {
    "AdamW": lambda: fl.optimizer(torch.optim.AdamW, lr=0.01),
    "fused AdamW": lambda: fl.optimizer(torch.optim.AdamW, lr=0.01, fused=True),
    "fused amsgrad": lambda: fl.optimizer(torch.optim.Adam, lr=0.01, fused=True, amsgrad=True),
    "SGD": lambda: fl.optimizer(torch.optim.SGD, lr=0.1),
    "SGD momentum": lambda: fl.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "fused SGD momentum": lambda: fl.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "groups": lambda: fl.optimizer(torch.optim.AdamW, fused=True, groups=[{"params": "*.bias", "weight_decay": 0.0}]),
    "a tensor as rate": lambda: fl.optimizer(torch.optim.AdamW, lr=torch.tensor(0.01)),
    "RMSprop": lambda: fl.optimizer(torch.optim.RMSprop, lr=0.01),
}


def loop_of(name: str, **more: Any) -> fl.Loop:
    with fl.seeded(3):
        x, y = torch.randn(22, 3), torch.randn(22, 4)
    arguments: dict[str, Any] = {
        "network": Uneven,
        "train": fl.batches(x, y, batch_size=4, shuffle=True),
        "valid": fl.batches(x, y, batch_size=11),
        "epochs": 3,
        "measures_train": [fl.measure("mse", F.mse_loss, minimize=True)],
    }
    return fl.Loop(optimizer=OPTIMIZERS[name](), **({"loss": F.mse_loss} | arguments | more))


def boundaries(ctx: fl.Context) -> list[fl.Context]:
    return list(fl.iterate(ctx))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_that_is_unobserved_at_has_the_bits_of_one_that_is_watched(name: str) -> None:
    start = fl.init(loop_of(name), seed=1)
    watched = boundaries(start)
    assert fl.digest(fl.train(start)) == fl.digest(watched[-1])
    after = {ctx.global_step: fl.digest(ctx) for ctx in watched if ctx.stage == "batch_end"}
    for steps in (1, 2, 5, 6, 9):
        assert fl.digest(fl.train(start, steps=steps)) == after[steps]


@pytest.mark.parametrize("name", ["AdamW", "fused AdamW"])
def test_mixed_precision_has_no_stale_casts(name: str) -> None:
    start = fl.init(loop_of(name, autocast=torch.bfloat16), seed=1)
    end = fl.digest(boundaries(start)[-1])
    assert fl.digest(fl.train(start)) == end
    with torch.autocast("cpu", torch.bfloat16):
        assert fl.digest(fl.train(start)) == end


@pytest.mark.parametrize("name", ["AdamW", "RMSprop"])
def test_precision_is_that_of_the_loop_whatever_is_set_around_the_call(name: str) -> None:
    def scaled(ctx: fl.Context) -> fl.Context:
        product = ctx.params["last.weight"] @ ctx.params["last.weight"]
        return fl.evolve(ctx, callbacks={**ctx.callbacks, "scaled": {"sum": product.sum()}})

    hook = fl.Callback("scaled", init=lambda ctx: {"sum": torch.zeros(())}, epoch_end=scaled)
    start = fl.init(loop_of(name, callbacks=[hook]), seed=1)
    end = fl.digest(fl.train(start))
    begun = next(ctx for ctx in fl.iterate(start) if ctx.stage == "epoch_begin")
    batch = (torch.ones(4, 3), torch.ones(4, 4))
    stepped = fl.digest(fl.train_step(begun, batch))
    with torch.autocast("cpu", torch.bfloat16):
        assert fl.digest(fl.train(start)) == end
        assert fl.digest(boundaries(start)[-1]) == end
        assert fl.digest(fl.train_step(begun, batch)) == stepped


@given(st.sampled_from(list(OPTIMIZERS)), st.lists(st.integers(1, 7), max_size=5))
def test_contexts_on_the_way_stay_what_they_were(name: str, parts: list[int]) -> None:
    kept: list[tuple[fl.Context, str]] = []

    def keep(ctx: fl.Context) -> fl.Context:
        if ctx.epoch != 2:
            kept.append((ctx, fl.digest(fl.boundary(ctx, "epoch_end"))))
        return ctx

    ctx = fl.init(loop_of(name, callbacks=[ema(0.9), fl.Callback("keep", epoch_end=keep, last=True)]), seed=2)
    given = [(ctx, fl.digest(ctx))]
    for steps in parts:
        ctx = fl.train(ctx, steps=steps)
        given.append((ctx, fl.digest(ctx)))
    fl.train(ctx)
    for ctx, digest in given:
        assert fl.digest(ctx) == digest
    for ctx, digest in kept:
        assert fl.digest(fl.boundary(ctx, "epoch_end")) == digest


class Intercept(nn.Module):
    """Predicts its parameter, and remembers what it was."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.ones(4))
        self.register_buffer("before", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.before = self.value.detach()
        return self.value.expand(len(x), 4)


@pytest.mark.parametrize("name", ["fused AdamW", "AdamW", "SGD"])
@pytest.mark.parametrize("loss", [F.mse_loss, lambda y_hat, y: y_hat[0, 0]])
def test_outputs_buffers_and_losses_may_be_views_of_parameters(name: str, loss: Any) -> None:
    start = fl.init(loop_of(name, network=Intercept, loss=loss))
    ends = fl.train(start), boundaries(start)[-1]
    assert fl.digest(ends[0]) == fl.digest(ends[1])
    assert ends[0].last_scores_train == ends[1].last_scores_train
    assert fl.train(start, steps=5).last_loss == next(c for c in fl.iterate(start) if c.global_step == 5).last_loss


class Hidden(torch.autograd.Function):
    """Gives what it is given, in a way that autograd does not know to be a view."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.empty(0).set_(x.detach())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class HiddenViews(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return Hidden.apply(self.value.expand(len(x), 4))


@pytest.mark.parametrize("name", ["fused AdamW", "AdamW", "SGD"])
@pytest.mark.parametrize("loss", [F.mse_loss, lambda y_hat, y: Hidden.apply(y_hat[0, 0])])
def test_outputs_and_losses_may_share_memory_with_parameters_in_secret(name: str, loss: Any) -> None:
    kept = [fl.measure("all", lambda y_hat, y: y_hat.sum())]
    start = fl.init(loop_of(name, network=HiddenViews, loss=loss, measures_train=kept))
    watched = boundaries(start)
    assert fl.train(start).last_scores_train == watched[-1].last_scores_train
    assert fl.train(start, steps=5).last_loss == next(c for c in watched if c.global_step == 5).last_loss


class Witness(nn.Module):
    """Remembers where its parameter lies in memory."""

    def __init__(self, places: list[int]) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.places = places

    def __deepcopy__(self, memo: Any) -> Witness:
        copied = Witness(self.places)
        copied.layer = copy.deepcopy(self.layer, memo)
        return copied

    def forward(self, x: Tensor) -> Tensor:
        self.places.append(self.layer.weight.data_ptr())
        return self.layer(x)


def test_the_steps_of_an_epoch_are_in_place_on_copies() -> None:
    places: list[int] = []
    loop = loop_of("fused AdamW", network=lambda: Witness(places), epochs=1, valid=None)
    start = fl.init(loop)
    end = fl.train(start)
    assert set(places) == {end.params["layer.weight"].data_ptr()}
    assert start.params["layer.weight"].data_ptr() not in places
    places.clear()
    kept = boundaries(start)
    assert len(set(places)) == len([ctx for ctx in kept if ctx.stage == "batch_end"])


@pytest.mark.parametrize("name", ["fused AdamW", "AdamW", "SGD momentum"])
def test_memory_of_a_context_is_let_go_of_as_it_is_copied(name: str) -> None:
    """So that no more than one tensor is there twice where nobody has the context."""

    class Source(fl.BatchSource):
        length = 1

        def fetch(self, *_: Any) -> Iterator[tuple[fl.Batch, Any]]:
            assert all(ref() is None for ref in held)
            yield fl.Batch(torch.ones(4, 3), torch.ones(4, 4)), ()

        def fingerprint(self) -> dict[str, Any]:
            return {}

    begun = fl.train(fl.init(loop_of(name)), steps=2)
    ctx = fl.evolve(
        begun, loop=fl.evolve(begun.loop, train=Source()), epoch=1, step=0, global_step=0, stage="epoch_begin"
    )
    tensors = [*(ctx.params[n] for n in ctx.trainable), *slots_of(ctx)]
    held = [weakref.ref(tensor) for tensor in tensors]
    del begun, tensors
    contexts = [ctx]
    del ctx
    # Not in an assert statement, which would hold on to the argument.
    fl.train(contexts.pop(), steps=1)


def slots_of(ctx: fl.Context) -> Iterator[Tensor]:
    for slots in ctx.optimizer_state["slots"].values():
        yield from (slot for slot in slots.values() if isinstance(slot, Tensor))


@pytest.mark.parametrize("name", ["fused AdamW", "AdamW", "SGD momentum", "RMSprop"])
def test_an_interrupt_at_any_line_leaves_a_boundary(name: str) -> None:
    """From whatever `context_of` gives, the run ends with the bits of an uninterrupted one."""
    start = fl.init(loop_of(name, epochs=1, valid=None), seed=1)
    watched = {fl.digest(ctx) for ctx in boundaries(start)}
    end = fl.digest(fl.train(start))
    # Not seeding.py: between the body of a with statement and its end, where a lock would stay taken, no signal comes,
    # but a trace function may raise.
    rooms = ("carry", "torch_carry", "span", "in_place", "mover", "kernels", "step", "network", "borrowed", "solo")
    files = tuple(f"/{room}.py" for room in rooms)
    at = 0
    while (error := _interrupted(start, files, at)) is not None:
        # Before the run is entered, none is given.
        ctx = fl.context_of(error) or start
        assert fl.digest(ctx) in watched | {fl.digest(start)}
        assert fl.digest(fl.train(ctx)) == end
        at += 29
    assert at > 500


def _interrupted(start: fl.Context, files: tuple[str, ...], at: int) -> KeyboardInterrupt | None:
    """Train from ``start`` with an interrupt before the ``at``-th line of ``files``."""
    count = 0

    def trace(frame: Any, event: str, argument: object) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.endswith(files):
            return None
        if event == "line":
            count += 1
            if count == at + 1:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        fl.train(start)
    except KeyboardInterrupt as error:
        return error
    finally:
        sys.settrace(before)
    return None


def test_errors_say_where_and_carry_the_boundary_before() -> None:
    calls = 0

    def loss(y_hat: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise RuntimeError("boom")
        return F.mse_loss(y_hat, y)

    loop = fl.evolve(loop_of("fused AdamW"), loss=loss)
    start = fl.init(loop)
    # The first step of a loop calls the loss more than once.
    fl.train(start, steps=1)
    calls = 0
    with pytest.raises(RuntimeError, match="boom") as caught:
        fl.train(start)
    assert "between 'batch_begin' and 'after_backward' (epoch 2, step 3)" in caught.value.__notes__[0]
    ctx = fl.context_of(caught.value)
    assert ctx is not None
    assert (ctx.stage, ctx.epoch, ctx.step) == ("batch_end", 2, 2)
    assert fl.digest(ctx) == fl.digest(fl.train(start, steps=8))


@pytest.mark.parametrize("stage", ["batch_begin", "after_backward", "batch_end"])
def test_hooks_of_a_batch_see_every_batch(stage: str) -> None:
    seen: list[int] = []

    def look(ctx: fl.Context) -> fl.Context:
        seen.append(ctx.global_step)
        return ctx

    loop = loop_of("fused AdamW", callbacks=[fl.Callback("look", **{stage: look})])
    ctx = fl.train(fl.init(loop))
    assert seen == list(range(1, ctx.global_step + 1))
    step = borrow_step(loop)
    assert not InPlaceSpan.can_train(step, ctx)
    assert InPlaceSpan.can_train(step, fl.init(loop_of("fused AdamW")))
