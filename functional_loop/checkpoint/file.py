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
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import CheckpointError
from ..core.record import tensor_bytes
from .atomic import replacing
from .header import BLANK, Index, Stored, header_of, nonsense_refused, read_index
from .json_tree import TENSOR, decode, encode


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
    header, tensors = _prepared(tree, metadata, lambda tensor: BLANK)
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
    return header_of(Index(json_tree, json_metadata, stored)), tensors


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
        index, header = read_index(file, path)
        tensors = {key: _read_tensor(file, path, key, stored) for key, stored in index.tensors.items()}
    with nonsense_refused(path):
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
        index, _ = read_index(file, path)
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
        return read_index(file, path)[0].metadata


def read_outline(path: str | os.PathLike[str]) -> Any:
    """The tree of the file ``path`` as JSON, with dtype, shape and checksum in place of each tensor; none is read.

    Raises:
        CheckpointError, OSError: as `read_metadata`.
    """
    path = Path(path)
    with _opened(path) as file:
        index, _ = read_index(file, path)
    with nonsense_refused(path):
        return _outlined(index.tree, index.tensors)


def outline(tree: Any) -> Any:
    """What `read_outline` gives of the file that ``tree`` is written to.

    >>> outline({"steps": [1, 2]})
    {'steps': [1, 2]}
    """
    json_tree, tensors = encode(tree)
    return _outlined(json_tree, {key: _stored(tensor, _sha256(tensor)) for key, tensor in tensors.items()})


def _outlined(node: Any, tensors: dict[str, Stored]) -> Any:
    if isinstance(node, list):
        return [_outlined(value, tensors) for value in node]
    if not isinstance(node, dict):
        return node
    if list(node) == [TENSOR]:
        return str(tensors[node[TENSOR]])
    return {key: _outlined(value, tensors) for key, value in node.items()}


def _stored(tensor: Tensor, checksum: str) -> Stored:
    return Stored(tensor.dtype, tuple(tensor.shape), checksum)


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


def _read_tensor(file: BufferedReader, path: Path, key: str, stored: Stored) -> Tensor:
    tensor = torch.empty(stored.shape, dtype=stored.dtype, device="cpu")
    view = tensor_bytes(tensor)
    if view and file.readinto(view) != stored.nbytes:
        raise CheckpointError(f"{path} is damaged: it ends within the tensor {key!r}")
    if hashlib.sha256(view).hexdigest() != stored.sha256:
        raise CheckpointError(f"{path} is damaged: the checksum of the tensor {key!r} is wrong")
    if stored.dtype is torch.bool and tensor.view(torch.uint8).gt(1).any():
        raise CheckpointError(f"{path} is no checkpoint: the bool tensor {key!r} has bytes other than 0 and 1")
    return tensor
