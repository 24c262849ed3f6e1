"""Descriptors: what a callback is made from, checked before anything is trained."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
from typing import Any

import attrs
import pytest
import torch

import functional_loop as fl
from functional_loop.callbacks.logs.history import history
from functional_loop.callbacks.objects.callback_set import CallbackSet
from functional_loop.callbacks.registry.descriptor import TorchCallback, describe
from functional_loop.callbacks.registry.packages import require, what_installs
from functional_loop.callbacks.registry.param_set import Param, ParamSet
from tests.callbacks.laws import holds_for
from tests.callbacks.objects import CallbackSetBatches, digests
from tests.sample_loops import counter, full_loop, make_loop


class CallbackSetStopAt(CallbackSet):
    """Ends a run after an epoch."""

    def __init__(self, epoch: int, why: str = "enough") -> None:
        self.epoch = epoch
        self.why = why

    def on_epoch_end(self) -> None:
        self.ctx.terminate = self.ctx.epoch == self.epoch


def stop_at(epoch: int, *, id: str = "stop_at") -> fl.Callback:
    stop = fl.when(lambda ctx: ctx.epoch == epoch, lambda ctx: fl.evolve(ctx, terminate=True))
    return fl.Callback(id, epoch_end=stop, kind="stop_at")


def train(*callbacks: Any, **changes: Any) -> fl.Context:
    return fl.train(fl.init(make_loop(**{"callbacks": list(callbacks), "epochs": 5} | changes)))


# ---- what it knows


def test_everything_has_a_default() -> None:
    made = TorchCallback(CallbackSetStopAt)
    assert made.generator is CallbackSetStopAt
    assert (made.id, made.label, made.packages, made.weight) == ("stop_at", "Stop at", (), None)
    assert made.man == "tests.callbacks.test_descriptor.CallbackSetStopAt"
    assert list(made.param_set) == ["epoch", "why"]
    assert made.values == {}
    assert repr(made) == "<TorchCallback 'stop_at': CallbackSetStopAt()>"


def test_everything_can_be_given() -> None:
    made = TorchCallback(
        CallbackSetStopAt,
        "early",
        label="Early end",
        packages=["torch"],
        man="a page",
        weight=3,
        param_set=ParamSet([Param("epoch", int)]),
        values={"epoch": 2},
    )
    assert (made.id, made.label, made.packages, made.man, made.weight) == (
        "early",
        "Early end",
        ("torch",),
        "a page",
        3,
    )
    assert list(made.param_set) == ["epoch"]
    assert repr(made) == "<TorchCallback 'early': CallbackSetStopAt(epoch=2), weight 3.0>"


def test_the_id_of_a_function_is_its_default_or_its_name() -> None:
    def other(epoch: int, *, id: str) -> fl.Callback: ...
    def nameless() -> fl.Callback: ...

    assert [TorchCallback(f).id for f in (stop_at, other, nameless)] == ["stop_at", "other", "nameless"]
    with pytest.raises(ValueError, match="a function without a name does not say what its callbacks are called"):
        TorchCallback(lambda: counter())
    assert TorchCallback(lambda: counter(), "counter").id == "counter"


class NotACallback:
    pass


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"generator": 3}, TypeError, "made by a CallbackSet class, or by a function that returns one, not 3"),
        ({"generator": NotACallback}, TypeError, "made by a CallbackSet class"),
        ({"generator": "history"}, TypeError, "made by a CallbackSet class"),
        ({"id": ""}, ValueError, "id of a callback must not be empty"),
        ({"id": 3}, TypeError, "the id of a callback is a string, not 3"),
        ({"label": 3}, TypeError, "the label of a callback is a string, not 3"),
        ({"packages": "rich"}, TypeError, "packages is a list of names of packages, not 'rich'"),
        ({"packages": [3]}, TypeError, "packages is a list of names"),
        ({"weight": math.nan}, ValueError, "callback 'stop_at': the weight is NaN"),
        ({"weight": "1"}, TypeError, "callback 'stop_at': the weight is a number"),
        ({"values": {"epohc": 1}}, TypeError, "callback 'stop_at' has no parameter 'epohc'; did you mean 'epoch'"),
        ({"values": {"epoch": "1"}}, TypeError, "callback 'stop_at': epoch must be of type int, not '1'"),
        ({"values": {"weight": 1}}, TypeError, "no parameter 'weight'"),
        ({"param_set": ParamSet([Param("epochs")])}, ValueError, "no parameter 'epochs'; did you mean 'epoch'"),
        ({"param_set": ParamSet([Param("ctx")])}, ValueError, "no parameter can be called 'ctx'"),
    ],
)
def test_wrong_descriptors_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TorchCallback(**{"generator": CallbackSetStopAt} | arguments)


@pytest.mark.parametrize("name", ["ctx", "weight"])
def test_reserved_names_are_refused(name: str) -> None:
    class CallbackSetCtx(CallbackSet):
        def __init__(self, ctx: int) -> None: ...

    class CallbackSetWeight(CallbackSet):
        def __init__(self, weight: int) -> None: ...

    generator = {"ctx": CallbackSetCtx, "weight": CallbackSetWeight}[name]
    with pytest.raises(ValueError, match=f"callback '{name}': no parameter can be called '{name}'"):
        TorchCallback(generator)


# ---- values


def test_values_are_checked_whenever_they_are_set() -> None:
    made = TorchCallback(CallbackSetStopAt)
    assert made.set_values(epoch=3) is made
    made.values["why"] = "done"
    assert made.values == {"epoch": 3, "why": "done"}
    with pytest.raises(TypeError, match="callback 'stop_at': why must be of type str, not 3"):
        made.values["why"] = 3
    with pytest.raises(TypeError, match="epoch must be of type int"):
        made.set_values(why="else", epoch="4")
    assert made.values == {"epoch": 3, "why": "done"}, "all or nothing"


def test_values_of_two_descriptors_are_apart() -> None:
    given = {"epoch": 1}
    one, other = TorchCallback(CallbackSetStopAt, values=given), TorchCallback(CallbackSetStopAt, values=given)
    one.set_values(epoch=2)
    assert (one.values["epoch"], other.values["epoch"], given["epoch"]) == (2, 1, 1)


def test_all_else_is_frozen_and_evolves() -> None:
    made = TorchCallback(CallbackSetStopAt, values={"epoch": 3})
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        made.weight = 3  # type: ignore[misc]
    other = fl.evolve(made, weight=3, id="other")
    other.set_values(epoch=4)
    assert (other.weight, other.id, other.values["epoch"]) == (3, "other", 4)
    assert (made.weight, made.id, made.values["epoch"]) == (None, "stop_at", 3)


# ---- what it makes


def test_it_makes_a_new_object_with_the_values_every_time() -> None:
    made = TorchCallback(CallbackSetStopAt, values={"epoch": 2})
    one, other = made.generate(), made.generate()
    assert isinstance(one, CallbackSetStopAt)
    assert one is not other
    assert (one.epoch, one.why, one.id, one.weight) == (2, "enough", "stop_at", 0)


def test_it_makes_pure_callbacks_too() -> None:
    made = TorchCallback(stop_at, values={"epoch": 2}).generate()
    assert isinstance(made, fl.Callback)
    assert made.id == "stop_at"


@pytest.mark.parametrize("generator", [CallbackSetStopAt, stop_at])
def test_it_stands_in_a_loop(generator: Any) -> None:
    assert train(TorchCallback(generator, values={"epoch": 2})).epoch == 2


@pytest.mark.parametrize("generator", [CallbackSetStopAt, stop_at])
def test_id_and_weight_are_those_of_the_descriptor(generator: Any) -> None:
    first = TorchCallback(generator, "first", weight=math.inf, values={"epoch": 2})
    loop = make_loop(callbacks=[first, TorchCallback(generator, "second", values={"epoch": 3})])
    assert [(callback.id, callback.weight) for callback in loop.callbacks] == [("first", math.inf), ("second", 0)]
    assert [id for id, _ in loop.hooks["epoch_end"]] == ["second", "first"]


def test_the_weight_of_a_pure_callback_is_all_that_changes() -> None:
    ran: list[str] = []

    def example(*, id: str = "example") -> fl.Callback:
        def resume(ctx: fl.Context) -> fl.Context:
            ran.append("resume")
            return ctx

        count = counter(id)
        return fl.Callback(
            id, init=count.init, kind="k", resume=resume, volatile=True, source=3, weight=7, **count.hooks
        )

    plain, heavy = TorchCallback(example).as_callback(), TorchCallback(example, weight=9).as_callback()
    assert (plain.weight, heavy.weight) == (7, 9)
    assert [(c.id, c.kind, c.volatile, c.source, list(c.hooks)) for c in (plain, heavy)] == [
        ("example", "k", True, 3, ["batch_end"])
    ] * 2
    fl.train(fl.train(fl.init(make_loop(callbacks=[heavy])), steps=1))
    assert ran == ["resume"]


def test_without_a_weight_the_callback_keeps_its_own() -> None:
    class CallbackSetHeavy(CallbackSet):
        weight = 5.0

    assert TorchCallback(CallbackSetHeavy).as_callback().weight == 5
    assert TorchCallback(CallbackSetHeavy, weight=0).as_callback().weight == 0


def test_a_required_value_that_is_not_set_is_refused_before_training() -> None:
    with pytest.raises(TypeError, match=r"callback 'stop_at': no value is set for epoch: set_values\(epoch=...\)"):
        make_loop(callbacks=[TorchCallback(CallbackSetStopAt)])


def test_a_generator_that_makes_something_else_is_refused() -> None:
    with pytest.raises(TypeError, match="callback 'wrong': the generator must make a CallbackSet or a Callback, not 3"):
        TorchCallback(lambda: 3, "wrong").generate()  # type: ignore[arg-type, return-value]


def test_a_function_without_an_id_cannot_make_another() -> None:
    with pytest.raises(ValueError, match=r"callback 'mine': the generator made a callback 'counter', .* argument id"):
        TorchCallback(lambda: counter(), "mine").generate()


def test_a_package_that_is_missing_is_told_before_training() -> None:
    made = TorchCallback(CallbackSetStopAt, packages=["torch", "nowhere.inside"], values={"epoch": 1})
    with pytest.raises(ImportError, match=r"'stop_at' needs nowhere\.inside, which is not installed: pip install"):
        make_loop(callbacks=[made])


def test_the_extra_that_has_a_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=2", 'rich>=13; extra == "cli"', "scikit-learn (>=1) ; extra == 'sklearn'", 'richer; extra == "b"']
    monkeypatch.setattr("importlib.metadata.requires", lambda name: lines)
    assert what_installs("rich") == "'functional-loop[cli]'"
    assert what_installs("scikit-learn") == "'functional-loop[sklearn]'"
    assert what_installs("ric") == "ric"
    assert what_installs("torch") == "torch"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"callback 'bar' needs rich, .* pip install 'functional-loop\[cli\]'"):
        require("rich", "callback 'bar'")


# ---- copies, equality, hash


def test_copies_have_values_of_their_own() -> None:
    made = TorchCallback(history, values={})
    table = {"steps": [1, 2]}
    described = TorchCallback(lambda table, id="x": fl.Callback(id), "x", values={"table": table})
    for copied in (described.clone(), described.clone(deep=True), copy.deepcopy(described)):
        assert copied == described
        assert copied.values is not described.values
    assert described.clone().values["table"] is table
    deep = described.clone(deep=True)
    deep.values["table"]["steps"].append(3)
    assert table == {"steps": [1, 2]}
    assert deep != described
    assert made.clone(deep=True) == made


CHANGES: list[dict[str, Any]] = [
    {"weight": 1},
    {"weight": 0},
    {"id": "other"},
    {"label": "other"},
    {"packages": ["torch"]},
    {"man": "other"},
    {"generator": stop_at},
    {"param_set": ParamSet([Param("epoch", int)])},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_whatever_differs_makes_two_descriptors_unequal(change: dict[str, Any]) -> None:
    usual: dict[str, Any] = {"generator": CallbackSetStopAt, "label": "", "man": "", "values": {"epoch": 1}}
    one, same, other = (TorchCallback(**{**usual, **more}) for more in ({}, {}, change))
    assert (one == same, hash(one) == hash(same), one.phash == same.phash) == (True, True, True)
    assert (one == other, hash(one) == hash(other), one.phash == other.phash) == (False, False, False)


def test_equal_weights_of_two_types_hash_alike() -> None:
    one, other = TorchCallback(CallbackSetStopAt, weight=1), TorchCallback(CallbackSetStopAt, weight=1.0)
    assert one == other
    assert hash(one) == hash(other)


def test_values_count_for_equality_and_not_for_the_hash() -> None:
    one, other = TorchCallback(CallbackSetStopAt, values={"epoch": 1}), TorchCallback(CallbackSetStopAt)
    assert one != other
    assert hash(one) == hash(other)
    assert other.set_values(epoch=1) == one


HASHES = """
from tests.callbacks.test_descriptor import CallbackSetStopAt, TorchCallback
made = TorchCallback(CallbackSetStopAt, weight=2, packages=["torch"])
print(hash(made), made.phash)
"""


def test_the_hash_is_the_same_in_every_process() -> None:
    made = TorchCallback(CallbackSetStopAt, weight=2, packages=["torch"])
    done = subprocess.run([sys.executable, "-c", HASHES], capture_output=True, text=True, check=True)
    assert done.stdout == f"{hash(made)} {made.phash}\n"


def test_it_can_be_sent_to_another_process() -> None:
    made = TorchCallback(CallbackSetStopAt, weight=2, values={"epoch": 2})
    received = pickle.loads(pickle.dumps(made))
    assert received == made
    assert train(received).epoch == 2


# ---- callbacks that are made already


def test_a_pure_callback_is_described_as_it_is() -> None:
    callback = counter()
    described = describe(callback)
    assert described == describe(callback) != describe(counter())
    assert (described.id, list(described.param_set)) == ("counter", [])
    assert described.generate() is callback
    assert fl.evolve(described, weight=3).as_callback().weight == 3
    with pytest.raises(ValueError, match="made already can't have another id"):
        describe(callback, "other")


def test_an_object_is_described_as_it_is() -> None:
    callback = CallbackSetBatches()
    assert train(describe(callback)).callbacks == {"batches": {"n": 15}}
    assert callback.n == 15


# ---- runs


@pytest.mark.parametrize("generator", [CallbackSetBatches, history])
def test_a_run_with_a_descriptor_resumes_anywhere(generator: Any, tmp_path: Any) -> None:
    described = TorchCallback(generator, "described", weight=-1)
    holds_for(lambda: full_loop(callbacks=[described]), tmp_path)


def test_two_loops_of_one_descriptor_do_not_share_an_object() -> None:
    described = TorchCallback(CallbackSetBatches)
    one, other = make_loop(callbacks=[described]), make_loop(callbacks=[described])
    a, b = fl.train(fl.init(one), steps=1), fl.train(fl.init(other), steps=4)
    assert fl.train(a).callbacks == fl.train(b).callbacks == {"batches": {"n": 6}}
    assert digests(one) == digests(other)


def test_values_may_be_tensors() -> None:
    def weighted(weights: torch.Tensor, *, id: str = "weighted") -> fl.Callback:
        return fl.Callback(id, init=lambda ctx: weights)

    described = TorchCallback(weighted, values={"weights": torch.ones(3)})
    copied = described.clone(deep=True)
    copied.values["weights"].zero_()
    assert train(described).callbacks["weighted"].tolist() == [1, 1, 1]
