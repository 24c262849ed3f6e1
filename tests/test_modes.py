"""The mode of a part of the network that is in evaluation mode when training begins."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import functional_loop as fl
from functional_loop.callbacks import CallbackSet, t_clbk

from .sample_loops import data, full_loop, hand_written, make_loop, same_bits


def partly_frozen() -> nn.Module:
    with fl.seeded(0):
        network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    network[1].eval()
    network[2].eval()
    return network


class KeepingModes(nn.Module):
    """The loop by hand sets the mode of the whole before every epoch: this one keeps that of the frozen parts."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def train(self, mode: bool = True) -> KeepingModes:
        return self

    def forward(self, x: Tensor) -> Any:
        return self.network(x)


@pytest.mark.parametrize("made_by_function", [False, True])
@pytest.mark.parametrize("hooks", [False, True])
def test_a_frozen_part_trains_as_in_the_loop_by_hand(made_by_function: bool, hooks: bool) -> None:
    log = [fl.Callback("log", batch_end=lambda ctx: ctx)] if hooks else []
    loop = make_loop(network=partly_frozen if made_by_function else partly_frozen(), callbacks=log)
    by_hand = copy.deepcopy(partly_frozen())
    hand_written(KeepingModes(by_hand), torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9), loop)
    ctx = fl.train(fl.init(loop, seed=0))
    assert same_bits(ctx, by_hand)
    assert ctx.buffers["1.num_batches_tracked"] == 0
    assert [part.training for part in fl.to_module(ctx)] == [True, False, False, True]


def test_a_frozen_part_stays_so_in_validation_and_after_it() -> None:
    ctx = fl.train(fl.init(full_loop(network=partly_frozen(), epochs=2)))
    assert ctx.buffers["1.num_batches_tracked"] == 0


@pytest.mark.slow
def test_a_frozen_part_stays_so_in_compiled_steps() -> None:
    ctx = fl.train(fl.init(make_loop(network=partly_frozen(), compile=True)))
    assert ctx.buffers["1.num_batches_tracked"] == 0


@pytest.mark.parametrize("mode", ["vectorised", "exact"])
def test_a_frozen_part_stays_so_in_ensembles(mode: str) -> None:
    loop = make_loop(network=partly_frozen)
    ctx = fl.train(fl.stack([fl.init(loop, seed) for seed in range(2)], mode=mode))
    assert ctx.buffers["1.num_batches_tracked"].tolist() == [0, 0]


def test_a_frozen_part_stays_so_when_its_parameters_are_thawed() -> None:
    thaw = t_clbk("unfreeze", starting_weights=["3.*"], unfreeze=[{"epoch": 2, "weights": ["1.*"]}])
    loop = make_loop(network=partly_frozen(), callbacks=[thaw])
    start = fl.init(loop)
    ctx = fl.train(start)
    assert ctx.buffers["1.num_batches_tracked"] == 0
    assert not torch.equal(ctx.params["1.weight"], start.params["1.weight"])


class CallbackSetModes(CallbackSet):
    def __init__(self, seen: list[Any]) -> None:
        self.seen = seen

    def on_batch_end(self) -> None:
        self.seen.append([part.training for part in self.ctx.network])

    def on_batch_valid_end(self) -> None:
        self.seen.append([part.training for part in self.ctx.network])


def test_object_callbacks_see_the_modes_of_the_step() -> None:
    seen: list[Any] = []
    x, y = data(3)
    valid, callbacks = fl.batches(x, y, batch_size=5), [CallbackSetModes(seen)]
    fl.train(fl.init(make_loop(network=partly_frozen(), valid=valid, callbacks=callbacks, epochs=1)))
    assert seen == [[True, False, False, True]] * 3 + [[False] * 4] * 2


def test_the_gradients_of_a_loss_function_see_them_too() -> None:
    ctx = fl.init(make_loop(network=partly_frozen()))
    x, y = data(3)
    f = fl.loss_function(ctx, (x, y), training=True)
    assert f(ctx.params) == f(ctx.params)
    assert fl.unroll(fl.evolve(ctx, stage="epoch_begin", epoch=1), [(x, y)]).buffers["1.num_batches_tracked"] == 0


def test_what_is_in_a_frozen_part_keeps_its_own_mode() -> None:
    network = nn.Sequential(nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)), nn.Linear(3, 2))
    network[0].eval()
    network[0][1].train()
    ctx = fl.train(fl.init(make_loop(network=network)))
    assert (ctx.buffers["0.0.num_batches_tracked"], ctx.buffers["0.1.num_batches_tracked"]) == (0, 6)


def test_a_network_in_evaluation_mode_as_a_whole_is_trained() -> None:
    ctx = fl.train(fl.init(make_loop(network=nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).eval())))
    assert ctx.buffers["0.num_batches_tracked"] == 6


def test_modes_are_those_of_the_first_init() -> None:
    network: Any = partly_frozen()
    loop = make_loop(network=network)
    start = fl.init(loop)
    expected = fl.digest(fl.train(start))
    other = fl.init(loop := make_loop(network=network))
    network.train()
    ctx = fl.train(other)
    assert fl.digest(ctx) == expected
    assert [part.training for part in fl.to_module(ctx)] == [True, False, False, True]


def test_the_loss_has_modes_of_its_own() -> None:
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, y_hat: Tensor, y: Tensor) -> Tensor:
            return nn.functional.mse_loss(self.norm(y_hat), y)

    loss = Normalised()
    loss.norm.eval()
    ctx = fl.train(fl.init(make_loop(loss=loss)))
    assert ctx.buffers["loss.norm.num_batches_tracked"] == 0
