"""Files and state dicts that no run has made are refused, in bounded time and memory, by all that reads them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import functional_loop as fl
from functional_loop.checkpoint import file as checkpoint_file
from functional_loop.checkpoint import state
from functional_loop.cli import main

from .sample_loops import full_loop
from .strategies import examples
from .test_damage import places

SPARSE = torch.sparse_coo_tensor(torch.tensor([[0, 2]]), torch.ones(2), (3,), is_coalesced=True, check_invariants=True)


def keeps(state: Any) -> fl.Callback:
    return fl.Callback("keeps", init=lambda ctx: state)


LOOP = full_loop(callbacks=[keeps({"rows": [SPARSE, 1.5, None], "tuple": ()})])
SOLO = fl.train(fl.init(LOOP, seed=3), steps=2)
PLAIN_LOOP = full_loop()
MEMBERS = fl.train(fl.stack([fl.init(PLAIN_LOOP, seed=seed) for seed in (3, 4)]), steps=2)
NAME = "step-00000002.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    """State and metadata of a run, and of an ensemble."""
    found = {}
    for name, ctx in {"solo": SOLO, "members": MEMBERS}.items():
        path = tmp_path_factory.mktemp(name)
        with fl.CheckpointStore(path) as store:
            found[name] = checkpoint_file.read(store.save(ctx))
    return found


def use(folder: Path, loop: fl.Loop) -> Iterator[Callable[[], Any]]:
    """All that reads a folder of checkpoints."""
    yield lambda: fl.CheckpointStore(folder).verify()
    yield lambda: fl.CheckpointStore(folder).load(loop)
    yield lambda: [*fl.verify(loop, folder, from_start=True)]
    yield lambda: main(["export", str(folder / NAME), str(folder / "out.pt")])
    yield lambda: main(["inspect", str(folder / NAME)])
    yield lambda: main(["diff", str(folder / NAME), str(folder / NAME)])
    yield lambda: fl.resume(loop, folder, seed=3)


def refused_or_read(folder: Path, loop: fl.Loop) -> list[str]:
    told = []
    for read in use(folder, loop):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            try:
                read()
            except (fl.CheckpointError, fl.StateDictError) as error:
                told.append(str(error))
    return told


def many(tree: Any, number: int) -> Any:
    return {**tree, "members": [copy.copy(tree["members"][0]) for _ in range(number)]}


CRAFTED: dict[str, Callable[[Any, Any], tuple[Any, Any]]] = {
    "many members": lambda s, m: (many(s, 50), {**m, "members": [3] * 50}),
    "no members": lambda s, m: ({**s, "members": []}, {**m, "members": []}),
    "members that are none": lambda s, m: ({**s, "members": [{}] * 5}, {**m, "members": [1] * 5}),
    "a mode": lambda s, m: ({**s, "ensemble": {"mode": "x", "batch_hooks": "each"}}, m),
    "no mode": lambda s, m: ({key: value for key, value in s.items() if key != "ensemble"}, m),
}


def test_a_replay_refuses_an_ensemble_with_more_than_its_mode(saved: dict[str, Any], tmp_path: Path) -> None:
    tree, metadata = saved["members"]
    tree = {**tree, "ensemble": {**tree["ensemble"], "": {"(sparse)": {}}}}
    checkpoint_file.write(tmp_path / NAME, tree, metadata)
    with pytest.raises(fl.CheckpointError, match="no checkpoint of a run"):
        [*fl.verify(PLAIN_LOOP, tmp_path, from_start=True)]


@pytest.mark.parametrize("what", CRAFTED)
def test_ensembles_that_no_run_has_saved_are_refused_before_their_members_are_made(
    saved: dict[str, Any], tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint_file.write(tmp_path / NAME, *CRAFTED[what](*saved["members"]))
    made: list[int] = []

    def count(loop: fl.Loop, seed: int) -> fl.Context:
        made.append(seed)
        return fl.init(loop, seed)

    monkeypatch.setattr(state, "init", count)
    with pytest.raises((fl.CheckpointError, fl.StateDictError)):
        fl.CheckpointStore(tmp_path).load(PLAIN_LOOP)
    refused_or_read(tmp_path, PLAIN_LOOP)
    # One for each way to read it.
    assert len(made) <= 3


NOT_SPARSE: dict[str, Any] = {
    "nothing": None,
    "a list": [1],
    "no parts": {},
    "no values": {"indices": torch.tensor([[0]]), "shape": [3], "coalesced": True},
    "a row too far": {"indices": torch.tensor([[5]]), "values": torch.ones(1), "shape": [3], "coalesced": True},
    "a row before the first": {
        "indices": torch.tensor([[-1]]),
        "values": torch.ones(1),
        "shape": [3],
        "coalesced": True,
    },
    "too few values": {"indices": torch.tensor([[0, 1]]), "values": torch.ones(1), "shape": [3], "coalesced": True},
    "a negative shape": {"indices": torch.tensor([[0]]), "values": torch.ones(1), "shape": [-3], "coalesced": True},
    "a huge shape": {
        "indices": torch.tensor([[0]]),
        "values": torch.ones(1),
        "shape": [2**62, 2**62],
        "coalesced": True,
    },
    "a shape of strings": {"indices": torch.tensor([[0]]), "values": torch.ones(1), "shape": ["3"], "coalesced": True},
    "rows that are floats": {"indices": torch.ones(1, 1), "values": torch.ones(1), "shape": [3], "coalesced": True},
    "not coalesced": {"indices": torch.tensor([[1, 0]]), "values": torch.ones(2), "shape": [3], "coalesced": True},
    "another word": {"indices": torch.tensor([[0]]), "values": torch.ones(1), "shape": [3], "coalesced": "yes"},
    "numbers": {"indices": 1, "values": 2.0, "shape": 3, "coalesced": True},
}


@pytest.mark.parametrize("what", NOT_SPARSE)
def test_sparse_tensors_of_a_wrong_form_are_refused(saved: dict[str, Any], tmp_path: Path, what: str) -> None:
    tree, metadata = copy.deepcopy(saved["solo"])
    tree["callbacks"]["keeps"]["state"]["rows"][0] = {"(sparse)": NOT_SPARSE[what]}
    with pytest.raises(fl.StateDictError, match=r"callbacks/keeps|malformed"):
        fl.load_state_dict(fl.init(LOOP), tree)
    checkpoint_file.write(tmp_path / NAME, tree, metadata)
    with pytest.raises((fl.StateDictError, fl.CheckpointError)):
        fl.CheckpointStore(tmp_path).load(LOOP)


@pytest.mark.parametrize("name", ["epoch", "step", "step_valid", "global_step", "seed", "stage", "terminate"])
@pytest.mark.parametrize("value", [-1, float("nan"), True, "1", 2**70, None, [], 10**6])
def test_places_that_no_run_has_are_refused_in_files(
    saved: dict[str, Any], tmp_path: Path, name: str, value: Any
) -> None:
    if (name == "seed" and type(value) is int) or (name, value) in (("terminate", True), ("global_step", 10**6)):
        return
    tree, metadata = saved["solo"]
    checkpoint_file.write(tmp_path / NAME, {**tree, name: value}, metadata)
    with pytest.raises((fl.CheckpointError, fl.StateDictError)):
        fl.CheckpointStore(tmp_path).load(LOOP)
    both = {**metadata, name: value} if name in metadata else metadata
    checkpoint_file.write(tmp_path / NAME, {**tree, name: value}, both)
    with pytest.raises((fl.CheckpointError, fl.StateDictError)):
        fl.CheckpointStore(tmp_path).load(LOOP)


VALUES = (
    st.none()
    | st.booleans()
    | st.sampled_from([-1, 0, 1, 2**31, 2**63, 2**70, 1.5, float("nan"), float("inf"), -0.0, "", "x", [], {}, [[]]])
    | st.sampled_from([torch.zeros(0), torch.ones(3), torch.zeros(2, 2, dtype=torch.int64), torch.tensor(True)])
    | st.sampled_from([{"()": []}, {"()": 1}, {"(sparse)": {}}, {"(sparse)": []}, {"kind": "", "state": 0}])
    | st.text(max_size=3)
)


def mutated(draw: st.DrawFn, tree: Any, number: int) -> Any:
    """A copy of ``tree`` in which some nodes are others, gone, or in the place of others."""
    tree = copy.deepcopy(tree)
    for _ in range(number):
        nodes = places(tree)[1:]
        *way, last = draw(st.sampled_from(nodes))
        node = tree
        for key in way:
            node = node[key]
        match draw(st.sampled_from(["other", "gone", "moved", "added"])):
            case "other":
                node[last] = draw(VALUES)
            case "gone":
                del node[last]
            case "moved":
                other = tree
                for key in draw(st.sampled_from(nodes)):
                    if not isinstance(other, (dict, list)) or not (
                        key in other if isinstance(other, dict) else key < len(other)
                    ):
                        break
                    other = other[key]
                node[last] = copy.deepcopy(other)
            case "added" if isinstance(node, dict):
                node[draw(st.text(max_size=3))] = draw(VALUES)
            case "added":
                node.append(draw(VALUES))
    return tree


@pytest.mark.parametrize("kind", ["solo", "members"])
@examples(1)
@given(st.data())
def test_any_state_dict_loads_or_is_refused(saved: dict[str, Any], kind: str, data: st.DataObject) -> None:
    tree, _ = saved[kind]
    crafted = data.draw(st.composite(lambda draw: mutated(draw, tree, draw(st.integers(1, 3))))())
    start = fl.init(LOOP) if kind == "solo" else fl.stack([fl.init(PLAIN_LOOP, seed=seed) for seed in (3, 4)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            assert isinstance(fl.load_state_dict(start, crafted), fl.Context)
        except fl.StateDictError as error:
            assert error.differences  # noqa: PT017


@pytest.mark.parametrize("kind", ["solo", "members"])
@examples(0.5)
@given(st.data())
def test_any_file_with_right_checksums_is_read_or_refused(
    saved: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    both = {"state": saved[kind][0], "metadata": saved[kind][1]}
    crafted = data.draw(st.composite(lambda draw: mutated(draw, both, draw(st.integers(1, 3))))())
    folder = tmp_path_factory.mktemp("crafted")
    try:
        checkpoint_file.write(folder / NAME, crafted["state"], crafted["metadata"])
    except (TypeError, AttributeError, KeyError, ValueError):
        return
    refused_or_read(folder, LOOP if kind == "solo" else PLAIN_LOOP)
