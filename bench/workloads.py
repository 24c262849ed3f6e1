"""What is trained in the benchmarks: networks from tiny to 50M parameters, on random data of fixed seeds."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TypeAlias

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import functional_loop as fl

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@attrs.frozen(eq=False)
class Workload:
    """A network, its loss, and one epoch of data."""

    title: str
    make_network: Callable[[], nn.Module]
    make_data: Callable[[], tuple[Tensor, Tensor]]
    loss: Loss
    batch_size: int

    def network(self) -> nn.Module:
        with fl.seeded(0):
            return self.make_network()

    def data(self) -> tuple[Tensor, Tensor]:
        """All rows: inputs and targets."""
        with fl.seeded(1):
            return self.make_data()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))


def table(rows: int = 8192) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, 20)
    return x, (x.sum(1) > 0).long()


def cnn() -> nn.Module:
    def block(channels_in: int, channels_out: int) -> list[nn.Module]:
        convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(*block(1, 16), *block(16, 32), nn.Flatten(), nn.Linear(32 * 7 * 7, 10))


def images(rows: int = 1024) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 1, 28, 28), torch.randint(10, (rows,))


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Block(nn.Module):
    """A transformer block that normalises first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)  # type: ignore[no-any-return]


class GPT(nn.Module):
    """A small GPT over bytes."""

    def __init__(self, length: int = 64, width: int = 128, heads: int = 4, layers: int = 5) -> None:
        super().__init__()
        self.token = nn.Embedding(256, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.token(tokens) + self.position))  # type: ignore[no-any-return]


def texts(rows: int = 64, length: int = 64) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(256, (rows, length + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def wide() -> nn.Module:
    widths = [2048, 4096, 4096, 4096]
    hidden = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(4096, 2048))


def wide_table(rows: int = 128) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 2048), torch.randint(2048, (rows,))


WORKLOADS = {
    "mlp": Workload("MLP 20-64-64-2, batch 32", mlp, table, F.cross_entropy, batch_size=32),
    "cnn": Workload("CNN on 28x28, batch 64", cnn, images, F.cross_entropy, batch_size=64),
    "gpt": Workload("GPT of 1M parameters, batch 16x64", GPT, texts, next_token_loss, batch_size=16),
    "wide": Workload("MLP of 50M parameters, batch 32", wide, wide_table, F.cross_entropy, batch_size=32),
}
