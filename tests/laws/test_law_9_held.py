"""Law 9: what was handed out never changes, in whatever form it is held, whatever trains on.

``MALLOC_PERTURB_=165 PYTHONMALLOC=malloc python -m pytest tests/laws/test_law_9_held.py`` fills memory that is freed
with a pattern, so that memory that is looked at too late shows.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import dlpack

import functional_loop as fl
from functional_loop.callbacks import ema
from functional_loop.optim import mover
from tests.sample_loops import data, mean_absolute

pytestmark = pytest.mark.filterwarnings("ignore:resuming in mid-epoch reads", "ignore:TypedStorage is deprecated")

Read = Callable[[], bytes | None]
"""What can be seen of something that is held; ``None`` if it is gone."""


def of(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().numpy().tobytes())


def weakly(tensor: Tensor) -> Read:
    ref = weakref.ref(tensor)
    return lambda: None if (alive := ref()) is None else of(alive)


def storage_weakly(tensor: Tensor) -> Read:
    ref = weakref.ref(tensor.untyped_storage())
    return lambda: None if (alive := ref()) is None else bytes(alive)


def storage_very_weakly(tensor: Tensor) -> Read:
    """As torch refers to storages that it shares with other processes: Python does not know of it."""
    ref = StorageWeakRef(tensor.untyped_storage())

    def read() -> bytes | None:
        alive = torch.UntypedStorage._new_with_weak_ptr(ref.cdata)
        return None if alive is None else bytes(alive)

    return read


def graph(tensor: Tensor) -> Read:
    if not tensor.is_floating_point():
        return lambda: of(tensor)
    with torch.enable_grad():
        ones = torch.ones_like(tensor, requires_grad=True)
        total = (tensor.detach() * ones).sum()
    # The gradient is what the graph has kept.
    return lambda: of(torch.autograd.grad(total, ones, retain_graph=True)[0])


def array(change: Callable[[Any], Any]) -> Callable[[Tensor], Read]:
    def take(tensor: Tensor) -> Read:
        held = change(tensor.detach().numpy())
        return lambda: np.ascontiguousarray(held).tobytes()

    return take


def tensor(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Read]:
    def take(tensor: Tensor) -> Read:
        held = change(tensor)
        return lambda: of(held)

    return take


def storage(tensor: Tensor) -> Read:
    held = tensor.untyped_storage()
    return lambda: bytes(held)


def typed_storage(tensor: Tensor) -> Read:
    held = tensor.storage()
    return lambda: repr(held.tolist()).encode()


def capsule(tensor: Tensor) -> Read:
    held = dlpack.to_dlpack(tensor.detach())
    return lambda: of(dlpack.from_dlpack(held))


def closure(tensor: Tensor) -> Read:
    return lambda: of(tensor)


def another_process(tensor: Tensor) -> Read:
    """What a process that is sent the tensor has: its memory under another address."""
    held = pickle.loads(ForkingPickler.dumps(tensor.detach()))
    return lambda: of(held)


class Reader:
    """A thread that looks at a tensor again and again; all that it has seen."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.done, self.seen = tensor, threading.Event(), {of(tensor)}
        self.thread = threading.Thread(target=self.look, daemon=True)
        self.thread.start()

    def look(self) -> None:
        while not self.done.wait(0.001):
            self.seen.add(of(self.tensor))

    def __call__(self) -> bytes:
        self.done.set()
        self.thread.join()
        return b"".join(sorted(self.seen))


WAYS: dict[str, Callable[[Tensor], Read]] = {
    "a tensor": tensor(lambda t: t),
    "a detached tensor": tensor(lambda t: t.detach()),
    "a view": tensor(lambda t: t.view(-1)[:1] if t.is_contiguous() else t[:1]),
    "a transposed view": tensor(lambda t: t.t() if t.dim() == 2 else t.view_as(t)),
    "a view of its data": tensor(lambda t: t.data.unsqueeze(0)),
    "a part of it": tensor(lambda t: t.unbind(0)[-1] if t.dim() and len(t) else t.squeeze()),
    "an alias": tensor(lambda t: torch.empty(0, dtype=t.dtype).set_(t.detach())),
    "an array": array(lambda a: a),
    "a part of an array": array(lambda a: a.reshape(-1)[:1] if a.flags.c_contiguous else a[:1]),
    "a tensor over an array": array(lambda a: torch.from_numpy(a).numpy()),
    "a memoryview": array(lambda a: memoryview(a)),
    "a tensor over a memoryview": array(
        lambda a: torch.frombuffer(memoryview(a), dtype=torch.uint8).numpy() if a.flags.c_contiguous and a.size else a
    ),
    "an array over a capsule": array(lambda a: np.from_dlpack(torch.from_numpy(a))),
    "a capsule": capsule,
    "a storage": storage,
    "a typed storage": typed_storage,
    "a weak reference": weakly,
    "a weak reference to a storage": storage_weakly,
    "a weak reference of C++ to a storage": storage_very_weakly,
    "a graph": graph,
    "a closure": closure,
    "an iterator": lambda t: tensor(lambda t: t)(next(iter([t]))),
    "a thread": Reader,
    "another process": another_process,
}


