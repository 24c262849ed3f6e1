"""Loaders of ``torchdata.nodes``, read by the root of their nodes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


class NodeLoader:
    """What `torchdata.nodes.Loader` is, with a state from which every epoch resumes.

    That of the Loader stays as it was in an epoch that it began from the end of another (torchdata 0.11).

    Raises:
        ValueError: a sampler has a generator of its own, which is no part of the state.
    """

    def __init__(self, loader: Any) -> None:
        self.root = loader.root
        self._next: Any = None
        self._samplers = [sampler for sampler in _samplers(self.root) if hasattr(sampler, "generator")]
        for sampler in self._samplers:
            own = sampler.generator
            if own is not None and type(own) is not _Order:
                raise ValueError(
                    f"the generator of the {type(sampler).__name__} would make the order depend on how often it was "
                    "read; leave generator= out, and the order follows from the seed of the run and the epoch"
                )

    def seed_order(self, seed: int) -> None:
        """Make the order of the samplers in the next `iter` a function of ``seed``, in whatever thread they draw."""
        for sampler in self._samplers:
            sampler.generator = _Order().manual_seed(seed)

    def __iter__(self) -> Iterator[Any]:
        self.root.reset(self._next)
        self._next = None
        return iter(self.root)

    def state_dict(self) -> Any:
        return self.root.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self._next = state or None


class _Order(torch.Generator):
    """The generator of an order, as apart from one that a sampler was made with."""


def _samplers(node: Any) -> Iterator[Any]:
    """The samplers of a node and of those that it reads from."""
    if (sampler := getattr(node, "sampler", None)) is not None:
        yield sampler
    several = getattr(node, "source_nodes", {})
    for child in (getattr(node, "source", None), *(several.values() if isinstance(several, dict) else ())):
        if child is not None:
            yield from _samplers(child)
