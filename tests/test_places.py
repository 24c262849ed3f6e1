"""A context is trained from a place of its run, or is refused by the name of the field that is wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import functional_loop as fl
from functional_loop.callbacks import CallbackSet

from .sample_loops import full_loop, make_loop

LOOP = full_loop(accumulate=1)
MIDDLE = fl.train(fl.init(LOOP), steps=2)
END = fl.train(MIDDLE)

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a step after the last": ({"step": 99, "global_step": 99}, "step: 99, and an epoch has 3 batches"),
    "a step alone": ({"step": 3, "global_step": 2}, "global_step: 2, and step 3 of epoch 1"),
    "a shifted count": ({"global_step": 50}, "global_step: 50, and step 2 of epoch 1 comes after fewer batches"),
    "a start with a count": (
        {"epoch": 0, "step": 0, "stage": "begin"},
        "global_step: 2, and step 0 of epoch 0 comes after fewer batches",
    ),
    "a negative step": ({"step": -1}, "step: -1, must not be negative"),
    "a negative epoch": ({"epoch": -1}, "epoch: -1, must not be negative"),
    "a negative count": ({"global_step": -5}, "global_step: -5, must not be negative"),
    "an epoch without its batches": ({"epoch": 9}, "global_step: 2, and step 2 of epoch 9"),
    "no epoch": ({"epoch": 0}, "epoch: 0, and after 'batch_end'"),
    "a bool": ({"step": True}, "step: True, must be of type int"),
    "a float": ({"epoch": 1.0}, "epoch: 1.0, must be of type int"),
    "NaN": ({"global_step": float("nan")}, "global_step: nan, must be of type int"),
    "a tensor": ({"seed": torch.tensor(1)}, "seed: tensor.1., must be of type int"),
    "a string": ({"step": "2"}, "step: '2', must be of type int"),
    "an int for a bool": ({"terminate": 1}, "terminate: 1, must be of type bool"),
    "no stage": ({"stage": "batch_ends"}, "stage: 'batch_ends' is not a stage .* did you mean 'batch_end'"),
    "a stage within a batch": ({"stage": "after_backward"}, "stage: 'after_backward' is not a stage to continue"),
    "something else for a stage": ({"stage": ["end"]}, r"stage: \['end'\] is not a stage"),
    "a start in mid-epoch": ({"stage": "begin"}, "step: 2, and 'begin' is before the first epoch"),
    "an epoch begun with batches": ({"stage": "epoch_begin"}, "step: 2, and no batch is done after 'epoch_begin'"),
    "an epoch ended without": ({"stage": "epoch_end", "step": 0}, "step: 0, and after 'epoch_end'"),
    "validation outside of one": ({"step_valid": 1}, "step_valid: 1, and it is 1 or more after 'batch_valid_end'"),
    "validation of nothing": ({"stage": "batch_valid_end"}, "step_valid: 0, and it is 1 or more after"),
    "validation after the last": (
        {"stage": "batch_valid_end", "step_valid": 7},
        "step_valid: 7, and a validation has 2 batches",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_place_is_refused_by_all_that_goes_on_from_it(what: str, tmp_path: Path) -> None:
    changes, message = WRONG[what]
    ctx = fl.evolve(MIDDLE, **changes)
    with pytest.raises(ValueError, match=f"train can't go on from .*{message}"):
        fl.train(ctx)
    with pytest.raises(ValueError, match=f"iterate can't go on from .*{message}"):
        fl.iterate(ctx)
    with pytest.raises(ValueError, match=message):
        fl.train_step(ctx, (torch.zeros(4, 3), torch.zeros(4, 2)))
    with pytest.raises(ValueError, match=f"state_dict can't go on from .*{message}"):
        fl.state_dict(ctx)
    with fl.CheckpointStore(tmp_path / "run") as store, pytest.raises(ValueError, match=message):
        store.save(ctx)
    assert not [*tmp_path.glob("run/*.safetensors")]


@pytest.mark.parametrize("what", WRONG)
def test_a_state_dict_of_a_wrong_place_is_refused(what: str) -> None:
    changes, _ = WRONG[what]
    with pytest.raises(fl.StateDictError) as caught:
        fl.load_state_dict(fl.init(LOOP), {**fl.state_dict(MIDDLE), **changes})
    assert any(
        line.split(":")[0] in (*changes, "global_step", "step", "step_valid") for line in caught.value.differences
    )


def test_members_of_an_ensemble_are_at_places_too() -> None:
    ctx = fl.train(fl.stack([fl.init(LOOP, seed=seed) for seed in (0, 1)]), steps=2)
    with pytest.raises(ValueError, match=r"train can't go on from .*step: 99, and an epoch has 3 batches"):
        fl.train(fl.evolve(ctx, step=99))
    assert fl.train(ctx, steps=1).global_step == 3
    apart = fl.stack([END, fl.init(LOOP, seed=1)])
    assert fl.train(apart).stage == "end"


@pytest.mark.parametrize(
    "changes",
    [
        {"epoch": 0, "step": 0, "global_step": 0, "stage": ""},
        {"epoch": 0, "step": 0, "global_step": 0, "stage": "begin"},
        {"seed": 7},
        {"epoch": 2, "global_step": 50},
        {"stage": "before_valid"},
        {"terminate": True},
    ],
    ids=str,
)
def test_places_that_a_run_can_have_are_trained_from(changes: Any) -> None:
    assert fl.train(fl.evolve(MIDDLE, **changes)).stage == "end"


@pytest.mark.parametrize("stage", fl.STAGES[:-1])
@pytest.mark.parametrize(
    "move",
    [
        {"step": 99},
        {"epoch": 5},
        {"global_step": 1000},
        {"seed": 3},
        {"stage": "epoch_end"},
        {"step_valid": 9},
        {"step": 0},
        {"global_step": 0},
    ],
    ids=str,
)
def test_a_hook_that_moves_the_run_is_refused_where_it_does(stage: str, move: dict[str, Any]) -> None:
    (name, value), *_ = move.items()

    def moves(ctx: fl.Context) -> fl.Context:
        return fl.evolve(ctx, **move) if getattr(ctx, name) != value else ctx

    loop = full_loop(accumulate=1, callbacks=[fl.Callback("moves", **{stage: moves})])
    try:
        end = fl.train(fl.init(loop))
    except ValueError as error:
        assert f"a hook can't move the run: {name}: {value!r}, and it is " in str(error)  # noqa: PT017
        assert any(f"in callback 'moves' at stage '{stage}'" in note for note in error.__notes__)  # noqa: PT017
    else:
        assert fl.digest(end) == fl.digest(fl.train(fl.init(full_loop(accumulate=1, callbacks=[]))))


def test_a_member_that_a_hook_moves_is_refused() -> None:
    loop = make_loop(callbacks=[fl.Callback("moves", batch_end=lambda ctx: fl.evolve(ctx, step=99))])
    for how in ("vectorised", "each"):
        ctx = fl.stack([fl.init(loop, seed=seed) for seed in (0, 1)], batch_hooks=how)
        with pytest.raises(ValueError, match="a hook can't move the run: step: 99, and it is 1 here"):
            fl.train(ctx)


def test_an_object_that_moves_the_run_is_refused() -> None:
    class CallbackSetMoves(CallbackSet):
        def on_epoch_begin(self) -> None:
            self.ctx.epoch = 7

    with pytest.raises((ValueError, AttributeError)):
        fl.train(fl.init(make_loop(callbacks=[CallbackSetMoves()])))


@pytest.mark.parametrize("asked", [1, None, "yes", torch.tensor(True)], ids=str)
def test_terminate_is_a_bool(asked: Any) -> None:
    loop = make_loop(callbacks=[fl.Callback("stop", epoch_end=lambda ctx: fl.evolve(ctx, terminate=asked))])
    with pytest.raises(TypeError, match=re.escape(f"terminate: {asked!r}, must be of type bool")):
        fl.train(fl.init(loop))


def test_a_hook_of_batch_end_may_go_back_to_an_earlier_context() -> None:
    kept: list[fl.Context] = []

    def back(ctx: fl.Context) -> fl.Context:
        if ctx.global_step == 4 and len(kept) < 4:
            kept.append(ctx)
            return kept[1]
        kept.append(ctx)
        return ctx

    looking = fl.Callback("back", batch_end=back)
    end = fl.train(fl.init(make_loop(callbacks=[looking])))
    assert fl.digest(end) == fl.digest(fl.train(fl.init(make_loop(callbacks=[]))))
    assert [ctx.global_step for ctx in kept[:8]] == [1, 2, 3, 4, 3, 4, 5, 6]
