"""The commands that look into runs: verify, diff, inspect, bisect."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import functional_loop as fl
from functional_loop.checkpoint import file as checkpoint_file
from functional_loop.cli import main
from functional_loop.cli.target import load_loop

SOURCE = """
import torch
import functional_loop as fl
from functional_loop.callbacks import csv_log, digest_trace
from torch import nn

def make(*callbacks):
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    error = fl.measure("error", nn.functional.cross_entropy, minimize=True)
    return fl.Loop(
        lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)),
        nn.functional.cross_entropy,
        fl.optimizer(torch.optim.AdamW, lr=0.01),
        train=fl.batches(x, (x.sum(1) > 0).long(), batch_size=8, shuffle=True),
        valid=fl.batches(x, (x.sum(1) > 0).long(), batch_size=20),
        epochs=3,
        measures_valid=[error],
        callbacks=[*callbacks, digest_trace(every=1), csv_log("scores.csv")],
    )

def loop():
    return make()

def other():
    change = lambda ctx: ctx.with_hyperparameters(lr=0.02) if ctx.global_step == 8 else ctx
    return make(fl.Callback("change", batch_end=change))
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Path]:
    """A folder with two trained runs, ``a`` and ``b``, that part at step 8."""
    (tmp_path / "looked_into.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert main(["train", "looked_into.py:loop", "--run", "a", "--every-steps", "3"]) == 0
    (tmp_path / "scores.csv").unlink()
    assert main(["train", "looked_into.py:other", "--run", "b"]) == 0
    capsys.readouterr()
    yield tmp_path
    sys.modules.pop("looked_into", None)


def files_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "__pycache__" not in str(path)}


def damage(path: Path) -> None:
    """Another number in a sound file."""
    state, metadata = checkpoint_file.read(path)
    weight = state["network"]["3.bias"].clone()
    weight[0] = torch.nextafter(weight[0], torch.tensor(torch.inf))
    checkpoint_file.write(path, {**state, "network": {**state["network"], "3.bias": weight}}, metadata)


def checkpoints(run: str) -> list[Path]:
    return sorted(Path(run, "checkpoints").glob("step-*"), key=lambda path: (path.name[:13], "-end" in path.name))


