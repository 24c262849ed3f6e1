"""Every shipped callback in a vectorised ensemble: it trains as in solo runs, or is refused before training."""

from __future__ import annotations

import math
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import functional_loop as fl
from functional_loop.callbacks import CallbackSet, t_clbk, torch_callbacks
from functional_loop.callbacks.logs.throughput import CallbackSetThroughput
from tests.closeness import ABSOLUTE, RELATIVE, assert_close
from tests.ensembles import digests, make_loop, starts

Options = Callable[[Path], dict[str, Any]]

SAME: dict[str, list[dict[str, Any]]] = {
    "clip_grad_norm": [{"max_norm": 0.5}],
    "clip_grad_value": [{"clip_value": 0.01}],
    "early_stopping": [{"patience": 1, "measure": "accuracy"}],
    "ema": [{"decay": 0.9, "validate": True}],
    "grad_norm": [{}],
    "history": [{}],
    "lambda_callback": [{"on_epoch_end": lambda ctx: None}],
    "lr_chained": [{"schedules": [t_clbk("lr_step", step_size=1, gamma=0.5), t_clbk("lr_exponential", gamma=0.9)]}],
    "lr_constant": [{"factor": 0.5, "total_iters": 2}],
    "lr_cosine_annealing": [{"T_max": 3}],
    "lr_cyclic": [{"base_lr": 1e-3, "max_lr": 1e-2, "step_size_up": 3}],
    "lr_exponential": [{"gamma": 0.9}],
    "lr_lambda": [{"lr_lambda": lambda n: 0.9**n}],
    "lr_linear": [{"start_factor": 0.5}],
    "lr_multi_step": [{"milestones": [1, 2]}],
    "lr_multiplicative": [{"lr_lambda": lambda n: 0.9}],
    "lr_one_cycle": [{"max_lr": 0.1}],
    "lr_polynomial": [{"total_iters": 3}],
    "lr_reduce_on_plateau": [{"patience": 0}],
    "lr_sequential": [
        {
            "schedules": [t_clbk("lr_step", step_size=1, gamma=0.5), t_clbk("lr_exponential", gamma=0.9)],
            "milestones": [2],
        }
    ],
    "lr_step": [{"step_size": 1, "gamma": 0.5}],
    "lr_warm_restarts": [{"T_0": 2}],
    "param_norm": [{}],
    "progress": [{}],
    "swa": [{"start": 2}],
    "terminate_on_nan": [{}, {"action": "terminate"}],
    "throughput": [{}],
    "timer": [{"max_time": "1h"}],
    "unfreeze": [{"starting_weights": ["6.*"], "unfreeze": [{"batch": 3, "weights": ["0.*", "4.*"]}]}],
}
SAVING: dict[str, dict[str, Any]] = {"checkpoint": {"every_steps": 3}, "stop_on_signal": {}}
REFUSED_AT_EVERY_BATCH: dict[str, dict[str, Any]] = {
    "digest_trace": {"every": 2},
    "dp_sgd": {"max_grad_norm": 1.0, "noise_multiplier": 1.0},
    "sam": {},
}
FOR_ONE_RUN: dict[str, dict[str, Any]] = {"csv_log": {}, "json_log": {}, "tb": {}}
REFUSED: dict[str, dict[str, Any]] = {"rollback": {}}
EVERYTHING = {*SAME, *SAVING, *REFUSED_AT_EVERY_BATCH, *FOR_ONE_RUN, *REFUSED}


def test_no_shipped_callback_is_forgotten() -> None:
    assert {
        key for key in torch_callbacks if "functional_loop" in torch_callbacks[key].generator.__module__
    } == EVERYTHING


def assert_as_solo(loop: fl.Loop, **stacking: Any) -> fl.Context:
    contexts = starts(loop)
    end = fl.train(fl.stack(contexts, **{"mode": "vectorised", **stacking}))
    for member, ctx in zip(fl.unstack(end), contexts, strict=True):
        assert_close(without_clocks(member), without_clocks(fl.train(ctx)))
    return end


