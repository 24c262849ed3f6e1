"""What an object callback was given, or has made of it, never changes under it; and no context changes through it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import functional_loop as fl
from functional_loop.callbacks.objects.callback_set import CallbackSet
from tests.callbacks.objects import digests, doing
from tests.sample_loops import data, full_loop, make_loop

FIELDS: dict[str, tuple[str, Callable[[Any], Tensor]]] = {
    "network": ("batch_end", lambda ctx: ctx.network[0].weight.detach()),
    "network in validation": ("batch_valid_end", lambda ctx: ctx.network[0].weight.data),
    "a buffer of the network": ("batch_end", lambda ctx: ctx.network[1].running_mean.view(-1)),
    "a gradient of the network": ("after_backward", lambda ctx: ctx.network[0].weight.grad),
    "params": ("epoch_begin", lambda ctx: ctx.params["0.weight"]),
    "buffers": ("batch_end", lambda ctx: ctx.buffers["1.running_mean"]),
    "grads": ("after_backward", lambda ctx: ctx.grads["0.weight"]),
    "batch": ("batch_begin", lambda ctx: ctx.batch.x),
    "y_hats": ("batch_end", lambda ctx: ctx.y_hat),
    "last_loss": ("batch_end", lambda ctx: ctx.last_loss),
    "a slot": ("epoch_end", lambda ctx: next(iter(ctx.optimizer.state.values()))["exp_avg"]),
    "a slot by name": ("epoch_end", lambda ctx: ctx.optimizer_state["slots"]["0.weight"]["exp_avg"]),
    "the context": ("batch_end", lambda ctx: ctx.context.params["0.weight"]),
}

HOLDS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], bytes]]] = {
    "tensor": (Tensor.detach, lambda kept: kept.numpy().tobytes()),
    "view": (lambda t: t.detach().reshape(-1)[:1], lambda kept: kept.numpy().tobytes()),
    "numpy": (lambda t: t.detach().numpy(), lambda kept: kept.tobytes()),
    "memoryview": (lambda t: memoryview(t.detach().numpy()), lambda kept: kept.tobytes()),
    "dlpack": (lambda t: np.from_dlpack(t.detach()), lambda kept: kept.tobytes()),
    "storage": (Tensor.untyped_storage, bytes),
}


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("field", FIELDS)
def test_what_a_callback_keeps_stays_as_it_is(field: str, hold: str) -> None:
    (stage, look), (make, read) = FIELDS[field], HOLDS[hold]
    kept: list[tuple[Any, bytes]] = []

    def keep(self: Any) -> None:
        held = make(look(self.ctx))
        kept.append((held, read(held)))

    loop = full_loop(callbacks=[doing("Keeping", **{f"on_{stage}": keep})])
    assert digests(loop) == digests(full_loop(callbacks=[]))
    assert kept
    assert all(read(held) == before for held, before in kept)


@pytest.mark.parametrize("field", FIELDS)
def test_arrays_of_kept_contexts_stay_as_they_are(field: str) -> None:
    stage, look = FIELDS[field]
    loop = full_loop(callbacks=[doing("Looking", **{f"on_{stage}": lambda self: look(self.ctx)})])
    kept = [(c.params["0.weight"].numpy(), c.params["0.weight"].clone()) for c in fl.iterate(fl.init(loop))]
    assert all(array.tobytes() == before.numpy().tobytes() for array, before in kept)


def test_what_was_not_asked_for_is_not_copied() -> None:
    pointers: list[Callable[[], Tensor | None]] = []

    class CallbackSetOnce(CallbackSet):
        def on_batch_end(self) -> None:
            if self.ctx.global_step == 1:
                pointers.append(weakref.ref(self.ctx.params["0.weight"]))
            assert self.ctx.epoch

    fl.train(fl.init(make_loop(callbacks=[CallbackSetOnce()])))
    assert [pointer() for pointer in pointers] == [None]


def test_a_network_that_has_not_changed_keeps_its_memory() -> None:
    seen: list[tuple[int, int]] = []

    def look(self: Any) -> None:
        seen.append((self.ctx.epoch, self.ctx.network[0].weight.data_ptr()))

    fl.train(fl.init(full_loop(callbacks=[doing("Looking", on_batch_valid_end=look)])))
    assert len(set(seen)) == len({epoch for epoch, _ in seen}) < len(seen)


def test_what_is_written_between_two_stages_is_not_shown() -> None:
    arrays: list[Any] = []

    def look(self: Any) -> None:
        assert not arrays or not (self.ctx.network[0].weight == 5).any()
        arrays.append(self.ctx.network[0].weight.detach().numpy())

    loop = full_loop(callbacks=[doing("Looking", on_batch_valid_begin=look)])
    for _ in fl.iterate(fl.init(loop)):
        if arrays:
            arrays[-1][...] = 5
    assert len(arrays) > 2


def test_a_state_of_the_optimizer_that_is_kept_shows_every_stage_and_can_be_written_at_any() -> None:
    def keep(self: Any) -> None:
        self.kept = self.ctx.optimizer.state

    def write(self: Any) -> None:
        for slot in self.kept.values():
            slot["momentum_buffer"].zero_()

    def pure(ctx: fl.Context) -> fl.Context:
        slots = fl.tree_map(torch.zeros_like, ctx.optimizer_state["slots"])
        return fl.evolve(ctx, optimizer_state={**ctx.optimizer_state, "slots": slots})

    loop = make_loop(callbacks=[doing("Keeping", on_begin=keep, on_batch_end=write)])
    assert digests(loop) == digests(make_loop(callbacks=[fl.Callback("hook", batch_end=pure)]))


# ---- tensors of other origin


def from_numpy(tensor: Tensor, path: Path) -> Tensor:
    return torch.from_numpy(tensor.numpy().copy())


def from_dlpack(tensor: Tensor, path: Path) -> Tensor:
    return torch.from_dlpack(tensor.numpy().copy())


def from_file(tensor: Tensor, path: Path) -> Tensor:
    file = path / str(len(list(path.iterdir())))
    tensor.numpy().tofile(file)
    return torch.from_numpy(np.memmap(file, dtype=np.float32, shape=tuple(tensor.shape), mode="r+"))


def shared(tensor: Tensor, path: Path) -> Tensor:
    return tensor.clone().share_memory_()


@pytest.mark.parametrize("origin", [from_numpy, from_dlpack, from_file, shared])
def test_tensors_of_any_origin_can_be_looked_at_and_written_to(origin: Any, tmp_path: Path) -> None:
    x, y = data(3)
    network = nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.data = origin(parameter.detach(), tmp_path)
    source = [(origin(x[i : i + 4], tmp_path), y[i : i + 4]) for i in range(0, 10, 4)]
    before = [rows.clone() for rows, _ in source]

    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = network

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    def write(self: Any) -> None:
        assert self.ctx.network is not None
        assert self.ctx.optimizer.state is not None
        self.ctx.batch.x.add_(1)

    def pure(ctx: fl.Context) -> fl.Context:
        return fl.evolve(ctx, batch=fl.evolve(ctx.batch, x=ctx.batch.x + 1))

    def loop(callback: Any) -> fl.Loop:
        return make_loop(network=Reading(), train=fl.batches(source), callbacks=[callback])

    assert digests(loop(doing(on_batch_begin=write))) == digests(loop(fl.Callback("hook", batch_begin=pure)))
    assert all(torch.equal(rows, old) for (rows, _), old in zip(source, before, strict=True))


def test_batches_from_workers_can_be_looked_at() -> None:
    rows = torch.utils.data.TensorDataset(*data(3))
    seen: list[Tensor] = []
    looking = doing(on_batch_end=lambda self: seen.append(self.ctx.batch.x))
    fl.train(fl.init(make_loop(train=fl.batches(rows, batch_size=4, num_workers=1), epochs=1, callbacks=[looking])))
    assert torch.equal(torch.cat(seen), data(3)[0])