def test_verify_of_a_trusted_folder_needs_no_target_and_writes_nothing(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert json.loads((project / "a/run.json").read_text()) == {"target": f"{project}/looked_into.py:loop"}
    before = files_in(project)
    for folder in ("a", "a/checkpoints"):
        assert main(["verify", folder, "--trust"]) == 0
        out = capsys.readouterr().out
        assert "step 12, after batch_end of epoch 3  →  step 15, after epoch_end of epoch 3:  the same bits" in out
        assert "step 15, after epoch_end of epoch 3  →  step 15, after end:  the same bits" in out
    assert main(["verify", "a", "looked_into.py:loop", "--from-start"]) == 0
    assert "step 0, before the run  →" in capsys.readouterr().out
    assert files_in(project) == before


def test_verify_shows_the_leaves_that_differ(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(checkpoints("a")[-1])
    assert main(["verify", "a", "--trust"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"after end:  1 leaf differs\n", out)
    assert re.search(r"network/3\.bias +1 of 2 elements +\S+ +1 *\n", out)
    assert re.search(r"(\d+) of (\d+) segments replay to the same bits", out)


def test_verify_of_a_damaged_file_fails(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoints("a")[-1]
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["verify", "a", "--trust"]) == 1
    assert "is damaged" in capsys.readouterr().out


def test_diff(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", "a", "a/checkpoints/" + checkpoints("a")[-1].name]) == 0
    assert "the same bits in every leaf" in capsys.readouterr().out
    assert main(["diff", "a", "b"]) == 1
    out = capsys.readouterr().out
    assert "by their digest traces, the runs have parted by step 8" in out
    assert re.search(r"optimizer/groups/0/lr +0\.01 against 0\.02 +0\.01 +\d+", out)
    assert re.search(r"network/0\.weight +32 of 32 elements +\S+ +\d+", out)
    shutil.copy(checkpoints("a")[-1], "copy.safetensors")
    damage(Path("copy.safetensors"))
    assert main(["diff", "a", "copy.safetensors"]) == 1
    assert "1 leaf differs" in capsys.readouterr().out


def test_inspect(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "a"]) == 0
    out = capsys.readouterr().out
    assert "step 15, after end; seed 0, finished" in out
    assert re.search(r"scores: +valid\.error \d\.\d{4}  loss", out)
    assert "0.weight  float32[8, 4]  128 B" in out
    assert "1.num_batches_tracked  int64[]  8 B = 15" in out
    assert "lr  0.01" in out
    assert f"written by: functional_loop {fl.__version__}, torch {torch.__version__}" in out


def test_bisect(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files_in(project)
    assert main(["bisect", "a", "b", "--trust"]) == 1
    out = capsys.readouterr().out
    assert "same up to step 7, after batch_end of epoch 2, and part at step 8, after batch_end of epoch 2." in out
    assert re.search(r"optimizer/groups/0/lr +0\.01 against 0\.02", out)
    assert main(["bisect", "a", "a", "--trust"]) == 0
    assert "The runs are the same, bit for bit" in capsys.readouterr().out
    assert files_in(project) == before


def test_bisect_says_that_chance_has_parted_runs(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("a", "c")
    for path in checkpoints("c")[-2:]:
        damage(path)
    assert main(["bisect", "a", "c", "--trust"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "by step 15, after epoch_end of epoch 3, and chance has parted them: what the second run saved there" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "absent"], "absent holds no checkpoints"),
        (["verify", "unknown"], "unknown does not say what was trained there; give the TARGET"),
        (["verify", "unreadable"], "run.json can't be read"),
        (["verify", "odd", "--trust"], "run.json can't be read"),
        (["verify", "a", "looked_into.py:lop"], "did you mean 'loop'?"),
        (["verify", "a", "functional_loop.examples.digits:loop"], "does not belong to this loop"),
        (["verify", "a", "--from-strt"], "unknown argument --from-strt; did you mean '--from-start'?"),
        (["diff", "a", "absent.safetensors"], "No such file or directory: 'absent.safetensors'"),
        (["inspect", "looked_into.py"], "is damaged or no checkpoint"),
        (["bisect", "a", "absent"], "absent holds no checkpoints"),
    ],
)
def test_a_wrong_command_is_one_line(
    project: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    shutil.copytree("a/checkpoints", "unknown")
    shutil.copytree("a", "unreadable")
    Path("unreadable/run.json").write_text("{")
    shutil.copytree("a", "odd")
    Path("odd/run.json").write_text('{"target": "looked_into.py:loop", "overfit": 1e400}')
    assert main(arguments) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert told.err.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [
        ["verify", "stranger"],
        ["verify", "stranger/checkpoints", "--from-start"],
        ["bisect", "stranger", "stranger"],
        ["bisect", "a", "stranger"],
        ["bisect", "stranger", "a", "--target-b", "looked_into.py:loop"],
        ["inspect", "stranger"],
        ["diff", "stranger", "a"],
        ["export", "stranger", "out.pt"],
        ["train", "looked_into.py:loop", "--run", "stranger", "--epochs", "4"],
    ],
)
def test_no_code_of_a_folder_is_run(project: Path, capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    shutil.copytree("a", "stranger")
    Path("theirs.py").write_text("from pathlib import Path\nPath('RUN').touch()\nfrom looked_into import loop\n")
    Path("stranger/run.json").write_text(json.dumps({"target": f"{Path('theirs.py').resolve()}:loop"}))
    command = [
        str(checkpoints("stranger")[-1]) if command[0] == "export" and word == "stranger" else word for word in command
    ]
    code = main(command)
    told = capsys.readouterr().err
    assert not Path("RUN").exists()
    if command[0] in ("verify", "bisect"):
        assert code == 2
        assert "give the TARGET" in told
        assert "--trust" in told
        assert main([*command, "--trust"]) == 0
        assert Path("RUN").exists()
    sys.modules.pop("theirs", None)


ENSEMBLE = """
import functional_loop as fl
from functional_loop.callbacks import checkpoint
from looked_into import make

loop = make()
ensemble = fl.evolve(loop, callbacks=[checkpoint("many/checkpoints", every_steps=5)])
"""


def test_commands_know_ensembles(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("together.py").write_text(ENSEMBLE)
    loop = load_loop("together.py:ensemble")
    fl.train(fl.stack([fl.init(loop, seed) for seed in (3, 4)], mode="vectorised"))
    assert main(["verify", "many", "together.py:ensemble", "--from-start"]) == 0
    assert "step 0, before the run  →" in capsys.readouterr().out
    assert main(["bisect", "many", "many", "--target", "together.py:ensemble"]) == 0
    assert main(["diff", "many", "many"]) == 0
    capsys.readouterr()
    assert main(["inspect", "many"]) == 0
    out = capsys.readouterr().out
    assert "step 15, after end; seeds 3, 4, finished" in out
    assert re.search(r"member 1: +valid\.error \d\.\d{4}  loss", out)
    assert main(["export", str(checkpoints("many")[-1]), "out.pt"]) == 2
    assert "is of an ensemble" in capsys.readouterr().err
    sys.modules.pop("together", None)


def test_a_run_on_a_few_batches_or_steps_is_replayed_as_it_was_trained(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--overfit", "2", "--max-steps", "5", "--every-steps", "2", "--epochs", "4"]
    for folder in ("few", "again"):
        Path("scores.csv").unlink(missing_ok=True)
        assert main(["train", "looked_into.py:loop", "--run", folder, *few]) == 0
    assert json.loads(Path("few/run.json").read_text())["overfit"] == 2
    for arguments in (["few", "--trust"], ["few/checkpoints", "--trust"], ["few", "looked_into.py:loop"]):
        assert main(["verify", *arguments, "--from-start"]) == 0
    assert main(["bisect", "few", "again", "--trust"]) == 0
    assert main(["bisect", "few", "a", "--trust"]) == 2
    assert "the runs have not the same steps in an epoch" in capsys.readouterr().err
