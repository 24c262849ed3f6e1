"""Objects as pure hooks: whatever run they are shown next, they have the state of that run."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import functional_loop as fl
from functional_loop.callbacks.objects.callback_set import CallbackSet
from functional_loop.callbacks.registry.descriptor import TorchCallback
from tests.callbacks.objects import CallbackSetBatches, CallbackSetCounter, digests, doing, watching
from tests.sample_loops import full_loop, make_loop


class CallbackSetTrace(CallbackSet):
    """A state of every kind that depends on all that came before: tensors, lists, nested dicts, numbers and text."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {
            "mean": torch.zeros(4),
            "losses": [],
            "last": {"epoch": 0, "text": "", "none": None},
        }

    def on_after_backward(self) -> None:
        self.state["mean"].mul_(0.9).add_(self.ctx.grads["0.bias"])

    def on_batch_end(self) -> None:
        self.state["losses"].append(float(self.ctx.last_loss))
        self.ctx.network[0].bias.data.sub_(0.01 * self.state["mean"])

    def on_epoch_end(self) -> None:
        self.state["last"].update(epoch=self.ctx.epoch, text=f"epoch {self.ctx.epoch}")

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict


def alone(loop: fl.Loop, seed: int) -> str:
    return fl.digest(fl.train(fl.init(loop, seed)))


def trace_loop() -> fl.Loop:
    return full_loop(callbacks=[CallbackSetTrace()])


def test_contexts_keep_the_states_of_their_time() -> None:
    digests(trace_loop())


def test_two_runs_of_one_loop_in_turn_do_not_mix() -> None:
    loop = trace_loop()
    for a, b in zip_longest(fl.iterate(fl.init(loop, seed=1)), fl.iterate(fl.init(loop, seed=2))):
        ends = (a, b)
    assert [fl.digest(ctx) for ctx in ends] == [alone(trace_loop(), seed=1), alone(trace_loop(), seed=2)]


def test_two_runs_of_one_loop_step_by_step_do_not_mix() -> None:
    loop = trace_loop()
    a, b = fl.init(loop, seed=1), fl.init(loop, seed=2)
    while "end" not in (a.stage, b.stage):
        a, b = (fl.train(ctx, steps=1) for ctx in (a, b))
        assert len(a.callbacks["trace"]["losses"]) == a.global_step
    assert fl.digest(fl.train(b)) == alone(trace_loop(), seed=2)
    assert fl.digest(fl.train(a)) == alone(trace_loop(), seed=1)


@settings(max_examples=15)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=6))
def test_going_back_gives_the_object_its_earlier_state(places: list[int]) -> None:
    loop = trace_loop()
    start = fl.init(loop)
    run = [start, *fl.iterate(start)]
    for place in places:
        at = min(place, len(run) - 2)
        following = next(fl.iterate(run[at]))
        assert fl.digest(following) == fl.digest(run[at + 1])


def test_a_second_run_of_a_loop_is_the_first_again() -> None:
    loop = trace_loop()
    assert digests(loop) == digests(loop)


def test_a_fork_by_another_learning_rate_leaves_the_origin_alone() -> None:
    loop = trace_loop()
    origin = fl.train(fl.init(loop), steps=2)
    before = fl.digest(origin)
    fork = fl.train(origin.with_hyperparameters(lr=0.5))
    assert fl.digest(origin) == before
    assert fl.digest(fl.train(origin)) == alone(trace_loop(), seed=0) != fl.digest(fork)


def test_one_object_in_two_loops_does_not_mix_them() -> None:
    callback = CallbackSetTrace()
    one, other = full_loop(callbacks=[callback]), full_loop(callbacks=[callback], epochs=3)
    a = fl.train(fl.init(one), steps=1)
    b = fl.train(fl.init(other), steps=4)
    a = fl.train(a, steps=2)
    b = fl.train(b)
    assert fl.digest(fl.train(a)) == alone(trace_loop(), seed=0)
    assert fl.digest(b) == alone(full_loop(callbacks=[CallbackSetTrace()], epochs=3), seed=0)


def test_a_loop_that_is_evolved_has_the_same_object() -> None:
    loop = trace_loop()
    longer = fl.evolve(loop, epochs=3)
    a = fl.train(fl.init(loop), steps=2)
    b = fl.train(fl.init(longer), steps=3)
    assert fl.digest(fl.train(a)) == alone(trace_loop(), seed=0)
    assert fl.digest(fl.train(b)) == alone(fl.evolve(trace_loop(), epochs=3), seed=0)


def test_two_objects_of_one_class_keep_apart() -> None:
    class CallbackSetLast(CallbackSetBatches):
        weight = 5.0

        def on_batch_end(self) -> None:
            self.n += self.ctx.callbacks["first"].n

    loop = make_loop(callbacks=[TorchCallback(CallbackSetLast, "second"), TorchCallback(CallbackSetBatches, "first")])
    assert fl.train(fl.init(loop)).callbacks == {"second": {"n": 21}, "first": {"n": 6}}


