"""Loaders: their batches are functions of (seed, epoch, step), and those with a state resume from it."""

from __future__ import annotations

import random
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, WeightedRandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

import functional_loop as fl

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")


class Noisy(torch.utils.data.Dataset):
    def __len__(self):
        return 11

    def __getitem__(self, i):
        return torch.tensor([float(i), torch.rand(()), np.random.rand(), random.random()], dtype=torch.float64), i


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 11

    def __getitem__(self, i):
        return torch.tensor(float(i)), i


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(5.0))


class Tape:
    """A loader of one's own with a state, in the most ordinary way."""

    def __init__(self, n=6):
        self.n, self.place = n, {"next": 0, "seen": (torch.zeros(1), None)}

    def __iter__(self):
        while self.place["next"] < self.n:
            self.place["next"] += 1
            self.place["seen"][0].add_(1)
            yield torch.tensor([self.place["next"]]), self.place["seen"][0]
        self.place["next"] = 0

    def state_dict(self):
        return self.place

    def load_state_dict(self, state):
        self.place = state


def stateful(dataset, shuffle=True, workers=0, **options):
    return StatefulDataLoader(dataset, batch_size=3, shuffle=shuffle, num_workers=workers, **options)


def read(source, seed=0, epoch=1, start=0, state=()):
    return list(source.fetch(seed, epoch, start, state))


def values(pairs):
    return [batch for batch, _ in pairs]


def rows(pairs):
    return [row for batch, _ in pairs for row in batch.y.tolist()]


# Loaders without a state


@pytest.mark.parametrize("workers", [0, 2])
def test_the_epochs_of_a_data_loader_are_functions_of_seed_and_epoch(workers):
    def epoch(seed, epoch):
        return values(read(fl.batches(DataLoader(Noisy(), 3, shuffle=True, num_workers=workers)), seed, epoch))

    source = fl.batches(DataLoader(Noisy(), 3, shuffle=True, num_workers=workers))
    expected = epoch(3, 2)
    torch.manual_seed(9), np.random.seed(9), random.seed(9)
    before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    read(source, 3, 1)
    assert fl.tree_equal(values(read(source, 3, 2)), expected)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (str(np.random.get_state()), random.getstate()) == before[1:]
    assert not fl.tree_equal(epoch(3, 1), expected)
    assert not fl.tree_equal(epoch(4, 2), expected)
    assert sorted(row for batch in expected for row in batch.y.tolist()) == list(range(11))


@pytest.mark.parametrize("start", [1, 3, 4])
def test_a_loader_without_a_state_is_replayed_with_one_warning(start):
    source = fl.batches(DataLoader(Noisy(), 3, shuffle=True))
    with pytest.warns(UserWarning, match=r"reads \d batches again.*batches\(dataset, ...\)") as caught:
        tail = read(source, start=start)
    assert len(caught) == 1
    assert fl.tree_equal(values(tail), values(read(source))[start:])


def test_any_iterable_that_starts_anew_is_a_loader():
    items = [(torch.ones(2), torch.zeros(2)), {"x": torch.ones(1), "y": torch.zeros(1)}, fl.Batch(torch.ones(3))]
    source = fl.batches(items)
    assert len(source) == 3
    for _ in range(2):
        got = values(read(source))
        assert fl.tree_equal(got, [fl.as_batch(item) for item in items])
        for batch in got:
            batch.x.zero_()
    assert items[0][0].tolist() == [1, 1]


def test_to_batch_runs_under_the_seed_of_the_batch():
    source = fl.batches(DataLoader(Rows(), 3), to_batch=lambda item: fl.Batch(item[0] + torch.rand(()), item[1]))
    assert fl.tree_equal(read(source), read(source))
    assert not fl.tree_equal(read(source, epoch=1), read(source, epoch=2))


def test_the_length_of_a_stream_is_unknown():
    source = fl.batches(DataLoader(Stream(), batch_size=2))
    assert source.length is None
    assert source
    with pytest.raises(TypeError, match="number of batches per epoch is unknown"):
        len(source)
    assert [batch.x.tolist() for batch, _ in read(source)] == [[0, 1], [2, 3], [4]]


def test_samplers_are_told_the_epoch():
    def order(epoch):
        sampler = torch.utils.data.DistributedSampler(Rows(), num_replicas=1, rank=0)
        return rows(read(fl.batches(DataLoader(Rows(), 3, sampler=sampler)), epoch=epoch))

    assert order(1) == order(1) != order(2)


