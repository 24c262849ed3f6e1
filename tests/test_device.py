"""What an accelerator would wait for: copies to it, and values that the host asks for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

import functional_loop as fl
from functional_loop.callbacks import clip_grad_norm, ema, grad_norm, history, lr_step
from functional_loop.core.batch import to_device
from tests.sample_loops import data, make_loop, mean_absolute, noisy_mlp


class Calls(TorchDispatchMode):
    """Operators that were called, with their keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made.append((func.overloadpacket, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def of(self, packet: Any) -> list[dict[str, Any]]:
        return [kwargs for called, kwargs in self.made if called is packet]


def test_copies_to_a_device_do_not_block_and_copies_to_the_host_do() -> None:
    batch = fl.Batch(x=(torch.zeros(2, 3), {"mask": torch.ones(2)}), y=torch.zeros(2))
    with Calls() as calls:
        there = to_device(batch, torch.device("meta"))
        assert to_device(there, torch.device("meta")) is there
    assert [kwargs.get("non_blocking") for kwargs in calls.of(torch.ops.aten._to_copy)] == [True, True, True]
    assert there.x[1]["mask"].is_meta
    seen: list[bool] = []

    class Far(torch.Tensor):
        def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            seen.append(kwargs["non_blocking"])
            return torch.zeros(2)

    to_device(fl.Batch(x=torch.zeros(2, device="meta").as_subclass(Far)), torch.device("cpu"))
    assert seen == [False]


@pytest.mark.parametrize("available", [True, False])
def test_batches_are_pinned_where_there_is_an_accelerator(available: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: available)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    source = fl.batches(TensorDataset(*data(3)), batch_size=4, pin_memory=True)
    batches = [batch for batch, _ in source.fetch(0, 1, 0, ())]
    assert len(batches) == 3
    # x, y and the row numbers of every batch.
    assert len(pinned) == (9 if available else 0)


def syncs(rows: int, callbacks: list[Any]) -> int:
    """How often the host asks for a value, in a run on ``rows`` rows."""
    x, y = (torch.randn(rows, n, generator=torch.Generator().manual_seed(0)) for n in (3, 2))
    measures = [
        fl.measure("error", mean_absolute, minimize=True),
        fl.measure(
            "squared",
            init=lambda: torch.zeros(()),
            update=lambda total, y_hat, y: total + ((y_hat - y) ** 2).sum(),
            compute=lambda total: total,
            minimize=True,
        ),
    ]
    loop = make_loop(
        network=noisy_mlp(),
        train=fl.batches(x, y, batch_size=4, shuffle=True),
        valid=fl.batches(x, y, batch_size=4),
        measures_train=measures,
        measures_valid=measures,
        callbacks=callbacks,
    )
    ctx = fl.init(loop)
    with Calls() as calls:
        fl.train(ctx)
    return len(calls.of(torch.ops.aten._local_scalar_dense))


@pytest.mark.parametrize(
    "callbacks",
    [
        [],
        [fl.Callback("look", batch_begin=lambda ctx: ctx, batch_end=lambda ctx: ctx, batch_valid_end=lambda ctx: ctx)],
        [history(), ema(0.9), clip_grad_norm(1.0), grad_norm(), lr_step(1)],
    ],
)
def test_no_batch_waits_for_the_device(callbacks: list[Any]) -> None:
    assert syncs(8, callbacks) == syncs(80, callbacks)