def without_clocks(ctx: fl.Context) -> fl.Context:
    for callback in ctx.loop.callbacks:
        if callback.volatile:
            ctx = ctx.with_callback_state(callback.id, ())
    return ctx


@pytest.mark.parametrize(("key", "options"), [(key, options) for key, rows in SAME.items() for options in rows])
def test_it_trains_as_in_solo_runs(key: str, options: dict[str, Any]) -> None:
    assert_as_solo(make_loop(callbacks=[t_clbk(key, **options)]))


@pytest.mark.parametrize("key", SAVING)
@pytest.mark.parametrize("mode", ["vectorised", "exact"])
def test_it_saves_the_whole_ensemble(key: str, mode: str, tmp_path: Path) -> None:
    stacked = fl.stack(starts(make_loop(callbacks=[t_clbk(key, path=tmp_path, **SAVING[key])], epochs=1)), mode=mode)
    end = fl.train(stacked)
    if key == "checkpoint":
        assert fl.digest(fl.CheckpointStore(tmp_path).load(end.loop)) == fl.digest(end)


@pytest.mark.parametrize("mode", ["vectorised", "exact"])
def test_a_signal_saves_the_whole_ensemble(mode: str, tmp_path: Path) -> None:
    def send(ctx: fl.Context) -> fl.Context:
        if ctx.global_step == 6:
            signal.raise_signal(signal.SIGTERM)
        return ctx

    saving = t_clbk("stop_on_signal", path=tmp_path)
    loop = make_loop(callbacks=[stop_seed(0, 1), fl.Callback("send", before_valid=send, batch_end=send), saving])
    stacked = fl.stack(starts(loop), mode=mode)
    with pytest.raises(SystemExit) as left:
        fl.train(stacked)
    assert left.value.code == 143
    silent = fl.evolve(loop, callbacks=[stop_seed(0, 1)])
    expected = fl.train(fl.stack(starts(silent), mode=mode))
    assert fl.digest(fl.train(fl.CheckpointStore(tmp_path).load(silent))) == fl.digest(expected)


@pytest.mark.parametrize("key", REFUSED_AT_EVERY_BATCH)
def test_it_is_refused_before_training_and_runs_for_every_member_if_asked(key: str) -> None:
    network = None if key != "dp_sgd" else lambda: nn.Linear(6, 2)
    changes = {"network": network} if network else {}
    loop = make_loop(callbacks=[t_clbk(key, **REFUSED_AT_EVERY_BATCH[key])], epochs=1, **changes)
    contexts = starts(loop)
    with pytest.raises(TypeError, match=f"callback '{key}' needs Python values.*batch_hooks='each'") as caught:
        fl.train(fl.stack(contexts, mode="vectorised"))
    assert fl.context_of(caught.value) is None  # before training
    exact = fl.train(fl.stack(contexts, mode="exact"))
    assert digests(fl.unstack(exact)) == digests([fl.train(ctx) for ctx in contexts])
    fl.train(fl.stack(contexts, mode="vectorised", batch_hooks="each"))


@pytest.mark.parametrize("key", FOR_ONE_RUN)
def test_it_is_for_one_run_and_refused_by_stack(key: str, tmp_path: Path) -> None:
    contexts = starts(make_loop(callbacks=[t_clbk(key, path=tmp_path / "log")]))
    with pytest.raises(ValueError, match=f"callback '{key}' writes what one run makes.*history"):
        fl.stack(contexts)


def test_rollback_is_refused_by_stack() -> None:
    with pytest.raises(ValueError, match="callback 'rollback' of the Loop passes batches over"):
        fl.stack(starts(make_loop(callbacks=[t_clbk("rollback")])))


def poison(seed: int, step: int, id: str = "poison") -> fl.Callback:
    """Makes the loss of one member NaN, in one batch."""

    def spoil(ctx: fl.Context) -> fl.Context:
        if ctx.global_step != step:
            return ctx
        spoiled = torch.where(torch.as_tensor(ctx.seed) == seed, math.nan, ctx.batch.x)
        return fl.evolve(ctx, batch=fl.evolve(ctx.batch, x=spoiled))

    return fl.Callback(id, batch_begin=spoil)


