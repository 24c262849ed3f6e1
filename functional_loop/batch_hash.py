"""The hash of a batch, by which a loader is known to be at its place."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from .batch import Batch
from .record import tensor_bytes

_MOST = 8192
"""Of a tensor of more elements, so many at most are looked at, spread over all dimensions."""


def hash_of(batch: Batch) -> str:
    """32 hexadecimal digits, from the forms and the bytes of a batch, of large tensors those of a sample.

    >>> hash_of(Batch(torch.zeros(2))) == hash_of(Batch(torch.zeros(2))) != hash_of(Batch(torch.ones(2)))
    True
    """
    found = blake2b(digest_size=16)
    for part in (batch.x, batch.y, batch.index):
        for piece in _pieces(part):
            found.update(piece)
    return found.hexdigest()


def _pieces(node: Any) -> Iterator[Any]:
    if isinstance(node, Tensor):
        yield from _pieces_of_tensor(node)
    elif isinstance(node, dict):
        yield b"D%d" % len(node)
        for key, value in node.items():
            yield f"{key!r}:".encode()
            yield from _pieces(value)
    elif isinstance(node, (tuple, list)):
        yield b"L%d" % len(node)
        for value in node:
            yield from _pieces(value)
    elif isinstance(node, (str, bytes, int, float, type(None))):
        yield f"{node!r};".encode("utf-8", "surrogatepass")
    else:
        # An array, or something of which no more than its type is known to be the same in every process.
        content = getattr(node, "tobytes", None)
        yield type(node).__qualname__.encode()
        yield content() if callable(content) else b""


def _pieces_of_tensor(tensor: Tensor) -> Iterator[Any]:
    if tensor.is_sparse:
        yield from _pieces([tensor._indices(), tensor._values()])
    elif tensor.is_nested or tensor.is_quantized or tensor.layout is not torch.strided:
        yield str(tensor.dtype).encode()
    else:
        yield repr((tensor.dtype, *tensor.shape)).encode()
        yield tensor_bytes(tensor if tensor.numel() <= _MOST else _sample(tensor))


def _sample(tensor: Tensor) -> Tensor:
    """Every n-th element of the longest dimensions, up to the last one."""
    sample = tensor.detach()
    while sample.numel() > _MOST:
        longest = max(range(sample.dim()), key=sample.shape.__getitem__)
        step = min(-(-sample.numel() // _MOST), 16)
        first = (sample.shape[longest] - 1) % step
        sample = sample[(slice(None),) * longest + (slice(first, None, step),)]
    return sample
