"""Tensors as the bits that they are: bytes in row-major order, and floating-point numbers as integers."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _comparison_of_memory() -> Any:
    try:
        memcmp = ctypes.CDLL(None).memcmp
    except (OSError, TypeError, AttributeError):
        return None
    memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    return memcmp


# Half the time of torch.equal, on small tensors and on large ones; there is none on Windows.
_memcmp = _comparison_of_memory()


def bits(tensor: Tensor) -> Tensor:
    """The bytes of ``tensor`` in row-major order, as a flat uint8 tensor on its device, aligned to eight bytes.

    It shares the memory of a tensor that is contiguous, and is not to be written to.

    >>> bits(torch.tensor([1.0, -0.0])).tolist()
    [0, 0, 128, 63, 0, 0, 0, 128]
    """
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1)
    # A single element may have any stride.
    flat = flat.as_strided((flat.numel(),), (1,))
    flat = flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return flat if flat.storage_offset() % 8 == 0 else flat.clone()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits: NaN is NaN, and 0.0 is not -0.0.

    >>> same_bits(torch.tensor(0.0), torch.tensor(-0.0)), same_bits(torch.tensor(torch.nan), torch.tensor(torch.nan))
    (False, True)
    """
    if a.dtype != b.dtype or a.shape != b.shape or a.layout != b.layout:
        return False
    if a.layout != torch.strided:
        return _same_sparse_bits(a, b)
    if _memcmp is not None and _is_plain(a) and _is_plain(b):
        return bool(_memcmp(a.data_ptr(), b.data_ptr(), a.nbytes) == 0)
    return torch.equal(_words(a), _words(b).to(a.device))


def _is_plain(tensor: Tensor) -> bool:
    """Whether its memory has its bits, in row-major order."""
    return tensor.is_cpu and tensor.is_contiguous() and not tensor.is_neg() and not tensor.is_conj()


def _same_sparse_bits(a: Tensor, b: Tensor) -> bool:
    if a.layout != torch.sparse_coo:
        a, b = a.to_sparse(), b.to_sparse()
    parts = ((a._indices(), b._indices()), (a._values(), b._values()))
    return a.is_coalesced() == b.is_coalesced() and all(same_bits(*pair) for pair in parts)


def _words(tensor: Tensor) -> Tensor:
    """The bits as 64-bit integers, which are compared eight times as fast as bytes, if they fill such."""
    flat = bits(tensor)
    return flat.view(torch.int64) if flat.numel() % 8 == 0 else flat


def most_ulps(a: Tensor, b: Tensor) -> int | None:
    """How many floating-point numbers lie from an element of ``a`` to that of ``b``, where these are the most.

    Elements that are NaN on one side do not count; ``None`` if the dtype is no floating-point or complex one.

    >>> most_ulps(torch.tensor([1.0, 0.0]), torch.tensor([1.0 + 2**-23, -0.0]))
    1
    """
    if a.is_complex():
        return most_ulps(torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj()))
    if not a.is_floating_point():
        return None
    left, right = _ordered(a), _ordered(b)
    known = ~(a.isnan() | b.isnan()).reshape(-1)
    gaps = torch.where(known, left.double() - right.double(), 0).abs()
    # In Python's integers, which hold the distance of any two 64-bit numbers.
    where = int(gaps.argmax()) if len(gaps) else None
    return abs(int(left[where]) - int(right[where])) if where is not None and known[where] else 0


def _ordered(tensor: Tensor) -> Tensor:
    """Integers in the order of the floating-point numbers, neighbours one apart, both zeros 0."""
    kind = _INTEGERS[tensor.element_size()]
    signed = bits(tensor).view(kind).to(torch.int64)
    return torch.where(signed < 0, torch.iinfo(kind).min - signed, signed)