@pytest.mark.parametrize(
    "optimizer",
    [
        fl.optimizer(torch.optim.AdamW, lr=1e-2),
        fl.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
        fl.optimizer(torch.optim.SGD, lr=0.1),
    ],
    ids=["adamw", "momentum", "sgd"],
)
@pytest.mark.parametrize("step", [1, 6, 12])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_member_whose_loss_is_nan_terminates_and_the_others_go_on(
    optimizer: fl.Optimizer, step: int, accumulate: int
) -> None:
    guard = t_clbk("terminate_on_nan", action="terminate")
    network = lambda: nn.Linear(6, 2)  # noqa: E731  # BatchNorm's statistics of a NaN are NaN, solo too
    loop = make_loop(
        network=network,
        optimizer=optimizer,
        callbacks=[poison(1, step), guard, t_clbk("param_norm")],
        accumulate=accumulate,
        measures_train=(),
        measures_valid=(),
    )
    contexts = starts(loop)
    end = fl.unstack(fl.train(fl.stack(contexts, mode="vectorised")))
    solo = [fl.train(ctx) for ctx in contexts]
    assert [member.epoch for member in end] == [ctx.epoch for ctx in solo]
    assert [int(member.callbacks["terminate_on_nan"]["step"]) for member in end] == [0, step, 0]
    for member, ctx in zip(end, solo, strict=True):
        torch.testing.assert_close(dict(member.params), dict(ctx.params), rtol=RELATIVE, atol=ABSOLUTE)
        assert all(bool(p.isfinite().all()) for p in member.params.values())
        assert norms(member) == pytest.approx(norms(ctx), rel=RELATIVE)


def norms(ctx: fl.Context) -> list[float]:
    return [row["mean"] for row in ctx.callbacks["param_norm"]["rows"]]


def test_all_members_may_terminate() -> None:
    guard = t_clbk("terminate_on_nan", action="terminate")

    def spoil(ctx: fl.Context) -> fl.Context:
        return fl.evolve(ctx, batch=fl.evolve(ctx.batch, x=ctx.batch.x * math.inf))

    end = fl.train(
        fl.stack(starts(make_loop(callbacks=[fl.Callback("spoil", batch_begin=spoil), guard])), "vectorised")
    )
    assert (end.stage, end.epoch, end.terminate) == ("end", 1, True)


def test_a_nan_of_one_member_stops_all_if_asked() -> None:
    loop = make_loop(callbacks=[poison(2, 6), t_clbk("terminate_on_nan")])
    with pytest.raises(FloatingPointError, match="the loss of a member is NaN or infinite") as caught:
        fl.train(fl.stack(starts(loop), mode="vectorised"))
    last = fl.context_of(caught.value)
    assert last is not None
    assert (last.global_step, last.stage) == (5, "batch_end")
    assert all(bool(p.isfinite().all()) for p in last.params.values())


def test_progress_has_one_line_for_all_members(capsys: pytest.CaptureFixture[str]) -> None:
    for mode in ("vectorised", "exact"):
        fl.train(fl.stack(starts(make_loop(callbacks=[t_clbk("progress")], epochs=2)), mode=mode))
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 3
        number = r"\d\.\d{4}"
        assert re.match(rf"epoch 1/2  3 members  train accuracy {number} \({number} to {number}\)", lines[0])
        assert re.search(rf"loss {number} \({number} to {number}\)", lines[0])
        assert re.match(r"finished after 2 epochs, ", lines[2])


def stop_seed(seed: int, epoch: int) -> fl.Callback:
    return fl.Callback(
        "stop", epoch_end=lambda ctx: fl.evolve(ctx, terminate=(ctx.seed, ctx.epoch) == (seed, epoch) or ctx.terminate)
    )


@pytest.mark.parametrize("mode", ["vectorised", "exact"])
def test_progress_goes_on_where_members_finish_early(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    loop = make_loop(callbacks=[stop_seed(1, 1), t_clbk("progress")], eval_freq=2)
    fl.train(fl.stack(starts(loop), mode=mode))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1] for line in lines[:3]] == ["3 members", "2 members", "2 members"]
    assert ["accuracy" in line for line in lines[:3]] == [False, True, True]


