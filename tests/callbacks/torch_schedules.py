"""The hand-written loop with a scheduler of torch, against a run with a schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch

import functional_loop as fl
from functional_loop.callbacks.gradients.windows import updates
from functional_loop.optim.torch_update import numbers_of
from tests.sample_loops import epoch_of, make_loop, same_bits

GROUPS = [{"params": "*.bias", "lr": 0.3}, {"params": "1.*", "lr": 0.02}]
OPTIMIZERS = {
    "sgd": fl.optimizer(torch.optim.SGD, lr=0.1),
    "sgd, momentum": fl.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "adamw, groups": fl.optimizer(torch.optim.AdamW, lr=0.05, groups=GROUPS),
    "tensor rate": fl.optimizer(torch.optim.Adam, lr=torch.tensor(0.1), foreach=False),
}

Numbers = list[dict[str, Any]]


def loop_of(kind: str = "adamw, groups", **changes: Any) -> fl.Loop:
    """Four epochs of three batches."""
    return make_loop(**{"epochs": 4, "optimizer": OPTIMIZERS[kind]} | changes)


def hand_written(loop: fl.Loop, make: Callable[[Any], Any], step_on: str) -> tuple[torch.nn.Module, list[Numbers]]:
    """A module trained with the scheduler that ``make`` makes; the hyperparameters at the start and after each step."""
    start = fl.init(loop)
    module = fl.to_module(start).train()
    optimizer = fl.to_optimizer(start, module)
    scheduler = make(optimizer)
    seen = [hyperparameters(optimizer, start)]
    for epoch in range(1, loop.epochs + 1):
        batches = list(epoch_of(loop, epoch))
        for step, (x, y) in enumerate(batches, 1):
            loop.loss(module(x), y).backward()
            window = (step - 1) % loop.accumulate + 1
            if window == loop.accumulate or step == len(batches):
                for parameter in module.parameters():
                    if window > 1:
                        parameter.grad /= window
                optimizer.step()
                optimizer.zero_grad()
                if step_on == "batch":
                    scheduler.step()
                    seen.append(hyperparameters(optimizer, start))
        if step_on == "epoch":
            scheduler.step()
            seen.append(hyperparameters(optimizer, start))
    return module, seen


def hyperparameters(optimizer: torch.optim.Optimizer, start: fl.Context) -> Numbers:
    known = start.optimizer_state["groups"]
    pairs = zip(optimizer.param_groups, known, strict=True)
    return [{key: value for key, value in numbers_of(group).items() if key in before} for group, before in pairs]


def rates(ctx: fl.Context) -> list[Any]:
    return [group["lr"] for group in ctx.optimizer_state["groups"]]


def same_as_torch(loop: fl.Loop, callback: fl.Callback, make: Callable[[Any], Any], step_on: str) -> None:
    """All hyperparameters at every step, and the trained parameters, have the bits of the hand-written loop."""
    module, expected = hand_written(loop, make, step_on)
    start = fl.init(attrs.evolve(loop, callbacks=[callback]))
    contexts = list(fl.iterate(start))
    stage = {"epoch": "epoch_end", "batch": "batch_end"}[step_on]
    stepped = [ctx for ctx in contexts if ctx.stage == "begin" or (ctx.stage == stage and updates(ctx))]
    assert fl.tree_equal([ctx.optimizer_state["groups"] for ctx in stepped], expected)
    assert same_bits(contexts[-1], module)
