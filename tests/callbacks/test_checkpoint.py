"""The checkpoint callback: what is saved is what the loop itself goes on from, and nothing needed is ever deleted."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest

import functional_loop as fl
from functional_loop.callbacks.control.checkpoint import CallbackSetCheckpoint
from functional_loop.callbacks.objects.lambda_callback import lambda_callback
from tests.callbacks.laws import resumes_everywhere, survives_the_store
from tests.sample_loops import counter, full_loop, mean_absolute, raising

STEPS_PER_EPOCH = 3


def saving(path: Any, *others: Any, loop: dict[str, Any] | None = None, **arguments: Any) -> fl.Loop:
    callbacks = [CallbackSetCheckpoint(path, **arguments), counter(), *others]
    return full_loop(**{"epochs": 4, **(loop or {})}, callbacks=callbacks)


def saved(path: Path, make: fl.Loop) -> dict[str, str]:
    """Stage and step of every checkpoint, with its digest."""
    store = fl.CheckpointStore(path)
    contexts = [store.load(make, step) for step in store.steps()]
    return {f"{ctx.stage} {ctx.global_step}": fl.digest(ctx) for ctx in contexts}


@pytest.mark.parametrize(
    ("periods", "places"),
    [
        ({}, ["epoch_end 3", "epoch_end 6", "epoch_end 9", "end 12"]),
        ({"every_epochs": 2}, ["epoch_end 6", "end 12"]),
        ({"every_epochs": 3}, ["epoch_end 9", "end 12"]),
        ({"every_epochs": None}, ["end 12"]),
        ({"every_steps": 4}, ["epoch_end 3", "batch_end 4", "epoch_end 6", "batch_end 8", "epoch_end 9", "end 12"]),
        ({"every_steps": 5, "every_epochs": None}, ["batch_end 5", "batch_end 10", "end 12"]),
        ({"keep_last": 2}, ["epoch_end 9", "end 12"]),
        ({"every_steps": 1, "every_epochs": None, "keep_last": 3}, ["batch_end 10", "batch_end 11", "end 12"]),
    ],
)
def test_places_and_bits_are_those_of_the_loop(tmp_path: Path, periods: dict[str, Any], places: list[str]) -> None:
    loop = saving(tmp_path, **periods)
    digests = {f"{ctx.stage} {ctx.global_step}": fl.digest(ctx) for ctx in fl.iterate(fl.init(loop))}
    found = saved(tmp_path, loop)
    assert list(found) == places
    assert all(found[place] == digests[place] for place in places)


def test_it_sees_what_the_other_callbacks_of_the_stage_left(tmp_path: Path) -> None:
    def late_change(ctx: fl.Context) -> fl.Context:
        return ctx.with_hyperparameters(lr=ctx.optimizer_state["groups"][0]["lr"] / 2)

    schedule = fl.Callback("schedule", weight=1e9, batch_end=late_change, epoch_end=late_change, end=late_change)
    objects = lambda_callback(on_epoch_end=lambda ctx: ctx.optimizer.param_groups[0].update(eps=0.25))
    objects.weight = 1e9
    loop = saving(tmp_path, schedule, objects, every_steps=1)
    for ctx in fl.iterate(fl.init(loop)):
        if ctx.stage in ("batch_end", "epoch_end", "end"):
            assert fl.digest(fl.CheckpointStore(tmp_path).load(loop)) == fl.digest(ctx)


def test_a_run_continues_from_its_checkpoints_bit_for_bit(tmp_path: Path) -> None:
    whole = fl.digest(fl.train(fl.init(saving(tmp_path / "whole"), seed=7)))
    stop = raising("after_backward", RuntimeError("power cut"))
    calls = itertools.count(1)
    every_fifth = fl.Callback(
        "cut", after_backward=lambda ctx: ctx if next(calls) % 5 else stop.hooks["after_backward"](ctx)
    )
    while True:
        loop = saving(tmp_path / "run", every_fifth, every_steps=2, keep_last=1)
        ctx = fl.resume(loop, tmp_path / "run", seed=7, must_exist=False)
        try:
            assert fl.digest(fl.train(ctx)) == whole
            break
        except RuntimeError:
            continue
    assert next(calls) > 3 * STEPS_PER_EPOCH


def test_a_run_can_be_made_longer_whatever_the_periods(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"every_epochs": 3, "keep_last": 1}
    fl.train(fl.init(saving(tmp_path, **arguments)))
    longer = saving(tmp_path, loop={"epochs": 6}, **arguments)
    resumed = fl.resume(longer, tmp_path)
    assert (resumed.stage, resumed.epoch) == ("epoch_end", 4)
    whole = fl.train(fl.init(saving(tmp_path / "whole", loop={"epochs": 6})))
    assert fl.digest(fl.train(resumed)) == fl.digest(whole)


def test_a_run_that_another_callback_ends_is_saved_at_its_end(tmp_path: Path) -> None:
    stop = fl.Callback("stop", epoch_end=lambda ctx: fl.evolve(ctx, terminate=ctx.epoch == 2))
    ctx = fl.train(fl.init(saving(tmp_path, stop, every_epochs=3)))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("step-00000006-end.safetensors", "step-00000006.safetensors")
    ]
    assert fl.digest(fl.resume(ctx.loop, tmp_path)) == fl.digest(ctx)


def test_the_callback_is_no_part_of_the_run(tmp_path: Path) -> None:
    ctx = fl.train(fl.init(saving(tmp_path)))
    plain = full_loop(epochs=4)
    assert fl.digest(ctx) == fl.digest(fl.train(fl.init(plain)))
    assert fl.digest(fl.CheckpointStore(tmp_path).load(plain)) == fl.digest(ctx)


def test_a_run_that_is_trained_again_writes_what_it_wrote_and_a_fork_is_refused(tmp_path: Path) -> None:
    loop = saving(tmp_path, every_steps=1)
    origin = fl.train(fl.init(loop), steps=2)
    end = fl.train(origin)
    fl.train(origin, steps=3)
    assert fl.digest(fl.resume(loop, tmp_path)) == fl.digest(end)
    with pytest.raises(fl.CheckpointError, match="with other bits: this is a branch of that run"):
        fl.train(origin.with_hyperparameters(lr=0.5))
    assert fl.digest(fl.resume(loop, tmp_path)) == fl.digest(end)


def test_the_laws(tmp_path: Path) -> None:
    folders = itertools.count()

    def make() -> fl.Loop:
        return saving(lambda: tmp_path / str(next(folders)), loop={"epochs": 2})

    resumes_everywhere(make)
    survives_the_store(make, tmp_path / "store")


def test_two_runs_in_turns_are_not_mixed_in_one_folder(tmp_path: Path) -> None:
    loop = saving(tmp_path, every_steps=1)
    one, two = (fl.iterate(fl.init(loop, seed)) for seed in (1, 2))
    next(two)
    list(itertools.islice(one, 4))
    with pytest.raises(fl.StateDictError, match="seed: 1 in what was saved, 2 here"):
        list(two)
    one.close()
    assert fl.resume(loop, tmp_path, seed=1).global_step == 2


def test_a_function_is_asked_for_the_path_once_per_run(tmp_path: Path) -> None:
    folders = itertools.count(1)
    callback = CallbackSetCheckpoint(lambda: tmp_path / f"run-{next(folders)}")
    loop = full_loop(callbacks=[callback])
    fl.train(fl.train(fl.init(loop), steps=4))
    assert callback.path == tmp_path / "run-1"
    fl.train(fl.init(loop, seed=1))
    assert callback.path == tmp_path / "run-2"
    assert [fl.CheckpointStore(tmp_path / name).steps() for name in ("run-1", "run-2")] == [[3, 6], [3, 6]]


def test_another_run_in_the_folder_is_refused_before_training(tmp_path: Path) -> None:
    fl.train(fl.init(saving(tmp_path), seed=1))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(fl.StateDictError, match="holds checkpoints of another run") as caught:
        fl.train(fl.init(saving(tmp_path), seed=2))
    assert fl.context_of(caught.value).global_step == 0  # type: ignore[union-attr]
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file"):
        fl.train(fl.init(saving(tmp_path / "file")))


def test_a_failed_save_stops_training_with_the_state_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    start = fl.init(saving(tmp_path, every_steps=1))
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="No space left") as caught:
            fl.train(start)
    ctx = fl.context_of(caught.value)
    assert ctx is not None
    assert fl.digest(fl.train(ctx)) == fl.digest(fl.train(start))


def test_a_train_step_saves_too(tmp_path: Path) -> None:
    loop = saving(tmp_path, every_steps=1)
    begun = next(ctx for ctx in fl.iterate(fl.init(full_loop(epochs=4))) if ctx.stage == "epoch_begin")
    ctx = fl.load_state_dict(fl.init(loop), fl.state_dict(begun))
    batch = next(iter(loop.train.fetch(0, 1, 0, ())))[0]
    assert fl.digest(fl.train_step(ctx, batch)) == fl.digest(fl.CheckpointStore(tmp_path).load(loop))


SCORES = [0.5, 0.2, 0.7, 0.2, math.nan, 0.4]


def scored(path: Path, minimize: bool | None = True, **arguments: Any) -> fl.Loop:
    """A loop of six epochs, whose validation scores are those above."""

    def say(ctx: fl.Context) -> fl.Context:
        return fl.evolve(ctx, last_scores_valid={"error": SCORES[ctx.epoch - 1]})

    measures = [fl.measure("error", mean_absolute, minimize=minimize), fl.measure("other", mean_absolute)]
    callbacks = [fl.Callback("say", valid_end=say), CallbackSetCheckpoint(path, **arguments)]
    return full_loop(epochs=len(SCORES), measures_valid=measures, callbacks=callbacks)


@pytest.mark.parametrize(
    ("minimize", "arguments", "epochs"),
    [
        (True, {"keep_best": "error"}, [2, 6]),
        (True, {"keep_best": ("error", 1)}, [2, 6]),
        (True, {"keep_best": ("error", 2)}, [2, 4, 6]),
        (True, {"keep_best": ("error", 3)}, [2, 4, 6]),
        (True, {"keep_best": ("error", 4)}, [1, 2, 4, 6]),
        (True, {"keep_best": ("error", 99)}, [1, 2, 3, 4, 6]),
        (True, {"keep_best": "error", "keep_last": 3}, [2, 4, 5, 6]),
        (False, {"keep_best": "error"}, [3, 6]),
        (False, {"keep_best": ("error", 2), "keep_last": 2}, [1, 3, 5, 6]),
    ],
)
def test_the_best_checkpoints_are_kept_beside_the_newest(
    tmp_path: Path, minimize: bool, arguments: dict[str, Any], epochs: list[int]
) -> None:
    loop = scored(tmp_path, minimize, **arguments)
    fl.train(fl.init(loop))
    store = fl.CheckpointStore(tmp_path)
    assert store.steps() == [STEPS_PER_EPOCH * epoch for epoch in epochs]
    best = store.load(loop, store.best("error"))
    assert best.last_scores_valid == {"error": 0.2 if minimize else 0.7}
    assert best.stage == "epoch_end"


def test_the_best_checkpoint_stays_the_best_over_restarts(tmp_path: Path) -> None:
    make = lambda: scored(tmp_path, keep_best="error", every_steps=2)  # noqa: E731
    ctx = fl.resume(make(), tmp_path, must_exist=False)
    while ctx.stage != "end":
        fl.train(ctx, steps=2)
        ctx = fl.resume(make(), tmp_path, must_exist=False)
        if ctx.epoch >= 3:
            assert 2 * STEPS_PER_EPOCH in fl.CheckpointStore(tmp_path).steps()
    assert fl.CheckpointStore(tmp_path).steps() == [2 * STEPS_PER_EPOCH, 6 * STEPS_PER_EPOCH]


def test_a_checkpoint_in_mid_epoch_does_not_have_the_score_of_the_epoch_before(tmp_path: Path) -> None:
    fl.train(fl.init(scored(tmp_path, keep_best=("error", 2), every_steps=1, keep_last=5)))
    assert fl.CheckpointStore(tmp_path).steps() == [6, 12, 14, 15, 16, 17, 18]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_best": "eror"}, "no validation measure 'eror'; did you mean 'error'"),
        ({"keep_best": "other"}, "nothing says whether a low or a high 'other' is better"),
    ],
)
def test_a_measure_that_does_not_tell_the_best_is_refused_before_training(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        fl.train(fl.init(scored(tmp_path, **changes)))
    assert fl.context_of(caught.value).global_step == 0  # type: ignore[union-attr]


def test_keep_best_needs_validation_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep_best='error' needs validation data"):
        fl.train(fl.init(fl.evolve(scored(tmp_path, keep_best="error"), valid=None, measures_valid=[])))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("every_steps", value) for value in (0, -1, 1.5, True)),
        *(("every_epochs", value) for value in (0, "1")),
        *(("keep_last", value) for value in (0, True, 2.0)),
        *(("keep_best", value) for value in (3, ("error", 0), ("error", True), ("error",), (3, "error"), ["error", 3])),
    ],
)
def test_bad_arguments_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be .*not {re.escape(repr(value))}"):
        CallbackSetCheckpoint("runs", **{name: value})


@pytest.mark.parametrize("path", [3, None])
def test_bad_paths_are_refused(path: Any) -> None:
    with pytest.raises(TypeError, match="checkpoint: path is a string or a Path"):
        CallbackSetCheckpoint(path)
