"""Random numbers as functions of (seed, stream, position): nothing random is stored, everything is derived."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Generator
from functools import lru_cache

import torch
from torch import Tensor

from .bits import same_bits
from .draws import put_back, reseed, states
from .errors import region

_MASK = 0xFFFFFFFF


def fold_in(seed: int, stream: str, position: int = 0) -> int:
    """A 32-bit seed for one use of randomness.

    For a given ``seed`` and ``stream``, any 2**32 successive positions get different seeds: torch's CPU generator uses
    the low 32 bits of its seed only, so that hashes of 64 bits collide.

    Args:
        seed: the seed of the run, any integer.
        stream: what the randomness is for, such as ``"dropout"``.
        position: where in the stream, an integer from 0.

    Returns:
        An integer from 0 to 2**32 - 1.

    Raises:
        TypeError: ``seed`` or ``position`` is not an integer.
        ValueError: ``position`` is negative.

    >>> fold_in(0, "dropout", 7) == fold_in(0, "dropout", 7)
    True
    >>> len({fold_in(0, "dropout", step) for step in range(10_000)})
    10000
    """
    if type(seed) is not int or type(position) is not int:
        raise TypeError(f"seed and position must be integers, not {seed!r} and {position!r}")
    if position < 0:
        raise ValueError(f"position must not be negative, but is {position}")
    first, second = _keys(seed, stream, position >> 32)
    return _mix(_mix((position & _MASK) ^ first) ^ second)


@lru_cache(maxsize=1024)
def _keys(seed: int, stream: str, high: int) -> tuple[int, int]:
    digest = hashlib.sha256(f"{seed}/{high}/{stream}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def _mix(x: int) -> int:
    """A bijection of the 32-bit integers with full avalanche (Wellons, "lowbias32", 2018)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def step_seed(seed: int, number: int) -> int:
    """The seed of a training step, by its number in the run."""
    return fold_in(seed, "step", number)


def evaluation_seed(seed: int, epoch: int, number: int) -> int:
    """The seed of a batch in evaluation mode, by its number in the validation of an epoch."""
    return fold_in(fold_in(seed, "evaluation", epoch), "batch", number)


@region
def seeded(seed: int) -> Generator[None]:
    """A region in which torch (CPU, and CUDA where it is in use), numpy and `random` start from ``seed``.

    The states from before are put back at the end, also after an error.

    Raises:
        ValueError: ``seed`` is not from 0 to 2**32 - 1, as `fold_in` makes them.

    >>> import random
    >>> def draw():
    ...     with seeded(fold_in(0, "augmentation", 3)):
    ...         return torch.rand(()).item(), random.random()
    >>> draw() == draw()
    True
    """
    if not 0 <= seed <= _MASK:
        raise ValueError(f"a seed is from 0 to 2**32 - 1, not {seed}; fold_in(seed, stream) makes one of any integer")
    with torch_seeded(seed):
        before = states()
        reseed(seed)
        try:
            yield
        finally:
            put_back(before)


generators_lock = threading.RLock()
"""Who sets the state of global generators, or relies on it, holds it: generators are the process's, not a thread's."""

# A process forked while another thread is in such a region would have a lock that none of its threads can release.
os.register_at_fork(
    before=generators_lock.acquire,
    after_in_parent=generators_lock.release,
    after_in_child=generators_lock.release,
)


class torch_seeded:  # noqa: N801  (a context manager, named like the function that it is used as)
    """As `seeded`, for torch's generators alone, which is much faster."""

    __slots__ = ("_seed", "_states")

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __enter__(self) -> None:
        generators_lock.acquire()
        self._states = torch_states()
        for generator in self._states:
            generator.manual_seed(self._seed)

    def __exit__(self, *_: object) -> None:
        put_torch_back(self._states)
        generators_lock.release()


def torch_states() -> dict[torch.Generator, Tensor]:
    """The states of torch's global generators."""
    return {generator: generator.get_state() for generator in torch_generators()}


def torch_has_moved(before: dict[torch.Generator, Tensor]) -> bool:
    """Whether torch's global generators are in other states than ``before``."""
    return not all(same_bits(state, generator.get_state()) for generator, state in before.items())


def put_torch_back(before: dict[torch.Generator, Tensor]) -> None:
    """Put `torch_states` back."""
    for generator, state in before.items():
        generator.set_state(state)


def torch_generators() -> tuple[torch.Generator, ...]:
    """The global generators of torch that are in use."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return _ON_CPU
    return (*_ON_CPU, *torch.cuda.default_generators)


_ON_CPU = (torch.default_generator,)
