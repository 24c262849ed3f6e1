"""Scores and predictions of any context: in evaluation mode, in the order of the rows, and without a trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import functional_loop as fl
from tests.sample_loops import data, full_loop, make_loop, mean_absolute, recorder

X, Y = data(3)
ERROR = fl.measure("error", mean_absolute)


def test_validate_gives_the_scores_that_training_would_make() -> None:
    loop = full_loop()
    contexts = list(fl.iterate(fl.init(loop)))
    for ctx in contexts:
        if ctx.stage == "before_valid":
            later = next(c for c in contexts if c.stage == "valid_end" and c.epoch == ctx.epoch)
            assert fl.validate(ctx) == later.last_scores_valid


def test_validate_on_other_data() -> None:
    ctx = fl.train(fl.init(full_loop()))
    source = fl.batches(X, Y, batch_size=3)
    with torch.no_grad():
        expected = mean_absolute(fl.to_module(ctx).eval()(X), Y).item()
    assert fl.validate(ctx, source) == {"error": expected}


def test_evaluation_changes_nothing_and_runs_no_hook() -> None:
    seen: list[tuple[str, Any]] = []
    ctx = fl.train(fl.init(full_loop(callbacks=[recorder(seen, repr)])), steps=2)
    digest, hooks, state = fl.digest(ctx), len(seen), torch.get_rng_state()
    fl.validate(ctx)
    fl.predict(ctx, X)
    assert fl.digest(ctx) == digest
    assert len(seen) == hooks
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_does_not_disturb_training() -> None:
    loop = full_loop()
    expected = fl.digest(fl.train(fl.init(loop)))
    for ctx in fl.iterate(fl.init(loop)):
        fl.validate(ctx)
        fl.predict(ctx, X)
        last = ctx
    assert fl.digest(last) == expected


def test_validation_data_cannot_change_training() -> None:
    loop = full_loop(measures_valid=())
    without = fl.train(fl.init(fl.evolve(loop, valid=None)))
    ctx = fl.train(fl.init(loop))
    assert fl.tree_equal(ctx.params, without.params)
    assert fl.tree_equal(ctx.buffers, without.buffers)
    assert fl.tree_equal(ctx.optimizer_state, without.optimizer_state)


def test_predictions_are_in_the_order_of_the_rows_whatever_the_batch_size() -> None:
    ctx = fl.train(fl.init(full_loop()))
    with torch.no_grad():
        module = fl.to_module(ctx).eval()
        for size in (1, 3, 10, 100):
            expected = torch.cat([module(rows) for rows in X.split(size)])
            assert torch.equal(fl.predict(ctx, X, batch_size=size), expected)
            assert torch.equal(fl.predict(ctx, fl.batches(X, Y, batch_size=size)), expected)


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        return {"sum": self.linear(a + b), "difference": self.linear(a - b)}


@pytest.mark.parametrize("x", [(X, 2 * X), {"b": 2 * X, "a": X}], ids=["tuple", "dict"])
def test_predictions_of_several_inputs_and_outputs(x: Any) -> None:
    ctx = fl.init(make_loop(network=Both(), train=fl.batches(x, Y)))
    outputs = fl.predict(ctx, x, batch_size=4)
    linear: Any = fl.to_module(ctx).linear
    with torch.no_grad():
        expected = {"sum": [linear(rows) for rows in (X + 2 * X).split(4)]}
        expected["difference"] = [linear(rows) for rows in (X - 2 * X).split(4)]
    assert fl.tree_equal(outputs, {name: torch.cat(parts) for name, parts in expected.items()})


def test_predictions_have_no_graph() -> None:
    assert not fl.predict(fl.init(make_loop()), X).requires_grad


class NoisyAlways(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.rand(())


def test_randomness_in_evaluation_is_a_function_of_the_place() -> None:
    ctx = fl.init(make_loop(network=NoisyAlways(3, 2)))
    first = fl.predict(ctx, X, batch_size=5)
    assert torch.equal(fl.predict(ctx, X, batch_size=5), first)
    noise = first - fl.predict(fl.init(make_loop(network=fl.to_module(ctx))), X, batch_size=5)
    assert not noise.any()
    assert not torch.equal(fl.predict(fl.evolve(ctx, seed=1), X, batch_size=5), first)


def test_predict_works_while_a_loop_is_training() -> None:
    predictions: list[Tensor] = []

    def predict(ctx: fl.Context) -> fl.Context:
        predictions.append(fl.predict(ctx, X))
        return ctx

    stages = dict.fromkeys([stage for stage in fl.STAGES if stage != "exit"], predict)
    loop = full_loop()
    observed = fl.evolve(loop, callbacks=[*loop.callbacks, fl.Callback("predict", **stages)])
    assert fl.digest(fl.train(fl.init(observed))) == fl.digest(fl.train(fl.init(loop)))
    assert not torch.equal(predictions[0], predictions[-1])


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(ValueError, match="no validation data; give a source"):
        fl.validate(fl.init(make_loop(measures_valid=[ERROR])))
    with pytest.raises(ValueError, match="no measures_valid"):
        fl.validate(fl.init(make_loop(valid=fl.batches(X, Y))))


@pytest.mark.parametrize("x", [3, torch.tensor(1.0), [], [X], "rows"], ids=repr)
def test_predict_takes_rows(x: Any) -> None:
    with pytest.raises(TypeError, match="predict takes a tensor, tuple or dict of tensors with rows"):
        fl.predict(fl.init(make_loop()), x)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_predict_in_batches_of_no_rows_is_refused(batch_size: int) -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        fl.predict(fl.init(make_loop()), X, batch_size=batch_size)


def test_predictions_of_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="the data has no rows"):
        fl.predict(fl.init(make_loop()), X[:0])


def test_predictions_in_a_shuffled_order_are_refused() -> None:
    with pytest.raises(ValueError, match="shuffle"):
        fl.predict(fl.init(make_loop()), fl.batches(X, Y, shuffle=True))
