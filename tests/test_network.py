"""Any network, trained by `train` and by hand: the same bits, and the user's module is left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import functional_loop as fl
from tests.sample_loops import ROWS, call, data, hand_written, make_loop, same_bits


class Recurrent(nn.Module):
    def __init__(self, cls: Any) -> None:
        super().__init__()
        self.recurrent = cls(3, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0].mean(1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x)[0].mean(1))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=8, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


class Tied(nn.Module):
    """A language model whose output head is its embedding."""

    def __init__(self, max_norm: float | None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4, max_norm=max_norm)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(x)).mean(1))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.GELU()
        )
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Mixed(nn.Module):
    """Layers, parameters of its own that the loss ignores, and modules without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.unused = nn.Parameter(torch.ones(2))
        self.nothing = nn.Identity()
        self.first = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.head(self.nothing(self.norm(self.first(x))))


class AssigningBuffers(nn.Module):
    """New tensors are assigned to its buffers, of which one is not persistent."""

    running: Tensor
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("running", torch.zeros(3))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.running = 0.9 * self.running + 0.1 * x.detach().mean(0)
            self.calls = self.calls + 1
        return self.linear(x - self.running)


class WritingToItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mul_(2).sub_(1))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(3, 2)
        self.right = nn.Bilinear(3, 3, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.left(a) + self.right(a, b)


class TwoOutputs(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(3, 2)
        self.variance = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Any:
        mean, variance = self.linear(x), self.variance(x)
        return {"mean": mean, "variance": variance} if self.kind is dict else (mean, variance)


def both_outputs(y_hats: Any, y: Tensor) -> Tensor:
    mean, variance = y_hats.values() if isinstance(y_hats, dict) else y_hats
    return ((mean - y) ** 2).mean() + (variance**2).mean()


def frozen_half() -> nn.Module:
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    network[0].requires_grad_(False)
    return network


def channels_last() -> nn.Module:
    return Convolutions().to(memory_format=torch.channels_last)


TOKENS = torch.arange(ROWS * 5).reshape(ROWS, 5) % 7
LABELS = torch.arange(ROWS) % 7
VECTORS, TARGETS = data(3)
SEQUENCES = data(5, 3)[0]
WIDE_SEQUENCES = data(5, 4)[0]
IMAGES = data(2, 6, 6)[0]

NETWORKS: dict[str, tuple[Any, Any, Any, Any]] = {
    "batch norm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), VECTORS, TARGETS, None),
    "cumulative batch norm": (
        lambda: nn.Sequential(nn.BatchNorm1d(3, momentum=None), nn.Linear(3, 2)),
        VECTORS,
        TARGETS,
        None,
    ),
    "convolutions": (Convolutions, IMAGES, TARGETS, None),
    "channels last": (channels_last, IMAGES.contiguous(memory_format=torch.channels_last), TARGETS, None),
    "RNN": (lambda: Recurrent(nn.RNN), SEQUENCES, TARGETS, None),
    "GRU": (lambda: Recurrent(nn.GRU), SEQUENCES, TARGETS, None),
    "LSTM": (lambda: Recurrent(nn.LSTM), SEQUENCES, TARGETS, None),
    "attention": (Attention, WIDE_SEQUENCES, TARGETS, None),
    "transformer": (Transformer, WIDE_SEQUENCES, TARGETS, None),
    "tied": (lambda: Tied(None), TOKENS, LABELS, nn.functional.cross_entropy),
    "tied, max_norm": (lambda: Tied(0.5), TOKENS, LABELS, nn.functional.cross_entropy),
    "embedding bag, max_norm": (lambda: nn.EmbeddingBag(7, 2, max_norm=0.5), TOKENS, TARGETS, None),
    "weight norm": (
        lambda: nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)),
        VECTORS,
        TARGETS,
        None,
    ),
    "spectral norm": (
        lambda: nn.Sequential(spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)),
        VECTORS,
        TARGETS,
        None,
    ),
    "unused parameters": (Mixed, VECTORS, TARGETS, None),
    "frozen parameters": (frozen_half, VECTORS, TARGETS, None),
    "assigned buffers": (AssigningBuffers, VECTORS, TARGETS, None),
    "in-place on the input": (WritingToItsInput, VECTORS, TARGETS, None),
    "tuple of inputs": (TwoInputs, (VECTORS, -VECTORS), TARGETS, None),
    "dict of inputs": (TwoInputs, {"b": VECTORS, "a": -VECTORS}, TARGETS, None),
    "tuple of outputs": (lambda: TwoOutputs(tuple), VECTORS, TARGETS, both_outputs),
    "dict of outputs": (lambda: TwoOutputs(dict), VECTORS, TARGETS, both_outputs),
    "float64": (lambda: nn.Linear(3, 2).double(), VECTORS.double(), TARGETS.double(), None),
    "complex": (
        lambda: nn.Linear(3, 2, dtype=torch.complex64),
        VECTORS + 0j,
        TARGETS + 0j,
        lambda a, b: (a - b).abs().mean(),
    ),
}


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
    assert calls == [True] * 6
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
    network.cached = network.weight * 2  # type: ignore[assignment]
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
