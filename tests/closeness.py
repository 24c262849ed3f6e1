"""What is promised of two ways to compute the same, and tests of it that do not measure the processor.

Vectorised members and compiled steps add in another order than solo and eager steps, so that their bits differ. One
step from equal states differs by rounding. Over several steps an optimizer may make a rounding error as large as its
steps (Adam and RMSprop divide a gradient by its own size), and how large depends on the processor. So states after
several steps are compared in float64, where even a rounding error that has grown ten million times is below the
tolerance, and losses of one step in float32.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import attrs
import torch
from torch import Tensor, nn

import functional_loop as fl
from functional_loop.core.record import leaves_with_paths
from functional_loop.data.tensors import TensorSource

RELATIVE, ABSOLUTE = 1e-6, 1e-8
"""Tolerances for states in float64."""


def in_doubles(loop: fl.Loop) -> fl.Loop:
    """The loop with its network and the tensors that it trains and validates on in float64."""
    network = loop.network
    made: Any = copy.deepcopy(network).double() if isinstance(network, nn.Module) else lambda: network().double()
    return fl.evolve(loop, network=made, train=_source(loop.train), valid=loop.valid and _source(loop.valid))


def doubled(tree: Any) -> Any:
    """The tree with its floating point tensors in float64."""
    return fl.tree_map(
        lambda leaf: leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, tree
    )


def _source(source: Any) -> Any:
    assert isinstance(source, TensorSource)
    return attrs.evolve(source, x=doubled(source.x), y=doubled(source.y))


def assert_close(a: fl.Context, b: fl.Context) -> None:
    """The same durable state, of the same types, up to rounding in float64."""
    left, right = dict(leaves_with_paths(fl.state_dict(a))), dict(leaves_with_paths(fl.state_dict(b)))
    assert left.keys() == right.keys()
    for path, value in left.items():
        other = right[path]
        assert type(value) is type(other), path
        if isinstance(value, Tensor):
            torch.testing.assert_close(
                value, other, rtol=RELATIVE, atol=ABSOLUTE, msg=lambda text, path=path: f"{path}: {text}"
            )
        elif isinstance(value, float):
            assert math.isclose(value, other, rel_tol=RELATIVE, abs_tol=ABSOLUTE), (path, value, other)
        else:
            assert value == other, path