def test_the_state_is_given_only_where_it_is_not_the_one_produced_last() -> None:
    class CallbackSetLoads(CallbackSetBatches):
        loads = 0

        def load_state_dict(self, state_dict: dict[str, int]) -> None:
            self.loads += 1
            super().load_state_dict(state_dict)

    callback = CallbackSetLoads()
    loop = make_loop(callbacks=[callback])
    half = fl.train(fl.init(loop), steps=3)
    end = fl.train(half)
    assert callback.loads == 0
    assert fl.digest(fl.train(half)) == fl.digest(end)
    assert callback.loads == 1


def test_what_an_object_does_to_its_own_dict_later_does_not_reach_a_context() -> None:
    callback = CallbackSetTrace()
    ctx = fl.train(fl.init(full_loop(callbacks=[callback])), steps=2)
    before = fl.digest(ctx)
    callback.state["mean"].fill_(7)
    callback.state["losses"].clear()
    callback.state["last"]["epoch"] = 99
    assert fl.digest(ctx) == before


def test_what_an_object_does_to_what_it_was_given_does_not_reach_a_context() -> None:
    loop = trace_loop()
    early = fl.train(fl.init(loop), steps=1)
    before = fl.digest(early)
    fl.train(fl.init(loop), steps=3)
    fl.train(early)
    assert fl.digest(early) == before


def test_writes_through_numpy_do_not_reach_a_context() -> None:
    class CallbackSetArray(CallbackSet):
        def __init__(self) -> None:
            self.tensor = torch.zeros(2)
            self.array = self.tensor.numpy()

        def on_batch_end(self) -> None:
            self.array += 1

        def state_dict(self) -> dict[str, torch.Tensor]:
            return {"tensor": self.tensor}

        def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
            self.tensor = state_dict["tensor"]
            self.array = self.tensor.numpy()

    # No digests on the way: they would make the tensors of a context its own.
    run = list(fl.iterate(fl.init(make_loop(callbacks=[CallbackSetArray()]))))
    assert [ctx.callbacks["array"]["tensor"].tolist() for ctx in run] == [[ctx.global_step] * 2 for ctx in run]


def test_a_state_may_be_nothing_at_first() -> None:
    class CallbackSetLate(CallbackSet):
        state: dict[str, int] | None = None

        def on_batch_end(self) -> None:
            self.state = {"n": (self.state or {"n": 0})["n"] + 1}

        def state_dict(self) -> dict[str, int] | None:
            return self.state

        def load_state_dict(self, state_dict: dict[str, int] | None) -> None:
            self.state = state_dict

    loop = make_loop(callbacks=[CallbackSetLate()])
    start = fl.init(loop)
    assert start.callbacks == {"late": ()}
    assert [fl.train(start, steps=n).callbacks["late"] for n in (2, 1, 3)] == [{"n": 2}, {"n": 1}, {"n": 3}]


@pytest.mark.parametrize("state", [torch.ones(3), torch.zeros(0), 1.5, "text", [1, [2]], {}, [], False])
def test_a_state_may_be_any_plain_value(state: Any) -> None:
    class CallbackSetAny(CallbackSet):
        def __init__(self) -> None:
            self.state = state

        def on_epoch_begin(self) -> None:
            assert fl.tree_equal(self.state, state)

        def state_dict(self) -> Any:
            return self.state

        def load_state_dict(self, state_dict: Any) -> None:
            self.state = state_dict

    loop = make_loop(callbacks=[CallbackSetAny()])
    middle = fl.train(fl.init(loop), steps=3)
    fl.train(fl.init(loop))
    assert fl.tree_equal(fl.train(middle).callbacks["any"], state)
    loaded = fl.load_state_dict(fl.init(make_loop(callbacks=[CallbackSetAny()])), fl.state_dict(middle))
    assert fl.tree_equal(fl.train(loaded).callbacks["any"], state)


def test_the_pure_callback_is_known_by_class_and_object() -> None:
    callback = CallbackSetCounter()
    pure = callback.as_callback()
    assert pure.id == "counter"
    assert pure.kind == f"{CallbackSetCounter.__module__}.CallbackSetCounter"
    assert pure.source is callback
    assert set(pure.hooks) == set(callback.stages)
    assert pure.keeps_state
    assert not doing("Nothing").as_callback().keeps_state


def test_an_object_equals_the_pure_hook_that_does_the_same() -> None:
    def pure_decay(ctx: fl.Context) -> fl.Context:
        return ctx.with_hyperparameters(lr=ctx.optimizer_state["groups"][0]["lr"] * 0.9)

    def decay(self: Any) -> None:
        self.ctx.optimizer.param_groups[0]["lr"] *= 0.9

    by_object = digests(full_loop(callbacks=[doing(on_batch_end=decay)]))
    assert by_object == digests(full_loop(callbacks=[fl.Callback("decay", batch_end=pure_decay)]))


def test_an_observer_changes_nothing_else() -> None:
    callback, _ = watching(lambda ctx: (ctx.network, ctx.optimizer, ctx.optimizer.state_dict()))
    assert digests(full_loop(callbacks=[callback])) == digests(full_loop(callbacks=[]))