# Loaders with a state


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_stateful_loader_resumes_from_its_state_at_every_batch(shuffle, workers):
    whole = fl.batches(stateful(Rows(), shuffle, workers))
    first = read(whole)
    second = read(whole, epoch=2, state=first[-1][1])
    assert sorted(rows(first)) == sorted(rows(second)) == list(range(11))
    assert (rows(first) != rows(second)) == shuffle
    for start, (_, state) in enumerate(first, 1):
        resumed = fl.batches(stateful(Rows(), shuffle, workers))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore" if workers else "error", "what the workers")
            rest = read(resumed, start=start, state=state)
        assert fl.tree_equal(rest, first[start:])
        last = (first[:start] + rest)[-1][1]
        assert fl.tree_equal(read(resumed, epoch=2, state=last), second)


class Playlist(Stream):
    """A stream that keeps its place."""

    def __init__(self):
        self.place = 0

    def __iter__(self):
        while self.place < 8:
            self.place += 1
            yield torch.tensor(float(self.place)) + torch.rand(())
        self.place = 0

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


@pytest.mark.filterwarnings("ignore:resuming in mid-epoch reads")
@pytest.mark.parametrize(("dataset", "workers"), [(Playlist, 0), (Stream, 0), (Stream, 1)])
def test_a_stateful_loader_of_a_stream_resumes_more_than_once(dataset, workers):
    first = read(fl.batches(stateful(dataset(), shuffle=None, workers=workers)))
    second = read(fl.batches(stateful(dataset(), shuffle=None, workers=workers)), epoch=2, state=first[-1][1])
    state = ()
    for start in range(len(first)):
        source = fl.batches(stateful(dataset(), shuffle=None, workers=workers))
        batch, state = next(source.fetch(0, 1, start, state))
        assert fl.tree_equal(batch, first[start][0])
    assert fl.tree_equal(values(read(source, epoch=2, state=state)), values(second))


def test_a_stream_without_a_state_makes_a_loader_without_one():
    with pytest.warns(UserWarning, match="the loader has no state to start from"):
        read(fl.batches(stateful(Stream(), shuffle=None)), start=1)


def test_random_transforms_in_this_process_resume_with_the_state():
    first = read(fl.batches(stateful(Noisy())))
    for start, (_, state) in enumerate(first, 1):
        assert fl.tree_equal(read(fl.batches(stateful(Noisy())), start=start, state=state), first[start:])


def test_random_transforms_in_workers_do_not_and_a_warning_says_so():
    source = fl.batches(stateful(Noisy(), workers=2))
    _, state = read(source)[0]
    with pytest.warns(UserWarning, match="random transforms start anew when resuming in mid-epoch"):
        read(source, start=1, state=state)


def test_an_order_with_a_state_is_a_function_of_seed_and_epoch_too():
    source = fl.batches(stateful(Rows()))
    first = read(source, seed=5)
    assert fl.tree_equal(read(source, seed=5), first)
    assert fl.tree_equal(read(fl.batches(stateful(Rows())), seed=5), first)
    assert rows(read(source, seed=6)) != rows(first)
    chained = read(source, seed=5, epoch=2, state=first[-1][1])
    assert rows(chained) == rows(read(source, seed=5, epoch=2))


RESUME = """
import sys, warnings, torch
import functional_loop as fl
from torchdata.stateful_dataloader import StatefulDataLoader
from torch.utils.data import TensorDataset

warnings.simplefilter("ignore")
dataset = TensorDataset(torch.arange(11.0), torch.arange(11))
for workers, epoch, start, state in torch.load(sys.argv[1], weights_only=True):
    loader = StatefulDataLoader(dataset, batch_size=3, shuffle=True, num_workers=workers)
    print([batch.y.tolist() for batch, _ in fl.batches(loader).fetch(0, epoch, start, state)])
"""


def test_a_fresh_process_resumes_from_the_state(tmp_path):
    places, expected = [], []
    for workers in (0, 2):
        source = fl.batches(stateful(Rows(), workers=workers))
        first = read(source)
        second = read(source, epoch=2, state=first[-1][1])
        places += [(workers, 1, 2, first[1][1]), (workers, 1, 4, first[3][1]), (workers, 2, 0, first[3][1])]
        expected += [first[2:], [], second]
    torch.save(places, tmp_path / "places")
    arguments = [sys.executable, "-c", RESUME, str(tmp_path / "places")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str([batch.y.tolist() for batch, _ in pairs]) for pairs in expected]


