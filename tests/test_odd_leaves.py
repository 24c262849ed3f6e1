"""Whatever a context may hold comes back from the store bit for bit, or is refused by its path when it is saved."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import functional_loop as fl
from tests.strategies import examples
from tests.test_checkpoint_file import DTYPES, containers, random_tensor, same, scalars, tensors, texts
from tests.test_store import START, at


class Odd(nn.Module):
    """Parameters and buffers of all dtypes, of no elements, of no dimensions, transposed, and with NaNs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4).t())
        self.image = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.bf16 = nn.Parameter(torch.randn(3).bfloat16())
        self.complex = nn.Parameter(torch.randn(2, dtype=torch.complex64))
        for i, dtype in enumerate(DTYPES):
            self.register_buffer(f"buffer{i}", random_tensor(dtype, [2, 3], i))
        self.register_buffer("view", torch.arange(10.0)[2:8:2])
        self.register_buffer("expanded", torch.tensor([math.nan]).expand(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight).sum(1, keepdim=True) * self.scalar + self.bf16.sum() + self.image.sum()


def odd_loop() -> fl.Loop:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    groups = [{"params": "scalar", "weight_decay": math.inf, "maximize": False}]
    return fl.Loop(
        network=Odd,
        loss=nn.functional.mse_loss,
        optimizer=fl.optimizer(torch.optim.SGD, lr=math.inf, groups=groups),
        train=fl.batches(x, x[:, :1], batch_size=4),
        epochs=1,
    )


def test_odd_parameters_and_buffers_come_back_with_their_layout(tmp_path: Path) -> None:
    loop = odd_loop()
    ctx = fl.init(loop, seed=3)
    fl.CheckpointStore(tmp_path).save(ctx)
    loaded = fl.CheckpointStore(tmp_path).load(loop)
    assert fl.digest(loaded) == fl.digest(ctx)
    assert fl.tree_equal(loaded.params, ctx.params)
    assert fl.tree_equal(loaded.buffers, ctx.buffers)
    assert fl.tree_equal(loaded.optimizer_state, ctx.optimizer_state)
    assert all(param.stride() == ctx.params[name].stride() for name, param in loaded.params.items())
    again = fl.CheckpointStore(tmp_path / "again").save(loaded)
    assert again.read_bytes() == (tmp_path / again.name).read_bytes()


leaves = st.recursive(scalars | tensors, containers, max_leaves=6).filter(
    lambda tree: tree != () and tree != {"()": []}
)


@examples(1)
@given(st.dictionaries(texts.filter(lambda key: key != "()"), leaves, max_size=3))
def test_any_state_of_a_callback_comes_back(tmp_path_factory: pytest.TempPathFactory, state: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("run")
    ctx = START.with_callback_state("count", state)
    fl.CheckpointStore(folder).save(ctx)
    loaded = fl.CheckpointStore(folder).load(START.loop)
    assert same(loaded.callbacks["count"], state)
    assert fl.digest(loaded) == fl.digest(ctx)


def test_slots_that_share_a_tensor_come_back_as_equal_ones(tmp_path: Path) -> None:
    """Fused kernels may keep one counter of steps for all parameters."""
    ctx = at(2)
    step = torch.tensor(2.0)
    slots = {name: {**slot, "step": step} for name, slot in ctx.optimizer_state["slots"].items()}
    shared = fl.evolve(ctx, optimizer_state={**ctx.optimizer_state, "slots": slots})
    fl.CheckpointStore(tmp_path).save(shared)
    loaded = fl.CheckpointStore(tmp_path).load(ctx.loop)
    assert fl.digest(loaded) == fl.digest(shared) == fl.digest(ctx)
    steps = [slot["step"] for slot in loaded.optimizer_state["slots"].values()]
    assert len({id(step) for step in steps}) == len(steps)
    assert fl.digest(fl.train(loaded)) == fl.digest(fl.train(ctx))


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (torch.empty(2, device="meta"), r"\['odd'\].*meta tensor"),
        (object(), r"\['odd'\] is of type object"),
        ((1, 2), r"\['odd'\] is of type tuple"),
        ({1: 2}, r"\['odd'\]\[1\] is under a key of type int"),
        (1j, r"\['odd'\] is of type complex"),
        (b"", r"\['odd'\] is of type bytes"),
    ],
)
@pytest.mark.parametrize("wait", [True, False])
def test_what_cannot_be_saved_is_refused_by_its_path(tmp_path: Path, leaf: Any, message: str, wait: bool) -> None:
    store = fl.CheckpointStore(tmp_path / "run")
    odd = START.with_callback_state("count", {"odd": leaf})
    with pytest.raises(TypeError, match=message), store:
        store.save(odd, wait=wait)
    assert store.steps() == []
