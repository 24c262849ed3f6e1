"""Which run a folder holds, and which may go on in it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import functional_loop as fl
from functional_loop.callbacks import checkpoint, early_stopping, t_clbk
from tests.sample_loops import counter, full_loop, make_loop

STEPS = 3  # in an epoch


def trained(path: Path, steps: int | None = None, **changes: Any) -> fl.Context:
    ctx = fl.init(make_loop(callbacks=[checkpoint(path, every_steps=1), *changes.pop("callbacks", [])], **changes))
    return fl.train(ctx, steps)


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.glob("*.safetensors")}


def never(ctx: fl.Context) -> fl.Context:
    raise AssertionError("trained")


OTHERS: dict[str, dict[str, Any]] = {
    "dropout": {"network": lambda: nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.9))},
    "loss": {"loss": nn.functional.l1_loss},
    "data": {"train": fl.batches(torch.zeros(10, 3), torch.zeros(10, 2), batch_size=4)},
    "rate": {"optimizer": fl.optimizer(torch.optim.SGD, lr=0.77)},
    "start": {"network": lambda: _filled(0.5)},
    "seed": {},
}


def _filled(value: float) -> nn.Module:
    network = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.1))
    nn.init.constant_(network[0].weight, value)  # type: ignore[arg-type]
    return network


@pytest.mark.parametrize("what", OTHERS)
def test_a_run_that_starts_where_another_has_been_is_refused_before_its_first_epoch(what: str, tmp_path: Path) -> None:
    base = {"network": lambda: _filled(0.1), "optimizer": fl.optimizer(torch.optim.SGD, lr=0.1)}
    trained(tmp_path, steps=4, **base)
    before = files(tmp_path)
    loop = make_loop(
        callbacks=[checkpoint(tmp_path, every_steps=1), fl.Callback("never", epoch_begin=never, replays=False)],
        **{**base, **OTHERS[what]},
    )
    with pytest.raises(fl.StateDictError, match="of another run"):
        fl.train(fl.init(loop, seed=int(what == "seed")))
    assert files(tmp_path) == before


def test_the_very_same_run_may_start_again(tmp_path: Path) -> None:
    trained(tmp_path, steps=4)
    before = files(tmp_path)
    trained(tmp_path, steps=2)
    assert files(tmp_path) == before
    end = trained(tmp_path)
    assert fl.digest(fl.resume(make_loop(), tmp_path)) == fl.digest(end)


def test_a_boundary_is_replaced_by_equal_bits_alone(tmp_path: Path) -> None:
    ctx = fl.train(fl.init(make_loop()), steps=4)
    with fl.CheckpointStore(tmp_path) as store:
        store.save(ctx)
        before = files(tmp_path)
        store.save(fl.train(fl.init(make_loop()), steps=4))
        with pytest.raises(fl.CheckpointError, match="with other bits"):
            store.save(ctx.with_hyperparameters(lr=0.77))
        assert files(tmp_path) == before


def test_an_older_step_is_trained_on_in_the_same_store(tmp_path: Path) -> None:
    end = trained(tmp_path)
    with fl.CheckpointStore(tmp_path) as store:
        for ctx in fl.iterate(store.load(make_loop(), step=2)):
            store.save(ctx)
    assert fl.digest(fl.resume(make_loop(), tmp_path)) == fl.digest(end)


def test_a_run_that_went_back_saves_what_it_does_instead(tmp_path: Path) -> None:
    poison = torch.ones(10, 3).index_fill(0, torch.tensor([9]), float("nan"))
    saving = [t_clbk("rollback"), checkpoint(tmp_path, every_steps=1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loop = make_loop(train=fl.batches(poison, torch.ones(10, 2), batch_size=4), callbacks=saving)
        end = fl.train(fl.init(loop))
        assert fl.digest(fl.resume(loop, tmp_path)) == fl.digest(end)


def test_a_new_run_says_so_or_is_refused(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    for path, why in ((absent, "which does not exist"), (tmp_path, "")):
        with pytest.warns(UserWarning, match=f"no checkpoint in {path}.*{why}.*a new run starts"):
            fl.resume(make_loop(), path)
        with pytest.raises(FileNotFoundError, match=f"no checkpoint to continue from in {path}.*{why}"):
            fl.resume(make_loop(), path, must_exist=True)
        assert fl.resume(make_loop(), path, must_exist=False).stage == ""
    assert not absent.exists()
    fl.CheckpointStore(tmp_path).save(fl.train(fl.init(make_loop()), steps=1))
    assert fl.resume(make_loop(), tmp_path, must_exist=True).global_step == 1


def test_a_name_that_matches_nothing_is_refused_with_the_nearest(tmp_path: Path) -> None:
    ctx = fl.train(fl.init(make_loop()), steps=1)
    fl.CheckpointStore(tmp_path).save(ctx)
    match = "allow='trian/batch_size' matches nothing that can differ; did you mean 'train/batch_size'"
    allow = ["trian/batch_size"]
    tries = [
        lambda: fl.resume(make_loop(), tmp_path, allow=allow),
        lambda: fl.load_state_dict(fl.init(make_loop()), fl.state_dict(ctx), allow=allow),
        lambda: fl.CheckpointStore(tmp_path).load(make_loop(), allow=allow),
        lambda: fl.CheckpointStore(tmp_path, allow=allow).save(ctx),
        lambda: fl.CheckpointStore(tmp_path / "new", allow=allow).check(ctx),
        lambda: fl.resume(make_loop(), tmp_path / "absent", allow=allow),
    ]
    for attempt in tries:
        with pytest.raises(fl.StateDictError, match=match):
            attempt()
    for known in ("train", "*", "batch_size", "train/*", "lr", "torch", "threads", "seed", lambda name: False):
        fl.resume(make_loop(), tmp_path, allow=[known])  # type: ignore[list-item]


# More epochs


def longer(epochs: int, path: Path | None = None) -> fl.Loop:
    return full_loop(callbacks=[counter(), *([] if path is None else [checkpoint(path)])], epochs=epochs)


@pytest.mark.parametrize("how", ["resume", "load_state_dict", "evolve"])
def test_a_finished_run_that_is_given_more_epochs_goes_on(how: str, tmp_path: Path) -> None:
    whole = fl.train(fl.init(longer(4)))
    end = fl.train(fl.init(longer(2, tmp_path)))
    if how == "resume":
        ctx = fl.resume(longer(4), tmp_path)
    elif how == "load_state_dict":
        ctx = fl.load_state_dict(fl.init(longer(4)), fl.state_dict(end))
    else:
        ctx = fl.evolve(end, loop=longer(4))
    assert fl.digest(fl.train(ctx)) == fl.digest(whole)
    *_, last = fl.iterate(ctx)
    assert fl.digest(last) == fl.digest(whole)
    assert fl.train(end) is end


def test_what_was_done_in_the_last_stage_can_not_be_undone() -> None:
    done = fl.Callback("done", end=lambda ctx: fl.evolve(ctx))
    end = fl.train(fl.init(make_loop(callbacks=[done])))
    for start in (fl.train, lambda ctx: list(fl.iterate(ctx))):
        with pytest.raises(fl.StateDictError, match=r"'done' did in its stage 'end' can't be undone.*resume"):
            start(fl.evolve(end, loop=make_loop(callbacks=[done], epochs=5)))


@pytest.mark.parametrize("how", ["resume", "load_state_dict", "evolve", "store"])
def test_fewer_epochs_than_were_begun_are_an_error(how: str, tmp_path: Path) -> None:
    ctx = fl.train(fl.init(make_loop(epochs=3)), steps=2 * STEPS + 1)
    fl.CheckpointStore(tmp_path).save(ctx)
    few = make_loop(epochs=2)
    ways = {
        "resume": lambda: fl.resume(few, tmp_path),
        "store": lambda: fl.CheckpointStore(tmp_path).load(few),
        "load_state_dict": lambda: fl.load_state_dict(fl.init(few), fl.state_dict(ctx)),
        "evolve": lambda: fl.train(fl.evolve(ctx, loop=few)),
    }
    with pytest.raises(fl.StateDictError, match="epochs: 3 begun in what was saved, 2 here"):
        ways[how]()


# Early stopping


def stopping(patience: int, path: Path | None = None, epochs: int = 8, best: bool = False) -> fl.Loop:
    callbacks = [early_stopping(patience=patience, min_delta=10.0, restore_best_weights=best)]
    return full_loop(callbacks=[*callbacks, *([] if path is None else [checkpoint(path)])], epochs=epochs)


@pytest.mark.parametrize("how", ["resume", "load_state_dict", "evolve"])
def test_an_ended_run_goes_on_with_more_patience_as_it_would_have_from_the_beginning(how: str, tmp_path: Path) -> None:
    whole = fl.train(fl.init(stopping(4)))
    end = fl.train(fl.init(stopping(2, tmp_path)))
    assert (end.epoch, whole.epoch) == (3, 5)
    if how == "resume":
        ctx = fl.resume(stopping(4), tmp_path)
    elif how == "load_state_dict":
        ctx = fl.load_state_dict(fl.init(stopping(4)), fl.state_dict(end))
    else:
        ctx = fl.evolve(end, loop=stopping(4))
    assert fl.digest(fl.train(ctx)) == fl.digest(whole)


def test_an_ended_run_stays_ended_with_the_patience_that_ended_it(tmp_path: Path) -> None:
    end = fl.train(fl.init(stopping(2, tmp_path)))
    assert fl.digest(fl.resume(stopping(2, epochs=99), tmp_path)) == fl.digest(end)
    assert fl.train(fl.load_state_dict(fl.init(stopping(2, epochs=99)), fl.state_dict(end))).epoch == end.epoch
    assert fl.train(fl.evolve(end, loop=stopping(1))).epoch == end.epoch


def test_best_weights_that_came_back_are_taken_from_the_folder_again(tmp_path: Path) -> None:
    whole = fl.train(fl.init(stopping(4, best=True)))
    end = fl.train(fl.init(stopping(2, tmp_path, best=True)))
    assert fl.digest(fl.train(fl.resume(stopping(4, best=True), tmp_path))) == fl.digest(whole)
    with pytest.raises(fl.StateDictError, match=r"'early_stopping'.*can't be undone"):
        fl.train(fl.evolve(end, loop=stopping(4, best=True)))


# What callbacks refuse themselves


def cycle(epochs: int) -> fl.Loop:
    return make_loop(callbacks=[t_clbk("lr_one_cycle", max_lr=0.1)], epochs=epochs)


def test_allowing_reaches_the_checks_of_callbacks(tmp_path: Path) -> None:
    ctx = fl.train(fl.init(cycle(2)), steps=2)
    fl.CheckpointStore(tmp_path).save(ctx)
    with pytest.raises(fl.StateDictError, match="a schedule of other settings") as caught:
        fl.resume(cycle(4), tmp_path)
    (note, *_) = [note for note in caught.value.__notes__ if "allow=" in note]
    allow = [word.strip("'") for word in note[note.index("[") + 1 : note.index("]")].split(", ")]
    end = fl.train(fl.resume(cycle(4), tmp_path, allow=allow))
    assert (end.epoch, end.global_step) == (4, 4 * STEPS)
    with pytest.raises(fl.StateDictError, match="a schedule of other settings"):
        fl.train(fl.evolve(ctx, loop=cycle(4)))


def test_allowing_reaches_the_measure_of_early_stopping() -> None:
    from tests.sample_loops import mean_absolute

    def watching(id: str) -> fl.Loop:
        measures = [fl.measure(name, mean_absolute, minimize=True) for name in ("a", "b")]
        return full_loop(measures_valid=measures, callbacks=[early_stopping(patience=2, measure=id)], epochs=4)

    ctx = next(ctx for ctx in fl.iterate(fl.init(watching("a"))) if ctx.stage == "epoch_end" and ctx.epoch == 2)
    with pytest.raises(fl.StateDictError, match="best score of another measure") as caught:
        fl.train(fl.load_state_dict(fl.init(watching("b")), fl.state_dict(ctx)))
    assert any("allow=" in note for note in caught.value.__notes__)
    loaded = fl.load_state_dict(fl.init(watching("b")), fl.state_dict(ctx), allow="callbacks/early_stopping")
    assert loaded.callbacks["early_stopping"]["best_epoch"] is None
    assert fl.train(loaded).stage == "end"
