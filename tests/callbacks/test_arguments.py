"""Every argument of every shipped callback is part of the identity of a run, or is free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import functional_loop as fl
from functional_loop.callbacks import as_lr_scheduler, t_clbk, torch_callbacks
from functional_loop.callbacks.schedules.lr_schedulers import lr_exponential, lr_step
from tests.made_with import X, Y, ce

GIVEN: dict[str, dict[str, Any]] = {
    "clip_grad_norm": {"max_norm": 1.0},
    "clip_grad_value": {"clip_value": 1.0},
    "dp_sgd": {"max_grad_norm": 1.0, "noise_multiplier": 1.0},
    "early_stopping": {"patience": 9},
    "lambda_callback": {"on_after_backward": lambda ctx, w=0.5: ctx.grads["bias"].mul_(w)},
    "lr_chained": {"schedules": [lr_exponential(0.5), lr_step(1)]},
    "lr_cosine_annealing": {"T_max": 9},
    "lr_cyclic": {"base_lr": 0.1, "max_lr": 0.2},
    "lr_exponential": {"gamma": 0.5},
    "lr_lambda": {"lr_lambda": lambda step: 0.5**step},
    "lr_multi_step": {"milestones": [1, 2]},
    "lr_multiplicative": {"lr_lambda": lambda step: 0.5},
    "lr_one_cycle": {"max_lr": 0.2},
    "lr_sequential": {"schedules": [lr_exponential(0.5), lr_step(1)], "milestones": [1]},
    "lr_step": {"step_size": 1},
    "lr_warm_restarts": {"T_0": 2},
    "swa": {"start": 1},
    "terminate_on_nan": {"action": "terminate"},
    "timer": {"max_time": 1000.0},
    "unfreeze": {"starting_weights": "weight", "unfreeze": [{"epoch": 2, "weights": "*"}]},
}
"""Values of the arguments that are required, and of those with which a callback takes a part in the result."""

OTHER: dict[str, Any] = {
    "schedules": [lr_exponential(0.5), lr_step(2)],
    "lr_lambda": [lambda step: 0.25],
    "milestones": [2, 3],
    "starting_weights": "bias",
    "unfreeze": [{"epoch": 1, "weights": "*"}],
    "when": lambda ctx: False,
    "scale_fn": lambda x: 0.5,
    "on_after_backward": lambda ctx, w=0.25: ctx.grads["bias"].mul_(w),
    "max_lr": 0.25,
    "back": 2,
    "spike": 6.0,
    "step_size_down": 3,
    "chunk_size": 2,
    "total_steps": 6,
    "live": False,
    "every_steps": 2,
    "keep_last": 3,
    "keep_best": "a",
    "keep_every": 2,
    "every_epochs": 2,
    "measure": "b",
    "allow": "seed",
    "requeue": print,
    "max_time": 2000.0,
    "min_lr": 0.01,
    "lr_factor": 0.5,
    "mode": "triangular2",
    "scale_mode": "iterations",
    "anneal_strategy": "linear",
    "threshold_mode": "abs",
}
SPECIAL = {("lr_sequential", "milestones"): [2], ("terminate_on_nan", "action"): "raise", ("rollback", "skip"): 2}
"""Other values of an argument."""

FREE = {
    ("early_stopping", "patience"),
    ("rollback", "max_rollbacks"),
    *(("checkpoint", name) for name in torch_callbacks["checkpoint"].param_set),
    *((key, name) for key in ("csv_log", "json_log", "tb", "stop_on_signal", "progress", "timer", "throughput")
      for name in torch_callbacks[key].param_set),
}  # fmt: skip
"""What changes no bit of the result: where files are written and what is shown, and when training gives up."""

ARGUMENTS = [
    (key, name)
    for key in torch_callbacks
    if torch_callbacks[key].generator.__module__.startswith("functional_loop.")
    for name in (*torch_callbacks[key].param_set, *(["on_after_backward"] if key == "lambda_callback" else []))
]


def start(key: str, path: Path, **changes: Any) -> fl.Context:
    given = {"path": path} if "path" in torch_callbacks[key].param_set else {}
    if "back" in torch_callbacks[key].param_set:
        given["back"] = 3
    loop = fl.Loop(
        network=lambda: nn.Linear(4, 2),
        loss=ce,
        optimizer=fl.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9),
        train=fl.batches(X, Y, batch_size=4),
        valid=fl.batches(X, Y, batch_size=4),
        measures_valid=[fl.measure(id, ce, minimize=True) for id in ("a", "b")],
        epochs=2,
        callbacks=[t_clbk(key, **{**given, **GIVEN.get(key, {}), **changes})],
    )
    return fl.init(loop)


def other(key: str, name: str) -> Any:
    if (key, name) in SPECIAL:
        return SPECIAL[key, name]
    default = {
        **{p: torch_callbacks[key].param_set[p].default for p in torch_callbacks[key].param_set},
        **GIVEN.get(key, {}),
    }[name]
    if name in OTHER:
        return OTHER[name]
    if name == "step_on":
        return "batch" if default == "epoch" else "epoch"
    if isinstance(default, bool):
        return not default
    return default + 1 if isinstance(default, int) else default / 2 or 0.01


@pytest.mark.parametrize(("key", "name"), ARGUMENTS, ids=["-".join(each) for each in ARGUMENTS])
def test_another_argument_is_refused_by_its_name_or_is_free(key: str, name: str, tmp_path: Path) -> None:
    saved = fl.state_dict(start(key, tmp_path / "a"))
    fl.load_state_dict(start(key, tmp_path / "a"), saved)
    changed = start(key, tmp_path / "b", **({} if name == "path" else {name: other(key, name)}))
    if (key, name) in FREE:
        fl.load_state_dict(changed, saved)
        return
    with pytest.raises(fl.StateDictError) as caught:
        fl.train(fl.load_state_dict(changed, saved), steps=1)
    paths = [line.partition(":")[0] for line in caught.value.differences]
    where = f"callbacks/{key}" if key == "terminate_on_nan" and name == "action" else f"callbacks/{key}/{name}"
    assert paths
    # What a callback refuses itself, it calls by the name of the argument alone.
    assert all(path in (where, name) or path.startswith(f"{where}/") for path in paths), paths
    fl.load_state_dict(changed, saved, allow=where)


def test_every_shipped_callback_is_looked_at() -> None:
    assert {key for key, _ in ARGUMENTS} >= {*GIVEN, "ema", "rollback", "sam", "grad_norm", "digest_trace"}


def test_a_refusal_says_both_values_and_nothing_else(tmp_path: Path) -> None:
    saved = fl.state_dict(start("clip_grad_norm", tmp_path))
    with pytest.raises(fl.StateDictError) as caught:
        fl.load_state_dict(start("clip_grad_norm", tmp_path, max_norm=2.0), saved)
    assert caught.value.differences == ("callbacks/clip_grad_norm/max_norm: 1.0 in what was saved, 2.0 here",)


class Decay(torch.optim.lr_scheduler.LRScheduler):
    def __init__(self, optimizer: Any, factor: float = 0.5, last_epoch: int = -1) -> None:
        self.factor = factor
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[Any]:
        return [group["lr"] * self.factor for group in self.optimizer.param_groups]


def test_a_refusal_of_a_schedule_of_ones_own_names_its_argument() -> None:
    def loaded(factor: float, sd: Any = None) -> fl.Context:
        ctx = fl.init(fl.evolve(start("history", Path()).loop, callbacks=[as_lr_scheduler(Decay)(factor=factor)]))
        return ctx if sd is None else fl.load_state_dict(ctx, sd)

    with pytest.raises(fl.StateDictError, match=r"callbacks/decay/factor: 0.5 in what was saved, 0.25 here"):
        loaded(0.25, fl.state_dict(loaded(0.5)))


COMBINED: dict[str, Any] = {
    "every/n": lambda n, w: fl.every(n, scaled(w)),
    "every/hook/w": lambda n, w: fl.every(1, scaled(w * n)),
    "when/hook/w": lambda n, w: fl.when(lambda ctx: True, scaled(w * n)),
    "when/condition/n": lambda n, w: fl.when(lambda ctx: ctx.epoch >= n, scaled(w)),
    "compose/hooks/1/w": lambda n, w: fl.compose(scaled(w), scaled(w * n)),
}


def scaled(w: float) -> Any:
    return lambda ctx: ctx.with_hyperparameters(lr=w)


@pytest.mark.parametrize("what", COMBINED)
def test_a_refusal_of_combined_hooks_names_what_was_given(what: str) -> None:
    def loop(n: int) -> fl.Loop:
        hook = fl.Callback("hook", epoch_end=COMBINED[what](n, 0.5))
        return fl.evolve(start("history", Path()).loop, callbacks=[hook])

    saved = fl.state_dict(fl.init(loop(1)))
    fl.load_state_dict(fl.init(loop(1)), saved)
    with pytest.raises(fl.StateDictError) as caught:
        fl.load_state_dict(fl.init(loop(2)), saved)
    assert [line.partition(":")[0] for line in caught.value.differences] == [
        f"callbacks/hook/epoch_end/{what.partition('/')[2]}"
    ]
