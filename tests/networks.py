"""Networks of many kinds, each with data and a loss, for tests of what holds for all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from tests.sample_loops import ROWS, data


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


class Shared(nn.Module):
    """One module under two names, and parameters in containers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = self.first
        self.scales = nn.ParameterList([torch.ones(3)])
        self.named = nn.ParameterDict({"out": torch.ones(2)})
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x) * self.scales[0])) * self.named["out"]


class Switching(nn.Module):
    """Half of its parameters have no gradient in any one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(3, 2)
        self.right = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) if x.sum() > 0 else self.right(x)


class InputGradient(nn.Module):
    """Differentiates by its input while it is called, as gradient penalties do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = self.linear(x).tanh()
            (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y + slope.sum(1, keepdim=True)


def both_outputs(y_hats: Any, y: Tensor) -> Tensor:
    mean, variance = y_hats.values() if isinstance(y_hats, dict) else y_hats
    return ((mean - y) ** 2).mean() + (variance**2).mean()


def frozen_half() -> nn.Module:
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    network[0].requires_grad_(False)
    return network


def frozen_gru() -> nn.Module:
    network = Recurrent(nn.GRU)
    network.recurrent.requires_grad_(False)
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
    "shared module": (Shared, VECTORS, TARGETS, None),
    "changing parameters": (Switching, VECTORS, TARGETS, None),
    "gradient of the input": (InputGradient, VECTORS, TARGETS, None),
    "frozen GRU": (frozen_gru, SEQUENCES, TARGETS, None),
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
