from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils import get_total_norm

import functional_loop as fl
from functional_loop.callbacks.gradients.clipping import clip_grad_norm
from functional_loop.callbacks.gradients.monitors import grad_norm, param_norm
from functional_loop.callbacks.gradients.windows import updates
from tests.callbacks.laws import holds_for
from tests.sample_loops import full_loop, make_loop

Monitor = Callable[..., fl.Callback]


def values(loop: fl.Loop, stage: str, of: Callable[[fl.Context], Any], norm_type: float) -> list[list[float]]:
    """Norms at every update, epoch by epoch."""
    seen: list[list[float]] = [[] for _ in range(loop.epochs)]

    def look(ctx: fl.Context) -> fl.Context:
        if updates(ctx):
            seen[ctx.epoch - 1].append(get_total_norm(of(ctx).values(), norm_type).item())
        return ctx

    hooks: Any = {stage: look}
    fl.train(fl.init(fl.evolve(loop, callbacks=[fl.Callback("look", **hooks)])))
    return seen


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("monitor", "stage", "of"),
    [(grad_norm, "after_backward", lambda ctx: ctx.grads), (param_norm, "batch_end", lambda ctx: ctx.params)],
)
def test_rows_are_the_mean_maximum_and_last_norm_of_the_updates_of_an_epoch(
    monitor: Monitor, stage: str, of: Callable[[fl.Context], Any], accumulate: int, norm_type: float
) -> None:
    loop = make_loop(epochs=2, accumulate=accumulate)
    slot = fl.train(fl.init(fl.evolve(loop, callbacks=[monitor(norm_type, id="norm")]))).callbacks["norm"]
    expected = values(loop, stage, of, norm_type)
    for row, norms in zip(slot["rows"], expected, strict=True):
        total = torch.tensor(norms[0])
        for norm in norms[1:]:
            total = total + norm
        assert (row["max"], row["last"]) == (max(norms), norms[-1])
        assert row["mean"] == total.item() / len(norms)
    assert [row["epoch"] for row in slot["rows"]] == [1, 2]
    assert slot["last"].item() == expected[-1][-1]


@pytest.mark.parametrize("monitor", [grad_norm, param_norm])
def test_they_only_watch(monitor: Monitor) -> None:
    plain, watched = fl.train(fl.init(make_loop())), fl.train(fl.init(make_loop(callbacks=[monitor()])))
    assert fl.tree_equal((plain.params, plain.optimizer_state), (watched.params, watched.optimizer_state))


def test_the_gradients_are_measured_before_they_are_clipped() -> None:
    alone = fl.train(fl.init(make_loop(epochs=1, callbacks=[grad_norm()])), steps=1)
    clipped = fl.train(fl.init(make_loop(epochs=1, callbacks=[clip_grad_norm(0.001), grad_norm()])), steps=1)
    assert torch.equal(alone.callbacks["grad_norm"]["last"], clipped.callbacks["grad_norm"]["last"])


@pytest.mark.parametrize("monitor", [grad_norm, param_norm])
def test_they_resume_anywhere_and_their_forks_do_not_mix(monitor: Monitor, tmp_path: Path) -> None:
    holds_for(lambda: full_loop(callbacks=[monitor()]), tmp_path)


def test_a_monitor_that_comes_late_has_rows_of_what_it_saw() -> None:
    ctx = fl.train(fl.init(make_loop()), steps=3)
    late = fl.init(make_loop(callbacks=[grad_norm(), param_norm()]))
    end = fl.train(fl.load_state_dict(late, fl.state_dict(ctx), strict=False))
    for id in ("grad_norm", "param_norm"):
        assert [row["epoch"] for row in end.callbacks[id]["rows"]] == [2]


@pytest.mark.parametrize("monitor", [grad_norm, param_norm])
def test_where_nothing_is_trainable_the_norms_are_those_of_nothing(monitor: Monitor) -> None:
    frozen = fl.evolve(fl.init(make_loop(epochs=1, callbacks=[monitor(id="norm")])), trainable=())
    (row,) = fl.train(frozen).callbacks["norm"]["rows"]
    assert row["max"] == row["last"]


@pytest.mark.parametrize("monitor", [grad_norm, param_norm])
def test_bad_arguments_are_refused_by_name(monitor: Any) -> None:
    with pytest.raises(ValueError, match=f"{monitor.__name__}: norm_type must be a number of at least 1, not 0"):
        monitor(0)
