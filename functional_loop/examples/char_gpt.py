"""A small GPT that learns to write like Python's manual, one character after the other.

    functional-loop train functional_loop.examples.char_gpt:loop --run runs/gpt

The text is ``pydoc_data.topics``, some 0.5 MB of English that come with Python. It differs a little from one version
of Python to the next, and the scores with it.
"""

from __future__ import annotations

import math
from functools import cache
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, scaled_dot_product_attention

import functional_loop as fl


class Attention(nn.Module):
    """Causal self-attention with several heads (Vaswani et al., 2017)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        q, k, v = (
            part.view(rows, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.queries_keys_values(x).split(width, dim=2)
        )
        dropout = self.dropout if self.training else 0.0
        mixed = scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.output(mixed.transpose(1, 2).reshape(rows, length, width))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and a perceptron, each on normalised inputs and added to what came in."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads, dropout), nn.Dropout(dropout))
        self.perceptron = nn.Sequential(nn.LayerNorm(width), perceptron, nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.perceptron(x)  # type: ignore[no-any-return]


class GPT(nn.Module):
    """From characters ``[n, length]`` to scores of the character after each, ``[n, length, characters]``.

    The scores are products with the embedding of the characters, so that one matrix serves at both ends.
    """

    def __init__(self, characters: int, context: int, width: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.context = context
        self.characters = nn.Embedding(characters, width)
        self.positions = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for weight in (self.characters.weight, self.positions.weight):
            nn.init.normal_(weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        embedded = self.dropout(self.characters(x) + self.positions(places))
        return linear(self.norm(self.blocks(embedded)), self.characters.weight)


@cache
def text() -> str:
    return "\n\n".join(topics[name] for name in sorted(topics))


@cache
def alphabet() -> str:
    return "".join(sorted(set(text())))


def encode(string: str) -> Tensor:
    """Numbers of characters, ``[len(string)]``.

    Raises:
        ValueError: a character that the text doesn't have.
    """
    numbers = {character: number for number, character in enumerate(alphabet())}
    if unknown := sorted(set(string) - numbers.keys()):
        raise ValueError(f"the text has no {unknown[0]!r}; it is made of {alphabet()!r}")
    return torch.tensor([numbers[character] for character in string])


def windows(numbers: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets ``[n, context]``: pieces of the text, and the same pieces one character later."""
    pieces = numbers.unfold(0, context + 1, context)
    return pieces[:, :-1], pieces[:, 1:]


def loss(y_hat: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(y_hat.flatten(0, 1), y.flatten())


def bits_per_character() -> fl.Measure:
    """The mean of ``-log2 p(character)`` over all characters, in constant memory."""

    def update(state: dict[str, Any], y_hat: Tensor, y: Tensor) -> dict[str, Any]:
        bits = loss(y_hat, y).double() * y.numel() / math.log(2)
        return {"bits": state["bits"] + bits, "characters": state["characters"] + y.numel()}

    return fl.measure(
        "bits_per_character",
        minimize=True,
        init=lambda: {"bits": 0.0, "characters": 0},
        update=update,
        compute=lambda state: state["bits"] / state["characters"],
    )


def loop(
    epochs: int = 12,
    context: int = 64,
    width: int = 128,
    layers: int = 3,
    heads: int = 4,
    dropout: float = 0.1,
    batch_size: int = 16,
    lr: float = 2e-3,
    characters: int | None = None,
) -> fl.Loop:
    """The loop: the last tenth of the text validates, the rest trains.

    Args:
        characters: how much of the text to use; ``None`` is all of it.

    >>> import functional_loop as fl
    >>> ctx = fl.init(loop(context=8, width=8, layers=1, heads=2, characters=1000), seed=0)
    >>> fl.predict(ctx, encode("What is ").unsqueeze(0)).shape == (1, 8, len(alphabet()))
    True
    """
    numbers = encode(text()[:characters])
    end = len(numbers) * 9 // 10
    measures = [bits_per_character()]
    return fl.Loop(
        lambda: GPT(len(alphabet()), context, width, layers, heads, dropout),
        loss,
        fl.optimizer(torch.optim.AdamW, lr=lr, betas=(0.9, 0.95)),
        train=fl.batches(*windows(numbers[:end], context), batch_size=batch_size, shuffle=True),
        valid=fl.batches(*windows(numbers[end:], context), batch_size=4 * batch_size),
        epochs=epochs,
        measures_train=measures,
        measures_valid=measures,
    )


def sample(ctx: fl.Context, prompt: str, length: int, temperature: float = 0.7) -> str:
    """``prompt`` and ``length`` more characters that the network writes; the same ones for the same arguments.

    Raises:
        ValueError: the prompt is empty, or has a character that the text doesn't have.

    >>> import functional_loop as fl
    >>> ctx = fl.init(loop(context=8, width=8, layers=1, heads=2, characters=1000), seed=0)
    >>> written = sample(ctx, "What is ", 20)
    >>> len(written), written.startswith("What is ")
    (28, True)
    """
    if not prompt:
        raise ValueError("the prompt must have a character to go on from")
    network = fl.to_module(ctx).eval()
    assert isinstance(network, GPT)
    numbers = encode(prompt).unsqueeze(0)
    with torch.no_grad(), fl.seeded(fl.fold_in(ctx.seed, "sample", ctx.global_step)):
        for _ in range(length):
            scores = network(numbers[:, -network.context :])[:, -1]
            following = torch.multinomial(torch.softmax(scores / temperature, dim=1), 1)
            numbers = torch.cat([numbers, following], dim=1)
    return "".join(alphabet()[number] for number in numbers[0])
