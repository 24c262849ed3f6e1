"""Every call to the system in a save may fail, or be the last one of a process: the store holds the old or the new."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import functional_loop as fl
from functional_loop.callbacks import checkpoint, csv_log
from functional_loop.checkpoint import file as checkpoint_file
from functional_loop.checkpoint.atomic import replacing
from functional_loop.checkpoint.folder import entry_of
from functional_loop.checkpoint.lock import NAME
from tests.test_store import BOUNDARIES, LOOP, at

WRITING = ("open", "write", "pwrite", "ftruncate", "fsync", "close", "mkdir", "replace", "rename", "unlink")
UNFINISHED = "step-00000003.safetensors.1.tmp"
OLD, NEW = at(2), at(3)
DIGESTS = {fl.digest(OLD): "old", fl.digest(NEW): "new"}


class Stop(BaseException):
    """Something that nobody expects, such as a KeyboardInterrupt."""


@contextmanager
def counting(act: Callable[[int, str], None], after: bool) -> Iterator[list[str]]:
    """Call ``act`` with number and name of each call to the system, before it is made or ``after``."""
    made: list[str] = []
    originals = {(os, name): getattr(os, name) for name in WRITING} | {(fcntl, "flock"): fcntl.flock}

    def wrapped(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            number = len(made)
            # A file is closed even if the system says that it failed.
            if not after and name != "close":
                act(number, name)
            result = original(*args, **kwargs)
            if after or name == "close":
                try:
                    act(number, name)
                except BaseException:
                    if name == "open":
                        os.close(result)
                    raise
            return result

        return call

    for (module, name), original in originals.items():
        setattr(module, name, wrapped(name, original))
    try:
        yield made
    finally:
        for (module, name), original in originals.items():
            setattr(module, name, original)


def save(folder: Path, store: fl.CheckpointStore | None = None) -> None:
    """Save over the same step, or the next one with a deletion; a failed deletion only warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (store or fl.CheckpointStore(folder, keep_last=1)).save(NEW)


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store before the save: its newest checkpoint is OLD; an unfinished file of a killed process lies about."""
    folder = tmp_path_factory.mktemp("before")
    with fl.CheckpointStore(folder) as store:
        store.save(at(1))
        store.save(OLD)
    (folder / UNFINISHED).write_bytes(b"unfinished")
    return folder


def copies(before: Path, tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """For every call to the system that a save makes its number, and a copy of the folder ``before``."""
    shutil.copytree(before, tmp_path / "0")
    with counting(lambda *_: None, after=False) as made:
        save(tmp_path / "0")
    assert {"open", "write", "fsync", "close", "replace", "unlink", "flock"} <= set(made)
    for n in range(1, len(made) + 1):
        shutil.copytree(before, tmp_path / str(n))
        yield n, tmp_path / str(n)


def what_is_there(folder: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return DIGESTS[fl.digest(fl.CheckpointStore(folder).load(LOOP))]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("code", "after"),
    [
        pytest.param(errno.ENOSPC, False, id="ENOSPC"),
        pytest.param(errno.EIO, True, id="EIO though done"),
        pytest.param(errno.EACCES, False, id="EACCES"),
        pytest.param(None, True, id="stopped when done"),
        pytest.param(errno.ENOSPC, True, id="ENOSPC though done", marks=SLOW),
        pytest.param(errno.EIO, False, id="EIO", marks=SLOW),
        pytest.param(errno.EACCES, True, id="EACCES though done", marks=SLOW),
        pytest.param(None, False, id="stopped before", marks=SLOW),
    ],
)
def test_any_call_may_fail(before: Path, tmp_path: Path, code: int | None, after: bool) -> None:
    outcomes = []
    for n, folder in copies(before, tmp_path):
        store = fl.CheckpointStore(folder, keep_last=1)

        def fail(number: int, name: str, n: int = n) -> None:
            if number == n:
                raise Stop if code is None else OSError(code, os.strerror(code))

        raised: BaseException | None = None
        with counting(fail, after):
            try:
                save(folder, store)
            except (OSError, Stop) as error:
                raised = error
        if isinstance(raised, OSError):
            assert raised.errno == code
            assert any("while saving" in note for note in raised.__notes__)
            assert any("context_of(error)" in note for note in raised.__notes__)
        found = what_is_there(folder)
        if raised is not None:
            outcomes.append(found)
        else:
            assert found == "new"
        assert all(path.suffix == ".safetensors" or path.name == NAME for path in unfinished_aside(folder))
        save(folder, store)
        store.close()
        assert what_is_there(folder) == "new"
        with fl.CheckpointStore(folder, keep_last=1) as another:
            another.save(at(4))
        assert [path.name for path in folder.iterdir()] == ["step-00000004.safetensors"]
    assert outcomes == sorted(outcomes, reverse=True)  # old, then new


def unfinished_aside(folder: Path) -> list[Path]:
    """All files but the one that was left over before the save."""
    return [path for path in folder.iterdir() if path.name != UNFINISHED]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_process_may_be_killed_at_any_call(before: Path, tmp_path: Path, after: bool) -> None:
    for n, folder in copies(before, tmp_path):
        if (child := os.fork()) == 0:
            try:
                with counting(lambda number, name, n=n: os._exit(9) if number == n else None, after):  # type: ignore[misc]
                    save(folder)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 9
        assert what_is_there(folder) in ("old", "new")
        save(folder)
        assert [path.name for path in folder.iterdir()] == ["step-00000003.safetensors"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_the_first_save_of_a_run_may_fail_at_any_call(tmp_path: Path, code: int) -> None:
    store = fl.CheckpointStore(tmp_path / "a" / "run")
    with counting(lambda *_: None, after=False) as made:
        store.save(NEW)
    assert made.count("mkdir") == 2
    for n in range(1, len(made) + 1):
        folder = tmp_path / str(n) / "run"
        store = fl.CheckpointStore(folder)

        def fail(number: int, name: str, n: int = n) -> None:
            if number == n:
                raise OSError(code, os.strerror(code))

        with counting(fail, after=False), pytest.raises(OSError, match=os.strerror(code)):
            store.save(NEW)
        store.save(NEW)
        assert what_is_there(folder) == "new"


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "no permission to write"),
        (errno.EPERM, "no permission to write"),
        (errno.ENOENT, "was it removed"),
        (errno.EIO, "the disk or the network has failed"),
    ],
)
def test_the_error_says_what_to_do_and_the_state_is_still_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, advice: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    store = fl.CheckpointStore(tmp_path / "run")

    def save(ctx: fl.Context) -> fl.Context:
        store.save(fl.boundary(ctx, "epoch_end"))
        with monkeypatch.context() as patched:
            patched.setattr("os.fsync", fail)
            store.save(fl.boundary(ctx, "epoch_end"))
        return ctx

    loop = fl.evolve(LOOP, callbacks=[*LOOP.callbacks, fl.Callback("save", epoch_end=save)])
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        fl.train(fl.init(loop))
    assert any(advice in note and "while saving" in note for note in caught.value.__notes__)
    rescued = fl.context_of(caught.value)
    assert rescued is not None
    fl.CheckpointStore(tmp_path / "elsewhere").save(rescued)
    resumed = fl.resume(LOOP, tmp_path / "elsewhere")
    assert fl.digest(fl.train(resumed)) == fl.digest(BOUNDARIES[-1])
    assert fl.digest(fl.train(fl.resume(LOOP, tmp_path / "run"))) == fl.digest(BOUNDARIES[-1])


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("made_again", ["", "empty", "with a copy of all"])
@pytest.mark.parametrize("what", ["moved", "removed", "a link that leads elsewhere"])
def test_a_folder_that_is_not_the_same_any_more_is_an_error_and_nothing_else(
    tmp_path: Path, what: str, made_again: str, wait: bool
) -> None:
    folder = path = tmp_path / "run"
    if what.startswith("a link"):
        path = tmp_path / "real"
        path.mkdir()
        folder.symlink_to(path)
    store = fl.CheckpointStore(folder)
    store.save(OLD)
    shutil.copytree(path, tmp_path / "copy")
    if what == "moved":
        folder.rename(tmp_path / "moved")
    elif what == "removed":
        shutil.rmtree(folder)
    else:
        folder.unlink()
    if made_again == "empty":
        folder.mkdir()
    elif made_again:
        (tmp_path / "copy").rename(folder)

    def files() -> dict[Path, tuple[float, bytes]]:
        return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file()}

    before = files()
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match="was moved, removed or replaced") as caught:
            store.save(NEW, wait=wait)
        assert any("was it removed" in note for note in caught.value.__notes__)
        with pytest.raises(FileNotFoundError, match="was moved, removed or replaced"):
            store.check(NEW)
    assert files() == before
    assert folder.exists() == bool(made_again)
    elsewhere = fl.CheckpointStore(tmp_path / "elsewhere")
    elsewhere.save(NEW)
    assert elsewhere.steps() == [3]


def test_a_folder_that_is_replaced_while_a_save_waits_is_not_written_to(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    store = fl.CheckpointStore(folder)
    store.save(OLD)
    lock = store._lock
    assert lock is not None
    with lock.writing:
        store.save(NEW, wait=False)
        folder.rename(tmp_path / "moved")
        folder.mkdir()
    with pytest.raises(FileNotFoundError, match="was moved, removed or replaced"):
        store.wait()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("in_its_place", ["nothing", "an empty folder", "a copy", "another run"])
def test_a_folder_may_be_replaced_at_any_call_of_a_save(before: Path, tmp_path: Path, in_its_place: str) -> None:
    """What takes the place of the folder stays as it is; the folder that was moved holds the old or the new."""
    for n, folder in copies(before, tmp_path):
        (moved := tmp_path / "moved").mkdir()
        placed: dict[str, bytes] = {}

        def replace(number: int, name: str, n: int = n, folder: Path = folder) -> None:
            if number != n:
                return
            if in_its_place == "a copy":
                shutil.copytree(folder, moved / "copy")
            elif in_its_place == "another run":
                shutil.copytree(before, moved / "copy")
            elif in_its_place == "an empty folder":
                subprocess.run(["mkdir", moved / "copy"], check=True)
            subprocess.run(["mv", "-T", folder, moved / "run"], check=True)
            if in_its_place != "nothing":
                subprocess.run(["mv", "-T", moved / "copy", folder], check=True)
                placed.update(files_of(folder))

        store = fl.CheckpointStore(folder, keep_last=1)
        store.check(NEW)
        raised = None
        with counting(replace, after=False) as made:
            try:
                save(folder, store)
            except FileNotFoundError as error:
                raised = error
        store.close()
        if len(made) < n:
            break  # the rest of the calls were made by `check`
        assert (files_of(folder) if folder.exists() else {}) == placed
        found = what_is_there(moved / "run")
        if raised is None:
            assert (found, made[n - 1]) == ("new", "unlink")  # it was saved before
        else:
            assert "moved, removed or replaced" in str(raised)
        shutil.rmtree(moved)
    assert n > 5


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_another_working_folder_moves_no_store_and_no_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "before")
    store = fl.CheckpointStore("run")
    log = csv_log("log.csv")
    saving = checkpoint("callback")
    loop = fl.evolve(LOOP, callbacks=[log, saving])
    monkeypatch.chdir(tmp_path / "after")
    store.save(OLD)
    fl.train(fl.init(loop))
    assert list(Path.cwd().iterdir()) == []
    assert {path.name for path in (tmp_path / "before").iterdir()} == {"run", "log.csv", "callback"}
    assert store.load(LOOP).global_step == OLD.global_step


def test_nothing_is_written_through_names_that_others_have_taken(tmp_path: Path) -> None:
    """A link in place of a checkpoint is no checkpoint to write over, and what it leads to stays."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / entry_of(folder, OLD).path.name).symlink_to(victim)
    with pytest.raises(fl.CheckpointError):
        fl.CheckpointStore(folder).save(OLD)
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("what", ["a dangling link", "a link to itself", "a pipe", "a folder", "a socket"])
def test_what_is_no_file_is_not_written_over_and_not_waited_for(tmp_path: Path, what: str) -> None:
    path = entry_of(tmp_path, NEW).path
    if what == "a dangling link":
        path.symlink_to(tmp_path / "nothing")
    elif what == "a link to itself":
        path.symlink_to(path)
    elif what == "a pipe":
        os.mkfifo(path)
    elif what == "a folder":
        path.mkdir()
    else:
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(os.path.relpath(path))
        listening.close()
    before = os.lstat(path)
    with fl.CheckpointStore(tmp_path) as store, pytest.raises((fl.CheckpointError, OSError)) as caught:
        store.save(NEW)
    assert str(path) in str(caught.value)
    assert os.path.samestat(os.lstat(path), before)
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
    with pytest.raises((fl.CheckpointError, OSError)):
        checkpoint_file.read(path)


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_checkpoint_that_has_another_name_too_is_replaced_under_its_own(tmp_path: Path, link: Any) -> None:
    """Copies by links, as backups make them, keep the old bytes."""
    with fl.CheckpointStore(tmp_path / "run") as store:
        path = store.save(at(2))
    kept = tmp_path / "kept.safetensors"
    if link is os.link:
        os.link(path, kept)
    else:
        path.rename(kept)
        path.symlink_to(kept)
    before = kept.read_bytes()
    later = next(ctx for ctx in reversed(BOUNDARIES) if ctx.global_step == 2)
    assert fl.CheckpointStore(tmp_path / "run").save(later) == path
    assert kept.read_bytes() == before
    assert not path.is_symlink()
    assert fl.digest(fl.CheckpointStore(tmp_path / "run").load(LOOP)) == fl.digest(later)


def test_a_name_in_use_is_not_the_one_to_write_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr("secrets.randbelow", lambda _: 7)
    (tmp_path / "notes.txt.7.tmp").symlink_to(victim)
    with pytest.raises(FileExistsError), replacing(tmp_path / "notes.txt") as write:
        write(b"mine")
    assert victim.read_text() == "precious"
    assert (tmp_path / "notes.txt.7.tmp").is_symlink()
    assert not (tmp_path / "notes.txt").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a disk to fill")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=64k tmpfs {disk} 2>/dev/null"):
        pytest.skip("this system mounts no disk")
    try:
        store = fl.CheckpointStore(disk / "run")
        store.save(OLD)
        with open(disk / "filling", "wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(100)):
                pass
        with pytest.raises(OSError, match="No space left") as caught:
            store.save(NEW)
        assert any("the disk is full" in note for note in caught.value.__notes__)
        assert not [path for path in store.path.iterdir() if path.name.endswith(".tmp")]
        assert what_is_there(store.path) == "old"
        (disk / "filling").unlink()
        store.save(NEW)
        store.close()
    finally:
        os.system(f"umount {disk}")
