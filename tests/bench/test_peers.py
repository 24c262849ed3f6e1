"""Environments for other trainers, and the timing that their runners share."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.peers import command
from bench.peers.environments import InstallError, environment

RUNNER = """
from bench.peers.measure import by_hand, measure

def talking(epochs):
    print("a trainer that prints")
    return by_hand(epochs)

measure({"default": talking, "leanest": by_hand})
"""


def test_an_environment_has_the_torch_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    python = environment("attrs", ["attrs"], tmp_path)
    done = subprocess.run(
        [python, "-c", "import sys, torch; print(sys.prefix, torch.__version__)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(tmp_path / "attrs"), torch.__version__]
    made = (tmp_path / "attrs" / "installed.json").stat().st_mtime_ns
    assert environment("attrs", ["attrs"], tmp_path) == python
    assert (tmp_path / "attrs" / "installed.json").stat().st_mtime_ns == made


def test_another_torch_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(InstallError, match="torch"):
        environment("old", ["torch==1.0"], tmp_path)


def test_what_does_not_install_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setitem(command.PEERS, "skorch", ["torch==1.0"])
    assert main(["peers", "--peers", "skorch", "--envs", str(tmp_path)]) == 0
    assert "does not install: " in capsys.readouterr().out


def test_what_fails_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setitem(command.PEERS, "skorch", ["attrs"])
    assert main(["peers", "--peers", "skorch", "--envs", str(tmp_path)]) == 0
    assert "fails: ModuleNotFoundError: No module named 'skorch'" in capsys.readouterr().out


def test_a_runner_prints_the_times_of_three_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_ROWS", "256")
    monkeypatch.setenv("PYTHONPATH", str(command.ROOT))
    (tmp_path / "runner.py").write_text(RUNNER, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "runner.py", "--repeats=2"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    measured = json.loads(done.stdout)
    assert [row["setting"] for row in measured] == ["default", "leanest"]
    assert {name: len(times) for name, times in measured[0]["times"].items()} == {"peer": 2, "by hand": 2, "ours": 2}
    assert "a trainer that prints" in done.stderr


def test_a_runner_refuses_another_amount_of_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_ROWS", "256")
    monkeypatch.setenv("PYTHONPATH", str(command.ROOT))
    code = "from bench.peers.measure import by_hand, measure; measure({'lazy': lambda epochs: by_hand(1)})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "peer made 8 updates in 3 epochs, not 24" in done.stderr
