"""``python -m bench.peak RUN WORKLOAD EPOCHS``: one run in a process of its own, and the memory that it took."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

import functional_loop as fl

from . import handwritten
from .resident import peak_memory
from .sources import Data, ready
from .workloads import WORKLOADS, Workload

LEARNING_RATE = 1e-3


def train(workload: Workload, data: Data, epochs: int) -> object:
    return fl.train(fl.init(_loop(workload, data, epochs)))


def keep(workload: Workload, data: Data, epochs: int) -> object:
    return list(fl.iterate(fl.init(_loop(workload, data, epochs))))


def by_hand(workload: Workload, data: Data, epochs: int) -> object:
    model, optimizer = _parts(workload)
    handwritten.train(model, workload.loss, optimizer, data.theirs(0), epochs)
    return model


def copies_by_hand(workload: Workload, data: Data, epochs: int) -> object:
    model, optimizer = _parts(workload)
    copies: list[Any] = []

    def copying(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterable[tuple[Tensor, Tensor]]:
        for batch in batches:
            yield batch
            copies.append(copy.deepcopy((model.state_dict(), optimizer.state_dict())))

    for _ in range(epochs):
        handwritten.train(model, workload.loss, optimizer, copying(data.theirs(0)), epochs=1)
    return copies


RUNS: dict[str, Callable[[Workload, Data, int], object]] = {
    "train()": train,
    "every context kept": keep,
    "hand-written": by_hand,
    "hand-written, copies kept": copies_by_hand,
}


def _loop(workload: Workload, data: Data, epochs: int) -> fl.Loop:
    optimizer = fl.optimizer(torch.optim.AdamW, lr=LEARNING_RATE, fused=True)
    return fl.Loop(workload.network, workload.loss, optimizer, data.ours, epochs=epochs)


def _parts(workload: Workload) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = workload.network()
    return model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)


def _parameter_bytes(workload: Workload) -> int:
    with torch.device("meta"):
        return sum(p.nbytes for p in workload.make_network().parameters())


def main(name: str, workload_name: str, epochs: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    # What torch loads at the first step of any network is not the run's.
    for run in (train, by_hand):
        run(WORKLOADS["mlp"], ready(WORKLOADS["mlp"]), 1)
    workload = WORKLOADS[workload_name]
    data = ready(workload)
    before, started = peak_memory(), perf_counter()
    kept = RUNS[name](workload, data, epochs)
    seconds = perf_counter() - started
    del kept
    return {
        "steps": epochs * len(data.ours),
        "before": before,
        "peak": peak_memory(),
        "parameters": _parameter_bytes(workload),
        "seconds": seconds,
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
