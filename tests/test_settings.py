"""What a run was made with: another number anywhere is another run, and the same program is the same run in every
process."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import functional_loop as fl
from functional_loop.checkpoint.comparing import compare_runs, unknown_differences
from functional_loop.checkpoint.settings import settings_of
from functional_loop.core.errors import PurityError
from tests import made_oddly, made_with
from tests.made_with import CALLBACKS, DATA, LOSSES, NETWORKS, ce, loop

PARTS: dict[str, tuple[str, dict[str, Callable[[float], Any]]]] = {
    "loss": ("loss", LOSSES),
    "network": ("network", {name: functools.partial(functools.partial, make) for name, make in NETWORKS.items()}),
    "callbacks": ("callbacks", CALLBACKS),
    "train": ("train", DATA),
}
CASES = [(part, name) for part, (_, makers) in PARTS.items() for name in makers]


@pytest.mark.parametrize(("part", "name"), CASES, ids=[f"{part}-{name}" for part, name in CASES])
def test_a_number_in_any_place_is_part_of_the_identity(part: str, name: str) -> None:
    argument, makers = PARTS[part]
    saved, same, other = (fl.fingerprint(loop(**{argument: makers[name](number)})) for number in (0.5, 0.5, 0.25))
    assert compare_runs(saved, same, rounded=True) == unknown_differences(saved, same) == []
    found = compare_runs(saved, other, rounded=True)
    assert found
    assert all(line.path.split("/")[0] in (part, "order") for line in found)
    assert compare_runs(saved, other, [line.path for line in found], rounded=True) == []


ODD = [
    *(("loss", name) for name in (*made_oddly.LOSSES, *made_oddly.FREE)),
    *(("callback", name) for name in made_oddly.CALLBACKS),
    *(("network", name) for name in made_oddly.NETWORKS),
]


@pytest.mark.parametrize("name", [": ".join(each) for each in ODD])
def test_of_odd_objects_too_and_nothing_that_training_does_to_them(name: str) -> None:
    loops = made_oddly.runs(0.5)
    saved, other = fl.fingerprint(loops[name]), fl.fingerprint(made_oddly.runs(0.25)[name])
    found = compare_runs(saved, other, rounded=True)
    assert bool(found) is (name.removeprefix("loss: ") not in made_oddly.FREE)
    assert compare_runs(saved, other, [line.path for line in found], rounded=True) == []
    start = fl.init(loops[name])
    with contextlib.suppress(PurityError, AttributeError, RuntimeError, TypeError):  # what can't train is looked at
        fl.train(start, steps=2)
    again = fl.fingerprint(fl.evolve(loops[name], epochs=3))
    assert compare_runs(saved, again, rounded=True) == unknown_differences(saved, again) == []


@pytest.mark.parametrize("program", [made_with, made_oddly], ids=["usual", "odd"])
def test_a_program_is_the_same_run_in_another_process_folder_and_file_of_another_name(program: Any) -> None:
    here = json.loads(json.dumps(program.told()))
    result = subprocess.run(
        [sys.executable, "-W", "error", program.__file__],
        cwd="/",
        env={**os.environ, "PYTHONHASHSEED": "4711", "PYTHONPATH": str(Path(fl.__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    there = json.loads(result.stdout)
    assert here.keys() == there.keys()
    for name, told in here.items():
        found = [*compare_runs(told, there[name], rounded=True), *unknown_differences(told, there[name])]
        assert not found, (name, found)


def test_code_that_was_changed_is_a_warning() -> None:
    ctx = fl.train(fl.init(loop(loss=lambda y_hat, y: 2 * ce(y_hat, y))), steps=1)
    other = fl.init(loop(loss=lambda y_hat, y: 3 * ce(y_hat, y)))
    with pytest.warns(UserWarning, match=r"the code of functions is not what it was.*: loss \(allow=\['loss'\]"):
        loaded = fl.load_state_dict(other, fl.state_dict(ctx))
    assert fl.digest(loaded) == fl.digest(ctx)
    fl.load_state_dict(other, fl.state_dict(ctx), allow="loss")


def test_of_another_function_nothing_else_is_listed() -> None:
    ctx = fl.init(loop(loss=LOSSES["partial"](0.5)))
    with pytest.raises(fl.StateDictError) as caught:
        fl.load_state_dict(fl.init(loop(loss=LOSSES["Factor"](0.5))), fl.state_dict(ctx))
    assert {line.partition(":")[0] for line in caught.value.differences} <= {"loss/def", "loss/class"}


def test_an_object_that_only_looks_on_may_come_and_go() -> None:
    import functional_loop.callbacks as cb

    class Look(cb.CallbackSet):
        def __init__(self, every: int) -> None:
            self.every = every
            self.seen: list[Any] = []

        def on_batch_end(self) -> None:
            self.seen.append(self.ctx.network)

    plain, looking, seldom = (fl.fingerprint(loop(callbacks=each)) for each in ([], [Look(1)], [Look(5)]))
    assert compare_runs(plain, looking) == compare_runs(looking, plain) == compare_runs(looking, seldom) == []


def test_what_training_did_to_the_things_it_was_made_with_is_not_part_of_it() -> None:
    from tests.made_with import Counting, Rows, counting, hook

    counter, rows, count = Counting(), Rows(0.5), counting()
    parts = {"callbacks": [hook(counter), count], "train": fl.batches(rows, batch_size=4)}
    first = fl.init(loop(**parts))
    before = fl.fingerprint(first.loop)
    fl.train(first)
    counter.count()
    assert compare_runs(before, fl.fingerprint(loop(**parts)), rounded=True) == []


HUGE: dict[str, Any] = {
    "list": [1.0] * 3_000_000,
    "dict": dict.fromkeys(range(300_000)),
    "set": set(range(300_000)),
    "text": "ab" * 5_000_000,
    "graph of doubles": functools.reduce(lambda inner, _: [inner, inner], range(40), [1.0]),
    "nesting": functools.reduce(lambda inner, _: [inner], range(5000), [1.0]),
    "transposed array": np.zeros((1000, 3000)).T,
}


@pytest.mark.parametrize("what", HUGE)
def test_of_much_a_sample_is_looked_at(what: str) -> None:
    made = settings_of(made_oddly.held(HUGE[what]))
    assert 10 < len(json.dumps(made)) < 1_000_000
