"""The identity of a run: what decides its result is an error, what may change its bits a warning, and both can be
allowed."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import functional_loop as fl
from functional_loop.checkpoint.comparing import compare
from functional_loop.checkpoint.identity import identity
from tests.sample_loops import counter, data, full_loop, mean_absolute, middle

X, Y = data(3)
ADAMW = torch.optim.AdamW


def at(place: Callable[[fl.Context], bool]) -> fl.Context:
    start = fl.init(full_loop(), seed=3)
    return next(ctx for ctx in (start, *fl.iterate(start)) if place(ctx))


def load(changes: dict[str, Any], sd: Any = None, **options: Any) -> fl.Context:
    return fl.load_state_dict(fl.init(full_loop(**changes)), sd or fl.state_dict(middle()), **options)


FLAGS = {
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
}


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_that_changes_the_arithmetic_is_refused(name: str) -> None:
    other = fl.optimizer(ADAMW, lr=0.01, **FLAGS[name])
    with pytest.raises(fl.StateDictError, match=f"optimizer/groups/0/flags/{name}: False in what was saved, True here"):
        load({"optimizer": other})
    with pytest.raises(fl.StateDictError, match=name):
        load({"optimizer": other}, allow=["optimizer", "optimizer/*", "*"])


ALLOWED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "batch size": ({"train": fl.batches(X, Y, batch_size=2, shuffle=True)}, ["train/batch_size"]),
    "rows": ({"train": fl.batches(X[:8], Y[:8], batch_size=4, shuffle=True)}, ["train/length"]),
    "order": ({"train": fl.batches(X, Y, batch_size=4)}, ["train/shuffle"]),
    "kind of data": ({"train": fl.batches([(X, Y)] * 5)}, ["train"]),
    "no validation": ({"valid": None, "measures_valid": []}, ["valid", "measures_valid"]),
    "validation data": ({"valid": fl.batches(X, Y, batch_size=2)}, ["valid/batch_size", "valid/rows"]),
    "training measures": ({"measures_train": []}, ["measures_train"]),
    "validation measures": (
        {"measures_valid": [fl.measure("worst", mean_absolute, minimize=True)]},
        ["measures_valid/*"],
    ),
    "callbacks": ({"callbacks": [counter("other")]}, ["callbacks/counter", "callbacks/other"]),
    "kind of a callback": (
        {"callbacks": [fl.Callback("counter", init=lambda ctx: 0, kind="Other")]},
        ["callbacks/counter"],
    ),
    "accumulate": ({"accumulate": 1}, ["accumulate"]),
    "autocast": ({"autocast": torch.bfloat16}, ["autocast"]),
}
PLACES: list[Callable[[fl.Context], bool]] = [
    lambda ctx: ctx.stage == "",
    lambda ctx: ctx.global_step == 4,
    lambda ctx: ctx.step_valid == 1,
    lambda ctx: ctx.stage == "epoch_end",
]


@pytest.mark.filterwarnings("ignore:resuming in mid-epoch reads")
@pytest.mark.parametrize("what", ALLOWED)
def test_a_difference_that_is_allowed_is_no_obstacle_at_any_place(what: str) -> None:
    changes, allow = ALLOWED[what]
    for place in PLACES:
        sd = fl.state_dict(at(place))
        with pytest.raises(fl.StateDictError) as caught:
            load(changes, sd)
        assert any(path.split("/")[0] in note for note in caught.value.__notes__ for path in allow)
        assert fl.train(load(changes, sd, allow=allow)).stage == "end"


def test_what_the_error_says_to_allow_is_enough() -> None:
    changes = ALLOWED["batch size"][0] | ALLOWED["accumulate"][0] | ALLOWED["training measures"][0]
    with pytest.raises(fl.StateDictError) as caught:
        load(changes)
    (note,) = caught.value.__notes__
    assert note == "to continue in spite of that: allow=['train/batch_size', 'measures_train', 'accumulate']"
    loaded = load(changes, allow=["train/batch_size", "measures_train", "accumulate"])
    assert fl.digest(fl.evolve(loaded, measures=middle().measures)) == fl.digest(middle())


def test_other_differences_are_listed_still() -> None:
    with pytest.raises(fl.StateDictError) as caught:
        load(ALLOWED["batch size"][0] | {"accumulate": 1}, allow=["batch_size"])
    assert caught.value.differences == ("accumulate: 2 in what was saved, 1 here",)


def test_networks_can_not_be_allowed() -> None:
    from torch import nn

    wide = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 2))
    with pytest.raises(fl.StateDictError, match=r"network/0.weight") as caught:
        load({"network": wide}, allow=["*"])
    assert not hasattr(caught.value, "__notes__")


def test_scores_of_an_epoch_that_changed_its_measures_are_left_out() -> None:
    measures = [fl.measure("other", mean_absolute)]
    loaded = load({"measures_train": measures}, allow=["measures_train"])
    ends = [ctx for ctx in fl.iterate(loaded) if ctx.stage == "epoch_end"]
    assert ends[0].last_scores_train == ()
    longer = load({"measures_train": measures, "epochs": 3}, allow=["measures_train"])
    assert set(fl.train(longer).last_scores_train) == {"other"}


def test_validation_begins_again_with_other_measures() -> None:
    ctx = at(PLACES[2])
    loaded = load(ALLOWED["validation measures"][0], fl.state_dict(ctx), allow=["measures_valid"])
    assert (loaded.stage, loaded.step_valid) == ("before_valid", 0)
    after = next(c for c in fl.iterate(loaded) if c.stage == "valid_end")
    usual = next(c for c in fl.iterate(ctx) if c.stage == "valid_end")
    assert after.last_scores_valid["worst"] == usual.last_scores_valid["error"]


ENVIRONMENT = {
    "torch": "1.0.0",
    "functional_loop": "0.0.1",
    "numpy": "1.0.0",
    "threads": 77,
    "cpu": "sparc64 DEFAULT",
    "device": "cuda (Some GPU)",
    "deterministic": True,
    "matmul_precision": "bf16",
    "mkldnn": False,
    "compile": "elsewhere",
}


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_what_may_change_bits_is_a_warning_with_both_values(name: str) -> None:
    ctx = middle()
    sd = fl.state_dict(ctx)
    here = sd["environment"][name]
    sd["environment"] = {**sd["environment"], name: ENVIRONMENT[name]}
    with pytest.warns(UserWarning, match="bits may differ") as caught:
        loaded = load({}, sd)
    assert f"{name}: {ENVIRONMENT[name]!r} in what was saved, {here!r} here" in str(caught[0].message)
    assert f"allow=['{name}']" in str(caught[0].message)
    assert fl.digest(loaded) == fl.digest(load({}, sd, allow=[name])) == fl.digest(ctx)


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_the_environment_is_that_of_the_moment(two_threads: None) -> None:
    before = fl.state_dict(fl.init(full_loop()))
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("medium")
    try:
        after = fl.state_dict(fl.init(full_loop()))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")
    found = {line.path for line in compare(before["environment"], after["environment"])}
    assert found >= {"threads", "deterministic"}
    assert found <= {"threads", "deterministic", "matmul_precision"}
    assert before["fingerprint"] == after["fingerprint"]


def test_kernels_of_the_same_arithmetic_are_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"kernels/0/fused: None in what was saved, True here"):
        load({"optimizer": fl.optimizer(ADAMW, lr=0.01, fused=True)})


def test_the_environment_and_the_given_hyperparameters_are_not_in_the_digest(two_threads: None) -> None:
    ctx = fl.init(full_loop(), seed=3)
    digest = fl.digest(ctx)
    torch.set_num_threads(1)
    assert fl.digest(ctx) == digest
    with pytest.warns(UserWarning, match="other hyperparameters"):
        loaded = load({"optimizer": fl.optimizer(ADAMW, lr=0.5)}, fl.state_dict(ctx))
    assert fl.digest(loaded) == digest


def test_the_identity_is_the_same_in_a_fresh_process() -> None:
    program = (
        "import json, torch; torch.set_num_threads(1)\n"
        "from functional_loop.checkpoint.identity import identity\n"
        "from tests.sample_loops import full_loop; print(json.dumps(identity(full_loop())))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == identity(full_loop())


def test_hyperparameters_that_were_saved_stay_in_force_and_a_warning_says_so() -> None:
    other = {"optimizer": fl.optimizer(ADAMW, lr=0.5)}
    with pytest.warns(UserWarning, match="stay in force: hyperparameters/0/lr: 0.01 in what was saved, 0.5 here"):
        loaded = load(other)
    assert loaded.optimizer_state["groups"][0]["lr"] == 0.01
    assert fl.digest(loaded) == fl.digest(middle())


@pytest.mark.parametrize("allow", [["lr"], "lr", ["hyperparameters"], ["hyperparameters/*/lr"]])
def test_hyperparameters_that_are_allowed_take_effect(allow: Any) -> None:
    sd = fl.state_dict(middle().with_hyperparameters(lr=0.001, weight_decay=0.3))
    loaded = load({"optimizer": fl.optimizer(ADAMW, lr=0.5)}, sd, allow=allow)
    (group,) = loaded.optimizer_state["groups"]
    assert group["lr"] == 0.5
    assert group["weight_decay"] == 0.3  # changed while training, and given as before


def test_a_part_of_several_hyperparameters_is_allowed() -> None:
    other = {"optimizer": fl.optimizer(ADAMW, lr=0.5, betas=(0.5, 0.6))}
    with pytest.warns(UserWarning, match="hyperparameters/0/lr") as caught:
        loaded = load(other, allow=["betas"])
    assert "betas" not in str(caught[0].message)
    assert loaded.optimizer_state["groups"][0]["betas"] == [0.5, 0.6]
    assert loaded.optimizer_state["groups"][0]["lr"] == 0.01


def test_a_changed_schedule_is_not_a_changed_hyperparameter() -> None:
    load({}, fl.state_dict(middle().with_hyperparameters(lr=0.001)))


def test_the_content_of_weights_counts() -> None:
    first, second = torch.ones(10), torch.ones(10).index_fill(0, torch.tensor([3]), 2.0)
    sd = fl.state_dict(fl.init(full_loop(train=fl.batches(X, Y, batch_size=4, weights=first))))
    load({"train": fl.batches(X, Y, batch_size=4, weights=first.tolist())}, sd)
    with pytest.raises(fl.StateDictError, match="train/weights"):
        load({"train": fl.batches(X, Y, batch_size=4, weights=second)}, sd)


def test_an_error_with_differences_can_be_pickled() -> None:
    with pytest.raises(fl.StateDictError) as caught:
        load({"accumulate": 1})
    assert pickle.loads(pickle.dumps(caught.value)).differences == caught.value.differences


def saved(path: Path) -> fl.Context:
    ctx = middle()
    fl.CheckpointStore(path).save(ctx)
    return ctx


def smaller() -> fl.Loop:
    return full_loop(**ALLOWED["batch size"][0])


def test_a_run_goes_on_in_its_folder_with_what_was_allowed(tmp_path: Path) -> None:
    saved(tmp_path)
    allow = ["train/batch_size"]
    with pytest.raises(fl.StateDictError, match="train/batch_size"):
        fl.resume(smaller(), tmp_path, seed=3)
    ctx = fl.train(fl.resume(smaller(), tmp_path, seed=3, allow=allow), steps=1)
    with pytest.raises(
        fl.StateDictError, match=r"another run.*\n.*train/batch_size: 4 in what was saved, 2 here"
    ) as caught:
        fl.CheckpointStore(tmp_path).save(ctx)
    assert f"to continue in spite of that: allow={allow}" in caught.value.__notes__
    with pytest.raises(fl.StateDictError):
        fl.CheckpointStore(tmp_path).check(ctx)
    store = fl.CheckpointStore(tmp_path, allow=allow)
    store.check(ctx)
    store.save(ctx)
    again = fl.resume(smaller(), tmp_path, seed=3)  # now the newest file is of this loop
    assert fl.digest(again) == fl.digest(ctx)
    fl.CheckpointStore(tmp_path).save(fl.train(again, steps=1))
    assert fl.CheckpointStore(tmp_path).steps() == [4, 5, 6]


def test_the_file_of_the_same_step_is_replaced_where_that_is_allowed(tmp_path: Path) -> None:
    loop = full_loop(measures_train=[])
    ctx = saved(tmp_path)
    store = fl.CheckpointStore(tmp_path, allow=["measures_train"])
    changed = store.load(loop)
    store.save(changed)
    assert fl.digest(fl.resume(loop, tmp_path, seed=3)) == fl.digest(changed) != fl.digest(ctx)


def test_files_from_before_the_change_are_deleted_where_that_is_allowed(tmp_path: Path) -> None:
    saved(tmp_path)
    ctx = fl.resume(smaller(), tmp_path, seed=3, allow="batch_size")
    store = fl.CheckpointStore(tmp_path, keep_last=1, allow="batch_size")
    store.save(fl.train(ctx, steps=1))
    assert store.steps() == [5]


def test_a_store_without_permission_keeps_files_from_before_the_change(tmp_path: Path) -> None:
    saved(tmp_path)
    ctx = fl.train(fl.resume(smaller(), tmp_path, seed=3, allow="batch_size"), steps=1)
    fl.CheckpointStore(tmp_path, allow="batch_size").save(ctx)
    fl.CheckpointStore(tmp_path, keep_last=1).save(fl.train(ctx, steps=1))
    assert fl.CheckpointStore(tmp_path).steps() == [4, 6]


def test_the_checkpoint_callback_saves_what_was_allowed(tmp_path: Path) -> None:
    from functional_loop.callbacks import checkpoint

    saved(tmp_path)
    ctx = fl.resume(smaller(), tmp_path, seed=3, allow="batch_size")

    def train(**options: Any) -> fl.Context:
        saving = fl.evolve(ctx.loop, callbacks=[counter(), checkpoint(tmp_path, **options)])
        return fl.train(fl.resume(saving, tmp_path, seed=3, allow="batch_size"))

    with pytest.raises(fl.StateDictError, match="train/batch_size"):
        train()
    assert fl.digest(fl.resume(smaller(), tmp_path, seed=3, allow="batch_size")) == fl.digest(ctx)
    end = train(allow="batch_size")
    assert fl.digest(fl.resume(smaller(), tmp_path, seed=3)) == fl.digest(end)


def test_the_saved_seed_counts_where_another_is_allowed(tmp_path: Path) -> None:
    ctx = saved(tmp_path)
    with pytest.raises(fl.StateDictError, match="seed: 3 in what was saved, 0 here"):
        fl.resume(full_loop(), tmp_path)
    assert fl.digest(fl.resume(full_loop(), tmp_path, allow=["seed"])) == fl.digest(ctx)
    with pytest.raises(fl.StateDictError, match="seed"):
        fl.CheckpointStore(tmp_path, allow=["*"]).save(fl.init(full_loop(), seed=4))


def test_loading_from_a_store_can_be_allowed_for_once(tmp_path: Path) -> None:
    saved(tmp_path)
    store = fl.CheckpointStore(tmp_path)
    assert store.load(smaller(), allow=["train"]).global_step == 4
    with pytest.raises(fl.StateDictError, match="train/batch_size"):
        store.load(smaller())


def test_another_environment_in_a_file_is_a_warning_and_no_other_run(tmp_path: Path, two_threads: None) -> None:
    ctx = saved(tmp_path)
    torch.set_num_threads(1)
    with pytest.warns(UserWarning, match="threads: 2 in what was saved, 1 here"):
        loaded = fl.resume(full_loop(), tmp_path, seed=3)
    assert fl.digest(loaded) == fl.digest(ctx)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fl.resume(full_loop(), tmp_path, seed=3, allow=["threads"])
        fl.CheckpointStore(tmp_path).save(loaded)
        fl.resume(full_loop(), tmp_path, seed=3)


@pytest.mark.parametrize(("before", "after"), [((), ("counter",)), (("counter",), ())])
def test_callbacks_come_and_go_in_a_store_if_it_is_not_strict(
    before: tuple[str, ...], after: tuple[str, ...], tmp_path: Path
) -> None:
    def loop(ids: tuple[str, ...]) -> fl.Loop:
        return full_loop(callbacks=[counter(id) for id in ids])

    with fl.CheckpointStore(tmp_path) as store:
        store.save(fl.train(fl.init(loop(before)), steps=3))
    for load in (partial(fl.resume, path=tmp_path), store.load):
        with pytest.raises(fl.StateDictError, match="strict=False lets callbacks come and go"):
            load(loop(after))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the saved state of callback 'counter' is dropped")
            ctx = load(loop(after), strict=False)
        assert (ctx.global_step, tuple(ctx.callbacks)) == (3, after)
        with pytest.raises(fl.StateDictError):
            load(full_loop(callbacks=[], accumulate=1), strict=False)
    with fl.CheckpointStore(tmp_path, allow="callbacks") as store:
        store.save(fl.train(ctx, steps=1))
    assert store.steps() == [3, 4]
