"""Plain torch checkpoints and safetensors, out of a context and into one, to the bit."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import functional_loop as fl
from tests.sample_loops import data, hand_written, make_loop, mlp, same_bits
from tests.test_export import OPTIMIZERS, Tied, epoch_ends, names


def through_a_file(checkpoint: Any) -> Any:
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(("cls", "flags"), OPTIMIZERS, ids=names)
def test_plain_torch_goes_on_from_a_checkpoint(cls: Any, flags: dict[str, Any]) -> None:
    loop = make_loop(optimizer=fl.optimizer(cls, **flags), epochs=4)
    _, second, _, last = epoch_ends(loop)
    digest = fl.digest(second)
    checkpoint = through_a_file(fl.to_checkpoint(second))
    assert list(checkpoint) == ["network", "optimizer"]
    module = mlp()
    module.load_state_dict(checkpoint["network"], strict=True)
    optimizer = cls(module.parameters(), **flags)
    optimizer.load_state_dict(checkpoint["optimizer"])
    hand_written(module, optimizer, loop, epochs=range(3, 5))
    assert same_bits(last, module)
    assert fl.digest(second) == digest


@pytest.mark.parametrize(("cls", "flags"), OPTIMIZERS, ids=names)
def test_a_checkpoint_is_what_torch_makes(cls: Any, flags: dict[str, Any]) -> None:
    loop = make_loop(optimizer=fl.optimizer(cls, **flags))
    ctx = fl.train(fl.init(loop))
    module = fl.to_module(ctx)
    made = {"network": dict(module.state_dict()), "optimizer": fl.to_optimizer(ctx, module).state_dict()}
    checkpoint = fl.to_checkpoint(ctx)
    assert fl.tree_equal(checkpoint["network"], made["network"])
    assert fl.tree_equal(checkpoint["optimizer"]["state"], made["optimizer"]["state"])
    assert checkpoint["optimizer"]["param_groups"] == made["optimizer"]["param_groups"]


@pytest.mark.parametrize(("cls", "flags"), OPTIMIZERS, ids=names)
@pytest.mark.parametrize("network", [mlp, mlp()], ids=["function", "module"])
def test_a_run_begins_at_a_checkpoint_of_plain_torch(cls: Any, flags: dict[str, Any], network: Any) -> None:
    module = mlp()
    optimizer = cls(module.parameters(), **flags)
    loop = make_loop(network=network, optimizer=fl.optimizer(cls, **flags))
    hand_written(module, optimizer, loop)
    checkpoint = through_a_file({"network": module.state_dict(), "optimizer": optimizer.state_dict()})
    before = copy.deepcopy(checkpoint)
    start = fl.from_checkpoint(loop, checkpoint)
    assert start.loop is loop
    assert start.stage == ""
    ctx = fl.train(start)
    hand_written(module, optimizer, loop)
    assert same_bits(ctx, module)
    assert fl.tree_equal(checkpoint["network"], before["network"])
    assert fl.tree_equal(checkpoint["optimizer"]["state"], before["optimizer"]["state"])


def test_groups_go_out_and_come_back() -> None:
    groups = [{"params": "*.bias", "lr": 0.2, "betas": (0.8, 0.9)}]
    loop = make_loop(optimizer=fl.optimizer(torch.optim.AdamW, lr=0.01, groups=groups))
    ctx = fl.train(fl.init(loop)).with_hyperparameters(0, lr=0.07)
    again = fl.from_checkpoint(loop, through_a_file(fl.to_checkpoint(ctx)), seed=5)
    assert fl.tree_equal(again.optimizer_state, ctx.optimizer_state)
    assert fl.tree_equal(again.params, ctx.params)
    assert fl.tree_equal(again.buffers, ctx.buffers)
    assert again.seed == 5


def test_a_part_of_the_network_can_be_trained() -> None:
    loop = make_loop(optimizer=fl.optimizer(torch.optim.AdamW, params="3.*", lr=0.01))
    ctx = fl.train(fl.init(loop))
    checkpoint = fl.to_checkpoint(ctx)
    assert checkpoint["optimizer"]["param_groups"][0]["params"] == [0, 1]
    again = fl.from_checkpoint(loop, checkpoint)
    assert again.trainable == ctx.trainable == ("3.weight", "3.bias")
    assert fl.tree_equal(again.optimizer_state, ctx.optimizer_state)


def test_without_an_optimizer_its_state_is_fresh() -> None:
    loop = make_loop()
    ctx = fl.train(fl.init(loop))
    again = fl.from_checkpoint(loop, {"network": fl.to_checkpoint(ctx)["network"]})
    assert fl.tree_equal(again.params, ctx.params)
    assert fl.tree_equal(again.optimizer_state, fl.init(loop).optimizer_state)


def test_another_class_of_optimizer_goes_on_from_the_network() -> None:
    ctx = fl.train(fl.init(make_loop()))
    loop = make_loop(optimizer=fl.optimizer(torch.optim.AdamW))
    again = fl.from_checkpoint(loop, {"network": fl.to_checkpoint(ctx)["network"]})
    assert fl.train(again).stage == "end"


def test_other_kernels_go_on_from_a_checkpoint() -> None:
    ctx = fl.train(fl.init(make_loop(optimizer=fl.optimizer(torch.optim.AdamW, fused=True))))
    loop = make_loop(optimizer=fl.optimizer(torch.optim.AdamW, foreach=False))
    again = fl.from_checkpoint(loop, fl.to_checkpoint(ctx))
    assert fl.tree_equal(again.optimizer_state["slots"], ctx.optimizer_state["slots"])


def test_a_checkpoint_shares_no_memory_with_the_context() -> None:
    ctx = fl.train(fl.init(make_loop()))
    digest = fl.digest(ctx)
    checkpoint = fl.to_checkpoint(ctx)
    again = fl.from_checkpoint(ctx.loop, checkpoint)
    digest_again = fl.digest(again)
    for tensor in checkpoint["network"].values():
        tensor.zero_()
    for slot in checkpoint["optimizer"]["state"].values():
        slot["momentum_buffer"].zero_()
    assert fl.digest(ctx) == digest
    assert fl.digest(again) == digest_again


def test_states_of_callbacks_begin_with_the_adopted_values() -> None:
    average = fl.Callback("average", init=lambda ctx: ctx.params)
    loop = make_loop(callbacks=[average], network=mlp)
    trained = fl.train(fl.init(loop))
    again = fl.from_checkpoint(loop, fl.to_checkpoint(trained))
    assert fl.tree_equal(again.callbacks["average"], trained.params)


def wrong(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    checkpoint = fl.to_checkpoint(fl.train(fl.init(make_loop(optimizer=fl.optimizer(torch.optim.Adam)))))
    change(checkpoint)
    return checkpoint


def reverse(checkpoint: dict[str, Any]) -> None:
    state = checkpoint["optimizer"]["state"]
    checkpoint["optimizer"]["state"] = dict(zip(reversed(state), state.values(), strict=True))


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (lambda c: c["network"].pop("0.bias"), ["network/0.bias: missing in what was saved"]),
        (lambda c: c["network"].update({"9.bias": torch.ones(1)}), ["network/9.bias", "missing here"]),
        (
            lambda c: c["network"].update({"0.bias": torch.ones(7), "0.weight": torch.ones(4, 3).double()}),
            ["network/0.bias: 'float32[7]'", "network/0.weight: 'float64[4, 3]' in what was saved, 'float32[4, 3]'"],
        ),
        (lambda c: c["network"].update({"0.bias": 3}), ["network/0.bias: 'int'"]),
        (lambda c: c["optimizer"].pop("state"), ["does not fit this Adam"]),
        (lambda c: c.update(optimizer=None), ["does not fit this Adam"]),
        (lambda c: c["optimizer"]["param_groups"].clear(), ["number of parameter groups"]),
        (lambda c: c["optimizer"]["param_groups"][0]["params"].pop(), ["doesn't match the size"]),
        (lambda c: c["optimizer"]["param_groups"][0].update(amsgrad=True), ["amsgrad is True, and here False"]),
        (lambda c: c["optimizer"]["param_groups"][0].pop("lr"), ["'lr' is missing"]),
        (reverse, ["optimizer/slots/0.weight/exp_avg", "[2] in what was saved, [4, 3] here"]),
        (lambda c: c["optimizer"]["state"][0].pop("exp_avg"), ["optimizer/slots/0.weight/exp_avg: missing"]),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(change: Any, messages: list[str]) -> None:
    with pytest.raises(fl.StateDictError) as caught:
        fl.from_checkpoint(make_loop(optimizer=fl.optimizer(torch.optim.Adam)), wrong(change))
    for message in messages:
        assert message in str(caught.value)


def test_the_state_of_another_class_is_refused() -> None:
    with pytest.raises(fl.StateDictError, match="momentum"):
        fl.from_checkpoint(make_loop(), wrong(lambda c: None))


@pytest.mark.parametrize(
    ("checkpoint", "error", "message"),
    [
        ("file.pt", TypeError, "not str"),
        ({"optimizer": {}}, ValueError, "has no network"),
        ({"network": {}, "optimiser": {}}, ValueError, "not 'optimiser'; did you mean 'optimizer'"),
        ({"network": [1]}, TypeError, "not list"),
    ],
)
def test_what_is_no_checkpoint_is_refused(checkpoint: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fl.from_checkpoint(make_loop(), checkpoint)


def test_a_network_goes_to_safetensors_and_back(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    ctx = fl.train(fl.init(make_loop()))
    fl.to_safetensors(ctx, path)
    tensors = safetensors.torch.load_file(path)
    module = mlp()
    module.load_state_dict(tensors, strict=True)
    assert same_bits(ctx, module)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    again = fl.from_safetensors(make_loop(), path, seed=2)
    assert fl.tree_equal(again.params, ctx.params)
    assert fl.tree_equal(again.buffers, ctx.buffers)


def test_tied_weights_go_out_under_each_name_and_come_back_under_one(tmp_path: Path) -> None:
    loop = make_loop(network=Tied)
    ctx = fl.train(fl.init(loop))
    fl.to_safetensors(ctx, tmp_path / "whole.safetensors")
    module = Tied()
    module.load_state_dict(safetensors.torch.load_file(tmp_path / "whole.safetensors"), strict=True)
    assert same_bits(ctx, module)
    safetensors.torch.save_model(module, str(tmp_path / "deduplicated.safetensors"))
    assert len(safetensors.torch.load_file(tmp_path / "deduplicated.safetensors")) == 2
    for name in ("whole", "deduplicated"):
        again = fl.from_safetensors(loop, tmp_path / f"{name}.safetensors")
        assert fl.tree_equal(again.params, ctx.params)


def test_convolutions_keep_their_layout() -> None:
    x, y = data(3, 8, 8)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)).to(memory_format=torch.channels_last)
    loop = make_loop(network=network, train=fl.batches(x, y, batch_size=4))
    ctx = fl.train(fl.init(loop))
    again = fl.from_checkpoint(loop, through_a_file(fl.to_checkpoint(ctx)))
    for name, param in again.params.items():
        assert param.stride() == ctx.params[name].stride()
    assert fl.tree_equal(again.optimizer_state, ctx.optimizer_state)
