"""Saving in the background: the same files, no error lost, and training hardly waits."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

import functional_loop as fl
from functional_loop.checkpoint import file as checkpoint_file
from tests.test_store import BOUNDARIES, contents


class Gate:
    """Holds back the writing of files until it is opened; counts who is inside."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.begun = threading.Event()
        self.inside = self.most = 0
        original = checkpoint_file.write

        def write(*args: Any) -> None:
            self.begun.set()
            self.inside += 1
            self.most = max(self.most, self.inside)
            assert self.open.wait(30)
            original(*args)
            self.inside -= 1

        monkeypatch.setattr(checkpoint_file, "write", write)


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {name: data for name, (_, data) in contents(folder).items()}


@pytest.mark.parametrize("kept", [{}, {"keep_last": 2}, {"every": 2}])
def test_the_files_are_those_of_a_synchronous_save(tmp_path: Path, kept: dict[str, int]) -> None:
    with fl.CheckpointStore(tmp_path / "a", **kept) as here, fl.CheckpointStore(tmp_path / "b", **kept) as behind:
        for ctx in BOUNDARIES:
            assert here.save(ctx).name == behind.save(ctx, wait=False).name
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
