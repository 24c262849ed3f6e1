"""``python -m bench.peak RUN WORKLOAD EPOCHS``: one run in a process of its own, and the memory that it took."""

from __future__ import annotations

import copy
import json
import sys
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import functional_loop as fl

from . import handwritten
from .resident import peak_memory
from .sources import Data, ready
from .workloads import WORKLOADS, Workload

LEARNING_RATE = 1e-3
RING = 3
"""How many contexts a `History` keeps, and how many copies are kept by hand."""
ENSEMBLE = "ensemble of "


def members_network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(128, 512),
        nn.ReLU(),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Linear(512, 10),
    )


def members_data() -> tuple[Tensor, Tensor]:
    return torch.randn(256, 128), torch.randint(10, (256,))


MEMBERS = Workload("MLP of 0.6M parameters, batch 32", members_network, members_data, F.cross_entropy, batch_size=32)


def train(workload: Workload, data: Data, epochs: int) -> object:
    return fl.train(fl.init(_loop(workload, data, epochs)))


def keep(workload: Workload, data: Data, epochs: int) -> object:
    return list(fl.iterate(fl.init(_loop(workload, data, epochs))))


def by_hand(workload: Workload, data: Data, epochs: int) -> object:
    model, optimizer = _parts(workload)
    handwritten.train(model, workload.loss, optimizer, data.theirs(0), epochs)
    return model


def copies_by_hand(workload: Workload, data: Data, epochs: int, kept: int | None = None) -> object:
    model, optimizer = _parts(workload)
    copies: deque[Any] = deque(maxlen=kept)

    def copying(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterable[tuple[Tensor, Tensor]]:
        for batch in batches:
            yield batch
            copies.append(copy.deepcopy((model.state_dict(), optimizer.state_dict())))

    for _ in range(epochs):
        handwritten.train(model, workload.loss, optimizer, copying(data.theirs(0)), epochs=1)
    return copies


def keep_last(workload: Workload, data: Data, epochs: int) -> object:
    history = fl.History(RING)
    loop = fl.evolve(_loop(workload, data, epochs), callbacks=[history])
    return fl.train(fl.init(loop)), history


def last_copies_by_hand(workload: Workload, data: Data, epochs: int) -> object:
    return copies_by_hand(workload, data, epochs, kept=RING)


def ensemble(members: int, workload: Workload, data: Data, epochs: int) -> object:
    loop = _loop(workload, data, epochs)
    start = fl.stack([fl.init(loop, seed) for seed in range(members)], mode="vectorised")
    return fl.train(start)


def run_of(name: str) -> Callable[[Workload, Data, int], object]:
    if name.startswith(ENSEMBLE):
        return partial(ensemble, int(name.removeprefix(ENSEMBLE)))
    return RUNS[name]


RUNS: dict[str, Callable[[Workload, Data, int], object]] = {
    "train()": train,
    "every context kept": keep,
    "hand-written": by_hand,
    "hand-written, copies kept": copies_by_hand,
    f"last {RING} contexts kept": keep_last,
    f"hand-written, last {RING} copies kept": last_copies_by_hand,
}
COUNTERPARTS = {
    "train()": "hand-written",
    "every context kept": "hand-written, copies kept",
    f"last {RING} contexts kept": f"hand-written, last {RING} copies kept",
}
"""Runs, and what each is compared to."""


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
    for run in (train, by_hand, *([run_of(f"{ENSEMBLE}2")] if name.startswith(ENSEMBLE) else [])):
        run(WORKLOADS["mlp"], ready(WORKLOADS["mlp"]), 1)
    workload = MEMBERS if name.startswith(ENSEMBLE) else WORKLOADS[workload_name]
    data = ready(workload)
    before, started = peak_memory(), perf_counter()
    kept = run_of(name)(workload, data, epochs)
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
