"""The state machine: which stages run, what a context says in each, and where training can be left and continued."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch

import functional_loop as fl
from functional_loop.core.stages import BOUNDARIES
from tests.sample_loops import data, full_loop, make_loop, mean_absolute, recorder

X, Y = data(3)
VALID = fl.batches(X, Y, batch_size=6)
ERROR = fl.measure("error", mean_absolute)
TRAIN_EPOCH = ["epoch_begin", *["batch_begin", "after_backward", "batch_end"] * 3, "before_valid"]
VALIDATION = [*["batch_valid_begin", "batch_valid_end"] * 2, "valid_end"]


def stages_of(**changes: Any) -> list[str]:
    seen: list[tuple[str, Any]] = []
    fl.train(fl.init(make_loop(callbacks=[recorder(seen, lambda ctx: None)], **changes)))
    return [stage for stage, _ in seen]


def test_the_stages_of_a_run_that_validates_in_every_epoch() -> None:
    epoch = [*TRAIN_EPOCH, *VALIDATION, "epoch_end"]
    assert stages_of(valid=VALID) == ["begin", *epoch * 2, "end", "exit"]


def test_the_stages_of_a_run_without_validation_data() -> None:
    assert stages_of() == ["begin", *[*TRAIN_EPOCH, "epoch_end"] * 2, "end", "exit"]


def test_a_run_validates_in_every_eval_freq_th_epoch_and_the_last() -> None:
    stages = stages_of(valid=VALID, epochs=5, eval_freq=2)
    epochs = re.findall("epoch_begin.*?epoch_end", " ".join(stages))
    assert ["valid_end" in epoch for epoch in epochs] == [False, True, False, True, True]


def test_a_run_of_no_epochs() -> None:
    assert stages_of(epochs=0) == ["begin", "end", "exit"]


def test_iterate_yields_every_boundary_and_nothing_else() -> None:
    loop = make_loop(valid=VALID, epochs=1)
    expected = [stage for stage in ["begin", *TRAIN_EPOCH, *VALIDATION, "epoch_end", "end"] if stage in BOUNDARIES]
    start = fl.init(loop)
    contexts = list(fl.iterate(start))
    assert [ctx.stage for ctx in contexts] == expected
    for i, ctx in enumerate(contexts):
        assert [fl.digest(each) for each in fl.iterate(ctx)] == [fl.digest(each) for each in contexts[i + 1 :]]
        assert ctx.batch == ctx.y_hats == ctx.grads == ()


def test_the_place_in_every_hook_and_at_every_boundary() -> None:
    seen: list[tuple[str, Any]] = []
    look = recorder(seen, lambda ctx: (ctx.epoch, ctx.step, ctx.step_valid, ctx.global_step, ctx.stage))
    boundaries = list(fl.iterate(fl.init(make_loop(valid=VALID, callbacks=[look]))))
    first = [
        ("begin", (0, 0, 0, 0, "")),
        ("epoch_begin", (1, 0, 0, 0, "begin")),
        ("batch_begin", (1, 1, 0, 1, "epoch_begin")),
        ("after_backward", (1, 1, 0, 1, "epoch_begin")),
        ("batch_end", (1, 1, 0, 1, "epoch_begin")),
        ("batch_begin", (1, 2, 0, 2, "batch_end")),
        ("after_backward", (1, 2, 0, 2, "batch_end")),
        ("batch_end", (1, 2, 0, 2, "batch_end")),
        ("batch_begin", (1, 3, 0, 3, "batch_end")),
        ("after_backward", (1, 3, 0, 3, "batch_end")),
        ("batch_end", (1, 3, 0, 3, "batch_end")),
        ("before_valid", (1, 3, 0, 3, "batch_end")),
        ("batch_valid_begin", (1, 3, 1, 3, "before_valid")),
        ("batch_valid_end", (1, 3, 1, 3, "before_valid")),
        ("batch_valid_begin", (1, 3, 2, 3, "batch_valid_end")),
        ("batch_valid_end", (1, 3, 2, 3, "batch_valid_end")),
    ]
    assert seen[: len(first)] == first
    assert seen[-1] == ("exit", (2, 3, 0, 6, "end"))
    assert seen[-2] == ("end", (2, 3, 0, 6, "epoch_end"))
    in_hooks = [(stage, place[:2] + place[3:4]) for stage, place in seen if stage in BOUNDARIES]
    assert in_hooks == [(ctx.stage, (ctx.epoch, ctx.step, ctx.global_step)) for ctx in boundaries]
    assert [ctx.step_valid for ctx in boundaries if ctx.stage == "batch_valid_end"] == [1, 2, 1, 2]
    assert not any(ctx.step_valid for ctx in boundaries if "valid_" not in ctx.stage or ctx.stage == "valid_end")


def test_what_is_there_in_every_hook() -> None:
    seen: list[tuple[str, Any]] = []
    names = ("batch", "y_hats", "grads")
    look = recorder(seen, lambda ctx: tuple(name for name in names if getattr(ctx, name) != ()))
    fl.train(fl.init(make_loop(valid=VALID, callbacks=[look])))
    there = {
        "batch_begin": ("batch",),
        "after_backward": names,
        "batch_end": names,
        "batch_valid_begin": ("batch",),
        "batch_valid_end": ("batch", "y_hats"),
    }
    assert set(seen) == {(stage, there.get(stage, ())) for stage in fl.STAGES}


def test_scores_are_replaced_when_they_are_made() -> None:
    seen: list[tuple[str, Any]] = []
    look = recorder(seen, lambda ctx: (ctx.epoch, bool(ctx.last_scores_train), bool(ctx.last_scores_valid)))
    measures = {"measures_train": [ERROR], "measures_valid": [ERROR]}
    fl.train(fl.init(make_loop(valid=VALID, epochs=4, eval_freq=2, callbacks=[look], **measures)))
    epochs = {(stage, place[0]): place[1:] for stage, place in seen}
    assert epochs["before_valid", 1] == (False, False)
    assert epochs["epoch_end", 1] == (False, False)
    assert epochs["batch_end", 2] == (False, False)
    assert epochs["before_valid", 2] == (True, False)
    assert epochs["batch_valid_end", 2] == (True, False)
    assert epochs["valid_end", 2] == epochs["epoch_end", 2] == (True, True)
    assert epochs["batch_end", 3] == (True, True)
    assert epochs["before_valid", 3] == (False, True)
    assert epochs["epoch_end", 3] == (False, False)
    assert epochs["before_valid", 4] == (True, False)
    assert epochs["end", 4] == (True, True)


def test_validation_scores_of_the_epoch_before_are_gone_when_the_next_ones_are_made() -> None:
    scores: list[Any] = []
    look = recorder(scores, lambda ctx: (ctx.last_scores_train, ctx.last_scores_valid), ("before_valid", "valid_end"))
    loop = make_loop(valid=VALID, measures_train=[ERROR], measures_valid=[ERROR], callbacks=[look])
    fl.train(fl.init(loop))
    (_, first), (_, validated), (_, second), (_, last) = scores
    assert first[1] == ()
    assert validated[1] == second[1]
    assert second[0] != first[0]
    assert last[1] != validated[1]


def test_the_loss_of_the_last_batch() -> None:
    seen: list[tuple[str, Any]] = []
    look = recorder(seen, lambda ctx: (ctx.global_step, ctx.last_loss))
    loop = make_loop(callbacks=[look])
    ctx = fl.train(fl.init(loop))
    losses = {(stage, step): loss for stage, (step, loss) in seen}
    assert losses["begin", 0] == losses["epoch_begin", 0] == losses["batch_begin", 1] == ()
    for step in (1, 2, 3):
        assert losses["after_backward", step] is losses["batch_end", step]
        assert losses["batch_end", step].shape == ()
        assert losses["batch_begin", step + 1] is losses["batch_end", step]
    assert ctx.last_loss is losses["batch_end", 6]


@pytest.mark.parametrize("stage", [stage for stage in fl.STAGES if stage not in ("end", "exit")])
def test_terminate_ends_training_before_the_next_epoch(stage: str) -> None:
    stop = fl.Callback("stop", **{stage: lambda ctx: fl.evolve(ctx, terminate=True)})
    ctx = fl.train(fl.init(make_loop(valid=VALID, epochs=3, callbacks=[stop])))
    assert (ctx.stage, ctx.terminate) == ("end", True)
    assert (ctx.epoch, ctx.step) == ((0, 0) if stage == "begin" else (1, 3))
    assert fl.train(ctx) is ctx


def test_terminate_before_training() -> None:
    ctx = fl.train(fl.evolve(fl.init(make_loop()), terminate=True))
    assert (ctx.stage, ctx.epoch) == ("end", 0)


def test_training_can_be_continued_from_every_boundary() -> None:
    loop = full_loop(epochs=3, eval_freq=2)
    start = fl.init(loop, seed=3)
    final = fl.digest(fl.train(start))
    for ctx in fl.iterate(start):
        assert fl.digest(fl.train(ctx)) == final


def test_runs_of_one_loop_can_be_interleaved() -> None:
    loop = full_loop()
    starts = [fl.init(loop, seed) for seed in (1, 2)]
    expected = [fl.digest(fl.train(start)) for start in starts]
    pairs = list(zip(*map(fl.iterate, starts), strict=True))
    assert [fl.digest(ctx) for ctx in pairs[-1]] == expected


def test_contexts_can_be_copied_deeply() -> None:
    middle = fl.train(fl.init(full_loop()), steps=2)
    assert fl.digest(fl.train(copy.deepcopy(middle))) == fl.digest(fl.train(middle))


def test_training_within_no_grad_is_training() -> None:
    start = fl.init(full_loop())
    expected = fl.digest(fl.train(start))
    with torch.no_grad():
        assert fl.digest(fl.train(start)) == expected


@pytest.mark.parametrize("pieces", [[1] * 6, [2, 4], [5, 1], [3, 3], [100]])
def test_training_in_pieces_is_training_at_once(pieces: list[int]) -> None:
    start = fl.init(full_loop(), seed=3)
    ctx = start
    for steps in pieces:
        before = ctx
        ctx = fl.train(ctx, steps=steps)
        assert (ctx.stage, ctx.global_step - before.global_step) in (("batch_end", steps), ("end", 6))
    assert fl.digest(fl.train(ctx)) == fl.digest(fl.train(start))


def test_steps_stop_after_the_batch_even_at_the_end_of_an_epoch() -> None:
    start = fl.init(make_loop(valid=VALID))
    ctx = fl.train(start, steps=3)
    assert (ctx.stage, ctx.epoch, ctx.step) == ("batch_end", 1, 3)
    assert next(fl.iterate(ctx)).stage == "before_valid"
    ctx = fl.train(ctx, steps=3)
    assert (ctx.stage, ctx.epoch, ctx.step) == ("batch_end", 2, 3)
    ctx = fl.train(ctx, steps=1)
    assert ctx.stage == "end"


def test_no_steps_are_no_change_and_no_hook() -> None:
    seen: list[tuple[str, Any]] = []
    start = fl.init(make_loop(callbacks=[recorder(seen, repr)]))
    assert fl.train(start, steps=0) is start
    assert seen == []


def test_a_finished_context_is_final() -> None:
    seen: list[tuple[str, Any]] = []
    ctx = fl.train(fl.init(make_loop(epochs=1, callbacks=[recorder(seen, repr)])))
    seen.clear()
    assert fl.train(ctx) is ctx
    assert fl.train(ctx, steps=3) is ctx
    assert list(fl.iterate(ctx)) == []
    assert seen == []


def test_begin_and_end_run_once_in_the_life_of_a_run_and_exit_in_every_call() -> None:
    seen: list[tuple[str, Any]] = []
    ctx = fl.init(make_loop(callbacks=[recorder(seen, lambda ctx: ctx.global_step, ("begin", "end", "exit"))]))
    while ctx.stage != "end":
        ctx = fl.train(ctx, steps=4)
    assert seen == [("begin", 0), ("exit", 4), ("end", 6), ("exit", 6)]


def test_an_iterator_that_is_never_started_runs_nothing() -> None:
    seen: list[tuple[str, Any]] = []
    fl.iterate(fl.init(make_loop(callbacks=[recorder(seen, repr)]))).close()
    assert seen == []


@pytest.mark.parametrize(
    ("argument", "error", "message"),
    [
        (-1, ValueError, "not -1"),
        (1.0, ValueError, "not 1.0"),
        (True, ValueError, "not True"),
        ("2", ValueError, "not '2'"),
    ],
)
def test_steps_are_a_number_of_batches(argument: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"train: steps must be a non-negative integer or None, {message}"):
        fl.train(fl.init(make_loop()), steps=argument)


@pytest.mark.parametrize("function", [fl.train, fl.iterate, lambda ctx: fl.train_step(ctx, (X, Y))])
def test_only_contexts_are_trained(function: Any) -> None:
    with pytest.raises(TypeError, match="takes a Context, not Loop"):
        function(make_loop())


GOING_ON = [fl.train, fl.iterate, fl.state_dict, fl.digest, lambda ctx: fl.train_step(ctx, (X, Y))]


@pytest.mark.parametrize("stage", [stage for stage in fl.STAGES if stage != "exit"])
def test_a_context_from_inside_a_stage_is_no_place_to_go_on_from(stage: str) -> None:
    inside: list[fl.Context] = []

    def keep(ctx: fl.Context) -> fl.Context:
        inside.append(ctx)
        return ctx

    fl.train(fl.init(full_loop(callbacks=[fl.Callback("keep", **{stage: keep})])))
    assert inside
    for ctx in inside:
        for go_on in GOING_ON:
            with pytest.raises(ValueError, match=f"by a hook of stage '{stage}' .epoch {ctx.epoch}, step {ctx.step}"):
                go_on(ctx)


def test_hooks_evolve_anything() -> None:
    def clip(ctx: fl.Context) -> fl.Context:
        return fl.evolve(ctx, grads={name: grad.clamp(-0.01, 0.01) for name, grad in ctx.grads.items()})

    def halve(ctx: fl.Context) -> fl.Context:
        return ctx.with_hyperparameters(lr=ctx.optimizer_state["groups"][0]["lr"] / 2)

    def freeze(ctx: fl.Context) -> fl.Context:
        return fl.evolve(ctx, trainable=ctx.trainable[2:])

    hooks = {"after_backward": clip, "epoch_end": halve, "epoch_begin": fl.when(lambda ctx: ctx.epoch == 2, freeze)}
    loop = make_loop(callbacks=[fl.Callback("all", **hooks)])
    module: Any = fl.to_module(fl.init(loop))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    source: Any = loop.train
    for epoch in (1, 2):
        if epoch == 2:
            module[0].requires_grad_(False)
        for index in source.order(0, epoch).split(4):
            torch.nn.functional.mse_loss(module(X[index]), Y[index]).backward()
            torch.nn.utils.clip_grad_value_(module.parameters(), 0.01)
            optimizer.step()
            optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] /= 2
    ctx = fl.train(fl.init(loop))
    assert all(torch.equal(param, ctx.params[name]) for name, param in module.named_parameters())
    assert ctx.optimizer_state["groups"][0]["lr"] == 0.025


@pytest.mark.parametrize("stage", [stage for stage in BOUNDARIES if stage != "exit"])
def test_parameters_that_a_hook_puts_in_are_those_that_training_goes_on_with(stage: str) -> None:
    def reset(ctx: fl.Context) -> fl.Context:
        return fl.evolve(ctx, params=fl.tree_map(torch.zeros_like, ctx.params))

    loop = make_loop(valid=VALID, callbacks=[fl.Callback("reset", **{stage: reset})])
    ctx = next(ctx for ctx in fl.iterate(fl.init(loop)) if ctx.stage == stage)
    assert not any(bool(param.any()) for param in ctx.params.values())
