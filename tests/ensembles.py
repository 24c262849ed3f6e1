"""Loops for the tests of ensembles: in float64, see `tests.closeness`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import functional_loop as fl

LOSS = nn.functional.cross_entropy


def data(rows: int = 70) -> tuple[torch.Tensor, torch.Tensor]:
    with fl.seeded(0):
        x = torch.randn(rows, 6, dtype=torch.float64)
    return x, (x.sum(1) > 0).long()


def network() -> nn.Module:
    body = [nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 8), nn.Tanh()]
    return nn.Sequential(*body, head())


def head() -> nn.Module:
    return nn.Sequential(nn.Dropout(0.1), nn.Linear(8, 2))


def accuracy(y_hat: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (y_hat.argmax(1) == y).float().mean()


def measures() -> list[fl.Measure]:
    return [
        fl.measure("accuracy", accuracy, minimize=False),
        fl.measure(
            "error",
            init=lambda: (torch.zeros(()), 0),
            update=lambda s, y_hat, y: (s[0] + LOSS(y_hat, y, reduction="sum"), s[1] + len(y)),
            compute=lambda s: s[0] / s[1],
            minimize=True,
        ),
    ]


def make_loop(double: bool = True, **changes: Any) -> fl.Loop:
    x, y = data()
    x = x if double else x.float()
    arguments: dict[str, Any] = {
        "network": network,
        "loss": LOSS,
        "optimizer": fl.optimizer(torch.optim.AdamW, lr=1e-2),
        "train": fl.batches(x[:50], y[:50], batch_size=16, shuffle=True),
        "valid": fl.batches(x[50:], y[50:], batch_size=12),
        "epochs": 3,
        "measures_train": measures(),
        "measures_valid": measures(),
    }
    loop = fl.Loop(**(arguments | changes))
    make: Any = loop.network
    return fl.evolve(loop, network=lambda: make().double()) if double else loop


def starts(loop: fl.Loop, members: int = 3) -> list[fl.Context]:
    return [fl.init(loop, seed) for seed in range(members)]


def digests(contexts: list[fl.Context]) -> list[str]:
    return [fl.digest(ctx) for ctx in contexts]
