"""Files of earlier versions: they load, continue, and are of the run that they were of."""

from __future__ import annotations

import copy
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

import functional_loop as fl
from functional_loop.checkpoint import file as checkpoint_file
from functional_loop.checkpoint import migrations
from functional_loop.checkpoint.header import NewerFormatError
from functional_loop.checkpoint.migrations import MIGRATIONS, Migration, migrate
from tests import released
from tests.sample_loops import full_loop, middle

RELEASED = {1: "9310534e1bd58f1c1120d656a27e4332a26ac62352b722276e31aa25c47929ab"}
"""By the version of the state dict: the digest of the file in ``tests/data``."""
SCORE = 1.1569710969924927
"""The validation score of the network in them."""


@pytest.mark.filterwarnings("ignore:bits may differ")
@pytest.mark.parametrize("version", RELEASED)
def test_a_file_of_a_released_version_loads_and_continues(version: int, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(released.FOLDER / f"version-{version}", folder)
    ctx = fl.resume(released.loop(), folder, seed=2**70)
    assert fl.digest(ctx) == RELEASED[version]
    assert (ctx.epoch, ctx.step, ctx.stage) == (2, 3, "batch_end")
    assert ctx.callbacks["counter"]["batches"] == 8
    assert ctx.callbacks["counter"]["none"] == ()
    # Without dropout, whose numbers and rounding are the processor's.
    assert fl.validate(ctx)["error"] == pytest.approx(SCORE, rel=1e-5)
    store = fl.CheckpointStore(folder, keep_last=1)
    end = fl.train(ctx)
    store.save(end)
    assert store.steps() == [15]
    assert all(math.isfinite(score) for score in end.last_scores_valid.values())


def test_every_version_up_to_this_one_has_a_file() -> None:
    assert set(RELEASED) >= set(range(1, migrations.VERSION))  # and this one's, once it is released
    assert set(MIGRATIONS) == set(range(1, migrations.VERSION))


def older(sd: dict[str, Any]) -> dict[str, Any]:
    """A state dict as two versions ago might have made it: it knew less, and used other names."""
    sd = copy.deepcopy(sd)
    sd["version"] = -1
    callbacks = sd["fingerprint"]["callbacks"]
    sd["fingerprint"]["callbacks"] = {id: entry["kind"] for id, entry in callbacks.items()}
    sd["parameters"] = sd.pop("network")
    sd["fingerprint"]["window"] = sd["fingerprint"].pop("accumulate")
    del sd["terminate"], sd["environment"]
    return sd


def rename(sd: dict[str, Any]) -> dict[str, Any]:
    return {**{k: v for k, v in sd.items() if k != "parameters"}, "network": sd["parameters"]}


def fill_in(sd: dict[str, Any]) -> dict[str, Any]:
    return {**sd, "terminate": False, "environment": {}}


def rename_window(fingerprint: dict[str, Any]) -> dict[str, Any]:
    return {**{k: v for k, v in fingerprint.items() if k != "window"}, "accumulate": fingerprint["window"]}


@pytest.fixture
def two_migrations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MIGRATIONS, -1, Migration(state=rename))
    monkeypatch.setitem(MIGRATIONS, 0, Migration(state=fill_in, fingerprint=rename_window))


@pytest.mark.filterwarnings("ignore:bits may differ")
def test_migrations_are_applied_in_their_order_to_a_copy(two_migrations: None) -> None:
    ctx = middle()
    sd = older(fl.state_dict(ctx))
    before = copy.deepcopy(sd)
    loaded = fl.load_state_dict(fl.init(full_loop()), sd)
    assert fl.digest(loaded) == fl.digest(ctx)
    assert fl.tree_equal(sd, before)


def test_a_state_dict_of_this_version_is_not_migrated(two_migrations: None) -> None:
    sd = fl.state_dict(middle())
    assert migrate(sd) is sd


@pytest.mark.filterwarnings("ignore:bits may differ")
def test_a_run_goes_on_in_the_folder_of_an_earlier_version(two_migrations: None, tmp_path: Path) -> None:
    ctx = middle()
    store = fl.CheckpointStore(tmp_path, keep_last=2)
    path = store.save(ctx)
    state, metadata = checkpoint_file.read(path)
    state = older(state)
    checkpoint_file.write(path, state, {**metadata, "version": -1, "fingerprint": state["fingerprint"]})
    resumed = fl.resume(full_loop(), tmp_path, seed=3)
    assert fl.digest(resumed) == fl.digest(ctx)
    store = fl.CheckpointStore(tmp_path, keep_last=2)
    store.save(resumed)  # in place of the older file
    store.save(fl.train(resumed, steps=1))
    store.save(fl.train(resumed, steps=2))
    assert store.steps() == [5, 6]


def test_a_run_of_an_earlier_version_is_still_told_from_others(two_migrations: None) -> None:
    with pytest.raises(fl.StateDictError, match="accumulate: 2 in what was saved, 3 here"):
        fl.load_state_dict(fl.init(full_loop(accumulate=3)), older(fl.state_dict(middle())))


def test_a_gap_in_the_migrations_is_said() -> None:
    with pytest.raises(fl.StateDictError, match=r"no migration leads from version -1.*\n.*version: -1 in"):
        fl.load_state_dict(fl.init(full_loop()), older(fl.state_dict(middle())))


def test_a_newer_state_dict_is_refused(tmp_path: Path) -> None:
    ctx = middle()
    sd = {**fl.state_dict(ctx), "version": 99, "new": 1}
    with pytest.raises(fl.StateDictError, match=r"newer functional_loop; install that one:\n.*version: 99 in"):
        fl.load_state_dict(fl.init(full_loop()), sd)
    path = fl.CheckpointStore(tmp_path).save(ctx)
    state, metadata = checkpoint_file.read(path)
    checkpoint_file.write(path, {**state, "version": 99, "new": 1}, {**metadata, "version": 99})
    content = path.read_bytes()
    for use in (
        lambda: fl.resume(full_loop(), tmp_path, seed=3),
        lambda: fl.CheckpointStore(tmp_path).load(full_loop()),
        lambda: fl.CheckpointStore(tmp_path).save(ctx),
    ):
        with pytest.raises(NewerFormatError, match="newer functional_loop"):
            use()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == content
