"""The Context as a value: a frozen pytree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import optree
import pytest
import torch
import torch.utils._pytree as torch_pytree

import functional_loop as fl
from functional_loop.core.context import first_output
from functional_loop.core.stages import BOUNDARIES
from tests.sample_loops import full_loop, make_loop


def test_assignment_fails() -> None:
    ctx = fl.init(make_loop())
    for field in attrs.fields(fl.Context):
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            setattr(ctx, field.name, None)
    with pytest.raises((attrs.exceptions.FrozenInstanceError, AttributeError)):
        ctx.new = 1


TAKING_A_CONTEXT: dict[str, Callable[[Any], Any]] = {
    "train": fl.train,
    "iterate": fl.iterate,
    "train_step": lambda ctx: fl.train_step(ctx, (torch.ones(4, 3), torch.ones(4, 2))),
    "validate": fl.validate,
    "predict": lambda ctx: fl.predict(ctx, torch.ones(4, 3)),
    "state_dict": fl.state_dict,
    "load_state_dict": lambda ctx: fl.load_state_dict(ctx, {}),
    "digest": fl.digest,
    "to_module": fl.to_module,
    "to_optimizer": lambda ctx: fl.to_optimizer(ctx, torch.nn.Linear(3, 2)),
    "save": lambda ctx: fl.CheckpointStore("never made").save(ctx),
    "check": lambda ctx: fl.CheckpointStore("never made").check(ctx),
}


@pytest.mark.parametrize("function", TAKING_A_CONTEXT)
def test_a_loop_is_no_context(function: str) -> None:
    with pytest.raises(TypeError, match=f"{function} takes a Context, not Loop"):
        TAKING_A_CONTEXT[function](make_loop())


@pytest.mark.parametrize("library", [optree, torch_pytree])
def test_a_context_is_a_tree_of_both_libraries(library: Any) -> None:
    for ctx in fl.iterate(fl.init(full_loop())):
        mapped = library.tree_map(lambda leaf: leaf, ctx)
        assert isinstance(mapped, fl.Context)
        assert mapped is not ctx
        assert mapped.loop is ctx.loop
        assert fl.tree_equal(mapped, ctx)
        assert fl.digest(mapped) == fl.digest(ctx)


def test_training_goes_on_from_a_mapped_context() -> None:
    middle = fl.train(fl.init(full_loop()), steps=2)
    copied = fl.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, middle)
    assert fl.digest(fl.train(copied)) == fl.digest(fl.train(middle))


def test_the_loop_is_metadata_and_paths_are_names() -> None:
    ctx = fl.init(make_loop())
    paths = optree.tree_paths(ctx)
    assert ("params", "0.weight") in paths
    assert ("epoch",) in paths
    assert not any(path[0] == "loop" for path in paths)
    names = [torch_pytree.keystr(path) for path, _ in torch_pytree.tree_flatten_with_path(ctx)[0]]
    assert ".params['0.weight']" in names


def test_absent_values_have_no_leaves() -> None:
    ctx = fl.init(make_loop())
    for field in (
        "batch",
        "y_hats",
        "grads",
        "accumulated",
        "last_loss",
        "last_scores_train",
        "last_scores_valid",
        "data",
    ):
        assert getattr(ctx, field) == ()
        assert optree.tree_leaves(getattr(ctx, field)) == []


def test_with_callback_state_changes_one_slot_of_a_copy() -> None:
    ctx = fl.init(full_loop())
    changed = ctx.with_callback_state("counter", 5)
    assert (changed.callbacks, ctx.callbacks) == ({"counter": 5}, {"counter": 0})
    with pytest.raises(KeyError, match="no callback 'count' in this loop; did you mean 'counter'"):
        ctx.with_callback_state("count", 5)


def two_groups() -> fl.Context:
    optimizer = fl.optimizer(torch.optim.SGD, lr=0.1, groups=[{"params": "*.bias", "lr": 0.2}])
    return fl.init(make_loop(optimizer=optimizer))


def rates(ctx: fl.Context) -> list[float]:
    return [group["lr"] for group in ctx.optimizer_state["groups"]]


def test_with_hyperparameters_changes_one_group_or_all_of_a_copy() -> None:
    ctx = two_groups()
    assert rates(ctx.with_hyperparameters(lr=0.5)) == [0.5, 0.5]
    assert rates(ctx.with_hyperparameters(1, lr=0.5)) == [0.2, 0.5]
    assert rates(ctx) == [0.2, 0.1]


def test_with_hyperparameters_knows_what_there_is() -> None:
    ctx = two_groups()
    with pytest.raises(KeyError, match="no hyperparameter 'mometum' in group 0; did you mean 'momentum'"):
        ctx.with_hyperparameters(mometum=0.5)
    with pytest.raises(IndexError):
        ctx.with_hyperparameters(2, lr=0.5)


def test_a_boundary_holds_durable_fields_only() -> None:
    inside: list[fl.Context] = []

    def keep(ctx: fl.Context) -> fl.Context:
        inside.append(ctx)
        return ctx

    fl.train(fl.init(make_loop(callbacks=[fl.Callback("keep", batch_end=keep)])), steps=1)
    for ctx in inside:
        assert ctx.batch != ()
        assert ctx.y_hats != ()
        assert ctx.grads != ()
        after = fl.boundary(ctx, "batch_end")
        assert (after.batch, after.y_hats, after.grads, after.stage) == ((), (), (), "batch_end")
        assert after.params is ctx.params


def test_the_boundary_of_the_last_hook_is_what_the_loop_yields() -> None:
    saved: list[str] = []

    def save(stage: str) -> fl.Hook:
        def run(ctx: fl.Context) -> fl.Context:
            saved.append(fl.digest(fl.boundary(ctx, stage)))
            return ctx

        return run

    hooks = {stage: save(stage) for stage in BOUNDARIES}
    callback = fl.Callback("save", weight=float("inf"), **hooks)
    loop = full_loop()
    loop = fl.evolve(loop, callbacks=[*loop.callbacks, callback])
    assert [fl.digest(ctx) for ctx in fl.iterate(fl.init(loop))] == saved


@pytest.mark.parametrize("running", ["after_backward", "batch_end", "epoch_end"])
def test_only_the_stage_that_is_running_has_a_boundary(running: str) -> None:
    refused: set[str] = set()

    def save(ctx: fl.Context) -> fl.Context:
        for stage in (*fl.STAGES, "", "nowhere"):
            try:
                fl.state_dict(fl.boundary(ctx, stage))
            except ValueError:
                refused.add(stage)
        return ctx

    fl.train(fl.init(full_loop(callbacks=[fl.Callback("save", **{running: save})])))
    assert refused == {*fl.STAGES, "", "nowhere"} - ({running} & set(BOUNDARIES))


@pytest.mark.parametrize(
    ("y_hats", "first"), [(1, 1), ((1, 2), 1), ([1, 2], 1), ({"b": 1, "a": 2}, 1), ((), ())], ids=repr
)
def test_the_first_output(y_hats: Any, first: Any) -> None:
    assert first_output(y_hats) == first


def test_y_hat_is_the_first_output() -> None:
    ctx = fl.init(make_loop())
    assert ctx.y_hat == ()
    assert fl.evolve(ctx, y_hats={"mean": 1, "variance": 2}).y_hat == 1


def test_the_printed_context_says_where_it_is() -> None:
    ctx = fl.train(fl.init(make_loop(), seed=4), steps=2)
    assert repr(ctx) == "Context(epoch=1, step=2, global_step=2, stage='batch_end', seed=4)"
    assert repr(fl.evolve(ctx, terminate=True)).endswith("seed=4, terminate=True)")
