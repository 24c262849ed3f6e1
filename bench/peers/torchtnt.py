"""torchtnt: ``train`` of a unit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torchtnt.framework.auto_unit import AutoUnit
from torchtnt.framework.state import State
from torchtnt.framework.train import train
from torchtnt.framework.unit import TrainUnit

from .measure import adamw, loader, measure, network, updates


class Auto(AutoUnit):  # type: ignore[misc]
    def compute_loss(self, state: State, data: Any) -> tuple[torch.Tensor, Any]:
        x, y = data
        outputs = self.module(x)
        return F.cross_entropy(outputs, y), outputs

    def configure_optimizers_and_lr_scheduler(self, module: torch.nn.Module) -> tuple[torch.optim.Optimizer, None]:
        return adamw(module), None


class Plain(TrainUnit[Iterator[Any]]):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.module = network()
        self.optimizer = adamw(self.module)

    def train_step(self, state: State, data: Any) -> None:
        x, y = data
        self.optimizer.zero_grad()
        F.cross_entropy(self.module(x), y).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


def default(epochs: int) -> Callable[[], int]:
    return _train(Auto(module=network(), device=torch.device("cpu")), epochs)


def leanest(epochs: int) -> Callable[[], int]:
    return _train(Plain(), epochs)


def _train(unit: Any, epochs: int) -> Callable[[], int]:
    batches = loader()

    def run() -> int:
        train(unit, batches, max_epochs=epochs)
        return updates(unit.optimizer)

    return run


if __name__ == "__main__":
    measure({"default: AutoUnit": default, "leanest: TrainUnit of a plain step": leanest})
