"""Hypothesis strategies: random training runs, and random places in them."""

from __future__ import annotations

from typing import Any

import attrs
import optree
import torch
from hypothesis import settings
from hypothesis import strategies as st

import functional_loop as fl

from .hooks import CALLBACKS
from .loops import MEASURES, NETWORKS, OPTIMIZERS, SOURCES, Spec

seeds = st.integers(0, 2**64)

# Workers take a hundred times as long; tests that need them ask for them.
IN_PROCESS = [name for name in SOURCES if name != "workers"]


def examples(share: float) -> settings:
    """A share of the profile's number of examples, for laws that take long to try."""
    return settings(max_examples=max(1, round(settings.default.max_examples * share)))


@st.composite
def specs(draw: st.DrawFn, **fixed: Any) -> Spec:
    """Runs of 1 to 4 epochs of 1 to 5 batches, in every combination that makes sense; ``fixed`` choices are kept."""
    accumulate = draw(st.integers(1, 4))
    optimizers = [name for name in OPTIMIZERS if name != "lbfgs" or accumulate == 1]
    batch_size = draw(st.integers(2, 6))
    full, rest = draw(st.integers(1, 4)), draw(st.integers(0, batch_size - 1))
    spec = Spec(
        network=draw(st.sampled_from(NETWORKS)),
        made_by_function=draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.4])),
        optimizer=draw(st.sampled_from(optimizers)),
        data=draw(st.sampled_from(IN_PROCESS)),
        # BatchNorm refuses a batch of one row.
        rows=full * batch_size + (rest if rest != 1 else 0),
        batch_size=batch_size,
        shuffle=draw(st.booleans()),
        drop_last=draw(st.booleans()),
        valid_rows=draw(st.sampled_from([0, 1, 5])),
        epochs=draw(st.integers(1, 4)),
        eval_freq=draw(st.integers(1, 3)),
        accumulate=accumulate,
        measures=some_of(draw, MEASURES),
        callbacks=some_of(draw, CALLBACKS),
    )
    return attrs.evolve(spec, **fixed)


def some_of(draw: st.DrawFn, names: dict[str, Any]) -> tuple[str, ...]:
    return tuple(draw(st.lists(st.sampled_from(list(names)), unique=True)))


@attrs.frozen
class Place:
    """A place in a run: prints as what it takes to get there."""

    spec: Spec
    seed: int
    number: int

    def context(self) -> fl.Context:
        contexts = boundaries(self.spec.loop(), self.seed)
        return contexts[self.number % len(contexts)]


def places(**fixed: Any) -> st.SearchStrategy[Place]:
    """Any boundary of any run."""
    return st.builds(Place, specs(**fixed), seeds, st.integers(0, 1000))


def boundaries(loop: fl.Loop, seed: int = 0) -> list[fl.Context]:
    """All contexts of a run, the first one included."""
    start = fl.init(loop, seed)
    return [start, *fl.iterate(start)]


def versions(tree: Any) -> list[int]:
    """The version counters of all tensors of a tree: an in-place operation moves one."""
    return [leaf._version for leaf in optree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
