"""The modules of a Loop: one of the network's structure without its values, and both parts that are trained as one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from ..core.beside import beside
from ..core.rng import fold_in, seeded
from .network import Modes, WithLoss, check_module

if TYPE_CHECKING:
    from .loop import Loop

TEMPLATE_SEED = -1
"""A seed under which no run trains: what a network draws besides its parameters and buffers differs from that."""


def template(loop: Loop, other: nn.Module | None = None) -> nn.Module:
    """A module of the network's structure, whose values don't matter; not to be written to.

    Args:
        other: another module that the network made, if there is one at hand.
    """
    if isinstance(loop.network, nn.Module):
        return loop.network
    network = loop.network

    def made() -> nn.Module:
        module = make_module(network, TEMPLATE_SEED)
        check_module(module)
        others = other if other is not None else make_module(network, TEMPLATE_SEED)
        _empty(module, frozenset(map(id, (*others.parameters(), *others.buffers()))))
        return module

    return beside(loop, "template", made)


def with_loss(loop: Loop) -> WithLoss:
    """`template` and the loss as one module, not to be written to."""
    return WithLoss(template(loop), loop.loss, modes(loop))


def modes(loop: Loop) -> Modes:
    """The parts of network and loss that keep a mode of their own in training, as they were at the first `init`."""
    return beside(loop, "modes", lambda: WithLoss(template(loop), loop.loss).kept_modes())


def _empty(module: nn.Module, shared: frozenset[int]) -> None:
    """Leave one element, that is NaN if there is such, of what the context has; what others ``shared`` stays."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_contiguous() and id(tensor) not in shared:
            value = math.nan if tensor.is_floating_point() or tensor.is_complex() else 0
            tensor.data = tensor.data.new_full((), value).expand(tensor.shape)


def make_module(network: Callable[[], nn.Module], seed: int) -> nn.Module:
    with seeded(fold_in(seed, "initialisation")):
        module = network()
    if not isinstance(module, nn.Module):
        raise TypeError(f"Loop: the function given as network must return an nn.Module, not {type(module).__name__}")
    return module