@pytest.mark.parametrize("mode", ["vectorised", "exact"])
def test_the_time_of_an_ensemble_adds_up_over_restarts(mode: str) -> None:
    loop = make_loop(callbacks=[t_clbk("progress"), t_clbk("throughput")])
    stacked = fl.stack(starts(loop), mode=mode)
    half = fl.train(stacked, steps=5)
    assert half.callbacks["progress"]["elapsed"] > 0
    loaded = fl.load_state_dict(stacked, fl.state_dict(half))
    end = fl.train(loaded)
    assert end.callbacks["progress"]["elapsed"] > half.callbacks["progress"]["elapsed"]
    assert fl.digest(end) == fl.digest(fl.train(stacked))
    for member in fl.unstack(end):
        assert member.callbacks["progress"]["elapsed"] == end.callbacks["progress"]["elapsed"]
        assert member.callbacks["throughput"]["rows_per_second"] > 0


def test_throughput_counts_the_rows_of_each_member() -> None:
    ctx = fl.train(fl.stack(starts(make_loop(callbacks=[CallbackSetThroughput()])), mode="vectorised"), steps=3)
    assert (ctx.callbacks["throughput"]["rows"], ctx.callbacks["throughput"]["batches"]) == (48, 3)


def test_a_limit_on_time_ends_all_members() -> None:
    end = fl.train(fl.stack(starts(make_loop(callbacks=[t_clbk("timer", max_time=1e-6)])), mode="vectorised"))
    assert (end.epoch, end.stage, end.terminate) == (1, "end", True)


class Sees(CallbackSet):
    """What a callback for the whole ensemble is given."""

    whole = True

    def __init__(self, volatile: bool) -> None:
        self.volatile = volatile
        self.seen: list[tuple[str, Any]] = []

    def _look(self, stage: str) -> None:
        ctx = self.ctx.context
        self.seen.append((stage, ctx.ensemble.members if ctx.ensemble is not None else None))

    def on_batch_end(self) -> None:
        self._look("batch_end")

    def on_epoch_end(self) -> None:
        self._look("epoch_end")


@pytest.mark.parametrize(("volatile", "at_batches"), [(True, 2), (False, 3)])
def test_a_clock_sees_at_batches_the_members_that_train(volatile: bool, at_batches: int) -> None:
    sees = Sees(volatile)
    fl.train(fl.stack(starts(make_loop(callbacks=[stop_seed(1, 1), sees], epochs=2)), mode="vectorised"))
    assert sees.seen == [("batch_end", 3)] * 4 + [("epoch_end", 3)] + [("batch_end", at_batches)] * 4 + [
        ("epoch_end", 3)
    ]


def test_check_pure_watches_hooks_at_batches_for_every_member() -> None:
    loop = make_loop(callbacks=[t_clbk("clip_grad_norm", max_norm=0.5)], check_pure=True, epochs=1)
    with pytest.raises(TypeError, match=r"'clip_grad_norm' is watched by check_pure.*batch_hooks='each'") as caught:
        fl.train(fl.stack(starts(loop), mode="vectorised"))
    assert fl.context_of(caught.value) is None  # before training
    assert_as_solo(loop, batch_hooks="each")
    assert_as_solo(loop, mode="exact")


@pytest.mark.parametrize("mode", ["vectorised", "exact"])
def test_check_pure_finds_an_impure_hook_of_an_ensemble(mode: str) -> None:
    def decay(ctx: fl.Context) -> fl.Context:
        ctx.params["6.1.bias"].mul_(0.9)
        return ctx

    assert_as_solo(make_loop(callbacks=[t_clbk("history"), t_clbk("progress")], check_pure=True, epochs=1), mode=mode)
    loop = make_loop(callbacks=[fl.Callback("decay", epoch_end=decay)], check_pure=True, epochs=1)
    with pytest.raises(fl.PurityError, match=r"6\.1\.bias"):
        fl.train(fl.stack(starts(loop), mode=mode))
