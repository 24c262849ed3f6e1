"""Callbacks and hooks as values: what is refused when they are made, and how they combine."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import functional_loop as fl
from functional_loop.core.stages import BOUNDARIES
from tests.sample_loops import counter, make_loop, recorder


def nothing(ctx: fl.Context) -> fl.Context:
    return ctx


def test_the_stages_are_those_of_the_grammar() -> None:
    assert fl.STAGES == (
        "begin",
        "epoch_begin",
        "batch_begin",
        "after_backward",
        "batch_end",
        "before_valid",
        "batch_valid_begin",
        "batch_valid_end",
        "valid_end",
        "epoch_end",
        "end",
        "exit",
    )
    assert set(fl.STAGES) - set(BOUNDARIES) == {"batch_begin", "after_backward", "batch_valid_begin", "exit"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"epoch_ends": nothing}, TypeError, "'mine': no stage 'epoch_ends'; did you mean 'epoch_end'"),
        ({"on_epoch_end": nothing}, TypeError, "no stage 'on_epoch_end'; did you mean 'epoch_end'"),
        ({"zzz": nothing}, TypeError, "no stage 'zzz'; there is 'begin'"),
        ({"zzz": None}, TypeError, "no stage 'zzz'"),
        ({"epoch_end": 3}, TypeError, "'mine': epoch_end must be a function of the context, not 3"),
        ({"init": {}}, TypeError, "'mine': init must be a function"),
        ({"weight": "1"}, TypeError, "'mine': the weight is a number, not '1'"),
        ({"weight": True}, TypeError, "the weight is a number, not True"),
        ({"weight": None}, TypeError, "the weight is a number, not None"),
        ({"weight": math.nan}, ValueError, "'mine': the weight is NaN"),
        ({"kind": 3}, TypeError, "'mine': .*kind.* 3"),
        ({"id": ""}, ValueError, "id of a callback must not be empty"),
        ({"id": 7}, TypeError, "id of a callback is a string, not 7"),
    ],
)
def test_wrong_callbacks_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fl.Callback(**{"id": "mine"} | arguments)


def test_a_callback_shows_its_hooks_in_the_order_of_the_grammar() -> None:
    callback = fl.Callback("mine", exit=nothing, begin=nothing, batch_end=None)
    assert repr(callback) == "Callback('mine', begin, exit)"
    assert callback.as_callback() is callback


@given(st.lists(st.sampled_from([-math.inf, -1.5, 0.0, 0, 1, math.inf]), max_size=8))
def test_hooks_run_by_ascending_weight_and_equal_weights_in_list_order(weights: list[float]) -> None:
    ran: list[int] = []

    def mark(place: int) -> fl.Hook:
        def run(ctx: fl.Context) -> fl.Context:
            ran.append(place)
            return ctx

        return run

    callbacks = [fl.Callback(str(i), weight=weight, begin=mark(i)) for i, weight in enumerate(weights)]
    fl.train(fl.init(make_loop(epochs=0, callbacks=callbacks)))
    assert ran == sorted(range(len(weights)), key=lambda i: weights[i])


def test_state_goes_from_hook_to_hook_within_a_stage() -> None:
    def append(letter: str) -> fl.Hook:
        return lambda ctx: ctx.with_callback_state("log", ctx.callbacks["log"] + letter)

    log = fl.Callback("log", init=lambda ctx: "", begin=append("a"), weight=1)
    other = fl.Callback("other", begin=append("b"))
    assert fl.train(fl.init(make_loop(epochs=0, callbacks=[log, other]))).callbacks == {"log": "ba", "other": ()}


words = st.lists(st.text(max_size=3), max_size=4)


def appending(words: list[str]) -> list[Callable[[Any], Any]]:
    return [lambda text, word=word: text + word for word in words]


@given(words, words, words)
def test_compose_is_associative_with_the_identity(a: list[str], b: list[str], c: list[str]) -> None:
    f, g, h = (fl.compose(*appending(words)) for words in (a, b, c))
    expected: Any = "".join(["start", *a, *b, *c])
    start: Any = "start"
    assert fl.compose(fl.compose(f, g), h)(start) == expected
    assert fl.compose(f, fl.compose(g, h))(start) == expected
    assert fl.compose(fl.compose(), f, g, h, fl.compose())(start) == expected


def test_when_runs_its_hook_where_the_condition_holds() -> None:
    hook = fl.when(lambda ctx: ctx.epoch == 2, lambda ctx: fl.evolve(ctx, terminate=True))
    ctx = fl.train(fl.init(make_loop(epochs=5, callbacks=[fl.Callback("stop", epoch_end=hook)])))
    assert ctx.epoch == 2


@pytest.mark.parametrize("n", [0, -1, 1.0, True, None])
def test_every_takes_a_positive_integer(n: Any) -> None:
    with pytest.raises(ValueError, match="every: n must be a positive integer"):
        fl.every(n, nothing)


def test_every_counts_batches_of_the_run_or_validation_batches_or_epochs() -> None:
    seen: list[tuple[str, Any]] = []
    hooks = recorder(seen, lambda ctx: (ctx.epoch, ctx.global_step, ctx.step_valid)).hooks
    callback = fl.Callback("log", **{stage: fl.every(2, hook) for stage, hook in hooks.items()})
    fl.train(fl.init(make_loop(epochs=3, callbacks=[callback], valid=make_loop().train)))
    batches = {stage: [place[1] for s, place in seen if s == stage] for stage in fl.STAGES}
    for stage in ("batch_begin", "after_backward", "batch_end"):
        assert batches[stage] == [2, 4, 6, 8]
    for stage in ("epoch_begin", "before_valid", "valid_end", "epoch_end"):
        assert [place[0] for s, place in seen if s == stage] == [2]
    for stage in ("batch_valid_begin", "batch_valid_end"):
        assert [place[::2] for s, place in seen if s == stage] == [(1, 2), (2, 2), (3, 2)]


def test_a_callback_without_state_leaves_no_trace() -> None:
    plain = fl.train(fl.init(make_loop(callbacks=[counter()])))
    observed = fl.train(fl.init(make_loop(callbacks=[recorder([], repr), counter()])))
    assert fl.digest(plain) == fl.digest(observed)
    assert observed.callbacks == {"recorder": (), "counter": 6}
