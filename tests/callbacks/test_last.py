"""Callbacks that save come after all others of their stage, whatever the weights are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

import functional_loop as fl
from functional_loop.callbacks import CallbackSet, t_clbk
from functional_loop.callbacks.control.checkpoint import CallbackSetCheckpoint
from tests.callbacks.objects import doing
from tests.sample_loops import full_loop, make_loop


def halving(weight: float) -> fl.Callback:
    def halve(ctx: fl.Context) -> fl.Context:
        return ctx.with_hyperparameters(lr=ctx.optimizer_state["groups"][0]["lr"] / 2)

    return fl.Callback("halving", weight=weight, batch_end=halve, epoch_end=halve, end=halve)


def assert_saves_boundaries(loop: fl.Loop, path: Path, stages: tuple[str, ...] = ("epoch_end", "end")) -> None:
    for ctx in fl.iterate(fl.init(loop)):
        if ctx.stage in stages:
            assert fl.digest(fl.CheckpointStore(path).load(loop)) == fl.digest(ctx)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("theirs", [-math.inf, 0.0, 1e9, math.inf])
@pytest.mark.parametrize("own", [-math.inf, -1.0, None, math.inf])
def test_a_checkpoint_is_the_state_after_its_whole_stage(
    own: float | None, theirs: float, order: int, tmp_path: Path
) -> None:
    saving = t_clbk("checkpoint", path=str(tmp_path), every_steps=1)
    if own is not None:
        saving = fl.evolve(saving, weight=own)
    loop = full_loop(callbacks=[saving, halving(theirs)][::order])
    assert_saves_boundaries(loop, tmp_path, ("batch_end", "epoch_end", "end"))


@pytest.mark.parametrize("neighbour", ["lr_step", "ema", "rollback", "digest_trace", "history", "early_stopping"])
def test_a_checkpoint_among_other_callbacks_resumes_as_if_it_had_never_stopped(neighbour: str, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"lr_step": {"step_size": 1}, "ema": {"decay": 0.5}, "early_stopping": {"patience": 1}}
    arguments |= {"digest_trace": {"every": 1}}

    def loop(epochs: int) -> fl.Loop:
        saving = t_clbk("checkpoint", path=str(tmp_path), weight=-1, every_steps=1, keep_last=1)
        return full_loop(callbacks=[saving, t_clbk(neighbour, **arguments.get(neighbour, {}))], epochs=epochs)

    whole = fl.digest(fl.train(fl.init(loop(3))))
    for path in tmp_path.iterdir():
        path.unlink()
    fl.train(fl.init(loop(3)), steps=4)
    assert fl.digest(fl.train(fl.resume(loop(3), tmp_path))) == whole


def test_a_checkpoint_of_members_has_the_states_of_all_that_are_for_all_members(tmp_path: Path) -> None:
    class CallbackSetEpochs(CallbackSet):
        whole = True
        n = 0

        def on_epoch_end(self) -> None:
            self.n += 1

        def state_dict(self) -> dict[str, Any]:
            return {"n": self.n}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.n = state_dict["n"]

    loop = make_loop(callbacks=[CallbackSetCheckpoint(tmp_path), CallbackSetEpochs(), halving(math.inf)])
    start = fl.stack([fl.init(loop, seed=seed) for seed in (0, 1)], batch_hooks="each")
    for ctx in fl.iterate(start):
        if ctx.stage == "epoch_end":
            found = fl.CheckpointStore(tmp_path).load(loop)
            assert fl.digest(found) == fl.digest(ctx)
            assert [c.callbacks["epochs"]["n"] for c in fl.unstack(found)] == [ctx.epoch] * 2


def test_a_hook_that_saves_before_others_is_refused_by_name() -> None:
    def save(ctx: fl.Context) -> fl.Context:
        fl.state_dict(fl.boundary(ctx, "epoch_end"))
        return ctx

    with pytest.raises(ValueError, match=r"'halving' runs later in 'epoch_end' than 'save'.*last=True") as caught:
        fl.train(fl.init(make_loop(callbacks=[fl.Callback("save", epoch_end=save), halving(0.0)])))
    assert fl.context_of(caught.value).epoch == 1
    for last, weight in ((True, math.inf), (False, -1.0)):
        saving = fl.Callback("save", last=last, epoch_end=save)
        assert fl.train(fl.init(make_loop(callbacks=[saving, halving(weight)]))).epoch == 2


def test_an_object_that_saves_before_others_is_refused_and_can_come_last() -> None:
    def save(self: Any) -> None:
        fl.boundary(self.ctx.context, "batch_end")

    saving: Any = doing("Save", on_batch_end=save)
    with pytest.raises(ValueError, match="'halving' runs later in 'batch_end' than 'save'"):
        fl.train(fl.init(make_loop(callbacks=[saving, halving(0.0)])))
    last: Any = doing("Save", on_batch_end=save)
    last.last = True
    assert fl.train(fl.init(make_loop(callbacks=[last, halving(math.inf)]))).epoch == 2


def test_going_back_to_the_middle_of_a_stage_is_refused() -> None:
    early = fl.evolve(t_clbk("rollback"), weight=-1.0)
    assert fl.train(fl.init(make_loop(callbacks=[early]))).epoch == 2
    with pytest.raises(ValueError, match="'halving' runs later in 'batch_end' than 'rollback'"):
        fl.train(fl.init(make_loop(callbacks=[early, halving(0.0)])))


def test_a_run_inside_of_a_hook_does_not_take_its_place() -> None:
    inner = make_loop(callbacks=[halving(0.0)], epochs=1)

    def save(ctx: fl.Context) -> fl.Context:
        fl.train(fl.init(inner))
        fl.boundary(ctx, "epoch_end")
        return ctx

    with pytest.raises(ValueError, match="'halving' runs later in 'epoch_end' than 'save'"):
        fl.train(fl.init(make_loop(callbacks=[fl.Callback("save", epoch_end=save), halving(0.0)])))
