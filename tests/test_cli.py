"""The command line: one command trains, stops, and goes on to the same bits."""

from __future__ import annotations

import csv
import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

import functional_loop as fl
from functional_loop.checkpoint.lock import NAME
from functional_loop.cli import main
from functional_loop.cli.progress import LiveProgress, progress
from functional_loop.cli.report import format_score
from functional_loop.cli.target import load_loop
from functional_loop.engine.signals import Signals

# A loop of 5 batches an epoch, in which training is as random as it gets, and which can be told to get into trouble:
# TROUBLE="7:SIGINT" in the environment sends it that signal in the 7th batch.
SOURCE = """
import os, signal, torch
import functional_loop as fl
from torch import nn

def trouble(ctx):
    step, _, kind = os.environ.get("TROUBLE", "").partition(":")
    if step and ctx.global_step == int(step):
        if kind == "error":
            raise RuntimeError("the sky has fallen")
        for name in kind.split(","):
            os.kill(os.getpid(), getattr(signal, name))
    return ctx

def loop():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 4, generator=generator)
    y = (x.sum(1) > 0).long()
    accuracy = fl.measure("accuracy", lambda y_hat, y: (y_hat.argmax(1) == y).float().mean())
    return fl.Loop(
        lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2)),
        nn.functional.cross_entropy,
        fl.optimizer(torch.optim.AdamW, lr=0.01),
        train=fl.batches(x, y, batch_size=8, shuffle=True),
        valid=fl.batches(x, y, batch_size=20),
        epochs=4,
        measures_train=[accuracy],
        measures_valid=[accuracy],
        callbacks=[fl.Callback("trouble", batch_begin=trouble)],
    )

ready = loop()
number = 3
def needs(size, *, depth): ...
def returns_text(): return "a loop"
def fails(): return 1 / 0
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the file ``project_loops.py``, in which we are."""
    (tmp_path / "project_loops.py").write_text(SOURCE)
    (tmp_path / "project_broken.py").write_text("import torch\nimport not_installed_anywhere\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv("TROUBLE", raising=False)
    yield tmp_path
    for name in ("project_loops", "project_broken"):
        sys.modules.pop(name, None)


TRAIN = ("train", "project_loops.py:loop", "--run", "run")


def digest_in(text: str) -> str:
    found = re.findall(r"^digest: ([0-9a-f]{64})$", text, re.MULTILINE)
    assert len(found) == 1
    return str(found[0])


def whole_run(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The digest of a run that nothing interrupts."""
    assert main(["train", "project_loops.py:loop", "--run", "whole", *options]) == 0
    return digest_in(capsys.readouterr().out)


def checkpoints(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "checkpoints").iterdir()}


def test_a_run_leaves_scores_a_picture_and_a_digest(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(TRAIN) == 0
    out = capsys.readouterr().out
    digest_in(out)
    rows = list(csv.DictReader((project / "run/history.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert set(rows[0]) == {"epoch", "train.accuracy", "valid.accuracy"}
    assert all(f"{float(row['valid.accuracy']):.4f}" in out for row in rows)
    assert (project / "run/learning_curve.png").read_bytes().startswith(b"\x89PNG")
    files = {"checkpoints", "history.csv", "learning_curve.png", "run.json"}
    assert {path.name for path in (project / "run").iterdir()} == files


def test_a_finished_run_is_not_trained_again(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(TRAIN) == 0
    digest, files = digest_in(capsys.readouterr().out), checkpoints(project / "run")
    assert main(TRAIN) == 0
    out = capsys.readouterr().out
    assert "finished already, after 4 epochs" in out
    assert digest_in(out) == digest
    assert checkpoints(project / "run") == files


def test_more_epochs_continue_a_finished_run(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(TRAIN) == 0
    capsys.readouterr()
    assert main([*TRAIN, "--epochs", "6"]) == 0
    out = capsys.readouterr().out
    assert "continuing after epoch 4 of 6" in out
    assert digest_in(out) == whole_run(capsys, "--epochs", "6")


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 138)])
def test_a_signal_saves_in_mid_epoch_and_the_same_command_continues_to_the_same_bits(
    project: Path, capsys: pytest.CaptureFixture[str], name: str, code: int
) -> None:
    stopped = run_in_a_process("TROUBLE", f"7:{name}")
    assert stopped.returncode == code
    assert "Stopped and saved after step 2 of 5 of epoch 2 of 4" in stopped.stdout
    assert "-m functional_loop train project_loops.py:loop --run run\n" in stopped.stdout
    assert (project / "run/history.csv").exists()
    assert stopped.stderr == ""
    assert main(TRAIN) == 0
    out = capsys.readouterr().out
    assert "continuing after step 2 of 5 of epoch 2 of 4" in out
    assert digest_in(out) == whole_run(capsys)


def test_sigusr1_runs_the_command_that_queues_the_job_again(project: Path) -> None:
    stopped = run_in_a_process("TROUBLE", "7:SIGUSR1", "--requeue", "ls run/checkpoints > requeued; exit 3")
    assert stopped.returncode == 138
    assert "step-00000007.safetensors" in (project / "requeued").read_text()
    assert stopped.stderr == "functional-loop: --requeue failed with exit code 3\n"
    assert run_in_a_process("TROUBLE", "9:SIGTERM", "--requeue", "touch again").returncode == 143
    assert not (project / "again").exists()


def test_a_run_killed_before_its_first_checkpoint_begins_anew(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_in_a_process("TROUBLE", "2:SIGKILL").returncode == -signal.SIGKILL
    assert {path.name for path in (project / "run").rglob("*") if path.is_file()} == {"run.json", NAME}
    assert main(TRAIN) == 0
    assert "a new run of 4 epochs" in capsys.readouterr().out


def test_a_killed_run_continues_from_what_it_saved_last(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    killed = run_in_a_process("TROUBLE", "10:SIGKILL", "--every-steps", "3")
    assert killed.returncode == -signal.SIGKILL
    assert main([*TRAIN, "--every-steps", "3"]) == 0
    out = capsys.readouterr().out
    assert "continuing after step 4 of 5 of epoch 2 of 4" in out
    assert digest_in(out) == whole_run(capsys)


def run_in_a_process(variable: str, value: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "functional_loop", *TRAIN, *options],
        env={**os.environ, variable: value, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_second_ctrl_c_stops_at_once_and_harms_nothing(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TROUBLE", "8:SIGINT,SIGINT")
    assert main(TRAIN) == 130
    assert "Stopped at once" in capsys.readouterr().out
    monkeypatch.delenv("TROUBLE")
    assert main(TRAIN) == 0
    out = capsys.readouterr().out
    assert "continuing after epoch 1 of 4" in out
    assert digest_in(out) == whole_run(capsys)


def test_a_terminal_shows_place_loss_and_scores(project: Path) -> None:
    loop = load_loop("project_loops.py:loop")
    ctx = fl.train(fl.init(loop), steps=7)
    console = Console(file=io.StringIO(), force_terminal=True, width=160, _environ={})
    with progress(console, fl.init(loop), Signals()) as display:
        display.show(ctx)
    assert isinstance(display, LiveProgress)
    assert isinstance(console.file, io.StringIO)
    shown = re.sub("\x1b[^A-Za-z]*[A-Za-z]", "", console.file.getvalue())
    assert "epoch 2/4  step 2/5" in shown
    assert f"loss {format_score(float(ctx.last_loss))}" in shown  # type: ignore[arg-type]
    assert f"train accuracy {format_score(dict(ctx.last_scores_train)['accuracy'])}" in shown


def test_signal_handlers_are_put_back(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setenv("TROUBLE", "2:SIGTERM")
    assert main(TRAIN) == 143
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_an_error_saves_the_state_before_it_and_shows_where_it_happened(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TROUBLE", "8:error")
    assert main(TRAIN) == 1
    error = capsys.readouterr().err
    assert "RuntimeError: the sky has fallen" in error
    assert "in callback 'trouble' at stage 'batch_begin' (epoch 2, step 3)" in error
    assert "after step 2 of 5 of epoch 2 of 4, was saved" in error
    monkeypatch.delenv("TROUBLE")
    assert main(TRAIN) == 0
    out = capsys.readouterr().out
    assert "continuing after step 2 of 5 of epoch 2 of 4" in out
    assert digest_in(out) == whole_run(capsys)


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_is_used(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(TRAIN) == 0
    digest = digest_in(capsys.readouterr().out)
    for name in ("step-00000020.safetensors", "step-00000020-end.safetensors"):
        path = project / "run/checkpoints" / name
        path.write_bytes(path.read_bytes()[:-1])
    assert main(TRAIN) == 0
    told = capsys.readouterr()
    assert "step-00000020.safetensors is damaged" in told.err
    assert "continuing after epoch 3 of 4" in told.out
    assert digest_in(told.out) == digest


WRONG = {
    "no name": (["project_loops"], "a target is module:name or file.py:name"),
    "no file": (["absent.py:loop"], "there is no file"),
    "no module": (["absent.module:loop"], "there is no module 'absent'"),
    "no submodule": (["project_loops.absent:loop"], "there is no module 'project_loops.absent'"),
    "misspelt": (["project_loops.py:lop"], "did you mean 'loop'?"),
    "not a loop": (["project_loops.py:number"], "neither a Loop nor a function that makes one"),
    "arguments": (["project_loops.py:needs"], "a function of no arguments, but needs size, depth"),
    "returns": (["project_loops.py:returns_text"], "must return a Loop, not str"),
    "epochs": (["project_loops.py:loop", "--epochs", "-1"], "--epochs: must be an integer of at least 0, not '-1'"),
    "every": (["project_loops.py:loop", "--every-steps", "0"], "--every-steps: must be an integer of at least 1"),
    "seed": (["project_loops.py:loop", "--seed", "one"], "--seed: invalid int value: 'one'"),
    "flag": (["project_loops.py:loop", "--epoch", "3"], "unknown argument --epoch; did you mean '--epochs'?"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_command_is_one_line_and_touches_nothing(
    project: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    arguments, message = WRONG[case]
    assert main(["train", *arguments, "--run", "run"]) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert told.err.count("\n") == 1
    assert told.out == ""
    assert not (project / "run").exists()


def test_no_folder_is_a_wrong_command(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "project_loops.py:loop"]) == 2
    assert "the following arguments are required: --run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "line"),
    [
        ("project_loops.py:fails", "calling project_loops.py:fails failed: ZeroDivisionError: division by zero"),
        ("project_broken:loop", "importing project_broken failed: ModuleNotFoundError"),
    ],
)
def test_an_error_in_the_users_file_has_its_traceback(
    project: Path, capsys: pytest.CaptureFixture[str], target: str, line: str
) -> None:
    assert main(["train", target, "--run", "run"]) == 2
    error = capsys.readouterr().err
    assert "Traceback (most recent call last)" in error
    assert f'{target.split(":")[0].removesuffix(".py")}.py", line' in error
    assert line in error


def test_a_loop_and_a_module_are_targets_too(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "project_loops:ready", "--run", "run"]) == 0
    assert digest_in(capsys.readouterr().out) == whole_run(capsys)


def test_a_folder_of_something_else_is_refused(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "thesis").mkdir()
    (project / "thesis/chapter.tex").write_text("words")
    for folder in ("thesis", "project_loops.py"):
        assert main(["train", "project_loops.py:loop", "--run", folder]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in (project / "thesis").iterdir()] == ["chapter.tex"]


def test_a_folder_that_cannot_be_made_is_refused_before_training(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "project_loops.py:loop", "--run", "project_loops.py/run"]) == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert "--run project_loops.py/run can't be written to: Not a directory" in written.err
    assert written.err.count("\n") == 1


def test_a_run_that_another_process_trains_is_refused(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reading, writing = os.pipe()
    with fl.CheckpointStore(project / "run/checkpoints") as store:
        store.check(fl.init(load_loop("project_loops.py:loop")))
        if (child := os.fork()) == 0:
            try:
                code = main(TRAIN)
                os.write(writing, f"{code} {capsys.readouterr().err}".encode())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
    said = os.read(reading, 10_000).decode()
    assert said.startswith("2 ")
    assert f"is being written to by process {os.getpid()} on host" in said
    assert said.count("\n") == 1
    assert main(TRAIN) == 0


def test_a_run_with_another_seed_is_refused(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TRAIN, "--epochs", "1"]) == 0
    capsys.readouterr()
    assert main([*TRAIN, "--seed", "1"]) == 2
    error = capsys.readouterr().err
    assert "seed: 0 in what was saved, 1 here" in error
    assert error.count("\n") == 1


def test_seeds_differ(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TRAIN, "--seed", "1"]) == 0
    assert digest_in(capsys.readouterr().out) != whole_run(capsys)


@pytest.mark.parametrize("extra", ["rich", "matplotlib"])
def test_a_missing_extra_is_named(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, extra, None)
    assert main(TRAIN) == 2
    assert capsys.readouterr().err == (
        f"functional-loop: error: the command line needs {extra}: pip install functional-loop[cli]\n"
    )


def test_a_difference_that_is_allowed_does_not_stop_a_run(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "project_loops.py:loop", "--run", "run", "--max-steps", "5"]) == 0
    source = Path("project_loops.py").read_text()
    Path("other_loops.py").write_text(source.replace("batch_size=8", "batch_size=4"))
    capsys.readouterr()
    again = ["train", "other_loops.py:loop", "--run", "run"]
    assert main(again) == 2
    assert "train/batch_size" in capsys.readouterr().err
    assert main([*again, "--allow", "train/batch_size"]) == 0
    assert "continuing after" in capsys.readouterr().out
    assert max(checkpoints(Path("run"))) >= "step-00000030"
    sys.modules.pop("other_loops", None)
