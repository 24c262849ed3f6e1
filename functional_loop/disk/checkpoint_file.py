"""Checkpoint files: a tree of plain containers and tensors in one safetensors file, every bit of it verified.

A file has the layout of safetensors: 8 bytes of length, a JSON header, the bytes of the tensors. In the
header, ``__metadata__`` holds one entry, the index: JSON with the checksum of the header itself, the version
of the format, the metadata, the tree, and dtype, shape and checksum of each tensor. Nothing in a header is
parsed before its checksum is right, and nothing is ever unpickled.

The bytes are written here and not by the safetensors package: its writer makes a temporary file of its own,
which stays behind when the process is killed, and turns an ``OSError`` into an error without ``errno``.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from ..errors import CheckpointError
from ..record import tensor_bytes
from .durable import replacing
from .tree_json import DTYPES, TENSOR, decode, encode

VERSION = 1

_LONGEST_HEADER = 100_000_000
"""Bytes; that of readers of safetensors."""

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
_BLANK = "0" * 64


class NewerFormatError(CheckpointError):
    """An intact file in a format that only a newer version of functional_loop reads."""


@attrs.frozen
class _Stored:
    """What the index says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    sha256: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@attrs.frozen
class _Index:
    tree: Any
    metadata: dict[str, Any]
    tensors: dict[str, _Stored]


def write(path: str | os.PathLike[str], tree: Any, metadata: dict[str, Any], folder: int | None = None) -> None:
    """Write ``tree`` and ``metadata`` to the file ``path``, durably and all or nothing.

    A tensor object that occurs twice is stored once; of a view, the elements that it shows are stored.

    Args:
        path: the file; one that exists is replaced when the new one is complete and on the disk.
        tree: nested dicts (str keys) and lists of tensors, int, float, bool, str and None.
        metadata: the same without tensors; `read_metadata` reads it without reading the tensors.
        folder: the descriptor of the folder of the file, as for `replacing`.

    Raises:
        TypeError: something else is in the tree; the message names its path.
        ValueError: the tree is nested deeper than 100 levels, or contains itself; or what is not tensors in it takes
            more than 100 MB.
        OSError: the file could not be written; what was there before is unharmed.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "example.safetensors"
    >>> write(path, {"weight": torch.ones(2), "steps": [1, 2]}, {"seed": 0})
    >>> read(path)
    ({'weight': tensor([1., 1.]), 'steps': [1, 2]}, {'seed': 0})
    """
    header, tensors = _prepared(tree, metadata, _sha256)
    with replacing(Path(path), folder) as write_bytes:
        write_bytes(header)
        for tensor in tensors.values():
            write_bytes(tensor_bytes(tensor))


def size(tree: Any, metadata: dict[str, Any]) -> int:
    """How many bytes `write` would write; no value of a tensor is looked at.

    >>> size({"weight": torch.empty(1).expand(1_000_000)}, {}) // 1_000_000
    4
    """
    header, tensors = _prepared(tree, metadata, lambda tensor: _BLANK)
    return len(header) + sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _prepared(
    tree: Any, metadata: dict[str, Any], checksum: Callable[[Tensor], str]
) -> tuple[bytes, dict[str, Tensor]]:
    """The header of a file, and the tensors in the order in which they follow it."""
    json_tree, tensors = encode(tree)
    json_metadata, forbidden = encode(metadata)
    if forbidden:
        raise TypeError(f"metadata can't hold tensors, and has {next(iter(forbidden))!r}")
    # Wide elements first: each tensor is then aligned to its element size, which readers that map files need.
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    stored = {key: _stored(tensor, checksum(tensor)) for key, tensor in tensors.items()}
    return _header(_Index(json_tree, json_metadata, stored)), tensors


