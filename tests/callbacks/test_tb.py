"""The TensorBoard callback: the event files of all runs together have every point of the way once."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

import functional_loop as fl
from functional_loop.callbacks.logs.tb import CallbackSetTB
from tests.callbacks.laws import holds_for
from tests.sample_loops import counter, full_loop, raising
from tests.strategies import examples

Points = dict[str, list[tuple[int, float]]]


def logged(path: Any, log_train_loss: bool = True, **changes: Any) -> fl.Loop:
    return full_loop(**{"callbacks": [counter(), CallbackSetTB(path, log_train_loss)], **changes})


def points(path: Path) -> Points:
    """What TensorBoard shows."""
    found = EventAccumulator(str(path), size_guidance={SCALARS: 0}).Reload()
    shown = {tag: [(p.step, p.value) for p in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    return {tag: series for tag, series in shown.items() if series}


def float32(value: Any) -> float:
    return torch.tensor(value).item()


def taken_up(loop: fl.Loop, ctx: fl.Context) -> fl.Context:
    return fl.load_state_dict(fl.init(loop), fl.state_dict(ctx))


def test_points_are_losses_and_scores_at_their_steps(tmp_path: Path) -> None:
    expected: Points = {tag: [] for tag in ("train.loss", "epoch", "train.error", "valid.error")}
    for ctx in fl.iterate(fl.init(logged(tmp_path, epochs=5, eval_freq=2))):
        if ctx.stage == "batch_end":
            expected["train.loss"].append((ctx.global_step, ctx.last_loss.item()))  # type: ignore[union-attr]
        if ctx.stage == "epoch_end" and ctx.epoch in (2, 4, 5):
            values = {"epoch": float(ctx.epoch)}
            values |= {"train.error": ctx.last_scores_train["error"], "valid.error": ctx.last_scores_valid["error"]}  # type: ignore[call-overload]
            for tag, value in values.items():
                expected[tag].append((ctx.global_step, float32(value)))
    assert points(tmp_path) == expected


def test_losses_are_logged_only_if_asked_for(tmp_path: Path) -> None:
    fl.train(fl.init(logged(tmp_path, log_train_loss=False)))
    assert set(points(tmp_path)) == {"epoch", "train.error", "valid.error"}
    assert "batch_end" not in CallbackSetTB(tmp_path).stages


def test_a_run_resumed_anywhere_shows_the_points_of_an_uninterrupted_one(tmp_path: Path) -> None:
    contexts = list(fl.iterate(fl.init(logged(tmp_path / "whole"))))
    whole = points(tmp_path / "whole")
    for number, ctx in enumerate(contexts[:-1]):
        path = tmp_path / str(number)
        fl.train(fl.init(logged(path)))
        fl.train(taken_up(logged(path), ctx))
        assert points(path) == whole, ctx


@given(data=st.data())
@examples(0.1)
def test_any_history_of_deaths_and_restarts_shows_every_point_once(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("tb")
    start = fl.init(logged(folder / "whole"))
    contexts = [start, *fl.iterate(start)]
    place = 0
    for length in data.draw(st.lists(st.integers(1, 12), max_size=4)):
        runs = fl.iterate(taken_up(logged(folder / "run"), contexts[place]))
        died_at = min(place + length, len(contexts) - 2)
        list(itertools.islice(runs, died_at - place))
        runs.close()
        tear(folder / "run", data.draw(st.integers(0, 20)))
        place = data.draw(st.integers(0, died_at))
    fl.train(taken_up(logged(folder / "run"), contexts[place]))
    assert points(folder / "run") == points(folder / "whole")


def tear(folder: Path, count: int) -> None:
    """Leave the newest file as a process that died in the middle of writing: with a part of one more record."""
    newest = max(folder.iterdir())
    record = newest.read_bytes()[:40]
    with open(newest, "ab") as file:
        file.write(record[:count])


def test_training_in_pieces_shows_the_same_points(tmp_path: Path) -> None:
    """More pieces in a second than ten, at which the names of event files are no longer in the order of numbers."""
    fl.train(fl.init(logged(tmp_path / "whole", epochs=5)))
    ctx = fl.init(logged(tmp_path / "pieces", epochs=5))
    while ctx.stage != "end":
        ctx = fl.train(ctx, steps=1)
    assert points(tmp_path / "pieces") == points(tmp_path / "whole")


def test_going_back_and_training_on_differently_shows_the_new_way(tmp_path: Path) -> None:
    origin = fl.train(fl.init(logged(tmp_path)), steps=3)
    prefix = points(tmp_path)["train.loss"]
    fl.train(origin)
    other = fl.train(origin.with_hyperparameters(lr=0.5), steps=2)
    found = points(tmp_path)["train.loss"]
    assert found[:3] == prefix
    assert [step for step, _ in found] == [1, 2, 3, 4, 5]
    assert found[-1] == (5, other.last_loss.item())  # type: ignore[union-attr]


def test_a_run_that_starts_anew_hides_what_was_there(tmp_path: Path) -> None:
    fl.train(fl.init(logged(tmp_path / "a"), seed=1))
    fl.train(fl.init(logged(tmp_path / "a"), seed=2), steps=2)
    fl.train(fl.init(logged(tmp_path / "b"), seed=2), steps=2)
    assert points(tmp_path / "a") == points(tmp_path / "b")


def test_a_killed_process_has_written_every_point(tmp_path: Path) -> None:
    def kill(ctx: fl.Context) -> fl.Context:
        if ctx.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return ctx

    if (child := os.fork()) == 0:
        killer = fl.Callback("killer", batch_end=kill, weight=math.inf)
        fl.train(fl.init(full_loop(callbacks=[CallbackSetTB(tmp_path, log_train_loss=True), killer])))
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    found = points(tmp_path)
    assert [step for step, _ in found["train.loss"]] == [1, 2, 3, 4]
    assert [step for step, _ in found["valid.error"]] == [3]


def test_the_writer_is_closed_when_a_run_is_left(tmp_path: Path) -> None:
    loop = full_loop(callbacks=[CallbackSetTB(tmp_path), raising("after_backward", RuntimeError("boom"))])
    with pytest.raises(RuntimeError, match="boom"):
        fl.train(fl.init(loop))
    assert loop.callbacks[0].source._writer is None


def test_the_laws(tmp_path: Path) -> None:
    folders = itertools.count()
    holds_for(lambda: logged(lambda: tmp_path / str(next(folders)), log_train_loss=False), tmp_path / "store")


def test_the_callback_is_no_part_of_the_run(tmp_path: Path) -> None:
    assert fl.digest(fl.train(fl.init(logged(tmp_path)))) == fl.digest(fl.train(fl.init(full_loop())))


def test_a_function_is_asked_for_the_path_once_per_run(tmp_path: Path) -> None:
    folders = itertools.count(1)
    loop = logged(lambda: tmp_path / f"run-{next(folders)}")
    fl.train(fl.train(fl.init(loop), steps=4))
    fl.train(fl.init(loop, seed=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run-1", "run-2"]
    assert [len(points(path)["train.loss"]) for path in tmp_path.iterdir()] == [6, 6]


def test_a_train_step_logs_its_loss(tmp_path: Path) -> None:
    begun = next(ctx for ctx in fl.iterate(fl.init(full_loop())) if ctx.stage == "epoch_begin")
    ctx = fl.train_step(taken_up(logged(tmp_path), begun), (torch.ones(4, 3), torch.ones(4, 2)))
    assert points(tmp_path) == {"train.loss": [(1, ctx.last_loss.item())]}  # type: ignore[union-attr]


def test_files_from_the_future_are_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"events.out.tfevents.{int(time.time()) + 3600}.host.1.0").touch()
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(RuntimeError, match="event files from the future") as caught:
        fl.train(fl.init(logged(tmp_path)))
    assert fl.context_of(caught.value).global_step == 0  # type: ignore[union-attr]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file"):
        fl.train(fl.init(logged(tmp_path / "file")))


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="callback 'tb' needs tensorboard, which is not installed: pip install"):
        CallbackSetTB("runs")


def test_nothing_is_imported_before_training() -> None:
    program = "import sys; from functional_loop.callbacks.logs.tb import CallbackSetTB; CallbackSetTB('x')\n"
    program += "assert not any(name.startswith('tensorboard') for name in sys.modules)"
    assert os.spawnl(os.P_WAIT, sys.executable, sys.executable, "-c", program) == 0


@pytest.mark.parametrize(
    ("path", "log_train_loss", "message"), [(3, True, "tb: path is"), ("x", 1, "tb: log_train_loss is")]
)
def test_bad_arguments_are_refused_by_name(path: Any, log_train_loss: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        CallbackSetTB(path, log_train_loss)


@pytest.mark.parametrize("what", ["moved", "removed", "replaced", "replaced by a copy"])
def test_a_folder_that_is_not_the_same_any_more_is_an_error_and_nothing_else(tmp_path: Path, what: str) -> None:
    folder, moved = tmp_path / "run", tmp_path / "moved"

    def change(ctx: fl.Context) -> fl.Context:
        if ctx.epoch == 2:
            folder.rename(moved)
            if what == "replaced":
                folder.mkdir()
            elif what == "replaced by a copy":
                shutil.copytree(moved, folder)
            elif what == "removed":
                shutil.rmtree(moved)
        return ctx

    def sizes(of: Path) -> list[int]:
        return [path.stat().st_size for path in of.iterdir()] if of.exists() else []

    loop = full_loop(callbacks=[CallbackSetTB(folder), fl.Callback("change", epoch_begin=change)])
    with pytest.raises(RuntimeError, match=f"the folder {folder} was moved, removed or replaced"):
        fl.train(fl.init(loop))
    assert sizes(folder) == (sizes(moved) if what == "replaced by a copy" else [])
