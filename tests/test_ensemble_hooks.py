"""Hooks on a stacked context mean what they mean in a solo run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import functional_loop as fl
from functional_loop.callbacks import CallbackSet, averaged, t_clbk
from tests.closeness import assert_close
from tests.ensembles import digests, make_loop, starts


def assert_as_solo(loop: fl.Loop, batch_hooks: str = "vectorised") -> None:
    contexts = starts(loop)
    solo = [fl.train(ctx) for ctx in contexts]
    stacked = fl.stack(contexts, mode="vectorised", batch_hooks=batch_hooks)
    for member, expected in zip(fl.unstack(fl.train(stacked)), solo, strict=True):
        assert_close(member, expected)
    exact = fl.train(fl.stack(contexts, mode="exact", batch_hooks=batch_hooks))
    assert digests(fl.unstack(exact)) == digests(solo)


def decayed(id: str = "decayed") -> fl.Callback:
    """Changes batch, gradients, parameters, hyperparameters and its own state, by tensors alone."""

    def scale(ctx: fl.Context) -> fl.Context:
        return fl.evolve(ctx, batch=fl.evolve(ctx.batch, x=ctx.batch.x / ctx.batch.x.norm()))

    def clip(ctx: fl.Context) -> fl.Context:
        grads: Any = ctx.grads
        total = sum(grad.square().sum() for grad in grads.values()) ** 0.5
        return fl.evolve(ctx, grads={name: grad / (1 + total) for name, grad in grads.items()})

    def count(ctx: fl.Context) -> fl.Context:
        rate = ctx.optimizer_state["groups"][0]["lr"]
        slot = ctx.callbacks[id]
        state = {"count": slot["count"] + 1, "mean": slot["mean"] + ctx.last_loss, "rows": slot["rows"]}
        return ctx.with_callback_state(id, state).with_hyperparameters(lr=rate * 0.9)

    start = {"count": 0, "mean": torch.zeros(()), "rows": [1]}
    return fl.Callback(id, init=lambda ctx: start, batch_begin=scale, after_backward=clip, batch_end=count)


@pytest.mark.parametrize("batch_hooks", ["vectorised", "each"])
def test_hooks_of_tensor_operations_mean_the_same(batch_hooks: str) -> None:
    assert_as_solo(make_loop(callbacks=[decayed()]), batch_hooks)


def test_rates_of_members_stay_numbers_of_theirs() -> None:
    loop = make_loop(callbacks=[decayed()], epochs=1)
    contexts = [ctx.with_hyperparameters(lr=lr) for ctx, lr in zip(starts(loop), (0.1, 0.01, 0.001), strict=True)]
    for member, ctx in zip(fl.unstack(fl.train(fl.stack(contexts))), contexts, strict=True):
        assert_close(member, fl.train(ctx))


@pytest.mark.parametrize(
    "key",
    [
        {"key": "history"},
        {"key": "early_stopping", "patience": 1, "measure": "accuracy"},
        {"key": "lr_step", "step_size": 1, "gamma": 0.5},
        {"key": "lr_one_cycle", "max_lr": 0.1},
        {"key": "lr_reduce_on_plateau", "patience": 0},
        {"key": "ema", "decay": 0.9, "validate": True},
        {"key": "clip_grad_norm", "max_norm": 0.5},
        {"key": "clip_grad_value", "clip_value": 0.01},
        {"key": "grad_norm"},
        {"key": "param_norm"},
        {"key": "unfreeze", "starting_weights": ["6.*"], "unfreeze": [{"epoch": 2, "weights": ["0.*", "4.*"]}]},
    ],
    ids=lambda options: options["key"],
)
def test_shipped_callbacks_work_for_every_member(key: dict[str, Any]) -> None:
    options = dict(key)
    assert_as_solo(make_loop(callbacks=[t_clbk(options.pop("key"), **options)], epochs=4))


class Counts(CallbackSet):
    """State, places and effects of its own."""

    def __init__(self) -> None:
        self.total = 0

    def on_begin(self) -> None:
        self.total = 100

    def on_valid_end(self) -> None:
        self.total += self.ctx.seed
        self.ctx.terminate = self.total > 102

    def on_epoch_end(self) -> None:
        with torch.no_grad():
            self.ctx.network[0].weight.mul_(0.5)

    def state_dict(self) -> Any:
        return {"total": self.total}

    def load_state_dict(self, state_dict: Any) -> None:
        self.total = state_dict["total"]


def test_objects_run_for_every_member_at_the_stages_of_an_epoch() -> None:
    assert_as_solo(make_loop(callbacks=[Counts()], epochs=4))


class Watches(CallbackSet):
    def on_batch_end(self) -> None:
        self.last = self.ctx.last_loss.item()


def test_objects_run_at_the_stages_of_a_batch_when_asked() -> None:
    loop = make_loop(callbacks=[Watches()], epochs=1)
    with pytest.raises(TypeError, match=r"callback 'watches' is an object.*batch_hooks='each'") as caught:
        fl.train(fl.stack(starts(loop), mode="vectorised"))
    assert fl.context_of(caught.value) is None  # before training
    assert_as_solo(loop, batch_hooks="each")


def test_a_hook_that_needs_values_at_every_batch_says_what_to_do() -> None:
    def look(ctx: fl.Context) -> fl.Context:
        assert float(torch.as_tensor(ctx.last_loss)) < 100
        return ctx

    loop = make_loop(callbacks=[fl.Callback("looks", batch_end=look)], epochs=1)
    with pytest.raises(RuntimeError) as caught:
        fl.train(fl.stack(starts(loop), mode="vectorised"))
    notes = "\n".join(caught.value.__notes__)
    assert "in callback 'looks' at stage 'batch_end'" in notes
    assert "batch_hooks='each'" in notes
    assert_as_solo(loop, batch_hooks="each")


def test_a_hook_may_end_members_by_a_tensor() -> None:
    def stop(ctx: fl.Context) -> fl.Context:
        return fl.evolve(ctx, terminate=ctx.params["6.1.bias"][0] > limit)

    first = [fl.train(ctx, steps=1).params["6.1.bias"][0].item() for ctx in starts(make_loop())]
    limit = sorted(first)[1]
    loop = make_loop(callbacks=[fl.Callback("stop", batch_end=fl.when(lambda ctx: ctx.global_step == 1, stop))])
    end = fl.train(fl.stack(starts(loop), mode="vectorised"))
    assert sorted(member.epoch for member in fl.unstack(end)) == [1, 3, 3]


def test_an_error_in_a_hook_names_the_member() -> None:
    def fail(ctx: fl.Context) -> fl.Context:
        if ctx.seed == 1:
            raise ArithmeticError
        return ctx

    exits: list[int] = []

    def leave(ctx: fl.Context) -> fl.Context:
        exits.append(ctx.seed)
        return ctx

    loop = make_loop(callbacks=[fl.Callback("fails", epoch_end=fail, exit=leave)])
    with pytest.raises(ArithmeticError) as caught:
        fl.train(fl.stack(starts(loop), mode="vectorised"))
    assert "in member 1 of an ensemble" in caught.value.__notes__
    last = fl.context_of(caught.value)
    assert last is not None
    assert last.stage == "valid_end"
    assert exits == [0, 1, 2]


@pytest.mark.parametrize("mode", ["vectorised", "exact"])
def test_checkpoints_are_of_the_whole_ensemble(mode: str, tmp_path: Path) -> None:
    stop = t_clbk("early_stopping", patience=1, measure="accuracy")
    saving = t_clbk("checkpoint", path=tmp_path, every_steps=3)
    loop = make_loop(callbacks=[stop, saving], epochs=4)
    stacked = fl.stack(starts(loop), mode=mode)
    end = fl.train(stacked)
    store = fl.CheckpointStore(tmp_path)
    assert store.steps()[:3] == [3, 4, 6]
    for step in store.steps():
        assert fl.digest(fl.train(store.load(loop, step))) == fl.digest(end)
    assert fl.digest(fl.resume(stacked, tmp_path)) == fl.digest(end)


def test_averages_can_be_taken_out_of_an_ensemble() -> None:
    loop = make_loop(callbacks=[t_clbk("ema", decay=0.5)], epochs=1)
    end = fl.train(fl.stack(starts(loop)))
    for i, member in enumerate(fl.unstack(end)):
        assert fl.tree_equal(averaged(member).params, fl.unstack(averaged(end))[i].params)


def test_what_is_for_one_run_is_refused_before_training(tmp_path: Path) -> None:
    contexts = starts(make_loop(callbacks=[t_clbk("csv_log", path=tmp_path / "log.csv")]))
    with pytest.raises(ValueError, match="callback 'csv_log' writes what one run makes"):
        fl.stack(contexts)
