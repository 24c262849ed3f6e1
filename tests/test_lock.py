"""The lock of a folder: one process writes at a time, and one that was killed is in nobody's way."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import functional_loop as fl
from functional_loop import StoreInUseError
from functional_loop.checkpoint.lock import NAME, FolderLock


def forked(function: Callable[[], object]) -> tuple[int, int]:
    """Run ``function`` in a forked process: its id, and the end of a pipe that gets what it returns, or its error."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.close(reading)
            try:
                answer = str(function())
            except BaseException as error:
                answer = f"{type(error).__name__}: {error}"
            os.write(writing, answer.encode())
            time.sleep(0 if answer != "stay" else 100)
        finally:
            os._exit(0)
    os.close(writing)
    return child, reading


def answer(function: Callable[[], object]) -> str:
    child, pipe = forked(function)
    os.waitpid(child, 0)
    with open(pipe) as file:
        return file.read()


def try_to_lock(folder: Path) -> str:
    lock = FolderLock(folder)
    lock.release()
    return "locked"


def test_another_process_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    refused = answer(lambda: try_to_lock(tmp_path))
    assert refused.startswith(f"StoreInUseError: {tmp_path} is being written to by process {os.getpid()} on host ")
    assert socket.gethostname() in refused
    assert "give this run a folder of its own" in refused
    lock.release()
    assert answer(lambda: try_to_lock(tmp_path)) == "locked"
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_was_killed_is_in_nobodys_way_though_its_workers_live(tmp_path: Path) -> None:
    kept: list[FolderLock] = []

    def hold() -> str:
        kept.append(FolderLock(tmp_path))
        worker = os.fork()
        if worker == 0:
            time.sleep(100)
        (tmp_path / "worker").write_text(str(worker))
        return "stay"

    child, pipe = forked(hold)
    assert os.read(pipe, 4) == b"stay"
    worker = int((tmp_path / "worker").read_text())
    try:
        with pytest.raises(StoreInUseError, match=f"by process {child} on host"):
            FolderLock(tmp_path)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert (tmp_path / NAME).exists()
        FolderLock(tmp_path).release()
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(pipe)


def test_a_forked_process_has_no_part_in_the_lock(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)

    def use() -> object:
        held = lock.is_held
        lock.release()
        return held, (tmp_path / NAME).exists(), answer(lambda: try_to_lock(tmp_path))[:15]

    assert answer(use) == "(False, True, 'StoreInUseError')"
    assert lock.is_held
    assert answer(lambda: try_to_lock(tmp_path)).startswith("StoreInUseError")


def test_all_locks_of_a_process_are_one(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    first, second = FolderLock(tmp_path), FolderLock(tmp_path / "link")
    assert first.writing is second.writing
    first.release()
    first.release()
    assert (first.is_held, second.is_held) == (False, True)
    assert answer(lambda: try_to_lock(tmp_path)).startswith("StoreInUseError")
    del second
    gc.collect()
    assert not (tmp_path / NAME).exists()
    assert FolderLock(tmp_path).excludes_others


@pytest.mark.parametrize("gone", ["the file", "the folder", "and made again"])
def test_a_lock_that_was_removed_is_held_no_more(tmp_path: Path, gone: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    lock, same = FolderLock(folder), FolderLock(folder)
    if gone == "the file":
        (folder / NAME).unlink()
    else:
        shutil.rmtree(folder)
    if gone == "and made again":
        folder.mkdir()
    assert not lock.is_held
    if gone != "the folder":
        other = FolderLock(folder)
        lock.release()
        same.release()
        assert other.is_held
        assert answer(lambda: try_to_lock(folder)).startswith("StoreInUseError")
    else:
        with pytest.raises(FileNotFoundError):
            FolderLock(folder)


def test_where_there_are_no_locks_a_warning_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", no_locks)
        with pytest.warns(UserWarning, match=r"can't be locked .*No locks available.*no second process"):
            lock = FolderLock(tmp_path)
        assert lock.is_held
        assert not lock.excludes_others
        assert list(tmp_path.iterdir()) == []
        lock.release()
        assert not lock.is_held


def test_an_unfinished_signature_is_no_obstacle(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    (tmp_path / NAME).write_text('{"host": ')
    assert "is being written to by another process" in answer(lambda: try_to_lock(tmp_path))
    assert lock.is_held


@pytest.mark.parametrize("call", ["os.open", "os.ftruncate", "os.pwrite"])
def test_a_folder_that_cannot_be_locked_is_an_error_and_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(call, fail)
        with pytest.raises(OSError, match="No space"):
            FolderLock(tmp_path)
    assert answer(lambda: try_to_lock(tmp_path)) == "locked"


@pytest.mark.parametrize("what", ["file", "link", "dangling link", "second name", "folder", "pipe"])
@pytest.mark.parametrize("locks", [True, False])
def test_what_is_not_of_a_lock_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, locks: bool
) -> None:
    if not locks:
        monkeypatch.setattr("functional_loop.checkpoint.lock.fcntl", None)
    victim, folder = tmp_path / "victim", tmp_path / "run"
    folder.mkdir()
    if what != "dangling link":
        victim.write_text("precious")
    path = folder / NAME
    if what == "file":
        path.write_text("precious")
    elif what.endswith("link"):
        path.symlink_to(victim)
    elif what == "second name":
        path.hardlink_to(victim)
    elif what == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    before = path.lstat()
    with pytest.raises(fl.CheckpointError, match=r"functional_loop\.lock is not of functional_loop.*move it away"):
        FolderLock(folder)
    after = path.lstat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)
    assert victim.exists() == (what != "dangling link")
    assert what == "dangling link" or victim.read_text() == "precious"


def test_the_lock_of_another_program_is_none_of_ours(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("of another program")
    lock = FolderLock(tmp_path)
    assert lock.is_held
    lock.release()
    assert (tmp_path / ".lock").read_text() == "of another program"
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_folder_is_told_from_one_in_its_place(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    lock = FolderLock(folder)
    assert lock.is_of(folder)
    (tmp_path / "link").symlink_to(folder)
    assert lock.is_of(tmp_path / "link")
    folder.rename(tmp_path / "moved")
    assert not lock.is_of(folder)
    folder.mkdir()
    assert not lock.is_of(folder)
    assert lock.is_of(tmp_path / "moved")
    lock.release()
    assert list(folder.iterdir()) == []


def test_many_processes_take_turns(tmp_path: Path) -> None:
    """Nobody ever is in the folder together with somebody else, however they come and go."""
    until = time.monotonic() + 1.0

    def come_and_go() -> str:
        turns = 0
        while time.monotonic() < until:
            try:
                lock = FolderLock(tmp_path)
            except StoreInUseError:
                continue
            os.close(os.open(tmp_path / "inside", os.O_CREAT | os.O_EXCL))
            os.unlink(tmp_path / "inside")
            lock.release()
            turns += 1
        return f"{turns} turns"

    processes = [forked(come_and_go) for _ in range(4)]
    for child, pipe in processes:
        os.waitpid(child, 0)
        with open(pipe) as file:
            said = file.read()
        assert said.endswith("turns"), said
    assert list(tmp_path.iterdir()) == []
