"""Every benchmark runs, and gives rows: at sizes at which the numbers mean nothing."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from bench import step, timing
from bench.__main__ import main
from bench.workloads import WORKLOADS, images, table

QUICK = ["--repeats", "1", "--clock", "cpu"]


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, make_data in (("mlp", partial(table, 256)), ("cnn", partial(images, 128))):
        monkeypatch.setitem(WORKLOADS, name, attrs.evolve(WORKLOADS[name], make_data=make_data))


def rows_of(tmp_path: Path, command: str, *arguments: str) -> list[dict[str, Any]]:
    path = tmp_path / "rows.json"
    assert main([command, *arguments, "--json", str(path)]) == 0
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["command"] == command
    assert content["environment"]["torch"] == torch.__version__
    rows: list[dict[str, Any]] = content["rows"]
    return rows


def test_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(tmp_path, "step", "--workloads", "mlp", "--flags", "fused", *QUICK)
    assert [row["setting"] for row in rows] == ["ready", "own", "kept", "dropped", "bare"]
    assert all(row["ours min µs"] > 0 and row["ratio of minima"] > 0 for row in rows)
    printed = capsys.readouterr().out
    assert "median ratio" in printed
    assert "Load was" in printed


def test_ensemble(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "ensemble", "--members", "3", *QUICK)
    assert {(row["mode"], row["members"]) for row in rows} == {("vectorised", 3), ("in turn", 3)}
    assert len(rows) == 6
    assert all(row["times faster"] > 0 for row in rows)


def test_data(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "data", "--rows", "cnn", *QUICK)
    assert [row["source"] for row in rows] == ["tensors", "dataset", "dataset, 2 workers"]
    assert all(row["theirs min µs"] > 0 for row in rows)


def test_fallbacks(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "fallbacks", *QUICK)
    assert {row["run"] for row in rows} == {"ready", "own", "members"}
    assert all(row["ratio of minima"] > 0 for row in rows)


def test_hooks(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "hooks", "--kinds", "none", "object, reads", "--callbacks", "1", *QUICK)
    names = [row["callback"] for row in rows]
    assert names[:2] == ["none", "object, reads"]
    assert "12 stages x 4 pure, nothing, AdamW default" in names
    assert all(row["run / hand-written"] > 0 for row in rows[2:])


def test_memory(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "memory", "--workload", "mlp", "--epochs", "1", "--members", "2", "16")
    assert [row["steps"] for row in rows] == [256] * 6 + [8] * 2
    by_name = {row["run"]: row for row in rows}
    # 256 contexts of 3 times 5600 parameters.
    assert by_name["every context kept"]["added MiB"] > 10
    assert by_name["hand-written, copies kept"]["added MiB"] > 10
    assert by_name["train()"]["added MiB"] < 10
    assert by_name["last 3 contexts kept"]["added MiB"] < 10
    few, many = (by_name[f"ensemble of {members}"]["in parameters"] for members in (2, 16))
    assert 0.5 < many / few < 1.5


def test_scale(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "scale", "--steps", "512", "--epochs", "20", "--largest", "1000", *QUICK)
    ends = {row["case"]: row["at"] for row in rows}
    assert ends["long run, 512 steps"] == 512
    assert ends["long run, 20 epochs"] == 40
    assert ends["start, tensors"] == 800
    assert ends["start, rows shuffled"] == 1000
    assert all(row["ours min µs"] > 0 and row["of the first"] > 0 for row in rows)


def test_paper(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "paper", "--layers", "0", "4", "--widths", "100", *QUICK)
    assert [(row["optimizer"], row.get("layers")) for row in rows] == [
        ("sgd", 0),
        ("sgd", 4),
        ("adamw", 0),
        ("adamw", 4),
        ("median of all", None),
        ("largest", None),
    ]
    assert rows[-1]["median ratio"] == max(row["median ratio"] for row in rows[:4])


def test_png(tmp_path: Path) -> None:
    path = tmp_path / "chart.png"
    assert main(["paper", "--layers", "0", *QUICK, "--png", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_no_folder_to_write_to_is_said_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["step", "--json", str(tmp_path / "none" / "rows.json")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_different_work_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def idle(*arguments: object) -> None: ...

    monkeypatch.setitem(step.SETTINGS, "ready", step.Setting(theirs=idle))
    assert main(["step", "--workloads", "mlp", "--settings", "ready", *QUICK]) == 1
    assert "different parameters" in capsys.readouterr().err


def test_the_limit_of_time_ends_a_comparison_but_leaves_enough_pairs() -> None:
    def side() -> Any:
        return lambda: None

    assert len(timing.compare(side, side, 50, "wall", limit=0).ours) == timing.LEAST_PAIRS
    assert len(timing.compare(side, side, 5, "wall").ours) == 5
