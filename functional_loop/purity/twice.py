"""Compares what is computed twice of one batch, and says what a difference means."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .reachable import EVERYTHING, changed, reachable, token

if TYPE_CHECKING:
    from ..engine.step import Differentiated

Bits = dict[str, Any]
"""By the names of things in messages, what is equal for equal bits."""


def bits_of(found: Differentiated, trainable: Sequence[str]) -> Bits:
    """The bits of all that a batch gives."""
    loss, outputs, buffers, grads = found
    named = {
        **{f"the new buffer {name!r}": buffer for name, buffer in buffers.items()},
        **{f"the gradient of {name!r}": grad for name, grad in zip(trainable, grads, strict=False)},
    }
    return output_bits((outputs, loss)) | {what: token(value, EVERYTHING) for what, value in named.items()}


def output_bits(found: tuple[Any, Any]) -> Bits:
    """The bits of outputs, and of the loss."""
    return {
        path: token(value, EVERYTHING)
        for path, value in reachable({"the output": found[0], "the loss": found[1]})
        if isinstance(value, (Tensor, int, float))
    }


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What differs between two computations, the loss first."""
    found = changed(one, other)
    return "" if not found else "the loss differs" if "the loss" in found else f"{found[0]} differs"


def refusal(what: str, paths: Sequence[str], when: str = "a second time") -> ValueError:
    """The error that says ``what`` differs in the second computation, and what the first has changed: ``paths``."""
    message = (
        f"{what} when a batch is computed {when} from the same parameters, buffers and seed: a run could neither be "
        "repeated nor resumed. "
    )
    if not paths:
        return ValueError(
            f"{message}Nothing has changed that attributes, closures and globals of network and loss reach: it depends "
            "on something further outside, such as a file, a clock, or a generator of another library. Pass it in with "
            "the batch"
        )
    name = paths[0].rpartition(".")[2].rpartition(" ")[2].partition("[")[0]
    more = " and more" if len(paths) > 5 else ""
    return ValueError(
        f"{message}The first call has changed {', '.join(paths[:5])}{more}, outside of the context. What is to be kept "
        f"is a buffer: self.register_buffer({name!r}, torch.zeros(...)) in __init__, assigned in forward(). What draws "
        "does it from the global generators (torch.randn(...)), which are seeded for every step, and from none of its "
        "own"
    )


def is_rounding(device_type: str, compute: Callable[[], Bits]) -> bool:
    """Whether what differs is the order in which kernels add, of which there is a warning."""
    if device_type == "cpu":
        if torch.get_num_threads() == 1:
            return False
        threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
        warns = torch.is_deterministic_algorithms_warn_only_enabled()
        try:
            torch.set_num_threads(1)
            torch.use_deterministic_algorithms(True, warn_only=True)
            if compute() != compute():
                return False
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(strict, warn_only=warns)
    warnings.warn(
        "a batch that is computed twice gives other bits, though nothing that network and loss keep has changed: some "
        "kernel adds in no fixed order, and a run will not repeat bit for bit. "
        "torch.use_deterministic_algorithms(True) finds it, or takes another",
        UserWarning,
        stacklevel=2,
    )
    return True
