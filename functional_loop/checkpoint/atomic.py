"""Files and folders that last: written whole or not at all, and on the disk when the function returns."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from ..core.errors import add_note, notes_of, region

Write: TypeAlias = Callable[[bytes | memoryview], None]

TEMPORARY = r"\.[0-9]+\.tmp"
"""What follows the name of a file, as a regular expression, while the file is being written; a process that is killed
leaves it behind."""

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)

_WHILE = "while saving "

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
    """An error of the operating system says what was being saved, and what can be done; of regions within one another,
    the innermost says it."""
    try:
        yield
    except BaseException as error:
        if any(note.startswith(_WHILE) for note in notes_of(error)):
            raise
        advice = _ADVICE.get(error.errno or 0) if isinstance(error, OSError) else None
        add_note(error, f"{_WHILE}{path}" + (f": {advice}" if advice else ""))
        if isinstance(error, OSError):
            add_note(
                error,
                "what was saved before is unharmed; in training, context_of(error) has the state, to save elsewhere",
            )
        raise


@region
def replacing(path: Path, folder: int | None = None) -> Generator[Write]:
    """A function that writes bytes to what takes the place of the file ``path``: when it is complete and on the disk.

    If anything fails, the file is what it was before, and nothing is left behind.

    Args:
        folder: the descriptor of the folder of ``path``, see `open_folder`, in which the file is then made even if
            another folder has taken the place of that one.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "notes.txt"
    >>> with replacing(path) as write:
    ...     write(b"a lot ")
    ...     write(b"of text")
    >>> path.read_text()
    'a lot of text'
    """
    with explaining(path):
        within = open_folder(path.parent) if folder is None else folder
        try:
            with _beside(path, within) as (descriptor, _):
                yield lambda data: write_all(descriptor, data)
                os.fsync(descriptor)
            if within is not None:
                _sync(within)
        finally:
            if within is not None and folder is None:
                os.close(within)


@region
def replacing_by_name(path: Path) -> Generator[Path]:
    """As `replacing`, for libraries that write to a file by its name; it is not made sure that it is on the disk."""
    with _beside(path, None) as (_, temporary):
        yield temporary


@region
def _beside(path: Path, folder: int | None) -> Generator[tuple[int, Path]]:
    """A new file, which takes the place of ``path`` at the end; its descriptor and its name.

    Its name is one that is not in use, and can't be foreseen: nothing is written to what others have put there.
    """
    temporary = path.with_name(f"{path.name}.{secrets.randbelow(2**63)}.tmp")
    new, old = (temporary, path) if folder is None else (temporary.name, path.name)
    try:
        descriptor = os.open(new, _NEW, 0o666, dir_fd=folder)
        try:
            yield descriptor, temporary
        finally:
            os.close(descriptor)
        os.replace(new, old, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException as error:
        # What was there before is not ours to remove.
        if not isinstance(error, FileExistsError):
            with suppress(OSError):
                os.unlink(new, dir_fd=folder)
        raise


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """`os.write` until everything is written."""
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


def open_folder(path: Path) -> int | None:
    """A descriptor of the folder ``path``, which stays that of this folder when it is moved; only POSIX has such."""
    return os.open(path, os.O_RDONLY) if os.name == "posix" else None


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk: only then a new one lasts."""
    if (descriptor := open_folder(path)) is not None:
        try:
            _sync(descriptor)
        finally:
            os.close(descriptor)


def _sync(folder: int) -> None:
    try:
        os.fsync(folder)
    except OSError as error:
        # Some network file systems know no such request, and do it unasked.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