def read(path: str | os.PathLike[str]) -> tuple[Any, dict[str, Any]]:
    """The tree and the metadata of the file ``path``, after verifying every bit of it.

    Returns:
        The tree, its tensors on the CPU, contiguous, and independent of the file; and the metadata.

    Raises:
        CheckpointError: the file is damaged, or no checkpoint; the message says what is wrong.
        OSError: the file does not exist or can't be read.
    """
    path = Path(path)
    with _opened(path) as file:
        index, header = _read_index(file, path)
        tensors = {key: _read_tensor(file, path, key, stored) for key, stored in index.tensors.items()}
    with _nonsense_refused(path):
        tree = decode(index.tree, tensors)
        checksums = {id(tensors[key]): stored.sha256 for key, stored in index.tensors.items()}
        if _prepared(tree, index.metadata, lambda tensor: checksums[id(tensor)])[0] != header:
            raise ValueError("this is not the header that such a tree has")
    return tree, index.metadata


def verify(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata of the file ``path``, after verifying every bit of it; one tensor at a time is in memory.

    Raises:
        CheckpointError: the file is damaged, or no checkpoint; the message says what is wrong.
        OSError: the file does not exist or can't be read.
    """
    path = Path(path)
    with _opened(path) as file:
        index, _ = _read_index(file, path)
        for key, stored in index.tensors.items():
            _read_tensor(file, path, key, stored)
    return index.metadata


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata of the file ``path``; its header and its length are verified, its tensors are not read.

    Raises:
        CheckpointError: the header is damaged, the length is wrong, or it is no checkpoint.
        OSError: the file does not exist or can't be read.
    """
    path = Path(path)
    with _opened(path) as file:
        return _read_index(file, path)[0].metadata


def read_outline(path: str | os.PathLike[str]) -> Any:
    """The tree of the file ``path`` as JSON, with dtype, shape and checksum in place of each tensor; none is read.

    Raises:
        CheckpointError, OSError: as `read_metadata`.
    """
    path = Path(path)
    with _opened(path) as file:
        index, _ = _read_index(file, path)
    with _nonsense_refused(path):
        return _outlined(index.tree, index.tensors)


def outline(tree: Any) -> Any:
    """What `read_outline` gives of the file that ``tree`` is written to.

    >>> outline({"steps": [1, 2]})
    {'steps': [1, 2]}
    """
    json_tree, tensors = encode(tree)
    return _outlined(json_tree, {key: _stored(tensor, _sha256(tensor)) for key, tensor in tensors.items()})


def _outlined(node: Any, tensors: dict[str, _Stored]) -> Any:
    if isinstance(node, list):
        return [_outlined(value, tensors) for value in node]
    if not isinstance(node, dict):
        return node
    if list(node) == [TENSOR]:
        return str(tensors[node[TENSOR]])
    return {key: _outlined(value, tensors) for key, value in node.items()}


def _stored(tensor: Tensor, checksum: str) -> _Stored:
    return _Stored(tensor.dtype, tuple(tensor.shape), checksum)


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    """The file for reading; what the disk can't read any more is damage.

    A folder, a pipe or a device of that name is none: opening one may wait for ever.
    """
    try:
        with open(path, "rb", opener=_not_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise CheckpointError(f"{path} is no checkpoint: it is no regular file")
            yield file
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise CheckpointError(f"{path} is damaged: it can't be read from the disk: {error}") from error


def _not_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _header(index: _Index) -> bytes:
    """The first bytes of a file: length, JSON, padding; with the checksum of all this in its place."""
    text = _dumps(
        {
            "header_sha256": _BLANK,
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
    if len(header) > _LONGEST_HEADER:
        raise ValueError(
            f"all but the tensors takes {len(header):,} bytes, and a file has {_LONGEST_HEADER:,} at most for it: "
            "keep long lists of numbers as tensors"
        )
    header = len(header).to_bytes(8, "little") + header
    return _stamped(header, hashlib.sha256(header).hexdigest())


def _dumps(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _stamped(header: bytes, checksum: str) -> bytes:
    return header[: _CHECKSUM.start] + checksum.encode() + header[_CHECKSUM.stop :]


def _layout(tensors: dict[str, _Stored]) -> dict[str, Any]:
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


def _read_index(file: BufferedReader, path: Path) -> tuple[_Index, bytes]:
    """The index, and the bytes that it is from, when their checksum and the length of the file are right."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(_CHECKSUM.stop)
    length = int.from_bytes(start[:8], "little")
    if len(start) < _CHECKSUM.stop or not _CHECKSUM.stop - 8 <= length <= size - 8:
        raise CheckpointError(f"{path} is damaged or no checkpoint: its {size} bytes are too few for a header")
    if length > _LONGEST_HEADER:
        raise CheckpointError(f"{path} is damaged or no checkpoint: its header would be of {length:,} bytes")
    if start[8 : _CHECKSUM.start] != _PREFIX:
        raise CheckpointError(f"{path} is damaged or no checkpoint: its header begins differently")
    # The length may be wrong and the header as long as the file: there is one copy of it until it is verified.
    file.seek(0)
    header = file.read(8 + length)
    checksum = hashlib.sha256(header[: _CHECKSUM.start] + _BLANK.encode())
    checksum.update(memoryview(header)[_CHECKSUM.stop :])
    if header[_CHECKSUM] != checksum.hexdigest().encode():
        raise CheckpointError(f"{path} is damaged: the checksum of its header is wrong")
    with _nonsense_refused(path):
        index = _parse(str(memoryview(header)[8:], "utf-8"), path)
    end = 8 + length + sum(stored.nbytes for stored in index.tensors.values())
    if size != end:
        raise CheckpointError(f"{path} is damaged: it has {size} bytes and should have {end}")
    return index, header


def _parse(header: str, path: Path) -> _Index:
    entries = json.loads(header)
    index = json.loads(entries.pop("__metadata__")["functional_loop"])
    if type(index["version"]) is not int or index["version"] < 1:
        raise ValueError(f"there is no version {index['version']!r}")
    if index["version"] > VERSION:
        raise NewerFormatError(
            f"{path} has format {index['version']}, and this functional_loop reads {VERSION} at most; "
            "install a newer one"
        )
    tensors = {
        key: _Stored(DTYPES[entry["dtype"]], _checked_shape(entry["shape"]), entry["sha256"])
        for key, entry in index["tensors"].items()
    }
    if entries != _layout(tensors):
        raise ValueError("header and index disagree about the tensors")
    metadata = decode(index["metadata"], {})
    if not isinstance(metadata, dict):
        raise TypeError("its metadata is not a dict")
    return _Index(index["tree"], metadata, tensors)


def _checked_shape(shape: list[int]) -> tuple[int, ...]:
    """A shape that torch can make: it computes strides of empty tensors too, in 64 bits."""
    if any(type(n) is not int or not 0 <= n < 2**59 for n in shape):
        raise ValueError(f"{str(shape)[:100]} is not the shape of a tensor")
    if math.prod(max(n, 1) for n in shape) >= 2**59:
        raise ValueError(f"{shape} is not the shape of a tensor")
    return tuple(shape)


@contextmanager
def _nonsense_refused(path: Path) -> Iterator[None]:
    """What makes no sense in spite of its right checksum is a `CheckpointError`, whatever fails over it."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError, struct.error) as error:
        raise CheckpointError(f"{path} is no checkpoint: {type(error).__name__}: {error}") from error


def _read_tensor(file: BufferedReader, path: Path, key: str, stored: _Stored) -> Tensor:
    tensor = torch.empty(stored.shape, dtype=stored.dtype, device="cpu")
    view = tensor_bytes(tensor)
    if view and file.readinto(view) != stored.nbytes:
        raise CheckpointError(f"{path} is damaged: it ends within the tensor {key!r}")
    if hashlib.sha256(view).hexdigest() != stored.sha256:
        raise CheckpointError(f"{path} is damaged: the checksum of the tensor {key!r} is wrong")
    if stored.dtype is torch.bool and tensor.view(torch.uint8).gt(1).any():
        raise CheckpointError(f"{path} is no checkpoint: the bool tensor {key!r} has bytes other than 0 and 1")
    return tensor