def slots(ctx: fl.Context, key: str) -> Iterator[Any]:
    for slot in ctx.optimizer_state["slots"].values():
        yield from (value for name, value in slot.items() if name == key or key == "")


FIELDS: dict[str, Callable[[fl.Context], Any]] = {
    "params": lambda ctx: ctx.params["layers.1.weight"],
    "a small parameter": lambda ctx: ctx.params["layers.1.bias"],
    "the last parameter": lambda ctx: [*ctx.params.values()][-1],
    "buffers": lambda ctx: ctx.buffers["layers.2.running_var"],
    "a counter of the network": lambda ctx: ctx.buffers["layers.2.num_batches_tracked"],
    "slots": lambda ctx: [*slots(ctx, "")][-1],
    "counters": lambda ctx: next(slots(ctx, "step")),
    "momenta": lambda ctx: next(slots(ctx, "exp_avg")),
    "an average": lambda ctx: ctx.callbacks["ema"]["layers.1.weight"],
    "last_loss": lambda ctx: ctx.last_loss,
    "predictions": lambda ctx: ctx.measures["train"]["predictions"][0]["y_hat"],
    "targets": lambda ctx: ctx.measures["train"]["predictions"][0]["y"],
    "accumulators": lambda ctx: ctx.measures["train"]["states"]["total"],
    "predictions in validation": lambda ctx: ctx.measures["valid"]["predictions"][-1]["y_hat"],
    "accumulated": lambda ctx: ctx.accumulated["layers.1.weight"],
    "batch.x": lambda ctx: ctx.batch.x,
    "batch.y": lambda ctx: ctx.batch.y,
    "batch.index": lambda ctx: ctx.batch.index,
    "y_hats": lambda ctx: ctx.y_hats,
    "grads": lambda ctx: ctx.grads["layers.1.weight"],
    "the state dict": lambda ctx: fl.state_dict(ctx)["network"]["layers.1.weight"],
}


class Views(nn.Module):
    """Writes to its input where it is told to; its outputs in evaluation are views of a parameter."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.ReLU(inplace), nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.constant = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Any:
        y_hat = self.layers(x)
        return y_hat if self.training else self.constant.expand_as(y_hat)


class Refilled:
    """A loader whose batches are one buffer."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        (x, y), buffers = data(3), (torch.empty(5, 3), torch.empty(5, 2))
        for rows in (slice(0, 5), slice(5, 10), slice(2, 7)):
            buffers[0].copy_(x[rows])
            buffers[1].copy_(y[rows])
            yield buffers


SOURCES: dict[str, Callable[[], fl.BatchSource]] = {
    "tensors": lambda: fl.batches(*data(3), batch_size=4, shuffle=True),
    "a refilled buffer": lambda: fl.batches(Refilled()),
    "slices of the dataset": lambda: fl.batches([(x, y) for x, y in zip(*(t.split(5) for t in data(3)), strict=True)]),
    "a collate function": lambda: fl.batches(
        torch.utils.data.TensorDataset(*data(3)), batch_size=5, collate_fn=lambda rows: next(iter(Refilled()))
    ),
}
OPTIMIZERS = {
    "AdamW": lambda: fl.optimizer(torch.optim.AdamW, lr=0.1),
    "fused AdamW": lambda: fl.optimizer(torch.optim.AdamW, lr=0.1, fused=True),
    "fused amsgrad": lambda: fl.optimizer(torch.optim.Adam, lr=0.1, fused=True, amsgrad=True),
    "SGD": lambda: fl.optimizer(torch.optim.SGD, lr=0.1),
    "momentum": lambda: fl.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "RMSprop": lambda: fl.optimizer(torch.optim.RMSprop, lr=0.1),
}
LOOKED_AT: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "epochs": ("begin", "epoch_begin", "before_valid", "valid_end", "epoch_end", "end"),
    "batches": ("batch_begin", "after_backward", "batch_end", "batch_valid_begin", "batch_valid_end"),
}


def by_steps(ctx: fl.Context) -> Iterator[fl.Context]:
    while ctx.stage != "end":
        ctx = fl.train(ctx, steps=1)
        yield ctx


def by_train_step(ctx: fl.Context, donate: bool = False) -> Iterator[fl.Context]:
    *_, ctx = (c for c, _ in zip(fl.iterate(ctx), range(2), strict=False))
    yield ctx
    x, y = data(3)
    while ctx.step < 2:
        ctx = fl.train_step(ctx, (x, y), donate=donate)
        yield ctx


def members(mode: str) -> Callable[[fl.Context], Iterator[fl.Context]]:
    return lambda ctx: fl.iterate(fl.stack([fl.init(ctx.loop, seed) for seed in (1, 2)], mode=mode, batch_hooks="each"))


def adopted(ctx: fl.Context) -> Iterator[fl.Context]:
    """The state goes through an ordinary module and optimizer, which are written to later."""
    module = fl.to_module(ctx)
    optimizer = fl.to_optimizer(ctx, module)
    adopting = fl.init(fl.evolve(ctx.loop, network=module), optimizer_state_from=optimizer)
    yield adopting
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    yield from fl.iterate(adopting)


