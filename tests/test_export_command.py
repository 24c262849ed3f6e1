"""``functional-loop export``: a checkpoint for other tools, without the code that trained it."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

import functional_loop as fl
from functional_loop.checkpoint import file as checkpoint_file
from functional_loop.cli import main
from tests.sample_loops import full_loop, middle, noisy_mlp, same_bits


@pytest.fixture
def saved(tmp_path: Path) -> tuple[fl.Context, Path]:
    ctx = middle()
    return ctx, fl.CheckpointStore(tmp_path / "run").save(ctx)


def test_network_and_optimizer_for_torch(saved: tuple[fl.Context, Path], tmp_path: Path) -> None:
    ctx, file = saved
    assert main(["export", str(file), str(tmp_path / "model.pt")]) == 0
    checkpoint = torch.load(tmp_path / "model.pt", weights_only=True)
    module = noisy_mlp()
    module.load_state_dict(checkpoint["network"], strict=True)
    assert same_bits(ctx, module)
    again = fl.from_checkpoint(full_loop(), checkpoint)
    assert fl.tree_equal(again.optimizer_state, ctx.optimizer_state)


def test_the_network_as_safetensors(
    saved: tuple[fl.Context, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ctx, file = saved
    out = tmp_path / "model.safetensors"
    assert main(["export", str(file), str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 9 tensors, after step 4\n"
    module = noisy_mlp()
    module.load_state_dict(safetensors.torch.load_file(out), strict=True)
    assert same_bits(ctx, module)


def test_what_can_not_be_exported_is_said(
    saved: tuple[fl.Context, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, file = saved
    there = tmp_path / "there.pt"
    there.write_text("mine")
    other = tmp_path / "other.safetensors"
    checkpoint_file.write(other, {"weight": torch.ones(1)}, {})
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(file.read_bytes()[:-1])
    newer = tmp_path / "newer.safetensors"
    state, metadata = checkpoint_file.read(file)
    checkpoint_file.write(newer, {**state, "version": 99}, metadata)
    for given, out, message in [
        (file, tmp_path / "model.onnx", "must end in .safetensors or .pt"),
        (file, there, "exists"),
        (tmp_path / "nowhere.safetensors", tmp_path / "model.pt", "No such file"),
        (other, tmp_path / "model.pt", "no checkpoint of a run"),
        (damaged, tmp_path / "model.pt", "is damaged"),
        (newer, tmp_path / "model.pt", "newer functional_loop"),
        (file, tmp_path / "no folder" / "model.pt", "could not be written"),
    ]:
        assert main(["export", str(given), str(out)]) == 2
        assert message in capsys.readouterr().err
    assert there.read_text() == "mine"
    assert not (tmp_path / "model.pt").exists()