def test_a_loader_of_ones_own_with_a_state_resumes_and_is_left_as_it_was():
    tape = Tape()
    source = fl.batches(tape)
    first = read(source)
    assert tape.place["next"] == 0
    assert tape.place["seen"][0].item() == 0
    second = read(source, epoch=2, state=first[-1][1])
    assert [batch.y.item() for batch, _ in first + second] == list(range(1, 13))
    for start, (_, state) in enumerate(first, 1):
        assert fl.tree_equal(read(source, start=start, state=state), first[start:])

    run = source.fetch(0, 1, 0, ())
    next(run), next(run)
    run.close()
    assert fl.tree_equal(read(source), first)


def test_a_state_given_to_fetch_is_not_written_to():
    source = fl.batches(Tape())
    (_, state), *rest = read(source)
    before = fl.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, state)
    read(source, start=1, state=state)
    assert fl.tree_equal(state, before)
    assert len(rest) == 5


def test_a_second_run_over_a_loader_with_a_state_stops_the_first():
    loader = stateful(Rows())
    first, second = fl.batches(loader).fetch(0, 1, 0, ()), fl.batches(loader).fetch(1, 1, 0, ())
    next(first)
    begun = next(second)
    with pytest.raises(RuntimeError, match="another run has begun to read this StatefulDataLoader"):
        next(first)
    assert fl.tree_equal([begun, *second], read(fl.batches(stateful(Rows())), seed=1))


def test_workers_leave_when_the_reader_does():
    run = fl.batches(stateful(Rows(), workers=2)).fetch(0, 1, 0, ())
    next(run)
    assert len(torch.multiprocessing.active_children()) == 2
    run.close()
    assert not torch.multiprocessing.active_children()


@pytest.mark.parametrize("opaque", [b"bytes", np.zeros(2), object(), {1: 2}])
def test_states_that_cannot_be_saved_are_refused_by_path(opaque):
    tape = Tape()
    tape.place["cursor"] = [opaque]
    with pytest.raises(TypeError, match=r"the state of the Tape can't be saved: \['cursor'\]\[0\]"):
        fl.batches(tape)


# Refusals


def generator():
    return torch.Generator()


@pytest.mark.parametrize(
    ("kind", "message", "make"),
    [
        (TypeError, "Stream is an IterableDataset.*pass a DataLoader", Stream),
        (TypeError, "can be read only once; pass what it was made from", lambda: (i for i in range(3))),
        (TypeError, "can be read only once", lambda: iter(DataLoader(Rows()))),
        (ValueError, "the list has no batches", list),
        (ValueError, "generator of the DataLoader", lambda: DataLoader(Rows(), generator=generator())),
        (
            ValueError,
            "generator of the RandomSampler",
            lambda: DataLoader(Rows(), sampler=RandomSampler(Rows(), generator=generator())),
        ),
        (ValueError, "generator of the StatefulDataLoader", lambda: stateful(Rows(), generator=generator())),
        (
            ValueError,
            "doesn't hold the order of its WeightedRandomSampler",
            lambda: stateful(Rows(), shuffle=False, sampler=WeightedRandomSampler([1.0] * 11, 11)),
        ),
        (ValueError, "persistent_workers", lambda: DataLoader(Rows(), num_workers=1, persistent_workers=True)),
        (ValueError, "in_order=False", lambda: DataLoader(Rows(), num_workers=1, in_order=False)),
        (TypeError, "not int", lambda: 3),
    ],
)
def test_loaders_that_are_no_function_of_the_place_are_refused(kind, message, make):
    with pytest.raises(kind, match=message):
        fl.batches(make())


def test_options_for_rows_are_refused_for_loaders():
    with pytest.raises(TypeError, match="batches of a loader take no batch_size; there is 'to_batch'"):
        fl.batches(DataLoader(Rows()), batch_size=3)


def test_a_batch_of_another_form_says_what_to_do():
    with pytest.raises(TypeError, match="pass to_batch="):
        read(fl.batches([{"image": torch.zeros(1)}]))
