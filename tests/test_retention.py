"""Retention: which checkpoints a store keeps."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import functional_loop as fl
from functional_loop.checkpoint.retention import Retention, best_steps
from tests.sample_loops import full_loop

Metadata = dict[str, Any]


def metadata(step: int, score: float | None, stage: str = "epoch_end", minimize: bool | None = True) -> Metadata:
    scores = {} if score is None else {"loss": score}
    return {"global_step": step, "stage": stage, "last_scores_valid": scores, "minimize": {"loss": minimize}}


scores = st.one_of(st.none(), st.just(math.nan), st.integers(0, 3).map(float), st.just(math.inf))
checkpoints = st.lists(
    st.builds(metadata, st.integers(0, 20), scores, st.sampled_from(["epoch_end", "batch_end", "end", "valid_end"])),
    max_size=12,
    unique_by=lambda m: m["global_step"],
)
counts = st.integers(1, 4)


@given(st.sets(st.integers(0, 60)), st.integers(1, 30), st.one_of(st.none(), counts))
def test_one_checkpoint_every_so_many_steps_is_kept_for_good(
    steps: set[int], every: int, keep_last: int | None
) -> None:
    """Whether the others are deleted on the way or at the end."""
    retention = Retention(keep_last, every=every)
    whole = retention.kept(metadata(step, None) for step in steps)
    firsts = {min(found) for n in range(every, 61, every) if (found := {s for s in steps if n <= s < n + every})}
    assert whole == {*sorted(steps)[-(keep_last or 1) :], *firsts}
    there: set[int] = set()
    for step in sorted(steps):
        there = retention.kept(metadata(s, None) for s in {*there, step})
        assert step in there
    assert there == whole


def test_a_store_keeps_milestones(tmp_path: Path) -> None:
    store = fl.CheckpointStore(tmp_path, keep_last=2, keep_best="error", every=5)
    for ctx in fl.iterate(fl.init(full_loop(epochs=8))):
        if ctx.stage in ("begin", "epoch_end", "end"):
            store.save(ctx)
    assert {6, 12, 15, 21, 24} <= set(store.steps()) <= {store.best(), 6, 12, 15, 21, 24}
    assert store.latest() == 24
    assert store.best() == store.best("error")
    assert "every=5" in repr(store)
    assert repr(copy.deepcopy(store)) == repr(pickle.loads(pickle.dumps(store))) == repr(store)


def test_without_keep_best_a_measure_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="by which measure"):
        fl.CheckpointStore(tmp_path).best()
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        fl.CheckpointStore(tmp_path).latest()


@pytest.mark.parametrize("every", [0, -3, 1.5, True, "2"])
def test_every_is_a_positive_integer(tmp_path: Path, every: Any) -> None:
    with pytest.raises(ValueError, match="every must be an integer of at least 1"):
        fl.CheckpointStore(tmp_path, every=every)


@given(checkpoints, st.one_of(st.none(), counts), st.one_of(st.none(), st.tuples(st.just("loss"), counts)))
def test_what_is_kept(found: list[Metadata], keep_last: int | None, keep_best: tuple[str, int] | None) -> None:
    kept = Retention(keep_last, keep_best).kept(found)
    steps = sorted(m["global_step"] for m in found)
    assert kept <= set(steps)
    assert set(steps[-1:]) <= kept
    if keep_last is not None:
        assert set(steps[-keep_last:]) <= kept
    if keep_best is None:
        assert len(kept) == len(steps if keep_last is None else steps[-keep_last:])
    else:
        best = best_steps(found, "loss")[: keep_best[1]]
        assert set(best) <= kept
        assert len(kept) <= (keep_last or 1) + keep_best[1]


@given(checkpoints)
def test_the_best_come_first_and_the_earlier_of_equal_ones(found: list[Metadata]) -> None:
    by_step = {m["global_step"]: m for m in found}
    ranked = [(by_step[step]["last_scores_valid"]["loss"], step) for step in best_steps(found, "loss")]
    assert ranked == sorted(ranked)
    upside_down = [metadata(m["global_step"], -s, m["stage"], False) for m in found for s in scores_of(m)]
    assert best_steps(upside_down, "loss") == [step for _, step in ranked]
    scored = [m for m in found if m["stage"] != "batch_end" and m["stage"] != "end"]
    assert len(ranked) == sum(not math.isnan(score) for m in scored for score in scores_of(m))


def scores_of(m: Metadata) -> list[float]:
    return list(m["last_scores_valid"].values())


def test_without_a_direction_or_a_score_nothing_is_best() -> None:
    assert best_steps([metadata(1, 0.5, minimize=None)], "loss") == []
    assert best_steps([metadata(1, 0.5)], "accuracy") == []
    # What was saved before scores were part of the metadata.
    assert best_steps([{"global_step": 1, "stage": "epoch_end"}], "loss") == []


def test_the_newest_alone_is_kept_with_the_best() -> None:
    found = [metadata(step, score) for step, score in ((1, 0.5), (2, 0.1), (3, 0.4), (4, 0.3))]
    assert Retention(keep_best="loss").kept(found) == {2, 4}  # type: ignore[arg-type]
    assert Retention(keep_best=("loss", 2)).kept(found) == {2, 4}
    assert Retention(keep_last=2, keep_best=("loss", 3)).kept(found) == {2, 3, 4}


def test_a_store_deletes_no_best_checkpoint_and_nothing_before_the_new_one_is_there(tmp_path: Path) -> None:
    loop = full_loop(epochs=5)
    errors: dict[int, float] = {}
    store = fl.CheckpointStore(tmp_path, keep_best="error")
    for ctx in fl.iterate(fl.init(loop)):
        store.save(ctx)
        if ctx.stage == "valid_end":
            errors[ctx.global_step] = ctx.last_scores_valid["error"]  # type: ignore[call-overload]
        best = [min(errors, key=lambda step: errors[step])] if errors else []
        assert store.steps() == sorted({*best, ctx.global_step})
        if best:
            assert store.best("error") == best[0]
            assert fl.CheckpointStore(tmp_path).load(loop, best[0]).global_step == best[0]


def test_a_store_without_scores_has_no_best_checkpoint(tmp_path: Path) -> None:
    store = fl.CheckpointStore(tmp_path)
    with pytest.raises(FileNotFoundError, match="has a validation score 'error'"):
        store.best("error")
    store.save(fl.train(fl.init(full_loop()), steps=2))
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        store.best("error")


def test_a_damaged_checkpoint_is_not_the_best(tmp_path: Path) -> None:
    store = fl.CheckpointStore(tmp_path)
    for ctx in fl.iterate(fl.init(full_loop(epochs=3))):
        if ctx.stage == "epoch_end":
            store.save(ctx)
    best = store.best("error")
    (tmp_path / f"step-{best:08}.safetensors").write_bytes(b"damaged")
    assert store.best("error") != best


def test_a_store_checks_a_run_before_it_is_trained(tmp_path: Path) -> None:
    fl.CheckpointStore(tmp_path).save(fl.init(full_loop(), seed=1))
    fl.CheckpointStore(tmp_path, keep_best="error").check(fl.init(full_loop(), seed=1))
    with pytest.raises(fl.StateDictError, match="another run"):
        fl.CheckpointStore(tmp_path).check(fl.init(full_loop(), seed=2))
    with pytest.raises(ValueError, match="no validation measure 'eror'; did you mean 'error'"):
        fl.CheckpointStore(tmp_path, keep_best="eror").check(fl.init(full_loop(), seed=1))


def test_a_save_that_can_not_tell_the_best_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep_best='error' needs validation data"):
        fl.CheckpointStore(tmp_path / "run", keep_best="error").save(fl.init(full_loop(valid=None)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("keep_best", [3, ("error", 0), ("error", True), ("error",), (3, "error"), ["error", 3]])
def test_bad_values_are_refused(tmp_path: Path, keep_best: Any) -> None:
    with pytest.raises(ValueError, match="keep_best must be the id of a validation measure"):
        fl.CheckpointStore(tmp_path, keep_best=keep_best)
