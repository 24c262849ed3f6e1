"""Damage to a store is never silent: whatever the bytes of its files are, it says so or gives back what was saved."""

from __future__ import annotations

import copy
import json
import random
import shutil
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import functional_loop as fl
from functional_loop.checkpoint import file as checkpoint_file
from functional_loop.checkpoint import folder
from tests.strategies import examples
from tests.test_checkpoint_file import sealed
from tests.test_store import END, EPOCH_END, LOOP, at


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    with fl.CheckpointStore(path) as store:
        for ctx in (at(1), at(2), EPOCH_END, END):
            store.save(ctx)
    return path


@pytest.fixture
def changing(run: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be damaged."""
    return Path(shutil.copytree(run, tmp_path / "run"))


DIGESTS = {fl.digest(ctx) for ctx in (at(1), at(2), EPOCH_END, END)}


def flipped(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def cuts(data: bytes) -> list[int]:
    """Where something ends: the length, the header, each tensor, blocks and pages; and one byte beside."""
    header = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:header])
    entries.pop("__metadata__")
    ends = [header + entry["data_offsets"][1] for entry in entries.values()]
    edges = {0, 8, header, *ends, *range(0, len(data), 512)}
    return sorted(cut for edge in edges for cut in (edge - 1, edge, edge + 1) if 0 <= cut < len(data))


def truncated(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.choice(cuts(data))]


def zeroed(data: bytes, chance: random.Random) -> bytes:
    cut = chance.choice(cuts(data))
    return data[:cut] + bytes(len(data) - cut)


def lost_block(data: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(0, len(data), 512)
    return data[:start] + bytes(len(data[start : start + 512])) + data[start + 512 :]


@pytest.mark.parametrize("number", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_of_many_damages_not_one_is_silent(changing: Path, number: int) -> None:
    """Flipped bits, truncations, zeroed tails, lost blocks, and files in the place of others."""
    chance = random.Random(0)
    entries = folder.entries(changing)
    intact = {entry: entry.path.read_bytes() for entry in entries}
    counts = dict.fromkeys(("flipped", "truncated", "zeroed", "lost_block", "swapped"), 0)
    while sum(counts.values()) < number:
        entry, other = chance.sample(entries, 2)
        kind = chance.choice([*counts])
        changed = intact[other] if kind == "swapped" else globals()[kind](intact[entry], chance)
        if changed == intact[entry]:
            continue  # the zeros were there before
        # To write over a file takes much longer than to make a new one: some disks flush it.
        entry.path.unlink()
        entry.path.write_bytes(changed)
        with pytest.raises(fl.CheckpointError, match=entry.path.name):
            entry.read()
        counts[kind] += 1
    assert min(counts.values()) > number / 10


@pytest.mark.parametrize("damage", [flipped, truncated, zeroed, lost_block])
def test_a_damaged_store_gives_back_an_older_checkpoint_and_names_the_damage(changing: Path, damage: Any) -> None:
    chance = random.Random(damage.__name__)
    entries = folder.entries(changing)
    newest = entries[-1]
    intact = newest.path.read_bytes()
    for _ in range(10):
        while (changed := damage(intact, chance)) == intact:
            pass
        newest.path.write_bytes(changed)
        store = fl.CheckpointStore(changing)
        assert [*store.verify()] == [newest.path]
        with pytest.warns(UserWarning, match=newest.path.name):
            assert fl.digest(store.load(LOOP)) == fl.digest(EPOCH_END)


def test_swapped_files_are_found(changing: Path) -> None:
    one, two, *_ = (entry.path for entry in folder.entries(changing))
    both = one.read_bytes(), two.read_bytes()
    two.write_bytes(both[0])
    one.write_bytes(both[1])
    store = fl.CheckpointStore(changing)
    assert [*store.verify()] == [one, two]
    with pytest.raises(fl.CheckpointError, match=f"{two.name} is not what its name says: it was saved as {one.name}"):
        store.load(LOOP, 2)
    assert store.latest() == 6


def test_a_file_of_another_run_in_the_place_of_one_is_refused(run: Path, tmp_path: Path) -> None:
    store = fl.CheckpointStore(tmp_path)
    path = store.save(fl.train(fl.init(LOOP, seed=1), steps=2))
    path.write_bytes((run / path.name).read_bytes())
    with pytest.raises(fl.StateDictError, match="another seed"):
        fl.resume(LOOP, tmp_path, seed=1)
    with pytest.raises(fl.StateDictError, match="another run"):
        fl.CheckpointStore(tmp_path).save(fl.init(LOOP, seed=1))


def test_what_the_disk_can_not_read_is_damage(changing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = folder.entries(changing)[-1].path
    read_tensor = checkpoint_file._read_tensor

    def fail(file: Any, path: Path, *args: Any) -> torch.Tensor:
        if path == newest:
            raise OSError(5, "Input/output error")
        return read_tensor(file, path, *args)

    monkeypatch.setattr(checkpoint_file, "_read_tensor", fail)
    with pytest.warns(UserWarning, match="Input/output error"):
        assert fl.digest(fl.CheckpointStore(changing).load(LOOP)) == fl.digest(EPOCH_END)
    assert [*fl.CheckpointStore(changing).verify()] == [newest]


def test_a_file_that_is_pruned_while_it_is_looked_for_is_no_error(
    changing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading needs no lock: another process may write, and delete, at the same time."""
    read = checkpoint_file.read

    def prune(path: Path) -> Any:
        if path.name == "step-00000002.safetensors":
            path.unlink()
            with fl.CheckpointStore(changing) as store:
                store.save(at(3))
        return read(path)

    for entry in folder.entries(changing)[2:]:
        entry.path.unlink()
    monkeypatch.setattr(checkpoint_file, "read", prune)
    assert fl.digest(fl.CheckpointStore(changing).load(LOOP)) == fl.digest(at(3))


@st.composite
def mutations(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes that have a lot in common with ``data``: parts of it changed, cut out, doubled, moved."""
    for _ in range(draw(st.integers(1, 3))):
        start, end = sorted((draw(st.integers(0, len(data))), draw(st.integers(0, len(data)))))
        part = data[start:end]
        data = data[:start] + draw(st.sampled_from([b"", part + part, part[::-1], bytes(len(part))])) + data[end:]
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.binary(max_size=8)) + data[at + draw(st.integers(0, 8)) :]
    return data


def use(path: Path) -> Iterator[fl.Context]:
    """All that reads a folder."""
    store = fl.CheckpointStore(path)
    store.steps(), store.verify()
    for read in (lambda: store.load(LOOP), lambda: fl.resume(LOOP, path)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            try:
                yield read()
            except fl.CheckpointError:
                continue


@examples(1)
@given(st.data())
def test_any_bytes_are_a_checkpoint_error_or_what_was_saved(
    run: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("fuzzed")
    intact = (run / "step-00000002.safetensors").read_bytes()
    (path / "step-00000002.safetensors").write_bytes(data.draw(st.binary() | mutations(intact)))
    start = fl.digest(fl.init(LOOP))
    for ctx in use(path):
        assert fl.digest(ctx) in {*DIGESTS, start}


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats() | st.text(max_size=3),
    lambda children: st.lists(children, max_size=2) | st.dictionaries(st.text(max_size=3), children, max_size=2),
    max_leaves=4,
)


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(place for key, child in items for place in places(child, (*path, key)))]


@examples(0.5)
@given(st.data())
def test_forged_files_with_right_checksums_are_refused_or_loaded(
    run: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whoever writes such a file can write a valid one as well; but what loads it must not fall over it."""
    path = tmp_path_factory.mktemp("forged")
    file = run / "step-00000002.safetensors"
    state, metadata = checkpoint_file.read(file)
    forged: Any = {"state": copy.deepcopy(state), "metadata": metadata}
    for _ in range(data.draw(st.integers(1, 2))):
        *way, last = data.draw(st.sampled_from(places(forged)[1:]))
        node = forged
        for key in way:
            node = node[key]
        if isinstance(node, dict) and data.draw(st.booleans()):
            del node[last]
        else:
            node[last] = data.draw(PLAIN)
    try:
        checkpoint_file.write(path / file.name, forged["state"], forged["metadata"])
    except (TypeError, AttributeError, KeyError):
        return
    store = fl.CheckpointStore(path)
    for read in (lambda: store.load(LOOP), lambda: fl.resume(LOOP, path)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            try:
                assert isinstance(read(), fl.Context)
            except (fl.CheckpointError, fl.StateDictError):
                continue


def peak_of_reading(path: Path) -> int:
    """Bytes of memory that reading took at its peak, beyond what was in use before."""

    def status(name: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    with suppress(fl.CheckpointError):
        checkpoint_file.read(path)
    return status("VmHWM") - before


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize("what", ["intact", "a longer header", "a shorter header", "cut", "all header", "foreign"])
def test_reading_takes_less_memory_than_two_files(tmp_path: Path, what: str) -> None:
    path = tmp_path / "large.safetensors"
    checkpoint_file.write(path, [torch.zeros(2_000_000) for _ in range(8)], {})
    data = path.read_bytes()
    size = len(data)
    if what == "a longer header":
        data = (size - 8).to_bytes(8, "little") + data[8:]
    elif what == "a shorter header":
        data = (200).to_bytes(8, "little") + data[8:]
    elif what == "cut":
        data = data[: size // 2]
    elif what == "all header":
        data = sealed(data[8:300] + b" " * size)
    elif what == "foreign":
        data = (size - 8).to_bytes(8, "little") + bytes(size - 8)
    path.write_bytes(data)
    del data
    assert peak_of_reading(path) < 1.5 * size