TRAINING: dict[str, Callable[[fl.Context], Iterator[fl.Context]]] = {
    "train": lambda ctx: iter([fl.train(ctx)]),
    "train(steps)": by_steps,
    "iterate": fl.iterate,
    "train_step": by_train_step,
    "donate": lambda ctx: by_train_step(ctx, donate=True),
    "vectorised members": members("vectorised"),
    "exact members": members("exact"),
    "adopted": adopted,
}


class Held:
    """What is taken of contexts, and what it showed then."""

    def __init__(self, field: str, way: str, every: int) -> None:
        self.field, self.take_of, self.once, self.every = FIELDS[field], WAYS[way], way in READ_ONCE, every
        self.kept: list[tuple[str, Read, bytes | None]] = []
        self.count = 0

    def take(self, ctx: fl.Context) -> fl.Context:
        try:
            found = self.field(ctx)
        except (LookupError, StopIteration, TypeError, AttributeError, ValueError):
            # It has no value here.
            return ctx
        if isinstance(found, Tensor):
            if self.count % self.every == 0:
                read = self.take_of(found)
                place = f"after {ctx.stage}, epoch {ctx.epoch}, step {ctx.step}"
                self.kept.append((place, read, of(found) if self.once else read()))
            self.count += 1
        return ctx

    def check(self) -> None:
        for place, read, before in self.kept:
            now = read()
            assert now == before or (now is None and self.take_of in WEAK), place


READ_ONCE = ("a capsule", "a thread")
WEAK = (weakly, storage_weakly, storage_very_weakly)


@given(
    st.sampled_from(list(FIELDS)),
    st.sampled_from(list(WAYS)),
    st.sampled_from(list(TRAINING)),
    st.sampled_from(list(LOOKED_AT)),
    st.sampled_from(list(OPTIMIZERS)),
    st.sampled_from(list(SOURCES)),
    st.sampled_from([1, 2]),
    st.sampled_from([1, mover.LARGE]),
    st.booleans(),
    st.integers(1, 3),
)
def test_what_was_handed_out_stays(field, way, training, looked_at, optimizer, source, accumulate, large, saves, every):
    held = Held(field, way, every)
    if training == "adopted":
        optimizer, source = "AdamW", "tensors"
    with fl.seeded(0):
        loop = fl.Loop(
            # Members at once read one batch.
            lambda: Views(inplace="members" not in training),
            nn.functional.mse_loss,
            OPTIMIZERS[optimizer](),
            train=SOURCES["tensors" if "members" in training else source](),
            valid=fl.batches(*data(3), batch_size=5),
            epochs=2,
            accumulate=accumulate,
            measures_train=MEASURES,
            measures_valid=MEASURES,
            callbacks=callbacks(held, looked_at),
        )
    # Of memory that moves to where others see it, torch leaves nothing to those who read where it was.
    saves = saves and way != "another process" and "members" not in training
    with mock.patch.object(mover, "LARGE", large), tempfile.TemporaryDirectory() as folder:
        digests = {}
        with fl.CheckpointStore(Path(folder) / "run") as store:
            for ctx in TRAINING[training](fl.init(loop, seed=1)):
                held.take(ctx)
                if saves and ctx.stage == "batch_end":
                    digests[ctx.global_step] = fl.digest(ctx)
                    store.save(ctx, wait=False)
                del ctx
            held.check()
        for step, digest in digests.items():
            assert fl.digest(store.load(loop, step=step)) == digest
    held.kept.clear()


MEASURES = [
    fl.measure("error", mean_absolute),
    fl.measure("total", init=lambda: torch.zeros(()), update=lambda s, y_hat, y: s + y_hat.sum(), compute=lambda s: s),
]


def callbacks(held: Held, looked_at: str) -> list[fl.Callback]:
    hooks: dict[str, Any] = dict.fromkeys(LOOKED_AT[looked_at], held.take)
    return [fl.Callback("held", **hooks), *([ema(0.5)] if looked_at == "batches" else [])] if hooks else []


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("field", ["batch.x", "batch.y"])
def test_a_batch_that_was_seen_stays(source: str, field: str) -> None:
    """Neither the loader nor the network, which writes to its input, writes to it."""
    held = Held(field, "a tensor", every=1)
    looking = callbacks(held, "batches")
    valid, optimizer = SOURCES[source](), OPTIMIZERS["SGD"]()
    train = SOURCES[source]()
    loss: Any = nn.functional.mse_loss
    fl.train(fl.init(fl.Loop(lambda: Views(True), loss, optimizer, train, valid=valid, epochs=2, callbacks=looking)))
    assert len(held.kept) >= 20
    held.check()


def test_it_holds_where_freed_memory_is_overwritten() -> None:
    """One run of the law in a process that fills freed memory with a pattern."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--hypothesis-profile=few", __file__]
    poisoned = {**os.environ, "MALLOC_PERTURB_": "165", "PYTHONMALLOC": "malloc"}
    selected = [*command, "-k", test_what_was_handed_out_stays.__name__]
    done = subprocess.run(selected, env=poisoned, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
