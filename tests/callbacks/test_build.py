"""Callbacks built from functions equal those written as classes; what can't work is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

import functional_loop as fl
from functional_loop.callbacks.objects.build import callback_set, torch_callback
from functional_loop.callbacks.objects.callback_set import CallbackSet
from functional_loop.callbacks.registry.descriptor import TorchCallback
from functional_loop.callbacks.registry.param_set import Param, ParamSet
from tests.callbacks.laws import holds_for
from tests.callbacks.objects import CallbackSetBatches, digests
from tests.sample_loops import full_loop, make_loop


def nothing(self: Any) -> None: ...


def initialize(self: Any, start: int = 0) -> None:
    self.n = start


def count(self: Any) -> None:
    self.n += 1


def state_dict(self: Any) -> dict[str, int]:
    return {"n": self.n}


def load_state_dict(self: Any, state_dict: dict[str, int]) -> None:
    self.n = state_dict["n"]


def counting(build: Callable[..., Any] = callback_set, name: str = "CallbackSetBatches", **members: Any) -> Any:
    return build(
        name,
        **{
            "initialize": initialize,
            "on_batch_end": count,
            "state_dict": state_dict,
            "load_state_dict": load_state_dict,
            **members,
        },
    )


def test_it_equals_the_class_written_by_hand() -> None:
    built = digests(full_loop(callbacks=[counting()()]))
    assert built != digests(full_loop(callbacks=[counting()(5)]))
    states = [fl.train(fl.init(make_loop(callbacks=[c]))).callbacks for c in (counting()(), CallbackSetBatches())]
    assert states[0] == states[1]


def test_a_run_with_it_resumes_anywhere(tmp_path: Any) -> None:
    holds_for(lambda: full_loop(callbacks=[counting()()]), tmp_path)


def test_the_class_is_a_class_like_any_other() -> None:
    made = callback_set("CallbackSetMine", on_end=nothing, on_begin=nothing, on_exit=None, colour="red")
    assert issubclass(made, CallbackSet)
    assert (made.__name__, made().id, made().stages, made.colour) == (
        "CallbackSetMine",
        "mine",
        ("begin", "end"),
        "red",
    )
    assert repr(made()) == "<CallbackSetMine 'mine': begin, end>"


@pytest.mark.parametrize("stage", fl.STAGES)
def test_there_is_a_method_for_every_stage(stage: str) -> None:
    seen: list[str] = []
    made = callback_set("CallbackSetMine", **{f"on_{stage}": lambda self: seen.append(stage)})
    assert made().stages == (stage,)
    fl.train(fl.init(full_loop(callbacks=[made()])))
    assert set(seen) == {stage}


def test_it_inherits() -> None:
    child = callback_set("CallbackSetChild", on_end=nothing, inherit=counting(weight=3))
    assert child().stages == ("batch_end", "end")
    assert (child().weight, child(7).n) == (3, 7)
    assert counting(weight=3, inherit=child)().weight == 3
    assert callback_set("CallbackSetLate", inherit=child, weight=math.inf).weight == math.inf


@pytest.mark.parametrize(
    ("members", "error", "message"),
    [
        (
            {"on_epoch_ends": nothing},
            TypeError,
            "on_epoch_ends is not a stage; did you mean 'on_epoch_end'",
        ),
        (
            {"epoch_end": nothing},
            TypeError,
            "the method of the stage 'epoch_end' is called on_epoch_end",
        ),
        ({"on_end": 3}, TypeError, "CallbackSetMine: on_end must be a function, not 3"),
        ({"on_end": lambda: None}, TypeError, r"CallbackSetMine: on_end must be a function of \(self\)"),
        ({"on_end": lambda self, ctx: None}, TypeError, r"on_end must be a function of \(self\)"),
        ({"initialize": 3}, TypeError, "CallbackSetMine: initialize must be a function, not 3"),
        ({"state_dict": state_dict}, TypeError, "give both state_dict and load_state_dict, or neither"),
        ({"load_state_dict": load_state_dict}, TypeError, "give both state_dict and load_state_dict, or neither"),
        (
            {"state_dict": state_dict, "load_state_dict": lambda self: None},
            TypeError,
            r"load_state_dict must be a function of \(self, state_dict\)",
        ),
        ({"weight": math.nan}, ValueError, "CallbackSetMine: the weight is NaN"),
        ({"weight": "1"}, TypeError, "CallbackSetMine: the weight is a number"),
        ({"inherit": object}, TypeError, "CallbackSetMine: inherit is a CallbackSet class, not <class 'object'>"),
        ({"inherit": CallbackSet()}, TypeError, "CallbackSetMine: inherit is a CallbackSet class"),
        ({"ctx": 3}, ValueError, "'ctx' is taken by CallbackSet"),
        ({"id": "x"}, ValueError, "'id' is taken by CallbackSet"),
        ({"stages": ()}, ValueError, "'stages' is taken by CallbackSet"),
        ({"classname": "Mine"}, ValueError, "starts with CallbackSet, unlike 'Mine'"),
        ({"classname": "CallbackSet mine"}, ValueError, "starts with CallbackSet, unlike 'CallbackSet mine'"),
        ({"classname": 3}, TypeError, "the name of a class is a string, not 3"),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_built(
    members: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        callback_set(**{"classname": "CallbackSetMine"} | members)
    if "id" not in members:
        with pytest.raises(error, match=message):
            torch_callback("mine", **{"classname": "CallbackSetMine"} | members)


# ---- descriptors


def test_a_descriptor_of_functions() -> None:
    made = counting(torch_callback, "my_counter", label="Count", packages=["torch"], man="a page", weight=2)
    assert isinstance(made, TorchCallback)
    assert made.generator.__name__ == "CallbackSetMyCounter"
    assert (made.id, made.label, made.packages, made.man) == ("my_counter", "Count", ("torch",), "a page")
    assert repr(made.param_set) == "ParamSet(start: int = 0)"
    made.set_values(start=3)
    ctx = fl.train(fl.init(make_loop(callbacks=[made])))
    assert ctx.callbacks == {"my_counter": {"n": 9}}
    assert made.generate().weight == 2


def test_a_descriptor_has_a_name_in_words() -> None:
    assert torch_callback("stop_early", on_end=nothing).label == "Stop early"


def test_the_parameters_can_be_given() -> None:
    made = counting(torch_callback, "counter", param_set=ParamSet([Param("start", float)]))
    made.set_values(start=1.5)
    with pytest.raises(ValueError, match="no parameter 'begin'"):
        counting(torch_callback, "counter", param_set=ParamSet([Param("begin")]))


def test_two_descriptors_of_one_class_keep_apart() -> None:
    made = counting(torch_callback, "one")
    ctx = fl.train(fl.init(make_loop(callbacks=[made, fl.evolve(made, id="two", values={"start": 10})])))
    assert ctx.callbacks == {"one": {"n": 6}, "two": {"n": 16}}


def test_the_id_is_checked() -> None:
    with pytest.raises((TypeError, ValueError), match=r"id|name"):
        torch_callback("", on_end=nothing)
    with pytest.raises((TypeError, ValueError), match=r"id|name"):
        torch_callback(3, on_end=nothing)  # type: ignore[arg-type]
