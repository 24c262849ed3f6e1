"""Object callbacks: what is refused when they are made, what they see, when they run and what stays of it."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import functional_loop as fl
from functional_loop.callbacks.objects.callback_set import CallbackSet
from functional_loop.callbacks.registry.descriptor import TorchCallback
from tests.callbacks.laws import holds_for
from tests.callbacks.objects import CallbackSetBatches, CallbackSetCounter, doing, watching
from tests.sample_loops import full_loop, make_loop, raising, recorder


def test_the_stages_are_those_it_has_methods_for_in_the_order_of_the_loop() -> None:
    class CallbackSetTwo(CallbackSet):
        def on_end(self) -> None: ...
        def on_epoch_begin(self) -> None: ...

    class CallbackSetThree(CallbackSetTwo):
        def on_exit(self) -> None: ...

    assert CallbackSetTwo().stages == ("epoch_begin", "end")
    assert CallbackSetThree().stages == ("epoch_begin", "end", "exit")
    assert CallbackSet().stages == ()
    assert repr(CallbackSetThree()) == "<CallbackSetThree 'three': epoch_begin, end, exit>"


def test_all_stages_run() -> None:
    callback, seen = watching(lambda ctx: None)
    fl.train(fl.init(full_loop(callbacks=[callback])))
    assert {stage for stage, _ in seen} == set(fl.STAGES)


@pytest.mark.parametrize("base", [CallbackSet, CallbackSetCounter])
@pytest.mark.parametrize(
    ("name", "likely"),
    [
        ("on_epoch_ends", "on_epoch_end"),
        ("on_batch_start", "on_batch_end"),
        ("on_before_validation", "on_before_valid"),
    ],
)
def test_a_misspelt_method_is_refused_when_the_class_is_made(base: type, name: str, likely: str) -> None:
    with pytest.raises(TypeError, match=f"CallbackSetTypo: {name} is not a stage; did you mean '{likely}'"):
        type("CallbackSetTypo", (base,), {name: lambda self: None})


def test_a_misspelt_method_of_a_mixin_is_refused() -> None:
    class Mixin:
        def on_epoch_ends(self) -> None: ...

    with pytest.raises(TypeError, match="on_epoch_ends is not a stage"):
        type("CallbackSetTypo", (Mixin, CallbackSet), {})


def test_a_stage_that_is_no_function_is_refused() -> None:
    with pytest.raises(TypeError, match="on_begin"):
        type("CallbackSetTypo", (CallbackSet,), {"on_begin": 3})


@pytest.mark.parametrize("name", ["on_epoch_end", "on_epoch_ends"])
def test_a_method_given_to_an_object_is_refused(name: str) -> None:
    """It would never run."""
    callback = CallbackSetCounter()
    with pytest.raises((TypeError, AttributeError), match=name):
        setattr(callback, name, lambda: None)


@pytest.mark.parametrize(
    ("name", "id"),
    [
        ("CallbackSetStopAt", "stop_at"),
        ("CallbackSetLRMonitor", "lr_monitor"),
        ("CallbackSetEMA", "ema"),
        ("CallbackSetTop5", "top5"),
        ("Greeting", "greeting"),
        ("CallbackSet", "callback_set"),
    ],
)
def test_the_id_is_the_name_of_the_class_in_snake_case(name: str, id: str) -> None:
    assert type(name, (CallbackSet,), {})().id == id


def test_two_objects_of_one_class_need_ids() -> None:
    with pytest.raises(ValueError, match="more than one of the id 'batches'"):
        make_loop(callbacks=[CallbackSetBatches(), CallbackSetBatches()])


@pytest.mark.parametrize("weight", [math.inf, -math.inf, 3, -0.5])
def test_any_number_is_a_weight(weight: float) -> None:
    made = type("CallbackSetMine", (CallbackSet,), {"weight": weight})()
    assert made.as_callback().weight == weight
    other = CallbackSet()
    other.weight = weight
    assert other.as_callback().weight == weight


@pytest.mark.parametrize(
    ("weight", "error"), [(math.nan, ValueError), ("1", TypeError), (True, TypeError), (None, TypeError)]
)
def test_a_weight_that_has_no_place_in_an_order_is_refused(weight: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="CallbackSetMine: the weight is"):
        type("CallbackSetMine", (CallbackSet,), {"weight": weight})
    with pytest.raises(error, match="CallbackSet: the weight is"):
        CallbackSet().weight = weight


@settings(max_examples=20)
@given(st.lists(st.sampled_from([-math.inf, -1.5, 0.0, 2, math.inf]), max_size=6))
def test_objects_and_pure_callbacks_run_by_ascending_weight(weights: list[float]) -> None:
    ran: list[int] = []

    def pure(place: int) -> fl.Hook:
        return lambda ctx: (ran.append(place), ctx)[1]

    callbacks: list[Any] = []
    for place, weight in enumerate(weights):
        if place % 2:
            callbacks.append(fl.Callback(str(place), weight=weight, begin=pure(place)))
        else:
            callbacks.append(doing(f"N{place}", on_begin=lambda self, place=place: ran.append(place)))
            callbacks[-1].weight = weight
    fl.train(fl.init(make_loop(epochs=0, callbacks=callbacks)))
    assert ran == sorted(range(len(weights)), key=lambda place: weights[place])


# ---- ctx


def test_ctx_is_there_in_every_method_and_nowhere_else() -> None:
    callback, seen = watching(lambda ctx: ctx is not None)
    assert callback.ctx is None
    for _ in fl.iterate(fl.init(full_loop(callbacks=[callback]))):
        assert callback.ctx is None
    assert all(there for _, there in seen)


class WrongError(Exception):
    pass


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise WrongError


def fail(self: Any) -> None:
    raise WrongError


@pytest.mark.parametrize("stage", fl.STAGES)
def test_after_an_error_of_its_own_ctx_is_gone_and_the_error_says_where(stage: str) -> None:
    callback = doing("Faulty", **{f"on_{stage}": fail})
    with pytest.raises(WrongError) as caught:
        fl.train(fl.init(full_loop(callbacks=[callback])))
    assert callback.ctx is None
    assert any(f"in callback 'faulty' at stage '{stage}' (epoch" in note for note in caught.value.__notes__)
    assert fl.context_of(caught.value) is not None


def test_after_an_error_of_somebody_else_ctx_is_gone() -> None:
    callback, _ = watching(lambda ctx: None)
    with pytest.raises(WrongError):
        fl.train(fl.init(make_loop(network=Failing(), callbacks=[callback])))
    assert callback.ctx is None
    with pytest.raises(WrongError):
        fl.train(fl.init(make_loop(callbacks=[callback, raising("epoch_end", WrongError())])))
    assert callback.ctx is None


def test_after_a_closed_iterator_and_after_train_step_ctx_is_gone() -> None:
    callback, seen = watching(lambda ctx: ctx.step)
    run = fl.iterate(fl.init(make_loop(callbacks=[callback])))
    _, ctx = next(run), next(run)
    run.close()  # type: ignore[attr-defined]
    assert callback.ctx is None
    assert seen[-1] == ("exit", 0)
    fl.train_step(ctx, (torch.ones(4, 3), torch.ones(4, 2)))
    assert callback.ctx is None
    assert seen[-1] == ("batch_end", 1)


def test_an_error_does_not_leave_the_object_ahead_of_the_context() -> None:
    class CallbackSetFaulty(CallbackSetBatches):
        fails = True

        def on_batch_end(self) -> None:
            super().on_batch_end()
            if self.n == 3 and self.fails:
                raise WrongError

    callback = CallbackSetFaulty()
    with pytest.raises(WrongError) as caught:
        fl.train(fl.init(make_loop(callbacks=[callback])))
    callback.fails = False
    ctx = fl.context_of(caught.value)
    assert ctx is not None
    assert fl.train(ctx).callbacks == {"faulty": {"n": 6}}


# ---- on_begin and on_exit


def test_begin_and_exit_run_in_every_run_and_end_once() -> None:
    callback, seen = watching(lambda ctx: ctx.global_step, stages=("begin", "end", "exit"))
    ctx = fl.init(make_loop(callbacks=[callback]))
    ctx = fl.train(ctx, steps=2)
    assert seen == [("begin", 0), ("exit", 2)]
    ctx = fl.train(ctx, steps=1)
    assert seen[2:] == [("begin", 2), ("exit", 3)]
    ctx = fl.train(ctx)
    assert seen[4:] == [("begin", 3), ("end", 6), ("exit", 6)]
    fl.train(ctx)
    assert len(seen) == 7, "a finished context is final"


def test_in_a_continued_run_what_on_begin_writes_is_dropped() -> None:
    def begin(self: Any) -> None:
        self.ctx.terminate = True
        self.ctx.network[0].weight.data.zero_()
        self.ctx.optimizer.param_groups[0]["lr"] = 9.0

    continued = fl.train(fl.init(make_loop()), steps=2)
    loop = make_loop(callbacks=[doing(on_begin=begin)])
    loaded = fl.load_state_dict(fl.init(loop), fl.state_dict(continued), allow="callbacks/doing")
    assert fl.tree_equal(fl.train(loaded).params, fl.train(continued).params)
    fresh = fl.train(fl.init(loop))
    assert (fresh.epoch, fresh.optimizer_state["groups"][0]["lr"]) == (0, 9.0)
    assert not fresh.params["0.weight"].any()


class CallbackSetBuilding(CallbackSet):
    """Builds in ``on_begin`` what the state fills."""

    def on_begin(self) -> None:
        self.tensors = [torch.zeros(self.ctx.total_epochs)]

    def on_batch_end(self) -> None:
        self.tensors[0][self.ctx.epoch - 1] += 1

    def state_dict(self) -> dict[str, Any] | None:
        return {"tensors": self.tensors} if hasattr(self, "tensors") else None

    def load_state_dict(self, state_dict: dict[str, Any] | None) -> None:
        if state_dict is not None:
            for own, saved in zip(self.tensors, state_dict["tensors"], strict=True):
                own.copy_(saved)


def test_the_state_comes_after_on_begin() -> None:
    def loop() -> fl.Loop:
        return make_loop(callbacks=[CallbackSetBuilding()])

    part = fl.train(fl.init(loop()), steps=4)
    loaded = fl.load_state_dict(fl.init(loop()), fl.state_dict(part))
    assert fl.train(loaded).callbacks["building"]["tensors"][0].tolist() == [3, 3]
    assert fl.digest(fl.train(loaded)) == fl.digest(fl.train(part))


def test_attributes_last_from_stage_to_stage_and_from_run_to_run() -> None:
    lines: list[str] = []

    def begin(self: Any) -> None:
        self.lines = lines
        self.anything = object()

    def end_of_batch(self: Any) -> None:
        self.lines.append(f"{self.ctx.epoch}.{self.ctx.step}")

    callback = doing(on_begin=begin, on_batch_end=end_of_batch)
    fl.train(fl.train(fl.init(make_loop(callbacks=[callback])), steps=3))
    assert lines == ["1.1", "1.2", "1.3", "2.1", "2.2", "2.3"]


# ---- state


@pytest.mark.parametrize("make", [CallbackSetCounter, CallbackSetBatches, CallbackSetBuilding])
def test_a_run_taken_up_anywhere_ends_as_the_uninterrupted_one(make: type[CallbackSet], tmp_path: Any) -> None:
    holds_for(lambda: full_loop(callbacks=[make()]), tmp_path)


def test_a_callback_without_state_leaves_no_trace() -> None:
    callback, _ = watching(lambda ctx: ctx.epoch)
    with_it = fl.train(fl.init(full_loop(callbacks=[callback])))
    without = fl.train(fl.init(full_loop(callbacks=[])))
    assert with_it.callbacks == {"watching": ()}
    assert fl.digest(with_it) == fl.digest(without)
    fl.load_state_dict(fl.init(full_loop(callbacks=[])), fl.state_dict(with_it))
    fl.load_state_dict(fl.init(full_loop(callbacks=[callback])), fl.state_dict(without))


def test_the_default_takes_nothing_and_says_so() -> None:
    CallbackSet().load_state_dict(None)
    with pytest.warns(UserWarning, match="CallbackSetMine was handed a state but has no load_state_dict"):
        doing("Mine").load_state_dict({"n": 1})


def test_a_state_that_is_kept_but_not_taken_warns_when_a_run_is_continued() -> None:
    def loop() -> fl.Loop:
        made = doing("Half", on_epoch_end=lambda self: None, state_dict=lambda self: {"n": 1})
        return make_loop(callbacks=[made])

    ctx = fl.load_state_dict(fl.init(loop()), fl.state_dict(fl.train(fl.init(loop()), steps=1)))
    with pytest.warns(UserWarning, match="CallbackSetHalf was handed a state"):
        fl.train(ctx)


def test_a_state_of_another_class_is_refused_and_both_are_named() -> None:
    class CallbackSetOther(CallbackSetBatches):
        pass

    other = TorchCallback(CallbackSetOther, id="batches")
    ctx = fl.train(fl.init(make_loop(callbacks=[CallbackSetBatches()])), steps=1)
    with pytest.raises(fl.StateDictError, match=r"(?s)batches.*CallbackSetBatches.*CallbackSetOther"):
        fl.load_state_dict(fl.init(make_loop(callbacks=[other])), fl.state_dict(ctx))


def test_callbacks_that_keep_state_come_and_go_only_when_asked() -> None:
    with_it = fl.state_dict(fl.train(fl.init(make_loop(callbacks=[CallbackSetBatches()])), steps=1))
    without = fl.state_dict(fl.train(fl.init(make_loop()), steps=1))
    with pytest.raises(fl.StateDictError, match="batches"):
        fl.load_state_dict(fl.init(make_loop()), with_it)
    with pytest.raises(fl.StateDictError, match="batches"):
        fl.load_state_dict(fl.init(make_loop(callbacks=[CallbackSetBatches()])), without)
    with pytest.warns(UserWarning, match="'batches'"):
        fl.load_state_dict(fl.init(make_loop()), with_it, strict=False)
    fresh = fl.load_state_dict(fl.init(make_loop(callbacks=[CallbackSetBatches()])), without, strict=False)
    assert fl.train(fresh).callbacks == {"batches": {"n": 5}}


@pytest.mark.parametrize("state", [{"x": object()}, {"x": {1: 2}}, {"x": (1, 2)}, [torch.nn.ReLU()]])
def test_a_state_that_cannot_be_saved_is_refused_before_training(state: Any) -> None:
    callback = doing("Mine", state_dict=lambda self: state, load_state_dict=lambda self, state: None)
    with pytest.raises(TypeError, match=r"(?s)state_dict\(\) of CallbackSetMine before training can't be saved: \["):
        make_loop(callbacks=[callback])


def test_a_state_that_cannot_be_saved_later_is_refused_by_its_stage() -> None:
    class CallbackSetMine(CallbackSetBatches):
        def on_batch_end(self) -> None:
            self.n = object()  # type: ignore[assignment]

    with pytest.raises(TypeError, match=r"CallbackSetMine after on_batch_end can't be saved: \['n'\]"):
        fl.train(fl.init(make_loop(callbacks=[CallbackSetMine()])))


def test_a_volatile_state_is_kept_but_is_no_part_of_the_digest() -> None:
    class CallbackSetClock(CallbackSetBatches):
        volatile = True

    plain = fl.train(fl.init(make_loop()), steps=2)
    ctx = fl.train(fl.init(make_loop(callbacks=[CallbackSetClock()])), steps=2)
    assert fl.digest(ctx) == fl.digest(plain)
    loaded = fl.load_state_dict(fl.init(make_loop(callbacks=[CallbackSetClock()])), fl.state_dict(ctx))
    assert fl.train(loaded).callbacks == {"clock": {"n": 6}}
    fl.load_state_dict(fl.init(make_loop()), fl.state_dict(ctx))


# ---- clone


def test_a_shallow_copy_shares_and_a_deep_one_does_not() -> None:
    callback = CallbackSetCounter()
    callback.counts["begin"] = 1
    shallow, deep = callback.clone(), callback.clone(deep=True)
    assert type(shallow) is type(deep) is CallbackSetCounter
    assert shallow.counts is callback.counts  # type: ignore[attr-defined]
    deep.count("begin")  # type: ignore[attr-defined]
    assert callback.counts == {"begin": 1}
    shallow.counts = {}  # type: ignore[attr-defined]
    assert callback.counts == {"begin": 1}


def test_nothing_is_cloned_while_training_runs() -> None:
    callback = doing("Mine", on_epoch_end=lambda self: self.clone())
    with pytest.raises(RuntimeError, match="CallbackSetMine can't be cloned while training runs"):
        fl.train(fl.init(make_loop(callbacks=[callback])))
    callback.clone(deep=True)


def test_a_deep_copy_of_a_callback_that_has_trained_trains_on_its_own() -> None:
    callback = CallbackSetBatches()
    part = fl.train(fl.init(make_loop(callbacks=[callback])), steps=2)
    other = fl.train(fl.init(make_loop(callbacks=[callback.clone(deep=True)])))
    assert other.callbacks == {"batches": {"n": 8}}, "it starts from the state that it was cloned in"
    assert fl.train(part).callbacks == {"batches": {"n": 6}}


# ---- exit


def test_one_exit_that_fails_does_not_stop_the_others() -> None:
    callback, seen = watching(lambda ctx: None, stages=("exit",))
    with pytest.raises(WrongError):
        fl.train(fl.init(make_loop(callbacks=[doing("Faulty", on_exit=fail), callback])))
    assert seen == [("exit", None)]


def test_what_exit_does_to_the_state_is_dropped() -> None:
    class CallbackSetAtExit(CallbackSetBatches):
        def on_exit(self) -> None:
            self.n = -100

    ctx = fl.init(make_loop(callbacks=[CallbackSetAtExit()]))
    for _ in range(3):
        ctx = fl.train(ctx, steps=1)
    assert ctx.callbacks == {"at_exit": {"n": 3}}


def test_it_works_among_pure_callbacks() -> None:
    seen: list[Any] = []
    pure = recorder(seen, lambda ctx: ctx.callbacks["batches"]["n"], stages=("batch_end",))
    fl.train(fl.init(make_loop(callbacks=[CallbackSetBatches(), pure])))
    assert [n for _, n in seen] == [1, 2, 3, 4, 5, 6]


WITHOUT_NUMPY = """
import sys, warnings
sys.modules["numpy"] = None
warnings.simplefilter("ignore")
import torch, functional_loop as fl
from functional_loop.callbacks.objects.callback_set import CallbackSet
class CallbackSetHalving(CallbackSet):
    def on_batch_end(self):
        self.ctx.optimizer.param_groups[0]["lr"] *= 0.5
        self.ctx.network.weight.data.clamp_(-1, 1)
loop = fl.Loop(torch.nn.Linear(3, 1), torch.nn.functional.mse_loss, fl.optimizer(torch.optim.SGD, lr=0.5),
               train=fl.batches(torch.ones(4, 3), torch.ones(4, 1), batch_size=2), epochs=1,
               callbacks=[CallbackSetHalving()])
print(fl.train(fl.init(loop)).optimizer_state["groups"][0]["lr"])
"""


def test_numpy_is_not_needed() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_NUMPY], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "0.125\n"), done.stderr
