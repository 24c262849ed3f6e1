"""Finds what is kept of earlier batches and decides later ones, of which a resumed run would have seen others."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from ..core.batch import Batch
from ..core.record import evolve, tree_map
from ..core.rng import fold_in
from .outside import Whole
from .twice import Bits, difference

if TYPE_CHECKING:
    from ..engine.step import Step, Tensors

FAR = 10_080_000
"""A number of calls that is more than what counters wait for, and a multiple of most intervals."""


class Inputs(NamedTuple):
    """What a batch is computed from."""

    params: Tensors
    buffers: Tensors
    batch: Batch
    seed: int


def difference_after_others(step: Step, compute: Callable[[Step, Inputs], Bits], given: Inputs, expected: Bits) -> str:
    """What differs from ``expected`` where batches of other rows, parameters, buffers and seeds were computed before;
    ``""`` if nothing does. What counts the calls is also set to a large number.

    Args:
        step: one whose network was never called.
        compute: gives the bits of a batch, to which it does not write.
    """
    whole = Whole(step)

    def call_another(number: int) -> None:
        # What can't be computed of such a batch says nothing.
        with suppress(Exception):
            compute(step, _other(given, number))

    whole.clear_caches()
    counts = [whole.bindings()]
    for number in (1, 2):
        call_another(number)
        counts.append(whole.bindings())
    try:
        if found := difference(expected, compute(step, given)):
            return found
    except Exception as error:
        return f"computing it failed ({error})"
    first, second, third = (bindings.numbers() for bindings in counts)
    counters = {
        key: type(value)(FAR - 1)
        for key, value in third.items()
        if key in first.keys() & second.keys() and first[key] != second[key] != value
    }
    if counters:
        counts[-1].set_numbers(counters)
        call_another(1)
        with suppress(Exception):
            return difference(expected, compute(step, given))
    return ""


def _other(given: Inputs, number: int) -> Inputs:
    """Inputs of the same form with other values."""

    def rows(tensor: Any) -> Any:
        return tensor.flip(0) if isinstance(tensor, Tensor) and tensor.dim() else tensor

    def moved(tensor: Any) -> Any:
        is_number = isinstance(tensor, Tensor) and (tensor.is_floating_point() or tensor.is_complex())
        return tensor.detach() * (1 + 0.25 * number) + 0.0625 if is_number else tensor

    batch = evolve(given.batch, x=tree_map(rows, given.batch.x), y=tree_map(rows, given.batch.y))
    if number == 1:
        # Only one of them, for networks that take no other numbers than those of the data.
        batch = evolve(batch, x=tree_map(moved, batch.x))
    params, buffers = (
        {name: moved(tensor) for name, tensor in tensors.items()} for tensors in (given.params, given.buffers)
    )
    return Inputs(params, buffers, batch, fold_in(given.seed, "another batch", number))
