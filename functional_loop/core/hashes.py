"""The hash of tensors and of what is made of them, by which a batch or data are known again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from ..purity.reachable import is_without_values
from .record import tensor_bytes

MOST = 8192
"""Of a tensor of more elements, so many at most are looked at, spread over all dimensions."""


def hash_of(*values: Any) -> str:
    """32 hexadecimal digits, from the forms and the bytes of tensors, arrays, numbers and words in any container; of
    large tensors those of a sample.

    >>> hash_of(torch.zeros(2)) == hash_of(torch.zeros(2)) != hash_of(torch.ones(2))
    True
    """
    found = blake2b(digest_size=16)
    for value in values:
        for piece in _pieces(value):
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
    elif dataclasses.is_dataclass(node) and not isinstance(node, type):
        yield from _pieces({field.name: getattr(node, field.name) for field in dataclasses.fields(node)})
    elif getattr(getattr(node, "dtype", None), "hasobject", False):
        yield from _pieces(node.tolist())
    else:
        # An array, or something of which no more than its type is known to be the same in every process.
        large = isinstance(getattr(node, "ndim", None), int) and node.size > MOST
        content = getattr(node.flat[:: -(-node.size // MOST)] if large else node, "tobytes", None)
        yield type(node).__qualname__.encode()
        yield content() if callable(content) else b""


def _pieces_of_tensor(tensor: Tensor) -> Iterator[Any]:
    if tensor.is_meta or is_without_values(tensor):
        yield repr((tensor.dtype, *tensor.shape)).encode()
    elif tensor.is_sparse:
        yield from _pieces([tensor._indices(), tensor._values()])
    elif tensor.is_nested or tensor.is_quantized or tensor.layout is not torch.strided:
        yield str(tensor.dtype).encode()
    else:
        yield repr((tensor.dtype, *tensor.shape)).encode()
        yield tensor_bytes(tensor if tensor.numel() <= MOST else _sample(tensor))


def _sample(tensor: Tensor) -> Tensor:
    """Every n-th element of the longest dimensions, up to the last one."""
    sample = tensor.detach()
    while sample.numel() > MOST:
        longest = max(range(sample.dim()), key=sample.shape.__getitem__)
        step = min(-(-sample.numel() // MOST), 16)
        first = (sample.shape[longest] - 1) % step
        sample = sample[(slice(None),) * longest + (slice(first, None, step),)]
    return sample
