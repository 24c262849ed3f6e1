"""Any network, trained by `train` and by hand: the same bits, and the user's module is left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import functional_loop as fl
from tests.networks import NETWORKS, TARGETS, TOKENS, VECTORS
from tests.sample_loops import call, hand_written, make_loop, same_bits


@pytest.fixture(params=NETWORKS)
def loop(request: pytest.FixtureRequest) -> fl.Loop:
    make, x, y, loss = NETWORKS[request.param]
    with fl.seeded(0):
        network = make()
    return make_loop(
        network=network,
        loss=loss or nn.functional.mse_loss,
        train=fl.batches(x, y, batch_size=4, shuffle=True),
        valid=fl.batches(x, y, batch_size=4),
    )


def test_trains_like_the_hand_written_loop(loop: fl.Loop) -> None:
    module = copy.deepcopy(loop.network)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    hand_written(module, optimizer, fl.evolve(loop, valid=None))
    assert same_bits(fl.train(fl.init(loop, seed=0)), module)


def test_no_context_is_ever_written_to(loop: fl.Loop) -> None:
    contexts = [(ctx, fl.digest(ctx)) for ctx in fl.iterate(fl.init(loop, seed=0))]
    source: Any = loop.train
    for ctx, digest in contexts:
        fl.predict(ctx, source.x)
        assert fl.digest(ctx) == digest
    moved = {fl.digest(ctx) for ctx, _ in contexts}
    assert len(moved) == len(contexts)


def test_the_data_is_never_written_to(loop: fl.Loop) -> None:
    source: Any = loop.train
    before = fl.tree_map(torch.clone, {"x": source.x, "y": source.y})
    ctx = fl.train(fl.init(loop, seed=0))
    fl.predict(ctx, source.x)
    assert fl.tree_equal({"x": source.x, "y": source.y}, before)


def test_the_module_is_never_written_to(loop: fl.Loop) -> None:
    network: Any = loop.network
    network.eval()
    before = copy.deepcopy(network.state_dict())
    tensors = [*network.parameters(), *network.buffers()]
    versions = [tensor._version for tensor in tensors]
    requires_grad = [tensor.requires_grad for tensor in tensors]
    fl.train(fl.init(loop, seed=0))
    assert [*map(id, network.parameters()), *map(id, network.buffers())] == [*map(id, tensors)]
    assert [tensor._version for tensor in tensors] == versions
    assert [tensor.requires_grad for tensor in tensors] == requires_grad
    assert all(tensor.grad is None for tensor in tensors)
    assert not any(part.training for part in network.modules())
    assert fl.tree_equal(dict(network.state_dict()), dict(before))


def test_contexts_share_no_memory_with_the_module(loop: fl.Loop) -> None:
    network: Any = loop.network
    theirs = {tensor.untyped_storage().data_ptr() for tensor in [*network.parameters(), *network.buffers()]}
    start = fl.init(loop, seed=0)
    for ctx in (start, fl.train(start, steps=1), fl.train(start)):
        ours = {tensor.untyped_storage().data_ptr() for tensor in [*ctx.params.values(), *ctx.buffers.values()]}
        assert not ours & theirs


def test_a_state_dict_resumes_at_every_boundary(loop: fl.Loop) -> None:
    final = fl.digest(fl.train(fl.init(loop, seed=0)))
    for ctx in fl.iterate(fl.init(loop, seed=0)):
        loaded = fl.load_state_dict(fl.init(loop), fl.state_dict(ctx))
        assert fl.digest(loaded) == fl.digest(ctx)
        assert fl.digest(fl.train(loaded)) == final


def test_predictions_are_those_of_the_module(loop: fl.Loop) -> None:
    source: Any = loop.train
    ctx = fl.train(fl.init(loop, seed=0))
    module = fl.to_module(ctx).eval()
    copies = fl.tree_map(torch.clone, source.x)
    with torch.no_grad():
        expected = call(module, copies)
    assert fl.tree_equal(fl.predict(ctx, source.x), expected)


def test_a_module_trained_by_hand_meanwhile_changes_no_run() -> None:
    loop = make_loop()
    network: Any = loop.network
    start = fl.init(loop, seed=0)
    expected = fl.digest(fl.train(start))
    middle = fl.train(start, steps=2)
    hand_written(network, torch.optim.SGD(network.parameters(), lr=1.0), loop)
    network.requires_grad_(False)
    assert fl.digest(fl.train(start)) == expected
    assert fl.digest(fl.train(middle)) == expected


def test_forward_hooks_of_the_module_run_and_stay_its_own() -> None:
    loop = make_loop()
    network: Any = loop.network
    calls: list[bool] = []
    network.register_forward_hook(lambda module, args, output: calls.append(module.training))
    fl.train(fl.init(loop, seed=0))
    # The first step is computed more than once.
    assert len(calls) > 6
    assert all(calls)
    assert len(network._forward_hooks) == 1


class Lookup(nn.Module):
    """Renormalises its parameter in place, as F.embedding(max_norm=...) does, where no one can see it coming."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(7, 2))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.table.clamp_(max=0.5)
        return nn.functional.embedding(x, self.table).mean(1)


def test_a_network_that_writes_to_its_parameters_is_refused() -> None:
    loop = make_loop(network=Lookup(), train=fl.batches(TOKENS, TARGETS, batch_size=4))
    with pytest.raises(ValueError, match="'table' in place"):
        fl.train(fl.init(loop))


class StatefulOutside(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"calls": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Sequential(nn.LazyLinear(2)), "lazy.*0.weight, 0.bias"),
        (nn.Sequential(nn.Linear(3, 2), nn.LazyBatchNorm1d()), "lazy.*1.running_mean"),
        (nn.Sequential(StatefulOutside(3, 2)), "StatefulOutside at '0'.*get_extra_state"),
    ],
)
def test_networks_that_no_function_can_follow_are_refused(network: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fl.init(make_loop(network=network))


def test_a_lazy_network_is_welcome_once_it_has_seen_a_batch() -> None:
    network = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Linear(4, 2))
    network(VECTORS)
    assert fl.train(fl.init(make_loop(network=network))).stage == "end"


def test_a_network_that_cannot_be_copied_is_explained() -> None:
    network = nn.Linear(3, 2)
    network.cached = network.weight * 2
    with pytest.raises(RuntimeError) as caught:
        fl.train(fl.init(make_loop(network=network)))
    assert "can't be copied" in caught.value.__notes__[0]


def test_dropout_is_a_function_of_seed_and_global_step() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    loop = make_loop(network=module)
    by_hand = copy.deepcopy(module)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9)

    def reseed(module: nn.Module, args: Any, steps: list[int] = [0]) -> None:  # noqa: B006
        steps[0] += 1
        torch.manual_seed(fl.fold_in(0, "step", steps[0]))

    by_hand.register_forward_pre_hook(reseed)
    state = torch.get_rng_state()
    hand_written(by_hand, optimizer, loop)
    torch.set_rng_state(state)
    assert same_bits(fl.train(fl.init(loop, seed=0)), by_hand)
    assert torch.equal(torch.get_rng_state(), state)
