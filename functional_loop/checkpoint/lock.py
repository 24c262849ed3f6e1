"""The right to write into a folder, which one process has at a time."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import threading
import time
import warnings
import weakref
from contextlib import suppress
from pathlib import Path

import attrs

from ..core.errors import CheckpointError, StoreInUseError
from .atomic import open_folder

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

NAME = ".functional_loop.lock"
"""The file in the folder that is locked; it says who has locked it."""

_SIGNATURE = b'{"host": '
"""How the file begins, once it is written to."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@attrs.define(eq=False)
class _Held:
    """A lock that this process has, the folder that it is in, and how many `FolderLock` share it.

    There is no descriptor of the file where there are no locks, and none of the folder outside of POSIX.
    """

    path: Path
    descriptor: int | None
    folder: int | None
    status: os.stat_result
    writing: threading.RLock = attrs.field(factory=threading.RLock)
    users: int = 0
    lost: bool = False


_held: dict[str, _Held] = {}
# Reentrant, because a release may come from the garbage collector at any place.
_guard = threading.RLock()


class FolderLock:
    """The right of this process to write into ``folder``, until `release`, or until it is no longer referenced.

    All locks of one folder in one process are one: threads take turns by ``with lock.writing:``. The operating system
    keeps it (``flock`` of a file ``.functional_loop.lock`` in the folder) and takes it away when the process ends,
    however it ends, so that a killed process blocks no other. A forked process does not inherit it. No file
    of others is written to or removed: neither one of that name, nor what a link of that name leads to.

    Where there are no locks, as on Windows and some network file systems, a ``UserWarning`` says that nothing keeps a
    second process away.

    Raises:
        StoreInUseError: another process has it; the message names host and process.
        CheckpointError: the file is not one that a lock has made.
        OSError: the folder is absent, or can't be written to.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> lock, same = FolderLock(folder), FolderLock(folder)
    >>> lock.release()
    >>> same.is_held, (folder / NAME).exists()
    (True, True)
    >>> same.release()
    >>> same.is_held, (folder / NAME).exists()
    (False, False)
    """

    def __init__(self, folder: Path) -> None:
        key = os.path.realpath(folder)
        with _guard:
            held = _held.get(key)
            if held is not None and not _is_held(held):
                held = None
            self.is_first = held is None
            """Whether this process had none before."""
            if held is None:
                held = _held[key] = _acquire(Path(key))
            held.users += 1
        self._held = held
        self.writing = held.writing
        self._release = weakref.finalize(self, _release, held)

    @property
    def is_held(self) -> bool:
        """Whether it still is what keeps others away; not if it was released, forked, or its file was removed."""
        return self._release.alive and _is_held(self._held)

    @property
    def excludes_others(self) -> bool:
        """Whether there are locks where the folder is."""
        return self._held.descriptor is not None

    @property
    def folder(self) -> int | None:
        """The descriptor of the folder that is locked, wherever it is by now; ``None`` outside of POSIX."""
        return self._held.folder

    def is_of(self, folder: Path) -> bool:
        """Whether ``folder`` is still the one that was locked, and not another that has taken its place."""
        try:
            return os.path.samestat(self._held.status, os.stat(folder))
        except (FileNotFoundError, NotADirectoryError):
            return False

    def check_is_of(self, folder: Path) -> None:
        """Raises a FileNotFoundError if ``folder`` is not the one that was locked any more."""
        if not self.is_of(folder):
            what = "The folder of the checkpoints was moved, removed or replaced, so that nothing is written there"
            raise FileNotFoundError(errno.ENOENT, what, str(folder))

    def release(self) -> None:
        """Let others write; the last one in this process to do so removes the file that was locked."""
        self._release()


def _acquire(path: Path) -> _Held:
    # Open, so that no other folder gets its number.
    folder = open_folder(path)
    try:
        status = os.stat(path if folder is None else folder)
        return _Held(path / NAME, _locked(path / NAME), folder, status)
    except BaseException:
        if folder is not None:
            os.close(folder)
        raise


def _locked(path: Path) -> int | None:
    """A descriptor of the file, which is locked; ``None`` where there are no locks."""
    while True:
        descriptor = _opened(path)
        try:
            _check_own(descriptor, path)
            if not _try_to_lock(descriptor, path):
                os.close(descriptor)
                return None
            # The process that had it before may have removed the file between our opening and our locking it.
            if _is_at(descriptor, path):
                _sign(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _opened(path: Path) -> int:
    # A pipe of that name would make us wait for its other end.
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        return os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise _foreign(path) from None
        raise


def _check_own(descriptor: int, path: Path) -> None:
    """Refuse to lock a file that no lock has made, or that has another name too."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        raise _foreign(path)
    begins = os.pread(descriptor, len(_SIGNATURE), 0) if hasattr(os, "pread") else b""
    # A process may have been killed while it signed.
    if not _SIGNATURE.startswith(begins):
        raise _foreign(path)


def _foreign(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} is not of functional_loop, which locks a file of that name: move it away")


def _try_to_lock(descriptor: int, path: Path) -> bool:
    """Lock the file; false where there are no locks."""
    reason: object = "this system has no flock"
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreInUseError(
                f"{path.parent} is being written to by {_owner(descriptor)}; wait for its end or end it, or give this "
                "run a folder of its own"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            reason = error
        else:
            return True
    with suppress(OSError):
        os.unlink(path)
    warnings.warn(
        f"{path.parent} can't be locked ({reason}); take care that no second process writes there",
        UserWarning,
        stacklevel=6,
    )
    return False


def _sign(descriptor: int) -> None:
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(owner).encode(), 0)


def _owner(descriptor: int) -> str:
    try:
        owner = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {owner['pid']} on host {owner['host']} since {owner['since']}"
    except (OSError, ValueError, TypeError, LookupError):
        return "another process"


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False


def _is_held(held: _Held) -> bool:
    if held.lost:
        return False
    return held.path.parent.is_dir() if held.descriptor is None else _is_at(held.descriptor, held.path)


def _release(held: _Held) -> None:
    with _guard:
        held.users -= 1
        if held.users or held.lost:
            return
        held.lost = True
        if _held.get(key := str(held.path.parent)) is held:
            del _held[key]
        if held.descriptor is not None:
            with suppress(OSError):
                # Removed before it is unlocked: no other process can have locked it yet.
                if _is_at(held.descriptor, held.path):
                    os.unlink(held.path)
        _close(held)


def _close(held: _Held) -> None:
    for descriptor in (held.descriptor, held.folder):
        if descriptor is not None:
            os.close(descriptor)


def _disown() -> None:
    """In a forked process: the locks are those of the parent, and must end with it."""
    global _guard
    _guard = threading.RLock()
    for held in _held.values():
        held.lost = True
        _close(held)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown)
