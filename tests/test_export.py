"""Out of a context into plain PyTorch, and from plain PyTorch into a context, in mid-flight and to the bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import functional_loop as fl
from tests.sample_loops import data, hand_written, make_loop, mlp, same_bits

OPTIMIZERS: list[tuple[Any, dict[str, Any]]] = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (torch.optim.AdamW, {"lr": 0.01}),
    (torch.optim.AdamW, {"lr": 0.01, "fused": True}),
    (torch.optim.NAdam, {"lr": 0.01}),
    (torch.optim.Rprop, {"lr": 0.01}),
    (torch.optim.ASGD, {"lr": 0.01, "t0": 2.0}),
    (torch.optim.Adafactor, {"lr": 0.01}),
    (torch.optim.LBFGS, {"lr": 0.1, "max_iter": 3}),
]
names = [f"{cls.__name__}{' fused' * ('fused' in flags)}" for cls, flags in OPTIMIZERS]


def epoch_ends(loop: fl.Loop) -> list[fl.Context]:
    return [ctx for ctx in fl.iterate(fl.init(loop)) if ctx.stage == "epoch_end"]


@pytest.mark.parametrize(("cls", "flags"), OPTIMIZERS, ids=names)
def test_training_goes_on_by_hand(cls: Any, flags: dict[str, Any]) -> None:
    loop = make_loop(optimizer=fl.optimizer(cls, **flags), epochs=4)
    _, second, _, last = epoch_ends(loop)
    digest = fl.digest(second)
    module = fl.to_module(second)
    optimizer = fl.to_optimizer(second, module)
    assert type(optimizer) is cls
    hand_written(module, optimizer, loop, epochs=range(3, 5))
    assert same_bits(last, module)
    assert fl.digest(second) == digest


@pytest.mark.parametrize(("cls", "flags"), OPTIMIZERS, ids=names)
def test_a_module_and_an_optimizer_in_mid_flight_are_adopted(cls: Any, flags: dict[str, Any]) -> None:
    module = mlp()
    optimizer = cls(module.parameters(), **flags)
    loop = make_loop(network=module, optimizer=fl.optimizer(cls, **flags))
    hand_written(module, optimizer, loop)
    adopted = fl.init(loop, optimizer_state_from=optimizer)
    digest = fl.digest(adopted)
    hand_written(module, optimizer, loop)
    assert fl.digest(adopted) == digest
    assert same_bits(fl.train(adopted), module)


def test_hyperparameters_that_were_changed_by_hand_are_adopted() -> None:
    module = mlp()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    loop = make_loop(network=module)
    hand_written(module, optimizer, loop)
    scheduler.step()
    adopted = fl.init(loop, optimizer_state_from=optimizer)
    assert adopted.optimizer_state["groups"][0]["lr"] == 0.05
    hand_written(module, optimizer, loop)
    assert same_bits(fl.train(adopted), module)


def test_groups_go_out_and_come_back() -> None:
    groups = [{"params": "*.bias", "lr": 0.2, "weight_decay": 0.0}]
    description = fl.optimizer(torch.optim.AdamW, lr=0.01, groups=groups)
    ctx = fl.train(fl.init(make_loop(optimizer=description)))
    module = fl.to_module(ctx)
    optimizer = fl.to_optimizer(ctx, module)
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.01]
    adopted = fl.init(make_loop(network=module, optimizer=description), optimizer_state_from=optimizer)
    assert fl.tree_equal(adopted.optimizer_state, ctx.optimizer_state)
    assert fl.tree_equal(adopted.params, ctx.params)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda params: torch.optim.Adam(params), "Adam can't be continued by SGD"),
        (lambda params: torch.optim.SGD(params[1:], lr=0.1, momentum=0.9), "no group of the torch optimizer has"),
        (lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True), "nesterov"),
        (lambda params: torch.optim.SGD(mlp().parameters(), lr=0.1, momentum=0.9), r"of shape \(4, 3\)"),
    ],
)
def test_an_optimizer_that_does_not_fit_is_not_adopted(make: Any, message: str) -> None:
    module = mlp()
    with pytest.raises(fl.StateDictError, match=message):
        fl.init(make_loop(network=module), optimizer_state_from=make(list(module.parameters())))


def test_an_optimizer_is_adopted_with_its_module_only() -> None:
    optimizer = torch.optim.SGD(mlp().parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match="needs a Loop whose network is the module"):
        fl.init(make_loop(network=mlp), optimizer_state_from=optimizer)


@pytest.mark.parametrize("network", [mlp(), mlp], ids=["module", "function"])
def test_to_module_gives_copies(network: Any) -> None:
    ctx = fl.train(fl.init(make_loop(network=network)))
    digest = fl.digest(ctx)
    module = fl.to_module(ctx)
    assert same_bits(ctx, module)
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.zero_()
    assert fl.digest(ctx) == digest
    assert not same_bits(ctx, module)


def test_to_module_keeps_what_the_network_is() -> None:
    network = mlp()
    network.eval()
    network.get_submodule("0").requires_grad_(False)
    ctx = fl.train(fl.init(make_loop(network=network)))
    module = fl.to_module(ctx)
    assert type(module) is type(network)
    assert not module.training
    flags = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    assert flags == {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    assert all(isinstance(parameter, nn.Parameter) for parameter in module.parameters())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 2, bias=False)
        self.decoder = nn.Linear(3, 2)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x) + self.decoder(x)


def test_tied_parameters_stay_tied() -> None:
    ctx = fl.train(fl.init(make_loop(network=Tied())))
    module: Any = fl.to_module(ctx)
    assert module.encoder.weight is module.decoder.weight
    assert len(list(module.parameters())) == 2


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(3, 2, num_layers=2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[0][:, -1]


@pytest.mark.parametrize(
    "make", [Recurrent, lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))]
)
def test_modules_with_views_of_their_parameters_can_be_trained_on(make: Any) -> None:
    x, y = data(4, 3) if make is Recurrent else data(3)
    loop = make_loop(network=make(), train=fl.batches(x, y, batch_size=4), epochs=2)
    first, last = epoch_ends(loop)
    module = fl.to_module(first)
    hand_written(module, fl.to_optimizer(first, module), loop, epochs=range(2, 3))
    assert same_bits(last, module)


def test_the_optimizer_of_another_module_is_refused() -> None:
    ctx = fl.init(make_loop())
    with pytest.raises(ValueError, match=r"parameter .* is in only one of the module and the context"):
        fl.to_optimizer(ctx, nn.Linear(3, 2))
    other = copy.deepcopy(fl.to_module(ctx))
    other.get_submodule("0").register_parameter("weight", nn.Parameter(torch.zeros(7, 3)))
    with pytest.raises(ValueError, match=r"'0.weight' is of shape \[7, 3\] in the module and of \[4, 3\]"):
        fl.to_optimizer(ctx, other)
