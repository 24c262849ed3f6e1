"""The store: what was saved comes back or is named as damaged, and nothing saved is ever harmed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import functional_loop as fl
from functional_loop.checkpoint import file as checkpoint_file
from functional_loop.checkpoint import header
from functional_loop.checkpoint.lock import NAME
from functional_loop.checkpoint.resume import resume
from functional_loop.checkpoint.store import CheckpointStore
from functional_loop.core.errors import CheckpointError, StateDictError


def make_loop(epochs: int = 2, width: int = 4, terminate_at: int = -1, **changes: Any) -> fl.Loop:
    """Three batches an epoch; a network, an optimizer, a measure and a callback with state."""
    x = torch.arange(36.0).reshape(12, 3).sin()
    y = x.sum(1, keepdim=True)

    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Dropout(0.5), nn.Linear(width, 1))

    def count(ctx: fl.Context) -> fl.Context:
        return ctx.with_callback_state("count", {"batches": ctx.callbacks["count"]["batches"] + 1})

    def stop(ctx: fl.Context) -> fl.Context:
        return fl.evolve(ctx, terminate=True) if ctx.epoch == terminate_at else ctx

    options: dict[str, Any] = {
        "network": network,
        "loss": nn.functional.mse_loss,
        "optimizer": fl.optimizer(torch.optim.AdamW, lr=0.01),
        "train": fl.batches(x, y, batch_size=4, shuffle=True),
        "valid": fl.batches(x, y, batch_size=6),
        "measures_train": [fl.measure("mse", nn.functional.mse_loss, minimize=True)],
        "callbacks": [
            fl.Callback("count", init=lambda ctx: {"batches": 0}, batch_end=count),
            fl.Callback("stop", epoch_end=stop),
        ],
    }
    return fl.Loop(epochs=epochs, **(options | changes))


LOOP = make_loop()
START = fl.init(LOOP, seed=0)
BOUNDARIES = list(fl.iterate(START))
END = BOUNDARIES[-1]
EPOCH_END = BOUNDARIES[-2]


def at(step: int) -> fl.Context:
    """The `batch_end` context of a step."""
    return next(ctx for ctx in BOUNDARIES if ctx.global_step == step and ctx.stage == "batch_end")


def damage(path: Path, position: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """All files but the lock: name, time and bytes."""
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir() if path.name != NAME}


def saved_run(folder: Path, *steps: int) -> list[Path]:
    store = CheckpointStore(folder)
    return [store.save(at(step)) for step in steps]


@pytest.mark.parametrize("place", range(len(BOUNDARIES)), ids=lambda i: f"{i}-{BOUNDARIES[i].stage}")
def test_every_boundary_comes_back_and_continues_bit_for_bit(tmp_path: Path, place: int) -> None:
    ctx = BOUNDARIES[place]
    path = CheckpointStore(tmp_path).save(ctx)
    loaded = CheckpointStore(tmp_path).load(make_loop())
    assert path.parent == tmp_path
    assert fl.digest(loaded) == fl.digest(ctx)
    assert fl.digest(fl.train(loaded)) == fl.digest(END)
    assert fl.digest(resume(make_loop(), tmp_path, seed=0)) == fl.digest(ctx)


def test_a_fresh_process_continues_bit_for_bit(tmp_path: Path) -> None:
    CheckpointStore(tmp_path).save(at(2))
    program = (
        f"import torch; torch.set_num_threads({torch.get_num_threads()})\n"
        "from tests import test_store as t\n"
        f"ctx = t.resume(t.make_loop(), {str(tmp_path)!r}, seed=0)\n"
        "print(ctx.global_step, t.fl.digest(t.fl.train(ctx)))"
    )
    root = Path(fl.__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["2", fl.digest(END)]


def test_files_are_named_by_global_step(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    assert store.save(at(2)).name == "step-00000002.safetensors"
    assert store.save(END).name == "step-00000006-end.safetensors"
    assert store.save(fl.evolve(at(5), global_step=10**9)).name == "step-1000000000.safetensors"
    assert store.steps() == [2, 6, 10**9]
    assert store.load(LOOP).global_step == 10**9


def test_only_checkpoints_count_as_steps(tmp_path: Path) -> None:
    names = (
        *("notes.txt", "step-7.safetensors", "step-0000000007.safetensors", "step-00000007.safetensors.tmp"),
        *("step-00000007.safetensors.damaged", "xstep-00000007.safetensors", "step-٠٠٠٠٠٠٠٧.safetensors"),
    )
    for name in names:
        (tmp_path / name).touch()
    store = CheckpointStore(tmp_path, keep_last=1)
    assert store.steps() == []
    store.save(at(1))
    store.save(at(2))
    assert store.steps() == [2]
    assert contents(tmp_path).keys() == {*names, "step-00000002.safetensors"}


def test_the_folder_is_made_and_may_be_absent(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "first"
    store = CheckpointStore(folder)
    assert store.steps() == []
    assert fl.digest(resume(LOOP, folder, seed=3, must_exist=False)) == fl.digest(fl.init(LOOP, seed=3))
    assert not folder.exists()
    store.save(at(1))
    assert store.steps() == [1]


def test_metadata_tells_the_place_and_the_run(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path) as store:
        store.check(fl.init(LOOP))
        metadata = checkpoint_file.read_metadata(store.save(at(4)))
    start = metadata.pop("start")
    assert start["made"] is True
    assert metadata == {
        "seed": 0,
        "epoch": 2,
        "step": 1,
        "global_step": 4,
        "stage": "batch_end",
        "terminate": False,
        "last_scores_valid": {},
        "minimize": {},
        "epochs": 2,
        "version": 2,
        "step_valid": 0,
        "skip_batches": [],
        "skipped": [],
        **{part: fl.state_dict(at(4))[part] for part in ("fingerprint", "environment", "hyperparameters")},
    }


def test_a_later_boundary_of_a_step_replaces_the_file(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for ctx in BOUNDARIES[:-1]:
        store.save(ctx)
        assert fl.digest(store.load(LOOP)) == fl.digest(ctx)
    assert store.steps() == [0, 1, 2, 3, 4, 5, 6]
    assert len(contents(tmp_path)) == 7


def test_saving_changes_nothing_in_the_context(tmp_path: Path) -> None:
    ctx = at(2)
    before, versions = fl.digest(ctx), [p._version for p in ctx.params.values()]
    CheckpointStore(tmp_path).save(ctx)
    assert fl.digest(ctx) == before
    assert [p._version for p in ctx.params.values()] == versions


def test_a_context_inside_a_batch_is_refused(tmp_path: Path) -> None:
    taken: list[fl.Context] = []

    def take(ctx: fl.Context) -> fl.Context:
        taken.append(ctx)
        return ctx

    fl.train(fl.init(make_loop(callbacks=[fl.Callback("take", after_backward=take)])), steps=1)
    with pytest.raises(ValueError, match="taken by a hook of stage 'after_backward'"):
        CheckpointStore(tmp_path / "run").save(taken[0])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("step", [None, 3])
def test_nothing_to_load_is_a_file_not_found_error(tmp_path: Path, step: int | None) -> None:
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        CheckpointStore(tmp_path).load(LOOP, step)
    saved_run(tmp_path, 1, 2)
    with pytest.raises(FileNotFoundError, match=r"step 3; there is \[1, 2\]"):
        CheckpointStore(tmp_path).load(LOOP, 3)


def test_any_saved_step_can_be_loaded(tmp_path: Path) -> None:
    saved_run(tmp_path, 1, 2, 3)
    for step in (1, 2, 3):
        assert fl.digest(CheckpointStore(tmp_path).load(LOOP, step)) == fl.digest(at(step))


@pytest.mark.parametrize("position", [0, 300, -1])
def test_load_falls_back_over_damaged_files_and_names_them(tmp_path: Path, position: int) -> None:
    _, second, third = saved_run(tmp_path, 1, 2, 3)
    damage(second, position)
    damage(third, position)
    before = contents(tmp_path)
    with pytest.warns(UserWarning, match="damaged") as caught:
        loaded = CheckpointStore(tmp_path).load(LOOP)
    assert [path in str(w.message) for w, path in zip(caught, (str(third), str(second)), strict=True)] == [True, True]
    assert all(w.filename == __file__ for w in caught)
    assert fl.digest(loaded) == fl.digest(at(1))
    assert contents(tmp_path) == before
    with pytest.raises(CheckpointError, match=str(third)):
        CheckpointStore(tmp_path).load(LOOP, 3)


def test_older_damage_goes_unnoticed_by_load(tmp_path: Path) -> None:
    first, _ = saved_run(tmp_path, 1, 2)
    damage(first)
    assert fl.digest(CheckpointStore(tmp_path).load(LOOP)) == fl.digest(at(2))


def test_load_of_nothing_but_damaged_files_names_all(tmp_path: Path) -> None:
    paths = saved_run(tmp_path, 1, 2)
    for path in paths:
        damage(path)
    with pytest.raises(CheckpointError) as caught:
        CheckpointStore(tmp_path).load(LOOP)
    assert all(str(path) in str(caught.value) for path in paths)


def test_resume_sets_damaged_files_aside(tmp_path: Path) -> None:
    first, second = saved_run(tmp_path, 1, 2)
    for _ in range(2):
        damage(second)
        with pytest.warns(UserWarning, match=rf"{second.name}.*damaged.*using {first.name}"):
            ctx = resume(LOOP, tmp_path, seed=0)
        assert fl.digest(ctx) == fl.digest(at(1))
        CheckpointStore(tmp_path).save(fl.train(ctx, steps=1))
        assert fl.digest(resume(LOOP, tmp_path, seed=0)) == fl.digest(at(2))
    assert {path.name for path in tmp_path.iterdir()} == {
        *(first.name, second.name, f"{second.name}.damaged", f"{second.name}.damaged-2"),
    }


def test_resume_starts_over_when_everything_is_damaged(tmp_path: Path) -> None:
    (path,) = saved_run(tmp_path, 1)
    damage(path)
    with pytest.warns(UserWarning, match="starting from the beginning"):
        ctx = resume(LOOP, tmp_path, seed=0)
    assert fl.digest(ctx) == fl.digest(START)
    assert CheckpointStore(tmp_path).steps() == []


def test_resume_refuses_another_seed_and_touches_nothing(tmp_path: Path) -> None:
    _, second = saved_run(tmp_path, 1, 2)
    damage(second)
    before = contents(tmp_path)
    with pytest.raises(StateDictError, match="another seed") as caught:
        resume(LOOP, tmp_path, seed=1)
    assert caught.value.differences == ("seed: 0 in what was saved, 1 here",)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("read", [lambda loop, path: CheckpointStore(path).load(loop), resume], ids=["load", "resume"])
def test_another_network_is_refused_with_the_differences(tmp_path: Path, read: Any) -> None:
    (path,) = saved_run(tmp_path, 1)
    before = contents(tmp_path)
    with pytest.raises(StateDictError) as caught:
        read(make_loop(width=5), tmp_path)
    assert any("0.weight" in line for line in caught.value.differences)
    assert any(str(path) in note for note in caught.value.__notes__)
    assert contents(tmp_path) == before


OTHERS = {
    "network": fl.evolve(LOOP, network=lambda: torch.nn.Linear(3, 5), callbacks=()),
    "batch size": fl.evolve(LOOP, train=fl.batches(torch.zeros(20, 3), torch.zeros(20, 2), batch_size=5)),
    "epochs": fl.evolve(LOOP, epochs=1),
}
READERS: dict[str, Any] = {
    "load": lambda loop, path: CheckpointStore(path).load(loop),
    "load a step": lambda loop, path: CheckpointStore(path).load(loop, step=4),
    "resume": resume,
    "verify": lambda loop, path: list(fl.verify(loop, path)),
}


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("members", [False, True])
def test_a_refusal_says_which_file_it_is_of(tmp_path: Path, read: str, other: str, members: bool) -> None:
    if read == "verify" and other == "epochs":
        return  # each segment has the epochs that it was trained for
    start = fl.stack([fl.init(LOOP, seed) for seed in (1, 2)]) if members else fl.init(LOOP)
    with CheckpointStore(tmp_path) as store:
        ctx = fl.train(start, steps=3)
        files = [store.save(ctx), store.save(fl.train(ctx, steps=1))]
    loop = OTHERS[other]
    given = fl.stack([fl.init(loop, seed) for seed in (1, 2)]) if members and read == "resume" else loop
    with pytest.raises(StateDictError) as caught:
        READERS[read](given, tmp_path)
    assert f"while loading {files[0 if read == 'verify' else 1]}" in caught.value.__notes__


@pytest.mark.parametrize("used", [False, True], ids=["new store", "used store"])
@pytest.mark.parametrize(
    ("other", "difference"),
    [(fl.init(LOOP, seed=1), "seed"), (fl.init(make_loop(width=5)), "network")],
    ids=["seed", "network"],
)
def test_another_run_is_refused_a_folder(tmp_path: Path, used: bool, other: fl.Context, difference: str) -> None:
    store = CheckpointStore(tmp_path)
    store.save(at(1))
    before = contents(tmp_path)
    with pytest.raises(StateDictError, match="another run") as caught:
        (store if used else CheckpointStore(tmp_path)).save(other)
    assert all(line.startswith(difference) for line in caught.value.differences)
    assert contents(tmp_path) == before


def test_the_newest_file_with_an_intact_header_tells_whose_folder_it_is(tmp_path: Path) -> None:
    _, second, third = saved_run(tmp_path, 1, 2, 3)
    damage(second)
    damage(third, 300)
    with pytest.raises(StateDictError, match="another run"):
        CheckpointStore(tmp_path).save(fl.init(LOOP, seed=1))


def test_unrelated_files_in_the_folder_are_fine(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("learning rate too high?")
    assert CheckpointStore(tmp_path).save(at(1)).exists()
    (tmp_path / "step-00000009.safetensors").write_bytes(b"something else")
    assert CheckpointStore(tmp_path, keep_last=1).save(at(2)).exists()
    assert (tmp_path / "step-00000009.safetensors").read_bytes() == b"something else"


def test_a_folder_of_foreign_checkpoints_is_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.ones(3)}, tmp_path / "step-00000009.safetensors")
    before = contents(tmp_path)
    for use in (CheckpointStore(tmp_path).save, CheckpointStore(tmp_path).check):
        with pytest.raises(CheckpointError, match="none is an intact one: give this run a folder of its own"):
            use(at(1))
    assert contents(tmp_path) == before


def test_a_damaged_target_is_not_written_over(tmp_path: Path) -> None:
    first, second = saved_run(tmp_path, 1, 2)
    damage(second)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=rf"refused to write over.*{second.name}"):
        CheckpointStore(tmp_path).save(at(2))
    assert contents(tmp_path) == before
    assert CheckpointStore(tmp_path).save(at(1)) == first


def test_a_target_that_is_no_checkpoint_of_a_run_is_not_written_over(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    target = store.save(at(1))
    checkpoint_file.write(target, {"a": torch.ones(2)}, {"seed": 0})
    before = contents(tmp_path)
    for saving in (store, CheckpointStore(tmp_path)):
        with pytest.raises(CheckpointError, match="no checkpoint of a run"):
            saving.save(at(1))
    assert contents(tmp_path) == before


def test_a_target_of_another_run_is_not_written_over(tmp_path: Path) -> None:
    CheckpointStore(tmp_path / "a").save(at(1))
    foreign = CheckpointStore(tmp_path / "b").save(fl.train(fl.init(LOOP, seed=1), steps=1))
    saved_run(tmp_path / "a", 2)
    target = tmp_path / "a" / foreign.name
    target.write_bytes(foreign.read_bytes())
    with pytest.raises(CheckpointError, match="of another run: seed"):
        CheckpointStore(tmp_path / "a").save(at(1))
    assert target.read_bytes() == foreign.read_bytes()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(NotADirectoryError, match="is a file"):
        CheckpointStore(path)
    with pytest.raises(NotADirectoryError, match="is a file"):
        resume(LOOP, path)


@pytest.mark.parametrize("keep_last", [0, -1, 1.0, True, "3"])
def test_keep_last_is_a_positive_integer(tmp_path: Path, keep_last: Any) -> None:
    with pytest.raises(ValueError, match="keep_last"):
        CheckpointStore(tmp_path, keep_last=keep_last)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, len(BOUNDARIES) - 1), min_size=1, max_size=8), st.integers(1, 3))
def test_keep_last_keeps_the_last_steps_up_to_the_one_just_saved(
    tmp_path_factory: pytest.TempPathFactory, places: list[int], keep_last: int
) -> None:
    folder = tmp_path_factory.mktemp("run")
    store = CheckpointStore(folder, keep_last=keep_last)
    expected: set[int] = set()
    for place in places:
        step = BOUNDARIES[place].global_step
        store.save(BOUNDARIES[place])
        expected.add(step)
        older = sorted(s for s in expected if s <= step)
        expected -= set(older[:-keep_last])
        assert store.steps() == sorted(expected)
        assert step in expected
        assert store.load(LOOP, step).global_step == step


def test_pruning_deletes_only_what_is_known_to_be_of_the_run(tmp_path: Path) -> None:
    first, second, third = saved_run(tmp_path, 1, 2, 3)
    damage(first, 0)
    foreign = CheckpointStore(tmp_path / "other").save(fl.train(fl.init(LOOP, seed=1), steps=2))
    second.write_bytes(foreign.read_bytes())
    store = CheckpointStore(tmp_path, keep_last=1)
    store.save(at(4))
    assert not third.exists()
    assert store.steps() == [1, 2, 4]


def test_pruning_comes_after_the_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    store.save(at(1))
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="No space"):
            store.save(at(2))
    assert store.steps() == [1]
    assert fl.digest(store.load(LOOP)) == fl.digest(at(1))
    store.save(at(2))
    assert store.steps() == [2]


def test_a_failed_deletion_warns_and_does_not_stop_later_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *_ = saved_run(tmp_path, 1, 2, 3)
    unlink = os.unlink

    def stubborn(path: str, **options: Any) -> None:
        if Path(path).name == first.name:
            raise PermissionError(13, "Permission denied", str(path))
        unlink(path, **options)

    store = CheckpointStore(tmp_path, keep_last=1)
    with monkeypatch.context() as patched:
        patched.setattr("os.unlink", stubborn)
        with pytest.warns(UserWarning, match=rf"could not be deleted.*{first.name}") as caught:
            store.save(at(4))
    assert caught[0].filename == __file__
    assert store.steps() == [1, 4]
    store.save(at(5))
    assert store.steps() == [5]


def fail(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("call", ["os.open", "os.write", "os.fsync", "os.replace"])
@pytest.mark.parametrize("step", [1, 2], ids=["same step", "next step"])
def test_a_failing_save_harms_nothing_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, step: int
) -> None:
    store = CheckpointStore(tmp_path)
    store.save(at(1))
    before = contents(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(call, fail)
        with pytest.raises(OSError, match="No space"):
            store.save(at(step))
    assert contents(tmp_path) == before
    store.save(at(step))
    assert fl.digest(store.load(LOOP)) == fl.digest(at(step))


def test_saves_after_the_first_read_no_other_file_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_run(tmp_path, 1, 2)
    store = CheckpointStore(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_file, "read", fail)
        for step in (3, 4):
            store.save(at(step))
            store.save(at(step))
    assert store.steps() == [1, 2, 3, 4]


def test_a_process_killed_while_saving_leaves_a_loadable_store(tmp_path: Path) -> None:
    known = {fl.digest(at(step)) for step in range(1, 7)}
    generator = random.Random(0)
    with CheckpointStore(tmp_path, keep_last=2) as store:
        store.save(at(1))
    for _ in range(15):
        child = os.fork()
        if child == 0:
            for i in range(10**9):
                CheckpointStore(tmp_path, keep_last=2).save(at(i % 6 + 1))
        time.sleep(generator.uniform(0.002, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert fl.digest(CheckpointStore(tmp_path).load(LOOP)) in known


def test_resuming_a_finished_run_returns_its_end_and_touches_no_file(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(EPOCH_END)
    store.save(END)
    before = contents(tmp_path)
    ctx = resume(make_loop(), tmp_path, seed=0)
    assert ctx.stage == "end"
    assert fl.digest(ctx) == fl.digest(END)
    assert fl.train(ctx) is ctx
    assert fl.digest(store.load(make_loop(), step=6)) == fl.digest(END)
    assert contents(tmp_path) == before
    assert store.steps() == [6]


def test_a_longer_run_goes_on_from_the_last_epoch_end(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    store.save(EPOCH_END)
    store.save(END)
    longer = make_loop(epochs=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ctx = resume(longer, tmp_path, seed=0)
    assert ctx.stage == "epoch_end"
    finished = fl.train(ctx)
    assert fl.digest(finished) == fl.digest(fl.train(fl.init(longer, seed=0)))
    store.save(finished)
    assert [*contents(tmp_path)] == ["step-00000012-end.safetensors"]


def test_a_terminated_run_is_finished_for_any_number_of_epochs(tmp_path: Path) -> None:
    *_, epoch_end, end = fl.iterate(fl.init(make_loop(epochs=3, terminate_at=1), seed=0))
    store = CheckpointStore(tmp_path)
    store.save(epoch_end)
    store.save(end)
    assert end.global_step == 3
    assert resume(make_loop(epochs=9, terminate_at=1), tmp_path, seed=0).stage == "end"


def test_a_finished_run_without_an_epoch_end_cannot_be_made_longer(tmp_path: Path) -> None:
    CheckpointStore(tmp_path).save(END)
    before = contents(tmp_path)
    for read in (lambda loop: CheckpointStore(tmp_path).load(loop), lambda loop: resume(loop, tmp_path)):
        with pytest.raises(CheckpointError, match="can't be trained for 4 epochs"):
            read(make_loop(epochs=4))
    assert contents(tmp_path) == before


def test_a_damaged_end_falls_back_to_its_epoch_end(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(EPOCH_END)
    damage(store.save(END))
    with pytest.warns(UserWarning, match="step-00000006-end.safetensors is damaged"):
        ctx = resume(LOOP, tmp_path, seed=0)
    assert fl.digest(fl.train(ctx)) == fl.digest(END)


def test_a_newer_format_is_not_taken_for_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_run(tmp_path, 1)
    with monkeypatch.context() as patched:
        patched.setattr(header, "VERSION", 2)
        saved_run(tmp_path, 2)
    before = contents(tmp_path)
    for use in (
        lambda: resume(LOOP, tmp_path, seed=0),
        lambda: CheckpointStore(tmp_path).load(LOOP),
        lambda: CheckpointStore(tmp_path).save(at(3)),
    ):
        with pytest.raises(CheckpointError, match="format 2"):
            use()
    assert contents(tmp_path) == before
