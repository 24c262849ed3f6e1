"""The header of a checkpoint file: how it is written, and read within bounds of time and memory."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

import attrs
import torch

from ..core.errors import CheckpointError
from .json_tree import DTYPES, decode

VERSION = 1

_LONGEST = 100_000_000
"""Bytes; that of readers of safetensors."""

_MOST_PARTS = 2_000_000
_BYTES_FOR_A_PART = 16
"""A list, a dict or another value takes up to 80 bytes of memory and three of a file: there may be so many in a header,
and one more for so many bytes of tensors."""

# Other dtypes are uint8 to readers of safetensors; the index has the dtype that they are.
_SAFETENSORS_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}

# The checksum is the first thing in a header, so that it can be verified before anything is parsed.
_PREFIX = rb'{"__metadata__":{"functional_loop":"{\"header_sha256\":\"'
_CHECKSUM = slice(8 + len(_PREFIX), 8 + len(_PREFIX) + 64)
BLANK = "0" * 64


class NewerFormatError(CheckpointError):
    """An intact file in a format that only a newer version of functional_loop reads."""


@attrs.frozen
class Stored:
    """What the index says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    sha256: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@attrs.frozen
class Index:
    tree: Any
    metadata: dict[str, Any]
    tensors: dict[str, Stored]


def header_of(index: Index) -> bytes:
    """The first bytes of a file: length, JSON, padding; with the checksum of all this in its place."""
    text = _dumps(
        {
            "header_sha256": BLANK,
            "version": VERSION,
            "metadata": index.metadata,
            "tree": index.tree,
            "tensors": {
                key: {"dtype": str(t.dtype).removeprefix("torch."), "shape": t.shape, "sha256": t.sha256}
                for key, t in index.tensors.items()
            },
        }
    )
    header = _dumps({"__metadata__": {"functional_loop": text}, **_layout(index.tensors)}).encode()
    header += b" " * (-len(header) % 8)
    if excess := _excess(header, sum(stored.nbytes for stored in index.tensors.values())):
        raise ValueError(f"all but the tensors takes {excess}: keep long lists of numbers as tensors")
    header = len(header).to_bytes(8, "little") + header
    return _stamped(header, hashlib.sha256(header).hexdigest())


def _excess(header: bytes, of_tensors: int) -> str:
    """What of a header is more than a file with so many bytes of tensors may have; ``""`` if nothing is."""
    if len(header) > _LONGEST:
        return f"{len(header):,} bytes, and a file has {_LONGEST:,} at most for it"
    most = _MOST_PARTS + of_tensors // _BYTES_FOR_A_PART
    # Commas in strings count too, which takes nothing from the bound.
    parts = sum(map(header.count, (b",", b"[", b"{")))
    return f"{parts:,} lists, dicts and other values, and this file has {most:,} at most" if parts > most else ""


def _dumps(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _stamped(header: bytes, checksum: str) -> bytes:
    return header[: _CHECKSUM.start] + checksum.encode() + header[_CHECKSUM.stop :]


def _layout(tensors: dict[str, Stored]) -> dict[str, Any]:
    """safetensors' own entries for the tensors, which lie one after the other."""
    layout: dict[str, Any] = {}
    offset = 0
    for key, stored in tensors.items():
        name = _SAFETENSORS_DTYPES.get(stored.dtype)
        layout[key] = {
            "dtype": name or "U8",
            "shape": list(stored.shape) if name else [stored.nbytes],
            "data_offsets": [offset, offset + stored.nbytes],
        }
        offset += stored.nbytes
    return layout


def read_index(file: BufferedReader, path: Path) -> tuple[Index, bytes]:
    """The index, and the bytes that it is from, when their checksum and the length of the file are right."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(_CHECKSUM.stop)
    length = int.from_bytes(start[:8], "little")
    if len(start) < _CHECKSUM.stop or not _CHECKSUM.stop - 8 <= length <= size - 8:
        raise CheckpointError(f"{path} is damaged or no checkpoint: its {size} bytes are too few for a header")
    if length > _LONGEST:
        raise CheckpointError(f"{path} is damaged or no checkpoint: its header would be of {length:,} bytes")
    if start[8 : _CHECKSUM.start] != _PREFIX:
        raise CheckpointError(f"{path} is damaged or no checkpoint: its header begins differently")
    # The length may be wrong and the header as long as the file: there is one copy of it until it is verified.
    file.seek(0)
    header = file.read(8 + length)
    checksum = hashlib.sha256(header[: _CHECKSUM.start] + BLANK.encode())
    checksum.update(memoryview(header)[_CHECKSUM.stop :])
    if header[_CHECKSUM] != checksum.hexdigest().encode():
        raise CheckpointError(f"{path} is damaged: the checksum of its header is wrong")
    if excess := _excess(header, size - 8 - length):
        raise CheckpointError(f"{path} is no checkpoint: its header holds {excess}")
    with nonsense_refused(path):
        index = _parse(str(memoryview(header)[8:], "utf-8"), path)
    end = 8 + length + sum(stored.nbytes for stored in index.tensors.values())
    if size != end:
        raise CheckpointError(f"{path} is damaged: it has {size} bytes and should have {end}")
    return index, header


def _parse(header: str, path: Path) -> Index:
    entries = json.loads(header, parse_constant=_no_constant)
    del header
    index = json.loads(entries.pop("__metadata__")["functional_loop"], parse_constant=_no_constant)
    if type(index["version"]) is not int or index["version"] < 1:
        raise ValueError(f"there is no version {index['version']!r}")
    if index["version"] > VERSION:
        raise NewerFormatError(
            f"{path} has format {index['version']}, and this functional_loop reads {VERSION} at most; "
            "install a newer one"
        )
    tensors = {
        key: Stored(DTYPES[entry["dtype"]], _checked_shape(entry["shape"]), entry["sha256"])
        for key, entry in index["tensors"].items()
    }
    if entries != _layout(tensors):
        raise ValueError("header and index disagree about the tensors")
    metadata = decode(index["metadata"], {})
    if not isinstance(metadata, dict):
        raise TypeError("its metadata is not a dict")
    return Index(index["tree"], metadata, tensors)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _checked_shape(shape: list[int]) -> tuple[int, ...]:
    """A shape that torch can make: it computes strides of empty tensors too, in 64 bits."""
    if any(type(n) is not int or not 0 <= n < 2**59 for n in shape):
        raise ValueError(f"{str(shape)[:100]} is not the shape of a tensor")
    if math.prod(max(n, 1) for n in shape) >= 2**59:
        raise ValueError(f"{shape} is not the shape of a tensor")
    return tuple(shape)


@contextmanager
def nonsense_refused(path: Path) -> Iterator[None]:
    """What makes no sense in spite of its right checksum is a `CheckpointError`, whatever fails over it."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError, struct.error) as error:
        raise CheckpointError(f"{path} is no checkpoint: {type(error).__name__}: {error}") from error
