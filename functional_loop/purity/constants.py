"""Finds what a network keeps besides its parameters and buffers that is not the same in every run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .before import storage_of
from .reachable import EVERYTHING, is_number, reachable, token


def views_of_state(module: nn.Module) -> dict[str, str]:
    """Tensors in attributes that share memory with parameters or buffers, by path, and what is wrong with them.

    Raises:
        ValueError: a numpy array does, of which reads and writes can't be observed.

    >>> module = nn.Linear(2, 1)
    >>> module.first = module.weight.detach()[0]
    >>> list(views_of_state(module))
    ['network.first']
    """
    named = (*module.named_parameters(), *module.named_buffers())
    registered = {storage_of(tensor): name for name, tensor in named}
    itself = {id(tensor) for _, tensor in named}
    kept = _kept(module)
    for path, value in kept.items():
        if not isinstance(value, Tensor) and (name := _name_at(value, named)):
            raise ValueError(
                f"{path} is an array over the memory of {name!r}, which has a tensor of its own in the context: what "
                "one is set to would not reach the other. Make the array where it is used, by "
                f"{name.rpartition('.')[2]}.numpy() in forward()"
            )
    return {
        path: f"which was a view of {registered[storage_of(value)]!r} when training began, and does not move with it: "
        "compute it in forward()"
        for path, value in kept.items()
        if isinstance(value, Tensor) and id(value) not in itself and storage_of(value) in registered
    }


def drawn(module: nn.Module, other: nn.Module, again: Callable[[], nn.Module]) -> dict[str, str]:
    """Tensors in attributes that differ between the networks of two seeds, by path, and what is wrong with them.

    Args:
        again: makes another network under the seed of ``other``.

    Raises:
        ValueError: numbers differ, and reads of numbers can't be observed.
    """
    ours, theirs = _kept(module), _kept(other)
    differing = [
        path for path in ours.keys() & theirs.keys() if token(ours[path], EVERYTHING) != token(theirs[path], EVERYTHING)
    ]
    if numbers := sorted(path for path in differing if not isinstance(ours[path], Tensor)):
        # What differs under one seed too is a time or a count, and not drawn.
        same_seed = _kept(again())
        numbers = [path for path in numbers if token(same_seed.get(path)) == token(theirs[path])]
    if numbers:
        raise ValueError(
            f"the network has drawn {numbers[0]}, which is not part of the context, and one copy of the network trains "
            "all seeds: draw it as a tensor and register it, self.register_buffer(...), or fix it"
        )
    return {
        path: "which is drawn anew for every seed and not part of the context: register it, self.register_buffer(...)"
        for path in differing
        if isinstance(ours[path], Tensor)
    }


def _name_at(array: Any, named: Sequence[tuple[str, Tensor]]) -> str:
    """The name of the tensor in whose memory a numpy array is; ``""`` if it is in none."""
    address = getattr(getattr(array, "ctypes", None), "data", None)
    if address is None or not array.nbytes:
        return ""
    for name, tensor in named:
        if storage_of(tensor) is not None and tensor.is_cpu:
            storage = tensor.untyped_storage()
            if storage.data_ptr() <= address < storage.data_ptr() + storage.nbytes():
                return name
    return ""


def _kept(module: nn.Module) -> dict[str, Any]:
    """Tensors and numbers that a network reaches, its parameters and buffers left out."""
    own = frozenset(map(id, module.modules()))
    found = reachable({"network": module}, own)
    return {path: value for path, value in found if isinstance(value, Tensor) or is_number(value)}
