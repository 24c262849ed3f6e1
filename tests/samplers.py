"""Networks that draw: every operator of torch that does, on tensors of several layouts."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SAMPLERS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(torch.ones_like(x), 0.5),
    "dropout1d": lambda x: F.dropout1d(torch.ones_like(x), 0.5),
    "alpha_dropout": lambda x: F.alpha_dropout(torch.ones_like(x), 0.5, True),
    "feature_alpha_dropout": lambda x: F.feature_alpha_dropout(torch.ones_like(x), 0.5, True),
    "rand": lambda x: torch.rand(x.shape),
    "randn": lambda x: torch.randn(x.shape, dtype=torch.float64),
    "randint": lambda x: torch.randint(9, x.shape),
    "randint, from": lambda x: torch.randint(2, 9, x.shape),
    "randperm": lambda x: torch.randperm(x.numel()).view(x.shape),
    "normal of numbers": lambda x: torch.normal(1.0, 2.0, x.shape),
    "normal of means": lambda x: torch.normal(x.detach(), 1.0),
    "normal of deviations": lambda x: torch.normal(0.0, x.detach().abs()),
    "normal of both": lambda x: torch.normal(x.detach(), x.detach().abs()),
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "randint_like": lambda x: torch.randint_like(x, 9),
    "randint_like, from": lambda x: torch.randint_like(x, 2, 9),
    "bernoulli": lambda x: torch.bernoulli(x.detach().sigmoid()),
    "bernoulli of a number": lambda x: torch.bernoulli(x.detach(), 0.3),
    "bernoulli_": lambda x: torch.empty_like(x).bernoulli_(0.3),
    "bernoulli_ of probabilities": lambda x: torch.empty_like(x).bernoulli_(x.detach().sigmoid()),
    "multinomial": lambda x: torch.multinomial(torch.ones_like(x).flatten(0, -2), 2, replacement=True),
    "exponential_": lambda x: torch.empty_like(x).exponential_(),
    "normal_": lambda x: torch.empty_like(x).normal_(),
    "uniform_": lambda x: torch.empty_like(x).uniform_(-1, 1),
    "cauchy_": lambda x: torch.empty_like(x).cauchy_(),
    "geometric_": lambda x: torch.empty_like(x).geometric_(0.3),
    "log_normal_": lambda x: torch.empty_like(x).log_normal_(),
    "random_": lambda x: torch.empty_like(x).random_(9),
    "poisson": lambda x: torch.poisson(torch.full_like(x, 3.0)),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, torch.ones_like(x), dropout_p=0.5),
    "two": lambda x: torch.rand_like(x) + torch.randn_like(x).flip(0),
    "one that depends on values before another": lambda x: torch.bernoulli(x.detach().sigmoid()) + torch.rand_like(x),
}
"""What they draw is a function of the generator and the layout of ``x``, not of its values up to rounding."""

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1),
    "every other": lambda x: x[:, ::2],
}


class Drawing(nn.Module):
    """A linear layer; a constant of the layout of its outputs is given to samplers, whose draws are more outputs."""

    def __init__(self, layout: str, *samplers: str) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self._samplers, self._layout = samplers, layout

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        made = self.linear(x)
        given = LAYOUTS[self._layout](0 * made + 0.5)
        return made, *(SAMPLERS[name](given) for name in self._samplers)


def loss_of_first(outputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
    return F.cross_entropy(outputs[0], y)
