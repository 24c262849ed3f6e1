"""Ways in which losses, networks, callbacks and data hold a number; ``python tests/made_with.py`` prints what is known
of the runs that are made with them."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import enum
import functools
import itertools
import json
import logging
import os
import pathlib
import random
import sys
import tempfile
import threading
import time
import types
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import functional_loop as fl
import functional_loop.callbacks as cb

X = torch.arange(40.0).reshape(10, 4) / 40
Y = torch.arange(10) % 2
Loss = Callable[[Tensor, Tensor], Tensor]
ce = nn.functional.cross_entropy


def loop(**changes: Any) -> fl.Loop:
    arguments = {
        "network": lambda: nn.Linear(4, 2),
        "loss": ce,
        "optimizer": fl.optimizer(torch.optim.SGD, lr=0.1),
        "train": fl.batches(X, Y, batch_size=4),
        "epochs": 2,
    }
    return fl.Loop(**{**arguments, **changes})


class Factor:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, y_hat: Tensor, y: Tensor) -> Tensor:
        return self.factor * ce(y_hat, y)


class Slots(Factor):
    __slots__ = ("slot",)

    def __init__(self, factor: float) -> None:
        self.slot = factor

    def __call__(self, y_hat: Tensor, y: Tensor) -> Tensor:
        return self.slot * ce(y_hat, y)


class FactorModule(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, y_hat: Tensor, y: Tensor) -> Tensor:
        return self.factor * ce(y_hat, y)


@dataclasses.dataclass
class Config:
    factor: float
    names: set[str] = dataclasses.field(default_factory=lambda: {"a", "b", "c", "d"})


class Color(enum.Enum):
    RED = 1


def closure(w: float) -> Loss:
    return lambda y_hat, y: w * ce(y_hat, y)


def in_an_inner_function(w: float) -> Loss:
    return lambda y_hat, y: (lambda value: w * value)(ce(y_hat, y))


def in_a_function_beside_it(w: float) -> Loss:
    def scaled(value: Tensor) -> Tensor:
        return w * value

    return lambda y_hat, y: scaled(ce(y_hat, y))


def default(w: float) -> Loss:
    def loss(y_hat: Tensor, y: Tensor, w: float = w) -> Tensor:
        return w * ce(y_hat, y)

    return loss


def keyword(w: float) -> Loss:
    def loss(y_hat: Tensor, y: Tensor, *, w: float = w) -> Tensor:
        return w * ce(y_hat, y)

    return loss


def of_a_function(w: float) -> Loss:
    def loss(y_hat: Tensor, y: Tensor) -> Tensor:
        return loss.w * ce(y_hat, y)  # type: ignore[attr-defined,no-any-return]

    loss.w = w  # type: ignore[attr-defined]
    return loss


def in_a_tensor(w: float) -> Loss:
    weight = torch.tensor(w)
    return lambda y_hat, y: weight * ce(y_hat, y)


def in_an_array(w: float) -> Loss:
    weights = np.array([w, 1.0])
    return lambda y_hat, y: float(weights[0]) * ce(y_hat, y)


def in_a_dict(w: float) -> Loss:
    config = {"w": w, "began": time.perf_counter()}
    return lambda y_hat, y: config["w"] * ce(y_hat, y)


def in_a_namespace(w: float) -> Loss:
    args = argparse.Namespace(w=w, began=time.perf_counter(), epochs=3)
    return lambda y_hat, y: args.w * ce(y_hat, y)


def in_a_dataclass(w: float) -> Loss:
    config = Config(w)
    return lambda y_hat, y: config.factor * ce(y_hat, y)


def handed_on(w: float) -> Loss:
    args = argparse.Namespace(w=w, began=time.perf_counter())

    def scaled(args: Any, value: Tensor) -> Tensor:
        return value * args.w  # type: ignore[no-any-return]

    return lambda y_hat, y: scaled(args, ce(y_hat, y))


def in_a_wrapped_function(w: float) -> Loss:
    @functools.wraps(ce)
    def loss(y_hat: Tensor, y: Tensor) -> Tensor:
        return w * ce(y_hat, y)

    return loss


def under_no_grad(w: float) -> Loss:
    @torch.no_grad()
    def weight() -> float:
        return w

    return lambda y_hat, y: weight() * ce(y_hat, y)


def in_a_cached_function(w: float) -> Loss:
    weight = functools.lru_cache(lambda: w)
    return lambda y_hat, y: weight() * ce(y_hat, y)


def in_a_local_class(w: float) -> Loss:
    class Local:
        @property
        def weight(self) -> float:
            return w

        def __call__(self, y_hat: Tensor, y: Tensor) -> Tensor:
            return self.weight * ce(y_hat, y)

    return Local()


def of_a_class(w: float) -> Loss:
    class Local:
        weight = w

        def __call__(self, y_hat: Tensor, y: Tensor) -> Tensor:
            return self.weight * ce(y_hat, y)

    return Local()


def script(program: str, **variables: Any) -> Any:
    scope = {"ce": ce, "__name__": "script", **variables}
    exec(program, scope)
    return scope["loss"]


LOSSES: dict[str, Callable[[float], Any]] = {
    function.__name__: function
    for function in (
        *(closure, in_an_inner_function, in_a_function_beside_it, default, keyword, of_a_function, in_a_tensor),
        *(in_an_array, in_a_dict, in_a_namespace, in_a_dataclass, handed_on, in_a_wrapped_function, under_no_grad),
        *(in_a_cached_function, in_a_local_class, of_a_class, Factor, Slots, FactorModule),
    )
} | {
    "partial": lambda w: functools.partial(ce, label_smoothing=w),
    "positional": lambda w: functools.partial(lambda k, y_hat, y: k * ce(y_hat, y), w),
    "method": lambda w: Factor(w).__call__,
    "module": lambda w: nn.CrossEntropyLoss(label_smoothing=w),
    "weights of classes": lambda w: nn.CrossEntropyLoss(weight=torch.tensor([w, 1.0])),
    "whole number": lambda w: closure(int(100 * w)),
    "word": lambda w: functools.partial(lambda mode, y_hat, y: ce(y_hat, y), f"by {w}"),
    "global": lambda w: script("def loss(a, b): return w * ce(a, b)", w=w),
    "global in a helper": lambda w: script("def h(x): return w * x\ndef loss(a, b): return h(ce(a, b))", w=w),
    "global module": lambda w: script("def loss(a, b): return m(a, b)", m=nn.CrossEntropyLoss(label_smoothing=w)),
    "global object": lambda w: script("def loss(a, b): return f(a, b)", f=Factor(w)),
    "global namespace": lambda w: script("def loss(a, b): return args.w * ce(a, b)", args=argparse.Namespace(w=w)),
}


def attribute(w: float) -> nn.Module:
    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 2)
            self._scale = w

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self._scale

    return Scaled()


def variable(w: float) -> nn.Module:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * w

    return Scaled(4, 2)


def nested(w: float) -> nn.Module:
    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 2)
            self.config = {"a": {"scale": w}}

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.config["a"]["scale"]

    return Scaled()


def hooked(w: float) -> nn.Module:
    network = nn.Linear(4, 2)
    network.register_forward_hook(lambda module, inputs, output: output * w)
    return network


def function(w: float) -> nn.Module:
    class Applied(nn.Module):
        def __init__(self, function: Any) -> None:
            super().__init__()
            self.function = function

        def forward(self, x: Tensor) -> Tensor:
            return self.function(x)  # type: ignore[no-any-return]

    return nn.Sequential(nn.Linear(4, 2), Applied(lambda x: x * w))


NETWORKS: dict[str, Callable[[float], nn.Module]] = {
    "attribute": attribute,
    "variable": variable,
    "nested": nested,
    "hook": hooked,
    "function": function,
    "dropout": lambda w: nn.Sequential(nn.Dropout(w), nn.Linear(4, 2)),
    "deep dropout": lambda w: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 4, dropout=w), nn.Linear(4, 2)),
    "slope": lambda w: nn.Sequential(nn.Linear(4, 2), nn.LeakyReLU(w)),
    "momentum": lambda w: nn.Sequential(nn.BatchNorm1d(4, momentum=w), nn.Linear(4, 2)),
    "mode": lambda w: nn.Sequential(nn.BatchNorm1d(4).train(w > 0.3), nn.Linear(4, 2)),
    "activation": lambda w: nn.Sequential(nn.Linear(4, 2), nn.ReLU() if w > 0.3 else nn.Tanh()),
    "function of torch": lambda w: nn.Sequential(
        nn.TransformerEncoderLayer(4, 2, 4, activation="relu" if w > 0.3 else "gelu"), nn.Linear(4, 2)
    ),
}


class Clip(cb.CallbackSet):
    def __init__(self, norm: float) -> None:
        self.norm = norm

    def on_after_backward(self) -> None:
        nn.utils.clip_grad_norm_(self.ctx.network.parameters(), self.norm)


def named(*ids: str) -> list[fl.Callback]:
    return [fl.Callback(id, batch_end=lambda ctx: ctx.with_hyperparameters(lr=0.1)) for id in ids]


CALLBACKS: dict[str, Callable[[float], list[Any]]] = {
    "clip norm": lambda w: [cb.t_clbk("clip_grad_norm", max_norm=w)],
    "clip norm of an object": lambda w: [Clip(w)],
    "schedule": lambda w: [cb.t_clbk("lr_step", step_size=1, gamma=w)],
    "function of a schedule": lambda w: [cb.t_clbk("lr_lambda", lr_lambda=lambda epoch: w**epoch)],
    "average": lambda w: [cb.t_clbk("ema", decay=w)],
    "unfreezing": lambda w: [
        cb.t_clbk(
            "unfreeze", starting_weights=["weight"] if w > 0.3 else ["bias"], unfreeze=[{"epoch": 2, "weights": "*"}]
        )
    ],
    "weight": lambda w: [fl.Callback("hook", weight=w, batch_end=lambda ctx: ctx.with_hyperparameters(lr=0.1))],
    "order": lambda w: named("a", "b") if w > 0.3 else named("b", "a"),
    "presence": lambda w: named("a", "b") if w > 0.3 else named("a"),
}


class Rows(Dataset[Any]):
    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.seen: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, row: int) -> Any:
        self.seen[row] = object()
        return X[row].numpy() * np.float32(self.factor), int(Y[row])


def collated(w: float) -> fl.BatchSource:
    def collate(rows: Any) -> Any:
        return torch.stack([x for x, _ in rows]) * w, torch.tensor([int(y) for _, y in rows])

    return fl.batches(TensorDataset(X, Y), batch_size=4, collate_fn=collate)


DATA: dict[str, Callable[[float], Any]] = {
    "values": lambda w: fl.batches(X * w, Y, batch_size=4),
    "one value": lambda w: fl.batches(X.index_fill(0, torch.tensor([7]), w), Y, batch_size=4),
    "labels": lambda w: fl.batches(X, Y if w > 0.3 else 1 - Y, batch_size=4),
    "order of the rows": lambda w: fl.batches(X if w > 0.3 else X.flip(0), Y, batch_size=4),
    "dict": lambda w: fl.batches({"a": X * w}, Y, batch_size=4),
    "dataset": lambda w: fl.batches(Rows(w), batch_size=4),
    "dataset of tensors": lambda w: fl.batches(TensorDataset(X * w, Y), batch_size=4),
    "subset": lambda w: fl.batches(Subset(TensorDataset(X, Y), range(5) if w > 0.3 else range(5, 10)), batch_size=4),
    "loader": lambda w: fl.batches(DataLoader(Rows(w), batch_size=4)),
    "worker": lambda w: fl.batches(Rows(w), batch_size=4, num_workers=1),
    "list": lambda w: fl.batches([(X * w, Y)] * 3),
    "collate_fn": collated,
}


class Counting:
    """An object with a state, which is another in every process."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.lock = threading.Lock()
        self.seen: list[Any] = [object()]
        self.calls = random.randrange(1 << 30)

    def __repr__(self) -> str:
        return f"<Counting at {id(self):#x}>"

    def count(self) -> float:
        self.calls += 1
        self.seen.append(self)
        return time.perf_counter() - self.began


