"""`self.ctx`: every field can be read, some can be written, and all else is refused with a likely name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import functional_loop as fl
from functional_loop.callbacks.objects.callback_set import CallbackSet
from functional_loop.callbacks.objects.view import FIELDS, ContextView
from tests.callbacks.objects import CallbackSetBatches, digests, doing, watching
from tests.sample_loops import counter, full_loop, make_loop

OF_THE_ORIGINAL = (
    *("learner", "task_train", "task_valid", "loader_train", "loader_valid", "measures_train", "measures_valid"),
    *("network", "optimizer", "loss_fn", "total_epochs", "prediction_encoder", "eval_freq", "device"),
    *("last_scores_train", "last_scores_valid", "last_loss", "y_hat", "y_hats", "epoch", "step", "global_step"),
    *("batch", "terminate", "callbacks"),
)


def read(name: str, stage: str, **changes: Any) -> Any:
    """What a field is at the first run of a stage of ``full_loop``."""
    callback, seen = watching(lambda ctx: getattr(ctx, name), stages=(stage,))
    fl.train(fl.init(full_loop(**{"callbacks": [callback]} | changes)))
    return seen[0][1]


def trained(stage: str, write: Callable[[Any], None], **changes: Any) -> fl.Context:
    """A finished run in which ``write(ctx)`` ran at every ``stage``."""
    callback = doing("Writing", **{f"on_{stage}": lambda self: write(self.ctx)})
    return fl.train(fl.init(make_loop(**{"callbacks": [callback]} | changes)))


@pytest.mark.parametrize("stage", fl.STAGES)
def test_every_field_can_be_read_at_every_stage(stage: str) -> None:
    callback, seen = watching(lambda ctx: {name: getattr(ctx, name) for name in FIELDS}, stages=(stage,))
    fl.train(fl.init(full_loop(callbacks=[callback])))
    assert seen[0][1].keys() >= set(OF_THE_ORIGINAL)


def test_reading_everything_everywhere_changes_nothing() -> None:
    callback, _ = watching(lambda ctx: [getattr(ctx, name) for name in dir(ctx)])
    assert digests(full_loop(callbacks=[callback])) == digests(full_loop(callbacks=[]))


def test_the_place_is_that_of_the_loop() -> None:
    callback, seen = watching(
        lambda ctx: (ctx.epoch, ctx.step, ctx.step_valid, ctx.global_step),
        stages=("begin", "epoch_begin", "batch_begin", "batch_valid_end", "valid_end", "end"),
    )
    fl.train(fl.init(full_loop(callbacks=[callback], epochs=2)))
    places = [(stage, *place) for stage, place in seen]
    assert places[:5] == [
        ("begin", 0, 0, 0, 0),
        ("epoch_begin", 1, 0, 0, 0),
        ("batch_begin", 1, 1, 0, 1),
        ("batch_begin", 1, 2, 0, 2),
        ("batch_begin", 1, 3, 0, 3),
    ]
    assert places[5:7] == [("batch_valid_end", 1, 3, 1, 3), ("batch_valid_end", 1, 3, 2, 3)]
    assert places[-1] == ("end", 2, 3, 0, 6)


def test_the_fields_of_the_loop() -> None:
    loop = full_loop(eval_freq=2)
    for name, value in {
        "loader_train": loop.train,
        "task_train": loop.train,
        "loader_valid": loop.valid,
        "measures_train": loop.measures_train,
        "measures_valid": loop.measures_valid,
        "loss_fn": loop.loss,
        "total_epochs": 2,
        "eval_freq": 2,
        "device": torch.device("cpu"),
    }.items():
        callback, seen = watching(lambda ctx, name=name: getattr(ctx, name), stages=("begin",))
        fl.train(fl.init(fl.evolve(loop, callbacks=[callback])))
        assert seen[0][1] is value or seen[0][1] == value


def test_loaders_have_a_length() -> None:
    assert len(read("loader_train", "begin")) == 3
    assert len(read("loader_valid", "begin")) == 2
    assert read("loader_valid", "begin", valid=None, measures_valid=[]) is None


def test_what_a_batch_brings() -> None:
    batch = read("batch", "batch_begin")
    assert (batch.x.shape, batch.y.shape) == ((4, 3), (4, 2))
    assert read("y_hat", "batch_begin") == ()
    assert read("y_hat", "after_backward").shape == (4, 2)
    assert read("y_hats", "batch_end").shape == (4, 2)
    assert read("y_hat", "batch_valid_end").shape == (6, 2)
    assert read("batch", "epoch_end") == ()
    assert read("last_loss", "batch_begin") == ()
    assert read("last_loss", "after_backward").shape == ()
    assert set(read("grads", "after_backward")) == {"0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"}


def test_the_scores_are_there_when_they_are_made() -> None:
    assert read("last_scores_train", "batch_end") == ()
    assert set(read("last_scores_train", "before_valid")) == {"error"}
    assert read("last_scores_valid", "before_valid") == ()
    assert set(read("last_scores_valid", "valid_end")) == {"error"}


def test_what_only_the_one_who_trains_knows() -> None:
    callback, seen = watching(lambda ctx: (ctx.learner, ctx.task_train, ctx.prediction_encoder), stages=("begin",))
    loop = make_loop(callbacks=[callback])
    fl.train(fl.init(loop))
    assert seen[-1][1] == (None, loop.train, None)
    callback.environment = {"learner": "a learner", "task_train": "a task", "prediction_encoder": str}
    fl.train(fl.init(make_loop(callbacks=[callback])))
    assert seen[-1][1] == ("a learner", "a task", str)


def test_the_other_callbacks_are_there_by_id() -> None:
    other, pure = CallbackSetBatches(), counter()
    callback, seen = watching(lambda ctx: ctx.callbacks, stages=("end",))
    fl.train(fl.init(make_loop(callbacks=[callback, other, pure])))
    assert seen == [("end", {"batches": other, "counter": pure})]
    assert seen[0][1]["batches"].n == 6


def test_the_pure_context_is_that_of_the_callbacks_before_and_has_what_was_written() -> None:
    def write(self: Any) -> None:
        self.before = self.ctx.context
        self.ctx.terminate = True
        self.ctx.network[0].bias.data.zero_()
        self.after = self.ctx.context

    earlier = fl.Callback("earlier", weight=-1, epoch_end=lambda ctx: ctx.with_hyperparameters(lr=0.5))
    callback: Any = doing("Writing", on_epoch_end=write)
    ctx = fl.train(fl.init(make_loop(callbacks=[callback, earlier])))
    assert isinstance(callback.before, fl.Context)
    assert not callback.before.terminate
    assert callback.before.optimizer_state["groups"][0]["lr"] == 0.5
    assert callback.before.params["0.bias"].any()
    assert callback.after.terminate
    assert not callback.after.params["0.bias"].any()
    assert fl.tree_equal(callback.after.params, ctx.params)


def test_it_shows_what_it_is_and_what_it_has() -> None:
    callback, seen = watching(lambda ctx: (repr(ctx), dir(ctx)), stages=("batch_end",))
    fl.train(fl.init(make_loop(callbacks=[callback])))
    assert seen[0][1][0].startswith("<ctx at Context(epoch=1, step=1")
    assert set(seen[0][1][1]) >= set(OF_THE_ORIGINAL)
    for name in (*OF_THE_ORIGINAL, "context"):
        assert name in (ContextView.__doc__ or ""), name


# ---- what is refused


@pytest.mark.parametrize(
    ("name", "likely"),
    [("epohc", "epoch"), ("optimiser", "optimizer"), ("last_los", "last_loss"), ("net", "network")],
)
def test_a_field_that_does_not_exist_is_refused(name: str, likely: str) -> None:
    with pytest.raises(AttributeError, match=f"ctx has no field '{name}'; did you mean '{likely}'"):
        read(name, "begin")
    with pytest.raises(AttributeError, match=f"ctx has no field '{name}'"):
        trained("begin", lambda ctx: setattr(ctx, name, 1))


def test_a_misspelt_terminate_is_refused_with_the_right_one() -> None:
    with pytest.raises(AttributeError, match="no field 'terminated' to write to; did you mean 'terminate'"):
        trained("begin", lambda ctx: setattr(ctx, "terminated", True))


@pytest.mark.parametrize("name", ["epoch", "step", "global_step", "total_epochs", "loss_fn", "callbacks", "context"])
def test_a_field_of_the_loop_cannot_be_written(name: str) -> None:
    with pytest.raises(AttributeError, match=rf"ctx\.{name} belongs to the loop and can't be written to"):
        trained("begin", lambda ctx: setattr(ctx, name, 1))


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("network", "ctx.network can't be assigned to; change it in place"),
        ("optimizer", "change its param_groups and state in place"),
        ("params", "ctx.params can't be assigned to; change ctx.network"),
        ("buffers", "change ctx.network"),
        ("grads", "the .grad of ctx.network's parameters"),
        ("trainable", "requires_grad_"),
        ("optimizer_state", "change ctx.optimizer"),
    ],
)
def test_what_is_changed_in_place_cannot_be_assigned_to(name: str, instead: str) -> None:
    with pytest.raises(AttributeError, match=re.escape(instead)) as caught:
        trained("begin", lambda ctx: setattr(ctx, name, getattr(ctx, name)))
    assert any("in callback 'writing' at stage 'begin'" in note for note in caught.value.__notes__)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("terminate", "no"),
        ("terminate", 1),
        ("terminate", None),
        ("last_scores_train", 0.5),
        ("last_scores_valid", [("error", 0.5)]),
        ("batch", "none"),
    ],
)
def test_values_that_do_not_fit_are_refused(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name}|batch") as caught:
        trained("batch_begin", lambda ctx: setattr(ctx, name, value))
    assert any("in callback 'writing' at stage 'batch_begin'" in note for note in caught.value.__notes__)


def test_a_view_that_is_kept_cannot_be_written_to_later() -> None:
    class CallbackSetKeeping(CallbackSet):
        def on_batch_end(self) -> None:
            self.kept = self.ctx

        def on_epoch_end(self) -> None:
            self.kept.terminate = True

    with pytest.raises(AttributeError, match=r"ctx\.terminate can be written to only while the hook"):
        fl.train(fl.init(make_loop(callbacks=[CallbackSetKeeping()])))


# ---- what is written


def test_terminate_ends_the_run_before_the_next_epoch() -> None:
    ctx = trained("batch_begin", lambda ctx: setattr(ctx, "terminate", True), epochs=5)
    assert (ctx.epoch, ctx.step, ctx.terminate, ctx.stage) == (1, 3, True, "end")


def test_terminate_in_begin_trains_nothing() -> None:
    assert trained("begin", lambda ctx: setattr(ctx, "terminate", True)).global_step == 0


def test_what_was_written_is_read_back() -> None:
    def write(ctx: Any) -> None:
        assert ctx.terminate is False
        ctx.terminate = True
        assert ctx.terminate is True

    trained("begin", write)


def test_a_batch_can_be_replaced() -> None:
    pure = fl.Callback(
        "pure", batch_begin=lambda ctx: fl.evolve(ctx, batch=fl.evolve(ctx.batch, x=ctx.batch.x + 1, index=()))
    )
    expected = fl.digest(fl.train(fl.init(make_loop(callbacks=[pure]))))
    for shifted in (lambda batch: (batch.x + 1, batch.y), lambda batch: fl.Batch(batch.x + 1, batch.y)):
        ctx = trained("batch_begin", lambda ctx, shifted=shifted: setattr(ctx, "batch", shifted(ctx.batch)))
        assert fl.digest(ctx) == expected


def test_scores_and_loss_can_be_replaced() -> None:
    def write(ctx: Any) -> None:
        ctx.last_scores_valid = {**dict(ctx.last_scores_valid), "mine": 0.5}
        ctx.last_loss = ctx.last_loss + 1

    callback, seen = watching(lambda ctx: (ctx.last_scores_valid, ctx.last_loss), stages=("epoch_end",))
    writing = doing("Writing", on_valid_end=lambda self: write(self.ctx))
    ctx = fl.train(fl.init(full_loop(callbacks=[writing, callback])))
    plain = fl.train(fl.init(full_loop(callbacks=[])))
    assert ctx.last_scores_valid == {**dict(plain.last_scores_valid), "mine": 0.5} == seen[-1][1][0]
    assert fl.tree_equal(ctx.last_loss, plain.last_loss + 1)


def test_clones_of_what_is_read_can_be_changed_without_harm() -> None:
    def write(self: Any) -> None:
        fl.tree_map(torch.clone, self.ctx.optimizer_state["slots"]).clear()
        for tensor in (self.ctx.last_loss, self.ctx.y_hat, self.ctx.batch.x, *self.ctx.grads.values()):
            tensor.clone().zero_()
        for tensor in (*self.ctx.params.values(), *self.ctx.buffers.values()):
            tensor.clone().zero_()

    changing = doing(on_after_backward=write, on_batch_end=write)
    assert digests(make_loop(callbacks=[changing])) == digests(make_loop())


def halved(tree: Any) -> Any:
    return fl.tree_map(lambda t: t * 0.5 if t.is_floating_point() else t, tree)


def halve(tree: dict[str, torch.Tensor]) -> None:
    for tensor in tree.values():
        if tensor.is_floating_point():
            tensor.mul_(0.5)


def replace(tree: dict[str, torch.Tensor]) -> None:
    tree.update(halved(tree))


def through_numpy(tree: dict[str, torch.Tensor]) -> None:
    for tensor in tree.values():
        if tensor.is_floating_point():
            tensor.numpy()[...] *= 0.5


@pytest.mark.parametrize("network", ["never", "before", "after"])
@pytest.mark.parametrize("write", [halve, replace, through_numpy])
@pytest.mark.parametrize(
    ("field", "stage"),
    [
        ("params", "begin"),
        ("params", "batch_begin"),
        ("params", "after_backward"),
        ("params", "batch_end"),
        ("params", "batch_valid_end"),
        ("params", "epoch_end"),
        ("buffers", "batch_end"),
        ("grads", "after_backward"),
    ],
)
def test_tensors_by_name_are_written_in_place_as_by_a_pure_hook(
    field: str, stage: str, write: Callable[[Any], None], network: str
) -> None:
    def by_object(self: Any) -> None:
        if network == "before":
            assert self.ctx.network is not None
        tree = getattr(self.ctx, field)
        if network == "after":
            assert self.ctx.network is not None
        write(tree)
        assert fl.tree_equal(getattr(self.ctx.context, field), tree)

    def pure(ctx: fl.Context) -> fl.Context:
        return fl.evolve(ctx, **{field: halved(getattr(ctx, field))})

    writing = full_loop(callbacks=[doing("Writing", **{f"on_{stage}": by_object})])
    hook: dict[str, Any] = {stage: pure}
    assert digests(writing) == digests(full_loop(callbacks=[fl.Callback("hook", **hook)]))


def test_the_network_has_what_is_written_to_the_tensors_and_they_what_is_written_to_it() -> None:
    def write(self: Any) -> None:
        tree = self.ctx.params
        tree["0.bias"].fill_(1)
        assert (self.ctx.network[0].bias == 1).all()
        self.ctx.network[0].bias.data.fill_(2)
        assert (tree["0.bias"] == 2).all()
        assert (self.ctx.params["0.bias"] == 2).all()

    ctx = fl.train(fl.init(make_loop(callbacks=[doing(on_end=write)])))
    assert (ctx.params["0.bias"] == 2).all()


def test_gradients_are_clipped_removed_and_added_by_name() -> None:
    def write(self: Any) -> None:
        self.ctx.grads["0.weight"].clamp_(-0.01, 0.01)
        del self.ctx.grads["1.weight"]
        self.ctx.grads["1.bias"] = torch.ones(4)

    def pure(ctx: fl.Context) -> fl.Context:
        grads = {name: grad for name, grad in ctx.grads.items() if name != "1.weight"}
        return fl.evolve(ctx, grads=grads | {"0.weight": grads["0.weight"].clamp(-0.01, 0.01), "1.bias": torch.ones(4)})

    hook = fl.Callback("hook", after_backward=pure)
    assert digests(make_loop(callbacks=[doing(on_after_backward=write)])) == digests(make_loop(callbacks=[hook]))


def test_scores_loss_outputs_and_batches_are_written_in_place() -> None:
    def score(self: Any) -> None:
        self.ctx.last_scores_valid["mine"] = 0.5
        self.ctx.last_scores_train["mine"] = torch.tensor(0.25)

    def batch(self: Any) -> None:
        self.ctx.last_loss.fill_(7.0)
        self.ctx.y_hat.fill_(8.0)
        self.ctx.batch.x.fill_(9.0)

    seen: list[Any] = []

    def look(ctx: fl.Context) -> fl.Context:
        seen.append((float(ctx.last_loss), ctx.y_hat.unique().tolist(), ctx.batch.x.unique().tolist()))
        return ctx

    loop = full_loop(
        callbacks=[
            doing("Score", on_valid_end=score),
            doing("Batch", on_batch_end=batch),
            fl.Callback("look", batch_end=look),
        ]
    )
    ctx = fl.train(fl.init(loop))
    assert seen == [(7.0, [8.0], [9.0])] * len(seen)
    assert dict(ctx.last_scores_valid)["mine"] == 0.5
    assert dict(ctx.last_scores_train)["mine"] == 0.25
    assert type(dict(ctx.last_scores_train)["mine"]) is float


@pytest.mark.parametrize("value", ["high", None, [1.0], torch.ones(2)])
def test_a_score_that_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=r"last_scores_valid\['mine'\] is a number"):
        fl.train(fl.init(full_loop(callbacks=[doing(on_valid_end=lambda self: _add(self.ctx, value))])))


def _add(ctx: Any, value: Any) -> None:
    ctx.last_scores_valid["mine"] = value


@pytest.mark.parametrize(
    ("write", "error", "match"),
    [
        (lambda ctx: ctx.params.pop("0.bias"), ValueError, r"'0\.bias' was taken out of ctx\.params"),
        (lambda ctx: ctx.params.update(new=torch.ones(1)), ValueError, r"'new' was added to ctx\.params"),
        (lambda ctx: ctx.params.update({"0.bias": torch.ones(1)}), ValueError, "'0.bias' has shape"),
        (lambda ctx: ctx.params.update({"0.bias": 1.0}), TypeError, "'0.bias' was set to 1.0, which is no tensor"),
        (lambda ctx: ctx.grads.update(new=torch.ones(1)), ValueError, "left 'new' in ctx.grads"),
        (lambda ctx: ctx.optimizer_state["slots"].clear(), ValueError, "change the param_groups or the state of"),
        (lambda ctx: ctx.optimizer_state["groups"][0].update(lr=9.0), ValueError, "ctx.optimizer_state was changed"),
        (lambda ctx: ctx.callbacks.update(new=None), AttributeError, "update"),
        (lambda ctx: ctx.callbacks.__setitem__("new", None), TypeError, "callbacks are given to the Loop"),
    ],
)
def test_what_has_no_place_in_a_context_is_refused(
    write: Callable[[Any], object], error: type[Exception], match: str
) -> None:
    # From the second batch on, when the optimizer has slots.
    callback = doing("Writing", on_after_backward=lambda self: self.ctx.step > 1 and write(self.ctx))
    with pytest.raises(error, match=match) as caught:
        fl.train(fl.init(make_loop(callbacks=[callback])))
    assert fl.context_of(caught.value).global_step == 1


@pytest.mark.parametrize("name", ["network", "optimizer", "params", "buffers", "callbacks", "optimizer_state"])
def test_a_view_that_is_kept_does_not_show_another_context_later(name: str) -> None:
    class CallbackSetKeeping(CallbackSet):
        def on_batch_end(self) -> None:
            self.kept = self.ctx

        def on_epoch_end(self) -> None:
            getattr(self.kept, name)

    with pytest.raises(AttributeError, match=rf"ctx\.{name} can be read only while the hook"):
        fl.train(fl.init(make_loop(callbacks=[CallbackSetKeeping()])))


def test_what_was_written_is_a_copy() -> None:
    class CallbackSetWriting(CallbackSet):
        def __init__(self) -> None:
            self.loss = torch.zeros(())
            self.scores: dict[str, float] = {}

        def on_epoch_end(self) -> None:
            self.loss.add_(1)
            self.scores[f"epoch {self.ctx.epoch}"] = 1.0
            self.ctx.last_loss = self.loss
            self.ctx.last_scores_train = self.scores

    digests(make_loop(callbacks=[CallbackSetWriting()], epochs=3))
