"""Small training runs as values: a `Spec` says in plain words what to train, and `Spec.loop()` makes it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

import functional_loop as fl

from .hooks import CALLBACKS

WIDTH, CLASSES = 16, 3


@attrs.frozen
class Spec:
    """What to train; plain values, so that another process can make the same loop."""

    network: str = "mlp"
    made_by_function: bool = True
    dropout: float = 0.3
    optimizer: str = "adamw"
    data: str = "tensors"
    rows: int = 20
    batch_size: int = 4
    shuffle: bool = True
    drop_last: bool = False
    valid_rows: int = 5
    epochs: int = 2
    eval_freq: int = 1
    accumulate: int = 1
    measures: tuple[str, ...] = ()
    callbacks: tuple[str, ...] = ()

    def loop(self, **changes: Any) -> fl.Loop:
        """A new loop, with some of its arguments changed."""
        make = partial(make_network, self.network, self.dropout)
        arguments = {
            "network": make if self.made_by_function else made_under(make, seed=1),
            "loss": nn.functional.cross_entropy,
            "optimizer": make_optimizer(self.optimizer),
            "train": self.source(self.rows, self.batch_size, shuffle=self.shuffle, drop_last=self.drop_last),
            "valid": self.source(self.valid_rows, 2) if self.valid_rows else None,
            "epochs": self.epochs,
            "eval_freq": self.eval_freq,
            "accumulate": self.accumulate,
            "measures_train": [MEASURES[name] for name in self.measures],
            "measures_valid": [MEASURES[name] for name in self.measures if self.valid_rows],
            "callbacks": [CALLBACKS[name]() for name in self.callbacks],
        }
        return fl.Loop(**{**arguments, **changes})

    def source(self, rows: int, batch_size: int, shuffle: bool = False, drop_last: bool = False) -> fl.BatchSource:
        return SOURCES[self.data](*tensors(rows), batch_size=batch_size, shuffle=shuffle, drop_last=drop_last)


def tensors(rows: int) -> tuple[Tensor, Tensor]:
    """Inputs (rows, 16) and classes (rows,): always the same for a number of rows."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, WIDTH, generator=generator)
    return x, x[:, :CLASSES].argmax(1)


def made_under(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    with fl.seeded(seed):
        return make()


class Recurrent(nn.Module):
    """A two-layer GRU over four steps, which has dropout of its own."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 5, num_layers=2, dropout=dropout, batch_first=True)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x.unflatten(1, (4, 4)))[0][:, -1])


class PythonNoise(nn.Module):
    """Noise while training, from numpy and `random`."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 0.1 * random.random() + 0.1 * np.random.rand()) if self.training else x


def make_network(kind: str, dropout: float) -> nn.Module:
    match kind:
        case "mlp":
            layers = [nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout)]
            return nn.Sequential(*layers, nn.Linear(8, CLASSES))
        case "cnn":
            layers = [nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten()]
            return nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(12, CLASSES))
        case "gru":
            return Recurrent(dropout)
        case "noisy":
            return nn.Sequential(nn.Linear(WIDTH, 8), PythonNoise(), nn.Dropout(dropout), nn.Linear(8, CLASSES))
    raise ValueError(kind)


NETWORKS = ("mlp", "cnn", "gru", "noisy")

# Of every optimizer the class of torch and its arguments; groups as `functional_loop.optimizer` takes them.
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
    "adamw, fused": (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True, "fused": True}),
    "adam, groups": (torch.optim.Adam, {"lr": 0.01, "groups": [{"params": "*bias*", "lr": 0.1, "weight_decay": 0.1}]}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5, "centered": True}),
    "nadam": (torch.optim.NAdam, {"lr": 0.01}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.05}),
    "asgd": (torch.optim.ASGD, {"lr": 0.05, "t0": 2}),
    "rprop": (torch.optim.Rprop, {"lr": 0.01}),
    "lbfgs": (torch.optim.LBFGS, {"lr": 0.1, "max_iter": 3, "line_search_fn": "strong_wolfe"}),
}


def make_optimizer(name: str) -> fl.Optimizer:
    cls, arguments = OPTIMIZERS[name]
    return fl.optimizer(cls, **arguments)


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Rows with noise from torch, numpy and `random`."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(WIDTH) + np.random.randn() + random.gauss(0, 1)
        return self.x[row] + 0.1 * noise, self.y[row]


class Stream:
    """Batches of a loader, without a length."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


def from_dataset(x: Tensor, y: Tensor, **options: Any) -> fl.BatchSource:
    return fl.batches(Augmented(x, y), **options)


def from_loader(x: Tensor, y: Tensor, **options: Any) -> fl.BatchSource:
    return fl.batches(DataLoader(Augmented(x, y), **options))


def from_stream(x: Tensor, y: Tensor, **options: Any) -> fl.BatchSource:
    return fl.batches(Stream(DataLoader(Augmented(x, y), **options)))


def from_stateful_loader(x: Tensor, y: Tensor, **options: Any) -> fl.BatchSource:
    return fl.batches(StatefulDataLoader(Augmented(x, y), **options))


SOURCES: dict[str, Callable[..., fl.BatchSource]] = {
    "tensors": fl.batches,
    "dataset": from_dataset,
    "workers": partial(from_dataset, num_workers=2),
    "loader": from_loader,
    "stream": from_stream,
    "stateful loader": from_stateful_loader,
}

MEASURES = {
    "accuracy": fl.measure("accuracy", lambda y_hat, y: (y_hat.argmax(1) == y).float().mean(), minimize=False),
    "order": fl.measure("order", lambda y_hat, y: (y * torch.arange(len(y))).sum() + y_hat[0].sum()),
    "rows": fl.measure("rows", init=lambda: 0, update=lambda n, y_hat, y: n + len(y), compute=lambda n: n),
    "mean": fl.measure(
        "mean",
        init=lambda: {"sum": torch.zeros(()), "rows": 0},
        update=lambda s, y_hat, y: {"sum": s["sum"] + y_hat.sum(), "rows": s["rows"] + len(y)},
        compute=lambda s: s["sum"] / s["rows"],
    ),
}