def hook(value: Any) -> fl.Callback:
    """A callback of which a hook has a value around it."""

    def run(ctx: fl.Context) -> fl.Context:
        return ctx.with_hyperparameters(lr=0.1) if str(value) else ctx

    return fl.Callback("hook", batch_end=run)


def counting() -> fl.Callback:
    batches = random.randrange(1 << 30)
    rows = [random.random()]
    last = torch.rand(2)

    def count(ctx: fl.Context) -> fl.Context:
        nonlocal batches
        batches += 1
        rows.append(time.perf_counter())
        last.fill_(batches)
        return ctx.with_hyperparameters(lr=0.1)

    return fl.Callback("counting", batch_end=count)


def values() -> dict[str, Any]:
    """Values that mean the same in every process, whatever they look like in it."""
    return {
        "set": {"a", "b", "c", "d"},
        "dict": {"b": {2, 3}, "a": [1]},
        "object": object(),
        "counting": Counting(),
        "tensor": torch.arange(3),
        "large tensor": torch.arange(100_000),
        "tensor without values": torch.empty(2, device="meta"),
        "sparse tensor": torch.eye(3).to_sparse(),
        "numpy": [np.float32(2), np.bool_(True), np.arange(3), np.array([object(), "a"], dtype=object), np.dtype("f4")],
        "generators": [np.random.default_rng(), torch.Generator(), random.Random(), itertools.count(), iter([1])],
        "paths": [pathlib.Path(tempfile.gettempdir()) / uuid.uuid4().hex, f"runs/{time.time()}", os.getcwd()],
        "times": [time.time(), datetime.datetime.now(), f"run {datetime.datetime.now()}", uuid.uuid4().hex],
        "world": [
            os.environ,
            sys,
            logging.getLogger("x"),
            threading.current_thread(),
            threading.Lock(),
            sys.__stderr__,
        ],
        "enum": Color.RED,
        "dataclass": Config(1.0),
        "namespace": types.SimpleNamespace(a={"x", "y", "z"}, o=object()),
        "classes": [Config, list[int], Loss],
        "functions": [len, np.mean, torch.add, [].append, lambda x: x],
        "not finite": [float("nan"), float("inf"), 1j],
        "bytes": [b"a", memoryview(b"b"), range(3), slice(1), ...],
        "cycle": (cycle := [1], cycle.append(cycle))[0],
        "optimizer": torch.optim.SGD([torch.zeros(1)], lr=0.1),
        "loop": loop(),
    }


def told() -> dict[str, Any]:
    """What is known of every one of these runs."""
    made: dict[str, Any] = {}
    made |= {f"loss: {name}": loop(loss=make(0.5)) for name, make in LOSSES.items()}
    made |= {f"network: {name}": loop(network=functools.partial(make, 0.5)) for name, make in NETWORKS.items()}
    made |= {f"callback: {name}": loop(callbacks=make(0.5)) for name, make in CALLBACKS.items()}
    made |= {f"data: {name}": loop(train=make(0.5)) for name, make in DATA.items()}
    made |= {f"value: {name}": loop(callbacks=[hook(value)]) for name, value in values().items()}
    made["counting"] = loop(callbacks=[counting()])
    return {name: fl.fingerprint(each) for name, each in made.items()}


if __name__ == "__main__":
    print(json.dumps(told()))
