"""Networks, loops and hand-written training that several test files share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import functional_loop as fl

ROWS = 10


def data(*shape: int, targets: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs of ``shape`` and regression targets, ten rows of each."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, *shape, generator=generator), torch.randn(ROWS, targets, generator=generator)


def mlp() -> nn.Module:
    with fl.seeded(0):
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def noisy_mlp() -> nn.Module:
    """Dropout and BatchNorm: a network whose steps depend on all that came before and on randomness."""
    with fl.seeded(0):
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


def mean_absolute(y_hat: Tensor, y: Tensor) -> Tensor:
    return (y_hat - y).abs().mean()


def make_loop(**changes: Any) -> fl.Loop:
    """Three batches in every epoch, two validation batches; any argument of Loop can be replaced."""
    x, y = data(3)
    usual: dict[str, Any] = {
        "network": mlp(),
        "loss": nn.functional.mse_loss,
        "optimizer": fl.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9),
        "train": fl.batches(x, y, batch_size=4, shuffle=True),
        "epochs": 2,
    }
    return fl.Loop(**usual | changes)


def full_loop(**changes: Any) -> fl.Loop:
    """All that can be lost when a run is continued: dropout, validation, measures, open windows, a callback's state."""
    x, y = data(3, seed=1)
    usual: dict[str, Any] = {
        "network": noisy_mlp(),
        "optimizer": fl.optimizer(torch.optim.AdamW, lr=0.01),
        "valid": fl.batches(x, y, batch_size=6),
        "measures_train": [fl.measure("error", mean_absolute, minimize=True)],
        "measures_valid": [fl.measure("error", mean_absolute, minimize=True)],
        "callbacks": [counter()],
        "accumulate": 2,
    }
    return make_loop(**usual | changes)


def middle(**changes: Any) -> fl.Context:
    """In the middle of an epoch and of an accumulation window, with scores of the epoch before."""
    return fl.train(fl.init(full_loop(**changes), seed=3), steps=4)


def counter(id: str = "counter") -> fl.Callback:
    """Counts batches, in its slot."""

    def count(ctx: fl.Context) -> fl.Context:
        return ctx.with_callback_state(id, ctx.callbacks[id] + 1)

    return fl.Callback(id, init=lambda ctx: 0, batch_end=count)


def recorder(seen: list[Any], what: Callable[[fl.Context], Any], stages: tuple[str, ...] = fl.STAGES) -> fl.Callback:
    """Appends ``(stage, what(ctx))`` to ``seen`` in every hook, and changes nothing."""

    def hook(stage: str) -> fl.Hook:
        def run(ctx: fl.Context) -> fl.Context:
            seen.append((stage, what(ctx)))
            return ctx

        return run

    return fl.Callback("recorder", replays=False, **{stage: hook(stage) for stage in stages})


def raising(stage: str, error: BaseException, id: str = "faulty") -> fl.Callback:
    def fail(ctx: fl.Context) -> fl.Context:
        raise error

    return fl.Callback(id, **{stage: fail})


def rows_of(tree: Any, index: Tensor) -> Any:
    return fl.tree_map(lambda tensor: tensor[index], tree)


def call(module: nn.Module, x: Any) -> Any:
    if isinstance(x, dict):
        return module(**x)
    return module(*x) if isinstance(x, tuple) else module(x)


def hand_written(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    loop: fl.Loop,
    epochs: range | None = None,
    autocast: torch.dtype | None = None,
) -> None:
    """The ordinary PyTorch loop, over the data of ``loop`` in the order of seed 0."""
    for epoch in epochs or range(1, loop.epochs + 1):
        module.train()
        for step, (x, y) in enumerate(epoch_of(loop, epoch), 1):

            def closure(x: Any = x, y: Any = y) -> Tensor:
                with torch.autocast("cpu", autocast) if autocast else nullcontext():
                    loss = loop.loss(call(module, x), y)
                loss.backward()
                return loss

            def fresh_closure(closure: Callable[[], Tensor] = closure) -> Tensor:
                optimizer.zero_grad()
                return closure()

            if isinstance(optimizer, torch.optim.LBFGS):
                optimizer.step(fresh_closure)
                continue
            closure()
            window = (step - 1) % loop.accumulate + 1
            if window == loop.accumulate or step == len(loop.train):
                for parameter in module.parameters():
                    if parameter.grad is not None and window > 1:
                        parameter.grad /= window
                optimizer.step()
                optimizer.zero_grad()


def epoch_of(loop: fl.Loop, epoch: int) -> Iterator[tuple[Any, Any]]:
    source: Any = loop.train
    order = source.order(0, epoch)
    for index in order.split(source.batch_size):
        yield rows_of(source.x, index), rows_of(source.y, index)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def same_bits(ctx: fl.Context, module: nn.Module) -> Any:
    """Whether the parameters and buffers of a context are those of a module."""
    plain = {name: tensor.detach() for name, tensor in state_of(module).items()}
    return fl.tree_equal({**ctx.params, **ctx.buffers}, plain)
