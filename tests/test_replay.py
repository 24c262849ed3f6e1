"""Replay: a segment of a run, trained again, gives the bits that were saved, or says which leaf does not."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import functional_loop as fl
from functional_loop.callbacks import (
    CallbackSet,
    checkpoint,
    csv_log,
    history,
    json_log,
    lambda_callback,
    progress,
    t_clbk,
    tb,
    throughput,
    timer,
)
from functional_loop.checkpoint import file as checkpoint_file
from functional_loop.core.place import Place
from functional_loop.replay.bisect import bisect
from functional_loop.replay.replay import quiet, saved_files
from tests import ensembles
from tests.sample_loops import counter, full_loop
from tests.strategies import boundaries, examples, seeds, specs

pytestmark = pytest.mark.filterwarnings("ignore:resuming in mid-epoch reads")


@examples(0.5)
@given(specs(), seeds, st.integers(0, 1000), st.integers(0, 1000))
def test_from_any_boundary_to_any_later_one(spec: Any, seed: int, one: int, other: int) -> None:
    loop = spec.loop()
    whole = [fl.init(loop, seed), *boundaries(loop, seed)]
    first, second = sorted((one % len(whole), other % len(whole)))
    again = fl.replay(whole[first], until=whole[second])
    assert again.loop is loop
    assert fl.digest(again) == fl.digest(whole[second])


@examples(0.25)
@given(specs(), seeds)
def test_places_are_in_the_order_of_training(spec: Any, seed: int) -> None:
    places = [Place.of(ctx) for ctx in boundaries(spec.loop(), seed)]
    assert all(a < b for a, b in itertools.pairwise(places))


def test_a_place_that_training_does_not_come_to() -> None:
    ctx = fl.train(fl.init(full_loop()), steps=2)
    with pytest.raises(ValueError, match="comes to step 6, after end, and not to step 7, after batch_end of epoch 3"):
        fl.replay(ctx, until=Place.of({"global_step": 7, "epoch": 3, "stage": "batch_end", "step_valid": 0}))

    end = fl.train(ctx)
    with pytest.raises(ValueError, match="from step 6, after end comes to step 6, after end, and not to step 7"):
        fl.replay(end, until=Place.of({"global_step": 7, "epoch": 3, "stage": "batch_end", "step_valid": 0}))


def saved(folder: Path, *callbacks: Any, **changes: Any) -> fl.Loop:
    """A loop that was trained, with a checkpoint every two batches in ``folder``."""
    loop = full_loop(callbacks=[counter(), *callbacks, checkpoint(folder, every_steps=2)], epochs=3, **changes)
    fl.train(fl.init(loop, seed=5))
    return loop


def damage(path: Path, **changes: Any) -> None:
    """What a flipped bit in memory leaves behind: a sound file of something else."""
    state, metadata = checkpoint_file.read(path)
    checkpoint_file.write(path, {**state, **changes}, metadata)


def files_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_segment_of_a_run_replays_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def on_epoch_end(ctx: Any) -> None:
        print("an effect")

    logs = [csv_log(tmp_path / "a.csv"), json_log(tmp_path / "a.json", every_steps=1), tb(tmp_path / "tb", True)]
    others = [progress(), timer("1h"), throughput(), lambda_callback(on_epoch_end=on_epoch_end), history()]
    loop = saved(tmp_path / "run", *logs, *others)
    capsys.readouterr()
    before = files_in(tmp_path)
    segments = list(fl.verify(loop, tmp_path / "run", from_start=True))
    assert all(segments)
    assert [segment.stop.global_step for segment in segments] == [2, 3, 4, 6, 8, 9, 9]
    assert [segment.start.global_step for segment in segments] == [0, 2, 3, 4, 6, 8, 9]
    assert files_in(tmp_path) == before
    assert capsys.readouterr() == ("", "")


def test_a_wrong_bit_is_found_in_its_segment_and_its_leaf(tmp_path: Path) -> None:
    loop = saved(tmp_path)
    files = saved_files(tmp_path)
    network = dict(checkpoint_file.read(files[2])[0]["network"])
    network["3.bias"] = torch.nextafter(network["3.bias"], torch.tensor(torch.inf))
    damage(files[2], network=network)
    segments = list(fl.verify(loop, tmp_path))
    assert [bool(segment) for segment in segments] == [True, False, False, True, True, True]
    (difference,) = segments[1].differences
    assert (difference.path, difference.ulps) == ("network/3.bias", 1)
    assert str(difference) == "network/3.bias: 2 of 2 elements"


def test_a_slot_of_a_callback_that_keeps_a_state_is_compared(tmp_path: Path) -> None:
    loop = saved(tmp_path)
    path = saved_files(tmp_path)[1]
    damage(path, callbacks={"counter": {"kind": "", "state": 99}})
    assert [str(d) for d in next(fl.verify(loop, tmp_path)).differences] == ["callbacks/counter/state: 3 against 99"]


def test_a_longer_run_replays_with_the_epochs_that_each_part_was_trained_for(tmp_path: Path) -> None:
    callbacks = [counter(), checkpoint(tmp_path)]
    for epochs in (2, 3):
        # The last epoch of a run is one that evaluates.
        loop = full_loop(callbacks=callbacks, epochs=epochs, eval_freq=5)
        fl.train(fl.resume(loop, tmp_path, seed=0, must_exist=False))
    segments = list(fl.verify(fl.evolve(loop, epochs=99), tmp_path))
    assert [(bool(segment), segment.stop.stage) for segment in segments] == [
        (True, "epoch_end"),
        (True, "end"),
        (True, "epoch_end"),
        (True, "end"),
    ]


def test_a_run_that_a_clock_has_ended_replays(tmp_path: Path) -> None:
    loop = saved(tmp_path, timer(1e-9))
    assert fl.CheckpointStore(tmp_path).steps() == [2, 3]
    assert [bool(segment) for segment in fl.verify(loop, tmp_path)] == [True, True]


def test_what_can_not_be_verified_is_an_error(tmp_path: Path) -> None:
    loop = full_loop()
    with pytest.raises(FileNotFoundError, match=r"two checkpoints, or the start of the run, and .* holds none"):
        list(fl.verify(loop, tmp_path / "absent"))
    fl.CheckpointStore(tmp_path).save(fl.train(fl.init(loop), steps=2))
    with pytest.raises(FileNotFoundError, match="holds 1"):
        list(fl.verify(loop, tmp_path))
    assert [bool(segment) for segment in fl.verify(loop, tmp_path, from_start=True)] == [True]
    with pytest.raises(fl.StateDictError, match="optimizer"):
        list(fl.verify(fl.evolve(loop, optimizer=fl.optimizer(torch.optim.SGD, lr=0.1)), tmp_path, from_start=True))


class CallbackSetHalves(CallbackSet):
    """Changes training, and keeps no state."""

    def on_after_backward(self) -> None:
        for parameter in self.ctx.network.parameters():
            parameter.grad.mul_(0.5)


class CallbackSetCounts(CallbackSet):
    """Keeps a state, and has an effect."""

    def __init__(self) -> None:
        self.batches, self.effects = 0, 0

    def on_batch_end(self) -> None:
        self.batches += 1
        self.effects += 1

    def state_dict(self) -> Any:
        return {"batches": self.batches}

    def load_state_dict(self, state_dict: Any) -> None:
        self.batches = state_dict["batches"]


def test_objects_without_a_state_are_called_if_they_change_training_unless_they_say_otherwise(tmp_path: Path) -> None:
    halves = CallbackSetHalves()
    loop = saved(tmp_path, halves)
    assert all(fl.verify(loop, tmp_path))
    halves.replays = False
    with pytest.raises(fl.StateDictError, match="callbacks/halves: it only looks on here, not in what was saved"):
        list(fl.verify(fl.evolve(loop, callbacks=[counter(), halves]), tmp_path))


@pytest.mark.parametrize("replays", [None, False])
def test_objects_with_a_state_are_called_unless_they_say_otherwise(tmp_path: Path, replays: bool | None) -> None:
    counts = CallbackSetCounts()
    counts.replays = replays
    loop = saved(tmp_path, counts)
    effects = counts.effects
    assert all(fl.verify(loop, tmp_path))
    assert (counts.effects == effects) is (replays is False)


def test_what_replays_passes_through_descriptors_and_quiet_changes_no_identity() -> None:
    assert not t_clbk("progress", weight=3.0).generate().as_callback().replays
    loop = full_loop(callbacks=[counter(), progress(), history()])
    silent = quiet(loop)
    assert fl.fingerprint(silent) == fl.fingerprint(loop)
    assert [bool(callback.hooks) for callback in silent.callbacks] == [True, False, True]


def from_step(step: int, **values: float) -> fl.Callback:
    """Changes hyperparameters once."""
    return fl.Callback(
        "from_step", batch_end=lambda ctx: ctx.with_hyperparameters(**values) if ctx.global_step == step else ctx
    )


@pytest.mark.parametrize("step", range(1, 9))
@pytest.mark.parametrize("every", [(2, 2), (1, 4), (4, None)])
def test_bisect_finds_the_step_and_the_leaf(tmp_path: Path, step: int, every: tuple[int, int | None]) -> None:
    loops = []
    for name, change, every_steps in (("a", 0.0, every[0]), ("b", 0.5, every[1])):
        callbacks = [counter(), from_step(step, weight_decay=change), checkpoint(tmp_path / name, every_steps)]
        loops.append(full_loop(callbacks=callbacks, epochs=3))
        fl.train(fl.init(loops[-1], seed=2))
    found = bisect((loops[0], loops[1]), (tmp_path / "a", tmp_path / "b"))
    assert (found.place.global_step, found.place.stage) == (step, "batch_end")
    assert found.equal is not None
    assert found.equal < found.place
    assert [str(d) for d in found.differences] == ["optimizer/groups/0/weight_decay: 0.0 against 0.5"]
    assert not found.unfaithful


def test_bisect_of_equal_runs_and_of_runs_that_differ_from_the_start(tmp_path: Path) -> None:
    a, b, c = (saved(tmp_path / name) for name in "abc")
    assert not bisect((a, b), (tmp_path / "a", tmp_path / "b"))
    other = full_loop(callbacks=[counter(), checkpoint(tmp_path / "d")], epochs=3)
    fl.train(fl.init(other, seed=6))
    found = bisect((c, other), (tmp_path / "c", tmp_path / "d"))
    assert (found.equal, found.place.stage) == (None, "")
    assert found.differences[0].path == "seed"


@pytest.mark.parametrize("which", [0, 1])
def test_bisect_says_which_run_chance_has_changed(tmp_path: Path, which: int) -> None:
    loops = saved(tmp_path / "0"), saved(tmp_path / "1")
    for path in saved_files(tmp_path / str(which))[3:]:
        network = dict(checkpoint_file.read(path)[0]["network"])
        network["3.bias"] = network["3.bias"] + 1
        damage(path, network=network)
    found = bisect(loops, (tmp_path / "0", tmp_path / "1"))
    assert found.unfaithful == (which,)
    assert (found.equal and found.equal.global_step, found.place.global_step) == (4, 6)
    assert [difference.path for difference in found.differences] == ["network/3.bias"]


def leaf_pairs() -> dict[str, tuple[Any, Any, str]]:
    nan = torch.nan
    return {
        "float": (1.0, 1.5, "1.0 against 1.5"),
        "zero": (0.0, -0.0, "0.0 against -0.0"),
        "type": (1, 1.0, "1 against 1.0"),
        "bool": (True, 1, "True against 1"),
        "text": ("a", "b", "'a' against 'b'"),
        "tuple": ((), torch.ones(2), "() against float32[2]"),
        "shape": (torch.ones(2), torch.ones(3), "float32[2] against float32[3]"),
        "dtype": (torch.ones(2), torch.ones(2).bool(), "float32[2] against bool[2]"),
        "one nan": (torch.tensor([nan, 1.0]), torch.tensor([1.0, 1.0]), "1 of 2 elements"),
        "minus zero": (torch.tensor([0.0]), torch.tensor([-0.0]), "the same numbers in other bits"),
        "integers": (torch.tensor([1, 2]), torch.tensor([1, 5]), "1 of 2 elements"),
        "infinite": (torch.tensor([torch.inf, 1.0]), torch.tensor([torch.inf, 3.0]), "1 of 2 elements"),
        "complex": (torch.tensor([1j]), torch.tensor([2j]), "1 of 1 elements"),
        "structure": ({"x": 1}, [1], "{'x': 1} against [1]"),
        "bf16": (torch.ones(3).bfloat16(), torch.zeros(3).bfloat16(), "3 of 3 elements"),
    }


@pytest.mark.parametrize("name", leaf_pairs())
def test_differences_of_leaves(name: str) -> None:
    a, b, reason = leaf_pairs()[name]
    (found,) = fl.differences({"callbacks": {"x": a}}, {"callbacks": {"x": b}})
    assert (found.path, found.reason) == ("callbacks/x", reason)
    assert fl.differences({"x": a}, {"x": a}) == []
    assert [d.reason for d in fl.differences({"x": [a]}, {"x": []})] == ["only in the first"]


def test_sizes_of_differences() -> None:
    (found,) = fl.differences({"x": leaf_pairs()["infinite"][0]}, {"x": leaf_pairs()["infinite"][1]})
    assert (found.max_abs, found.ulps) == (2.0, 3 << 22)
    (found,) = fl.differences({"x": torch.tensor([1, 2])}, {"x": torch.tensor([1, 5])})
    assert attrs.astuple(found) == ("x", "1 of 2 elements", 3.0, None)
    (found,) = fl.differences({"x": torch.tensor([torch.nan])}, {"x": torch.tensor([1.0])})
    assert found.max_abs is not None
    assert found.max_abs != found.max_abs


# ---- ensembles


def ensemble(folder: Path, mode: str, *callbacks: Any) -> fl.Loop:
    """A loop of which an ensemble was trained, one member of which stopped early."""

    def stop(ctx: fl.Context) -> fl.Context:
        return fl.evolve(ctx, terminate=ctx.seed == 1 and ctx.epoch == 1)

    saving = checkpoint(folder, every_steps=3)
    loop = ensembles.make_loop(callbacks=[fl.Callback("stop", epoch_end=stop), *callbacks, progress(), saving])
    fl.train(fl.stack(ensembles.starts(loop), mode=mode))
    return loop


@pytest.mark.parametrize("mode", ["vectorised", "exact"])
def test_every_segment_of_an_ensemble_replays(mode: str, tmp_path: Path) -> None:
    loop = ensemble(tmp_path, mode)
    segments = list(fl.verify(loop, tmp_path, from_start=True))
    assert all(segments)
    assert [segment.stop.global_step for segment in segments] == [3, 4, 6, 8, 9, 12, 12]
    path = saved_files(tmp_path)[2]
    members = checkpoint_file.read(path)[0]["members"]
    weights = dict(members[2]["network"])
    weights["6.1.bias"] = weights["6.1.bias"] + 1
    damage(path, members=[*members[:2], {**members[2], "network": weights}])
    wrong = [segment for segment in fl.verify(loop, tmp_path) if not segment]
    assert wrong[0].stop.global_step == 6
    assert [d.path for d in wrong[0].differences] == ["members/2/network/6.1.bias"]


@pytest.mark.parametrize("mode", ["vectorised", "exact"])
def test_bisect_finds_the_step_and_the_member_of_an_ensemble(mode: str, tmp_path: Path) -> None:
    def change(ctx: fl.Context) -> fl.Context:
        if ctx.global_step != 7:
            return ctx
        bias = ctx.params["6.1.bias"]
        changed = torch.where(torch.as_tensor(ctx.seed == 2), bias + 1, bias)
        return fl.evolve(ctx, params={**ctx.params, "6.1.bias": changed})

    loops = ensemble(tmp_path / "a", mode), ensemble(tmp_path / "b", mode, fl.Callback("change", batch_end=change))
    parting = bisect(loops, (tmp_path / "a", tmp_path / "b"))
    assert (parting.place.global_step, parting.place.stage, parting.unfaithful) == (7, "batch_end", ())
    assert [d.path for d in parting.differences] == ["members/2/network/6.1.bias"]
    assert not bisect((loops[0], loops[0]), (tmp_path / "a", tmp_path / "a"))
