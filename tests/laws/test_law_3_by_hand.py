"""Law 3: with the same flags and batches, parameters equal those of the hand-written PyTorch loop, bit for bit."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import functional_loop as fl
from tests.loops import OPTIMIZERS, Spec
from tests.strategies import seeds, specs

DETERMINISTIC = ["clipping", "schedule", "freezing"]


def train_by_hand(spec: Spec, module: nn.Module, seed: int) -> torch.optim.Optimizer:
    """What one would write without this package."""
    optimizer = make_torch_optimizer(spec, module)
    source = spec.loop().train
    for epoch in range(1, spec.epochs + 1):
        if "freezing" in spec.callbacks:
            freeze(module, odd=epoch % 2 == 1)
        batches = [batch for batch, _ in source.fetch(seed, epoch, 0, ())]
        for start in range(0, len(batches), spec.accumulate):
            window = batches[start : start + spec.accumulate]
            update(spec, module, optimizer, window)
    return optimizer


def update(spec: Spec, module: nn.Module, optimizer: torch.optim.Optimizer, window: list[fl.Batch]) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        for batch in window:
            loss = nn.functional.cross_entropy(module(batch.x), batch.y)
            loss.backward()
        for parameter in module.parameters():
            if parameter.grad is not None and len(window) > 1:
                parameter.grad /= len(window)
        if "clipping" in spec.callbacks:
            nn.utils.clip_grad_norm_(module.parameters(), 0.1)
        return loss

    if spec.optimizer == "lbfgs":
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()
    if "schedule" in spec.callbacks:
        for group in optimizer.param_groups:
            group["lr"] *= 0.9


def make_torch_optimizer(spec: Spec, module: nn.Module) -> torch.optim.Optimizer:
    cls, arguments = OPTIMIZERS[spec.optimizer]
    arguments = dict(arguments)
    left = dict(module.named_parameters())
    groups = []
    for group in arguments.pop("groups", []):
        names = [name for name in left if fnmatchcase(name, group["params"])]
        groups.append({**group, "params": [left.pop(name) for name in names]})
    return cls([*groups, {"params": list(left.values())}], **arguments)


def freeze(module: nn.Module, odd: bool) -> None:
    parameters = list(module.parameters())
    for parameter in parameters:
        parameter.requires_grad_(not odd)
    for parameter in parameters[-2:]:
        parameter.requires_grad_(True)


def hooks_of(draw_from: list[str]) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(st.sampled_from(draw_from), unique=True).map(tuple)


@given(specs(network="mlp", dropout=0.0), st.sampled_from(["mlp", "cnn", "gru"]), hooks_of(DETERMINISTIC), seeds)
def test_training_equals_the_hand_written_loop(spec, network, callbacks, seed):
    if spec.optimizer == "lbfgs":
        # It evaluates gradients by itself, which the loop does not offer to hooks.
        callbacks = tuple(name for name in callbacks if name != "clipping")
    # A loader with a state is read with that state; its batches are those of the other loaders.
    data = "loader" if spec.data == "stateful loader" else spec.data
    spec = fl.evolve(spec, network=network, callbacks=callbacks, data=data)
    start = fl.init(spec.loop(), seed)
    module = fl.to_module(start)
    optimizer = train_by_hand(spec, module, seed)
    ctx = fl.train(start)
    assert fl.tree_equal(dict(module.state_dict()), {**ctx.params, **ctx.buffers})
    assert fl.tree_equal(optimizer.state_dict(), fl.to_optimizer(ctx, fl.to_module(ctx)).state_dict())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("network", ["mlp", "cnn", "gru"])
def test_every_optimizer_and_network(network, optimizer):
    accumulate = 1 if optimizer == "lbfgs" else 2
    spec = Spec(network, dropout=0.0, optimizer=optimizer, rows=18, epochs=3, accumulate=accumulate)
    start = fl.init(spec.loop(), seed=3)
    module = fl.to_module(start)
    train_by_hand(spec, module, seed=3)
    ctx = fl.train(start)
    assert fl.tree_equal(dict(module.state_dict()), {**ctx.params, **ctx.buffers})
    assert not fl.tree_equal(ctx.params, start.params)
