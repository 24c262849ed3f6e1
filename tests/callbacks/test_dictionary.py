"""Callbacks by key: those that ship, those that are added, and those of other packages."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from importlib.metadata import EntryPoint
from typing import Any

import pytest

import functional_loop as fl
from functional_loop import callbacks
from functional_loop.callbacks.logs.history import history
from functional_loop.callbacks.objects.callback_set import CallbackSet
from functional_loop.callbacks.registry.descriptor import TorchCallback
from functional_loop.callbacks.registry.dictionary import (
    GROUP,
    CallbackDictionary,
    as_torch_callback,
    as_torch_callbacks,
    t_clbk,
    t_clbks,
    torch_callbacks,
)
from tests.callbacks.objects import CallbackSetBatches
from tests.sample_loops import counter, make_loop


class CallbackSetKeeping(CallbackSet):
    weight = 7.0

    def __init__(self, path: str, keep: int = 3) -> None:
        self.path = path
        self.keep = keep


DESCRIPTOR = TorchCallback(CallbackSetBatches, "described", label="Described", weight=2)


@pytest.fixture
def dictionary(monkeypatch: pytest.MonkeyPatch) -> CallbackDictionary:
    """An empty dictionary, in a world without other packages."""
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    return CallbackDictionary()


# ---- the dictionary that ships


def test_every_shipped_callback_can_be_looked_up_and_is_described() -> None:
    assert "history" in torch_callbacks
    for key, descriptor in torch_callbacks.items():
        assert isinstance(descriptor, TorchCallback)
        assert descriptor.id == key
        assert descriptor.label
        assert descriptor.generator.__doc__
    assert [row["key"] for row in torch_callbacks.table()] == list(torch_callbacks)


# What the required parameters of the shipped callbacks may be.
REQUIRED: dict[str, dict[str, Any]] = {
    "checkpoint": {"path": "checkpoints"},
    "clip_grad_norm": {"max_norm": 1.0},
    "clip_grad_value": {"clip_value": 1.0},
    "csv_log": {"path": "log.csv"},
    "dp_sgd": {"max_grad_norm": 1.0, "noise_multiplier": 1.0},
    "early_stopping": {"patience": 2},
    "json_log": {"path": "log.jsonl"},
    "lambda_callback": {"on_end": print},
    "stop_on_signal": {"path": "checkpoints"},
    "lr_chained": {"schedules": [t_clbk("lr_linear")]},
    "lr_cosine_annealing": {"T_max": 2},
    "lr_cyclic": {"base_lr": 0.1, "max_lr": 0.2},
    "lr_exponential": {"gamma": 0.9},
    "lr_lambda": {"lr_lambda": float},
    "lr_multi_step": {"milestones": [2]},
    "lr_multiplicative": {"lr_lambda": float},
    "lr_one_cycle": {"max_lr": 0.1},
    "lr_sequential": {"schedules": [t_clbk("lr_linear"), t_clbk("lr_step", step_size=2)], "milestones": [3]},
    "lr_step": {"step_size": 2},
    "lr_warm_restarts": {"T_0": 2},
    "swa": {"start": 1},
    "tb": {"path": "events"},
    "timer": {"max_time": "1h"},
    "unfreeze": {"starting_weights": "*", "unfreeze": []},
}


def test_every_shipped_callback_can_be_made_and_has_the_weight_of_the_table() -> None:
    weights = {row["key"]: row["weight"] for row in torch_callbacks.table()}
    for key in torch_callbacks:
        made = t_clbk(key, **REQUIRED.get(key, {})).generate()
        assert made.id == key
        assert made.weight == weights[key]


def test_everything_that_ships_is_in_the_dictionary() -> None:
    not_callbacks = {"averaged", "dp_epsilon", "to_frame", "as_lr_scheduler", "first_parting"}
    not_callbacks |= {"callback_set", "torch_callback", "torch_callbacks"}
    functions = {name for name in callbacks.__all__ if name[0].islower() and not name.startswith(("as_", "t_clbk"))}
    assert functions - not_callbacks == set(torch_callbacks)


def test_a_key_gives_a_descriptor_that_trains() -> None:
    ctx = fl.train(fl.init(make_loop(callbacks=[t_clbk("history")])))
    assert [row["epoch"] for row in ctx.callbacks["history"]] == [1, 2]


def test_a_wrong_key_suggests_the_right_one() -> None:
    for look_up in (t_clbk, as_torch_callback, as_torch_callbacks, torch_callbacks.__getitem__, lambda k: t_clbks([k])):
        with pytest.raises(KeyError, match="there is no callback 'historry'; did you mean 'history'"):
            look_up("historry")


def test_looking_up_with_values_id_and_weight(monkeypatch: pytest.MonkeyPatch, dictionary: CallbackDictionary) -> None:
    monkeypatch.setattr("functional_loop.callbacks.registry.dictionary.torch_callbacks", dictionary)
    dictionary.add("keeping", CallbackSetKeeping)
    made = t_clbk("keeping", id="second", weight=3, path="a", keep=5)
    assert (made.id, made.weight, made.values) == ("second", 3, {"path": "a", "keep": 5})
    assert (dictionary["keeping"].id, dictionary["keeping"].weight, dictionary["keeping"].values) == (
        "keeping",
        None,
        {},
    )
    with pytest.raises(TypeError, match="callback 'keeping' has no parameter 'pth'; did you mean 'path'"):
        t_clbk("keeping", pth="a")
    with pytest.raises(TypeError, match="callback 'keeping': keep must be of type int"):
        t_clbk("keeping", keep="all")


def test_several_keys() -> None:
    assert t_clbks([]) == []
    assert t_clbks(["history", "history"]) == [t_clbk("history")] * 2
    with pytest.raises(TypeError, match=r"t_clbks takes a list of keys; for one there is t_clbk\('history'\)"):
        t_clbks("history")


LAZY = """
import sys, functional_loop
assert not any(name.startswith("functional_loop.callbacks") for name in sys.modules)
"""


def test_the_package_does_not_import_its_callbacks() -> None:
    subprocess.run([sys.executable, "-c", LAZY], check=True)


# ---- adding


@pytest.mark.parametrize(
    "target",
    [
        CallbackSetBatches,
        "tests.callbacks.objects:CallbackSetBatches",
        TorchCallback(CallbackSetBatches, "mine", label="Label"),
    ],
)
def test_whatever_makes_a_callback_can_be_added(dictionary: CallbackDictionary, target: Any) -> None:
    given = {} if isinstance(target, TorchCallback) else {"label": "Label"}
    dictionary.add("mine", target, **given)
    assert list(dictionary) == ["mine"]
    assert len(dictionary) == 1
    found = dictionary["mine"]
    assert (found.id, found.label, found.generator.__name__) == ("mine", "Label", "CallbackSetBatches")
    assert fl.train(fl.init(make_loop(callbacks=[found]))).callbacks == {"mine": {"n": 6}}


def test_functions_and_callbacks_that_are_made_can_be_added(dictionary: CallbackDictionary) -> None:
    dictionary.add("scores", history, label="Scores", packages=["torch"])
    dictionary.add("counter", counter())
    assert list(dictionary) == ["counter", "scores"]
    assert (dictionary["scores"].label, dictionary["scores"].packages) == ("Scores", ("torch",))
    fl.train(fl.init(make_loop(callbacks=list(dictionary.values()))))


def test_what_is_looked_up_is_a_copy(dictionary: CallbackDictionary) -> None:
    dictionary.add("keeping", TorchCallback(CallbackSetKeeping, values={"path": "a"}))
    dictionary["keeping"].set_values(path="b")
    assert dictionary["keeping"].values == {"path": "a"}


def test_a_key_is_added_once(dictionary: CallbackDictionary) -> None:
    dictionary.add("mine", CallbackSetBatches)
    with pytest.raises(ValueError, match="there is a callback 'mine' already"):
        dictionary.add("mine", CallbackSetKeeping)
    dictionary.remove("mine")
    assert "mine" not in dictionary
    dictionary.add("mine", CallbackSetKeeping)
    with pytest.raises(KeyError, match="there is no callback 'yours'"):
        dictionary.remove("yours")


@pytest.mark.parametrize(
    ("target", "given", "error", "message"),
    [
        (3, {}, TypeError, "made by a CallbackSet class"),
        (int, {}, TypeError, "made by a CallbackSet class"),
        ("no_colon", {}, ValueError, "a reference is of the form 'module:attribute', not 'no_colon'"),
        (DESCRIPTOR, {"label": "x"}, TypeError, "a descriptor has its own label and packages"),
        (counter("other"), {}, ValueError, "made already can't have another id"),
    ],
)
def test_what_is_no_callback_is_refused_when_it_is_added(
    dictionary: CallbackDictionary, target: Any, given: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        dictionary.add("mine", target, **given)
    assert len(dictionary) == 0


def test_the_table_has_key_label_weight_and_packages(dictionary: CallbackDictionary) -> None:
    dictionary.add("scores", history, label="Scores of every epoch")
    dictionary.add("keeping", CallbackSetKeeping, packages=["torch", "rich"])
    dictionary.add("described", DESCRIPTOR)

    def required(n: int, *, id: str = "required") -> fl.Callback: ...

    dictionary.add("required", required)
    assert dictionary.table() == [
        {"key": "described", "label": "Described", "weight": 2.0, "packages": []},
        {"key": "keeping", "label": "Keeping", "weight": 7.0, "packages": ["torch", "rich"]},
        {"key": "required", "label": "Required", "weight": None, "packages": []},
        {"key": "scores", "label": "Scores of every epoch", "weight": 1000.0, "packages": []},
    ]
    assert str(dictionary).splitlines()[:3] == [
        "key        label                  weight  packages",
        "described  Described              2.0",
        "keeping    Keeping                7.0     torch, rich",
    ]
    assert repr(dictionary) == "<CallbackDictionary: described, keeping, required, scores>"


# ---- entry points


def entry(name: str, value: str) -> EntryPoint:
    return EntryPoint(name, value, GROUP)


GOOD = entry("theirs", "tests.callbacks.objects:CallbackSetBatches")


def with_entries(monkeypatch: pytest.MonkeyPatch, *points: EntryPoint) -> CallbackDictionary:
    asked: list[str] = []

    def entry_points(group: str) -> list[EntryPoint]:
        asked.append(group)
        return list(points)

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    made = CallbackDictionary()
    made.add("ours", CallbackSetKeeping)
    assert asked == ["functional_loop.callbacks"]
    return made


def test_other_packages_register_callbacks(monkeypatch: pytest.MonkeyPatch) -> None:
    made = with_entries(monkeypatch, GOOD, entry("more", f"{__name__}:DESCRIPTOR"))
    assert list(made) == ["more", "ours", "theirs"]
    assert made["theirs"].generator.__name__ == "CallbackSetBatches"
    assert made["more"].label == "Described"


def test_nothing_of_another_package_is_imported_before_it_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    made = with_entries(monkeypatch, entry("broken", "nowhere.at_all:thing"))
    assert "broken" in made
    assert list(made) == ["broken", "ours"]
    assert made["ours"].id == "ours"
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        made["broken"]


@pytest.mark.parametrize("value", ["nowhere.at_all:thing", "tests.callbacks.objects:CallbackSetNo", "math:pi"])
def test_one_that_is_broken_warns_and_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    made = with_entries(monkeypatch, entry("broken", value), GOOD)
    with pytest.warns(UserWarning, match="the callback 'broken' can't be loaded"):
        rows = made.table()
    assert [row["key"] for row in rows] == ["ours", "theirs"]
    assert made["theirs"].generate().id == "theirs"


def test_a_key_that_is_taken_warns_and_the_first_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [entry("theirs", "tests.callbacks.objects:CallbackSetCounter"), GOOD]
    with pytest.warns(UserWarning, match="CallbackSetBatches registers a callback 'theirs', which is taken"):
        made = with_entries(monkeypatch, *points)
    assert made["theirs"].generator.__name__ == "CallbackSetCounter"


# ---- conversions


def test_whatever_a_callback_is_given_as_becomes_a_descriptor() -> None:
    pure = counter()
    for x, id in [
        (DESCRIPTOR, "described"),
        (CallbackSetBatches, "batches"),
        (history, "history"),
        ("history", "history"),
        (pure, "counter"),
        (CallbackSetBatches(), "batches"),
    ]:
        made = as_torch_callback(x)
        assert isinstance(made, TorchCallback)
        assert made.id == id
        fl.train(fl.init(make_loop(callbacks=[made])))
    assert as_torch_callback(DESCRIPTOR) is DESCRIPTOR
    with pytest.raises(TypeError, match="made by a CallbackSet class"):
        as_torch_callback(3)


def test_another_id_makes_another_descriptor() -> None:
    for x in (DESCRIPTOR, CallbackSetBatches, history, "history"):
        assert as_torch_callback(x, id="other").id == "other"
    assert DESCRIPTOR.id == "described"
    with pytest.raises(ValueError, match="can't have another id"):
        as_torch_callback(counter(), id="other")


def test_two_of_a_class_stand_in_one_loop() -> None:
    loop = make_loop(callbacks=[CallbackSetBatches(), as_torch_callback(CallbackSetBatches, id="more")])
    assert fl.train(fl.init(loop)).callbacks == {"batches": {"n": 6}, "more": {"n": 6}}


def test_a_clone_is_a_deep_copy() -> None:
    described = TorchCallback(lambda rows, id="x": fl.Callback(id), "x", values={"rows": [1]})
    copied = as_torch_callback(described, clone=True)
    copied.values["rows"].append(2)
    assert described.values["rows"] == [1]
    assert as_torch_callbacks([described], clone=True)[0] is not described
    assert as_torch_callbacks([described])[0] is described


def test_lists_of_callbacks() -> None:
    assert as_torch_callbacks(None) == as_torch_callbacks([]) == as_torch_callbacks(()) == []
    assert as_torch_callbacks("history") == as_torch_callbacks(["history"]) == [t_clbk("history")]
    assert as_torch_callbacks(DESCRIPTOR) == [DESCRIPTOR]
    mixed = as_torch_callbacks([DESCRIPTOR, "history", CallbackSetBatches])
    assert [made.id for made in mixed] == ["described", "history", "batches"]
