"""The digest of a context: a hash of its durable state."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..core.context import Context
from ..core.record import tensor_bytes
from .state import StateDict, saved_fields


def digest(ctx: Context) -> str:
    """SHA-256 of the durable state as 64 hexadecimal digits: equal bits, equal digest.

    Callbacks without a state leave no trace in it.

    >>> from functional_loop.examples.digits import loop
    >>> import functional_loop as fl
    >>> a, b = fl.init(loop(), seed=1), fl.init(loop(), seed=1)
    >>> fl.digest(fl.train(a, steps=2)) == fl.digest(fl.train(b, steps=2))
    True
    """
    return digest_of(saved_fields(ctx, "digest"))


_NOT_STATE = ("version", "fingerprint", "environment", "hyperparameters", "ensemble", "volatile")


def digest_of(sd: StateDict) -> str:
    """The `digest` of the context that a state dict is of."""
    hasher = hashlib.sha256()
    for piece in _canonical(durable(sd)):
        hasher.update(piece)
    return hasher.hexdigest()


def durable(sd: StateDict) -> StateDict:
    """What of a state dict is in its `digest`."""
    kept = {key: value for key, value in sd.items() if key not in _NOT_STATE}
    return {**kept, "members": [durable(member) for member in kept["members"]]} if "members" in kept else kept


def _canonical(node: Any) -> Iterator[bytes | memoryview]:
    """Bytes that determine a plain tree, and are determined by it: every part is preceded by its type and size."""
    match node:
        case Tensor():
            yield f"T{node.dtype}{list(node.shape)}".encode()
            yield tensor_bytes(node)
        case dict():
            yield f"D{len(node)}".encode()
            for key in sorted(node):
                yield from _canonical(key)
                yield from _canonical(node[key])
        case list():
            yield f"L{len(node)}".encode()
            for value in node:
                yield from _canonical(value)
        case str():
            text = node.encode("utf-8", "surrogatepass")
            yield b"S%d:" % len(text)
            yield text
        case float():
            yield b"F" + struct.pack("<d", node)
        case _:
            yield f"{type(node).__name__}:{node};".encode()
