"""Files and folders that last: written whole or not at all, and on the disk when the function returns."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from ..errors import add_note, region

Write: TypeAlias = Callable[[bytes | memoryview], None]

TEMPORARY = r"\.[0-9]+\.tmp"
"""What follows the name of a file, as a regular expression, while the file is being written; a process that is killed
leaves it behind."""

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)

_ADVICE = {
    errno.ENOSPC: "the disk is full: free some space on it",
    errno.EDQUOT: "the quota of disk space is used up: free some space",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EACCES: "there is no permission to write there: change that, or choose another folder",
    errno.EPERM: "there is no permission to write there: change that, or choose another folder",
    errno.ENOENT: "the folder is not there, or not any more: was it removed?",
    errno.EFBIG: "files of that size are not allowed there: raise the limit, or choose another folder",
    errno.EIO: "the disk or the network has failed: choose another folder",
}


@region
def explaining(path: Path) -> Generator[None]:
    """An error of the operating system says what was being saved, and what can be done."""
    try:
        yield
    except BaseException as error:
        advice = _ADVICE.get(error.errno or 0) if isinstance(error, OSError) else None
        add_note(error, f"while saving {path}" + (f": {advice}" if advice else ""))
        if isinstance(error, OSError):
            add_note(
                error,
                "what was saved before is unharmed; in training, context_of(error) has the state, to save elsewhere",
            )
        raise


@region
def replacing(path: Path) -> Generator[Write]:
    """A function that writes bytes to what takes the place of the file ``path``: when it is complete and on the disk.

    If anything fails, the file is what it was before, and nothing is left behind.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "notes.txt"
    >>> with replacing(path) as write:
    ...     write(b"a lot ")
    ...     write(b"of text")
    >>> path.read_text()
    'a lot of text'
    """
    with explaining(path):
        with _beside(path) as (descriptor, _):
            yield lambda data: _write_all(descriptor, data)
            os.fsync(descriptor)
        sync_folder(path.parent)


@region
def replacing_by_name(path: Path) -> Generator[Path]:
    """As `replacing`, for libraries that write to a file by its name; it is not made sure that it is on the disk."""
    with _beside(path) as (_, temporary):
        yield temporary


@region
def _beside(path: Path) -> Generator[tuple[int, Path]]:
    """A new file, which takes the place of ``path`` at the end; its descriptor and its name.

    Its name is one that is not in use, and can't be foreseen: nothing is written to what others have put there.
    """
    temporary = path.with_name(f"{path.name}.{secrets.randbelow(2**63)}.tmp")
    try:
        descriptor = os.open(temporary, _NEW, 0o666)
        try:
            yield descriptor, temporary
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException as error:
        # What was there before is not ours to remove.
        if not isinstance(error, FileExistsError):
            with suppress(OSError):
                os.unlink(temporary)
        raise


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        # A system may take less than it is given: Linux takes 2 GiB at most.
        view = view[os.write(descriptor, view) :]


def make_folder(path: Path) -> None:
    """Make the folder ``path``, and those that it is in, where there is none."""
    if not path.is_dir():
        if path.exists():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """A new name lasts when its folder is on the disk; only POSIX lets us ask for that."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems know no such request, and do it unasked.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
