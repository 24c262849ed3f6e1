"""Batches of tensors and datasets are functions of (seed, epoch, step)."""

from __future__ import annotations

import gc
import json
import math
import os
import random
import signal
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, RandomSampler, Subset, TensorDataset, WeightedRandomSampler, default_collate

import functional_loop as fl
from functional_loop.data.sources import to_device
from tests.ensembles import data as ensemble_data
from tests.ensembles import make_loop

laws = settings(max_examples=25, deadline=None)
rows, sizes, seeds, epochs = st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**40), st.integers(1, 9)


def data(n):
    return torch.arange(2.0 * n).reshape(n, 2), torch.arange(n)


def read(source, seed=0, epoch=1, start=0):
    return [batch for batch, _ in source.fetch(seed, epoch, start, ())]


def index_of(batches):
    return torch.cat([batch.index for batch in batches])


def random_states():
    return torch.get_rng_state(), list(np.random.get_state(legacy=False)["state"]["key"]), random.getstate()


class Augmented(torch.utils.data.Dataset):
    """Rows with noise from torch, numpy and `random`, and a sum whose bits depend on the number of threads."""

    def __len__(self):
        return 11

    def __getitem__(self, i):
        noise = torch.rand(2) + float(np.random.rand()) + random.random()
        return i + noise, torch.rand(100_000).sum()


# Laws


@laws
@given(rows, sizes, seeds, epochs)
def test_every_row_comes_once_in_a_shuffled_epoch(n, batch_size, seed, epoch):
    x, y = data(n)
    source = fl.batches(x, y, batch_size=batch_size, shuffle=True)
    got = read(source, seed, epoch)
    assert len(got) == len(source) == source.length
    assert sorted(index_of(got).tolist()) == list(range(n))
    for batch in got:
        assert torch.equal(batch.x, x[batch.index])
        assert torch.equal(batch.y, y[batch.index])
        assert batch.index.dtype == torch.int64


@laws
@given(rows, sizes, seeds, epochs, st.sampled_from(["none", "shuffle", "sampler", "weights"]), st.data())
def test_fetch_from_an_offset_is_the_tail_of_the_epoch(n, batch_size, seed, epoch, order, draw):
    x, y = data(n)
    options = {
        "none": {},
        "shuffle": {"shuffle": True},
        "sampler": {"sampler": RandomSampler(range(n))},
        "weights": {"weights": torch.ones(n)},
    }[order]
    for source in (
        fl.batches(x, y, batch_size=batch_size, **options),
        fl.batches(TensorDataset(x, y), batch_size=batch_size, **options),
    ):
        start = draw.draw(st.integers(0, len(source)))
        assert fl.tree_equal(read(source, seed, epoch, start), read(source, seed, epoch)[start:])


@laws
@given(rows, sizes, st.booleans(), st.booleans(), seeds, epochs)
def test_batches_equal_those_of_a_data_loader_with_the_same_order(n, batch_size, shuffle, drop_last, seed, epoch):
    n = max(n, batch_size)
    dataset = TensorDataset(*data(n))
    tensors = fl.batches(*data(n), batch_size=batch_size, shuffle=shuffle, drop_last=drop_last)
    samples = fl.batches(dataset, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last)
    order = tensors.order(seed, epoch).split(batch_size)
    order = [part.tolist() for part in order if len(part) == batch_size or not drop_last]
    theirs = [fl.as_batch(item) for item in DataLoader(dataset, batch_sampler=order)]
    theirs = [fl.evolve(batch, index=torch.tensor(part)) for batch, part in zip(theirs, order, strict=True)]
    assert fl.tree_equal(read(tensors, seed, epoch), theirs)
    assert fl.tree_equal(read(samples, seed, epoch), theirs)


def test_the_order_is_the_documented_one():
    generator = torch.Generator().manual_seed(fl.fold_in(7, "order", 3))
    source = fl.batches(torch.zeros(100, 1), shuffle=True)
    assert torch.equal(source.order(7, 3), torch.randperm(100, generator=generator))


def test_the_order_differs_between_epochs_and_seeds():
    source = fl.batches(torch.zeros(50, 1), shuffle=True)
    orders = {tuple(source.order(seed, epoch).tolist()) for seed in range(5) for epoch in range(1, 6)}
    assert len(orders) == 25


def test_runs_that_share_a_source_do_not_mix():
    source = fl.batches(torch.zeros(97, 1), batch_size=10, shuffle=True)
    expected = {seed: index_of(read(source, seed)) for seed in range(4)}
    interleaved = zip(*(source.fetch(seed, 1, 0, ()) for seed in range(4)), strict=True)
    columns = zip(*([batch for batch, _ in row] for row in interleaved), strict=True)
    for seed, column in enumerate(columns):
        assert torch.equal(index_of(column), expected[seed])


def test_threads_that_share_a_source_do_not_mix():
    source = fl.batches(torch.zeros(97, 1), shuffle=True)
    expected = [source.order(seed, 1) for seed in range(4)]

    def always_right(seed):
        return all(torch.equal(source.order(seed, 1), expected[seed]) for _ in range(100))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(always_right, range(4)))


# Tensors in memory


@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_are_copies(shuffle):
    x, y = data(6)
    source = fl.batches(x, y, batch_size=6, shuffle=shuffle)
    before = source.order(0, 1).clone()
    for batch in read(source):
        for tensor in (batch.x, batch.y, batch.index):
            tensor.zero_()
    source.order(0, 1).zero_()
    assert torch.equal(x, data(6)[0])
    assert torch.equal(y, data(6)[1])
    assert torch.equal(source.order(0, 1), before)


def test_inputs_may_be_tuples_and_dicts():
    x, y = data(5)
    (batch,) = read(fl.batches((x, {"a": x, "b": y}), {"label": y}, batch_size=5))
    assert fl.tree_equal(batch, fl.Batch((x, {"a": x, "b": y}), {"label": y}, torch.arange(5)))


def test_without_targets_y_is_empty():
    (batch,) = read(fl.batches(torch.zeros(3, 1)))
    assert batch.y == ()


def test_data_that_requires_grad_gives_batches_that_do_not():
    (batch,) = read(fl.batches(torch.zeros(3, 1, requires_grad=True)))
    assert not batch.x.requires_grad


def test_a_default_device_does_not_reach_the_order():
    expected = index_of(read(fl.batches(torch.zeros(9, 1), shuffle=True)))
    source = fl.batches(torch.zeros(9, 1), shuffle=True)
    with torch.device("meta"):
        assert torch.equal(index_of(read(source)), expected)


# Order: samplers and weights


def test_weights_draw_with_replacement_as_many_rows_as_there_are():
    weights = torch.tensor([0.0, 1.0, 3.0, 0.0])
    source = fl.batches(torch.zeros(4, 1), weights=weights)
    drawn = torch.cat([source.order(seed, 1) for seed in range(200)])
    assert len(drawn) == 800
    assert set(drawn.tolist()) == {1, 2}
    assert (drawn == 2).sum() > (drawn == 1).sum()


def test_a_random_sampler_gets_an_order_per_seed_and_epoch():
    source = fl.batches(torch.zeros(20, 1), sampler=RandomSampler(range(20)))
    orders = [source.order(seed, epoch) for seed in range(3) for epoch in (1, 2)]
    again = fl.batches(torch.zeros(20, 1), sampler=RandomSampler(range(20)))
    assert len({tuple(order.tolist()) for order in orders}) == 6
    assert torch.equal(again.order(2, 2), orders[-1])


def test_a_sampler_may_choose_rows_and_is_told_the_epoch():
    class Turning:
        def __len__(self):
            return 3

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            return iter([self.epoch, 0, self.epoch])

    source = fl.batches(torch.arange(8), batch_size=2, sampler=Turning())
    assert len(source) == 2
    assert [batch.x.tolist() for batch in read(source, epoch=5)] == [[5, 0], [5]]


@pytest.mark.parametrize("given", [[3, 1, 1], torch.tensor([3, 1, 1]), range(1, 4)])
def test_a_sampler_may_be_any_sized_iterable_of_row_numbers(given):
    assert fl.batches(torch.arange(8), sampler=given).order(0, 1).tolist() == list(given)


def test_a_sampler_outside_the_rows_is_an_error():
    with pytest.raises(ValueError, match="sampler: in epoch 1 it gave indices outside 0 to 3"):
        read(fl.batches(torch.arange(4), sampler=[0, 4]))


# Datasets


@pytest.fixture
def _several_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_several_threads")
def test_workers_cannot_change_a_bit():
    epochs_read = []
    for workers in (0, 1, 2):
        source = fl.batches(Augmented(), batch_size=2, shuffle=True, num_workers=workers)
        epochs_read.append([read(source, 5, 2), read(source, 5, 2, start=4)])
    assert fl.tree_equal(epochs_read[0], epochs_read[1])
    assert fl.tree_equal(epochs_read[0], epochs_read[2])
    assert fl.tree_equal(epochs_read[0][0][4:], epochs_read[0][1])


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_more_workers_than_cores_cannot_either():
    few, many = (fl.batches(Augmented(), batch_size=2, num_workers=workers) for workers in (0, 3))
    assert fl.tree_equal(read(few), read(many))


class Keeping(torch.utils.data.Dataset):
    """Rows that depend on what was asked for before."""

    def __init__(self, kind):
        self.kind, self.calls = kind, 0
        self.torch, self.numpy = torch.Generator().manual_seed(0), np.random.default_rng(0)

    def __len__(self):
        return 6

    def __getitem__(self, row):
        self.calls += 1
        drawn = {"torch": lambda: torch.rand((), generator=self.torch), "numpy": self.numpy.random}
        return torch.ones(2) * drawn.get(self.kind, lambda: self.calls)()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["torch", "numpy", "calls"])
def test_a_dataset_with_a_state_is_refused_by_name(kind, workers):
    source = fl.batches(Keeping(kind), batch_size=2, num_workers=workers)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"made twice of the same rows.* dataset\.(calls, dataset\.)?{kind}"):
            read(source)


@pytest.mark.parametrize("part", ["collate_fn", "to_batch"])
def test_a_function_of_a_batch_with_a_state_is_refused_by_name(part):
    seen = []

    def counting(rows):
        seen.append(1)
        return torch.zeros(len(rows), 1) + len(seen)

    with pytest.raises(ValueError, match=rf"made twice of the same rows.*{part} > seen"):
        read(fl.batches(Augmented(), batch_size=2, **{part: counting}))


def test_a_dataset_is_asked_twice_once():
    asked = []

    class Asked(Augmented):
        def __getitem__(self, row):
            asked.append(row)
            return super().__getitem__(row)

    source = fl.batches(Asked(), batch_size=2)
    rows = len(source._make.dataset)
    read(source, epoch=1), read(source, epoch=2)
    # What draws from numpy and `random` is asked once more, see `Seeding`.
    assert len(asked) - 2 * rows in (2, 4)


def test_augmentation_differs_between_batches_epochs_and_seeds():
    source = fl.batches(Augmented(), batch_size=1)
    noise = [batch.y.item() for seed in range(2) for epoch in (1, 2) for batch in read(source, seed, epoch)]
    assert len(set(noise)) == 44


@pytest.mark.parametrize("workers", [0, 1])
def test_global_random_numbers_are_neither_used_nor_moved(workers):
    sources = [
        fl.batches(Augmented(), batch_size=4, num_workers=workers, **order)
        for order in ({"shuffle": True}, {"sampler": RandomSampler(range(11))}, {"weights": [1.0] * 11})
    ]
    before = random_states()
    first = [read(source) for source in sources]
    assert str(random_states()) == str(before)
    assert torch.equal(torch.get_rng_state(), before[0])
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    assert fl.tree_equal([read(source) for source in sources], first)


class RarelyNoisy(torch.utils.data.Dataset):
    """Rows of which one in five draws, from numpy; others may fail after it."""

    def __init__(self, failing=()):
        self.failing = failing

    def __len__(self):
        return 20

    def __getitem__(self, i):
        noise = float(np.random.rand()) if i % 5 == 4 else 0.0
        if i in self.failing:
            raise OSError(f"row {i}")
        return torch.tensor(i + noise)


def test_rows_that_seldom_draw_are_functions_of_seed_epoch_and_step_wherever_one_begins():
    fresh = [read(fl.batches(RarelyNoisy(), batch_size=3, num_workers=workers)) for workers in (0, 1)]
    assert fl.tree_equal(fresh[0], fresh[1])
    later = [read(fl.batches(RarelyNoisy(), batch_size=3), start=start) for start in range(7)]
    assert all(fl.tree_equal(tail, fresh[0][start:]) for start, tail in enumerate(later))
    noise = torch.cat([batch.x % 1 for batch in fresh[0]])
    assert (noise != 0).sum() == 4


@pytest.mark.parametrize("row", [4, 9])
def test_global_random_numbers_do_not_move_where_a_row_fails(row):
    before = random_states()
    with pytest.raises(OSError, match=f"row {row}"):
        read(fl.batches(RarelyNoisy(failing=[row]), batch_size=5))
    assert str(random_states()) == str(before)


class Choosy(RarelyNoisy):
    """Rows that can be read or not by what is drawn from numpy."""

    def __getitem__(self, i):
        if np.random.rand() < 0.5:
            raise OSError(f"row {i}")
        return torch.tensor(i)


def test_whether_a_row_fails_by_what_it_draws_is_a_function_of_seed_epoch_and_step():
    def fails(own_seed):
        np.random.seed(own_seed)
        try:
            return str(read(fl.batches(Choosy(), batch_size=20))[0].x)
        except OSError as error:
            return str(error)

    assert len({fails(own_seed) for own_seed in range(5)}) == 1


class Interrupted(torch.utils.data.Dataset):
    """Ctrl-C reaches the worker while it makes a row; what it does at SIGTERM is in the row."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        os.kill(os.getpid(), signal.SIGINT)
        return torch.tensor([i, signal.getsignal(signal.SIGTERM) == signal.SIG_DFL])


def test_workers_leave_signals_to_the_main_process():
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        made = read(fl.batches(Interrupted(), batch_size=2, num_workers=1))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert torch.cat([batch.x for batch in made]).tolist() == [[i, 1] for i in range(4)]


def test_workers_leave_when_the_reader_does():
    children = torch.multiprocessing.active_children
    reader = fl.batches(Augmented(), batch_size=1, num_workers=2).fetch(0, 1, 0, ())
    next(reader)
    assert len(children()) == 2
    reader.close()
    assert not children()

    reader = fl.batches(Augmented(), batch_size=1, num_workers=2).fetch(0, 1, 0, ())
    next(reader)
    del reader
    gc.collect()
    assert not children()


def test_a_dataset_may_fetch_many_rows_at_once():
    class Table:
        def __len__(self):
            return 5

        def __getitem__(self, i):
            raise AssertionError("one by one")

        def __getitems__(self, rows):
            return [(torch.tensor(i), torch.tensor(-i)) for i in rows]

    assert [batch.y.tolist() for batch in read(fl.batches(Table(), batch_size=3))] == [[0, -1, -2], [-3, -4]]


def test_collate_and_to_batch_make_the_batch():
    samples = [{"image": torch.full((2,), float(i)), "label": i} for i in range(4)]
    source = fl.batches(
        Subset(samples, range(4)),
        batch_size=2,
        collate_fn=lambda rows: default_collate(rows[::-1]),
        to_batch=lambda item: fl.Batch(x=item["image"], y=item["label"]),
    )
    assert [batch.y.tolist() for batch in read(source)] == [[1, 0], [3, 2]]


def test_a_collate_function_that_passes_rows_on_does_not_expose_the_dataset():
    x, y = data(3)
    for batch in read(fl.batches(TensorDataset(x, y), batch_size=1, collate_fn=lambda rows: rows[0])):
        batch.x.zero_()
    assert torch.equal(x, data(3)[0])


def test_pinning_is_silent_where_there_is_no_accelerator():
    assert len(read(fl.batches(TensorDataset(*data(3)), pin_memory=True))) == 1


# Batch


def test_as_batch_takes_pairs_mappings_and_single_tensors():
    x, y = data(2)
    whole = fl.Batch(x, y, torch.arange(2))
    assert fl.as_batch(whole) is whole
    assert fl.tree_equal(fl.as_batch((x, y)), fl.Batch(x, y))
    assert fl.tree_equal(fl.as_batch([[x, x], y]), fl.Batch((x, x), y))
    assert fl.tree_equal(fl.as_batch({"y": y, "x": x}), fl.Batch(x, y))
    assert fl.tree_equal(fl.as_batch({"x": x, "y": y, "index": whole.index}), whole)
    assert fl.tree_equal(fl.as_batch(x), fl.Batch(x))
    assert fl.tree_equal(fl.as_batch([x]), fl.Batch(x))


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"image": 1, "label": 2}, r"the keys \['image', 'label'\], not x and y; pass to_batch="),
        ((1, 2, 3), "has 3 parts, not x and y; pass to_batch="),
        ("text", "is of type str; pass to_batch="),
        ((np.zeros(2), torch.zeros(2)), "x of a batch is of type ndarray, not tensors; pass to_batch="),
    ],
)
def test_as_batch_says_what_to_do_with_anything_else(item, message):
    with pytest.raises(TypeError, match=message):
        fl.as_batch(item)


def test_to_device_moves_all_tensors_and_nothing_that_is_there():
    batch = fl.Batch((torch.zeros(2), {"a": torch.zeros(2)}), ["cat", "dog"], torch.arange(2))
    assert to_device(batch, torch.device("cpu")) is batch
    moved = to_device(batch, torch.device("meta"))
    assert {t.device.type for t in (moved.x[0], moved.x[1]["a"], moved.index)} == {"meta"}
    assert moved.y == ["cat", "dog"]


# Fingerprints


def test_fingerprints_are_plain_and_tell_sources_apart():
    x, y = data(8)
    sources = [
        fl.batches(x, y, batch_size=2),
        fl.batches(x, y, batch_size=3),
        fl.batches(x[:7], y[:7], batch_size=2),
        fl.batches(x, y, batch_size=2, shuffle=True),
        fl.batches(x, y, batch_size=3, drop_last=True),
        fl.batches(x, y, batch_size=2, weights=torch.ones(8)),
        fl.batches(x, y, batch_size=2, sampler=range(8)),
        fl.batches(TensorDataset(x, y), batch_size=2),
    ]
    assert len({json.dumps(source.fingerprint()) for source in sources}) == len(sources)
    assert sources[0].fingerprint() == fl.batches(x + 1, y, batch_size=2).fingerprint()


def test_the_content_is_part_of_the_fingerprint_if_asked():
    def content(x, y=None):
        return fl.batches(x, y, hash_content=True).fingerprint()["content"]

    x, y = data(8)
    assert content(x, y) == content(x.clone(), y.clone())
    assert len({content(x, y), content(x), content(x + 1, y), content(x.double(), y), content({"x": x}, y)}) == 5


# Refusals


@pytest.mark.parametrize(
    ("kind", "message", "make"),
    [
        (ValueError, "batch_size must be at least 1, not 0", lambda x, y: fl.batches(x, y, batch_size=0)),
        (TypeError, "batch_size must be an int, not 2.0", lambda x, y: fl.batches(x, y, batch_size=2.0)),
        (TypeError, "batch_size must be an int, not True", lambda x, y: fl.batches(x, y, batch_size=True)),
        (TypeError, "shuffle must be True or False, not 'yes'", lambda x, y: fl.batches(x, y, shuffle="yes")),
        (TypeError, "drop_last must be True or False, not 1", lambda x, y: fl.batches(x, y, drop_last=1)),
        (TypeError, "no shufle; did you mean 'shuffle'", lambda x, y: fl.batches(x, y, shufle=True)),
        (TypeError, "batches of tensors take no num_workers", lambda x, y: fl.batches(x, y, num_workers=2)),
        (ValueError, "x has 4 rows, but y has 3", lambda x, y: fl.batches(x, y[:3])),
        (ValueError, r"x\[0\] has 4 rows, but x\[1\]\['a'\] has 2", lambda x, y: fl.batches((x, {"a": x[:2]}))),
        (ValueError, "the data has no rows", lambda x, y: fl.batches(x[:0], y[:0])),
        (TypeError, "x is a tensor without rows", lambda x, y: fl.batches(torch.tensor(1.0))),
        (TypeError, r"y\[0\] is of type int", lambda x, y: fl.batches(x, [1, 2, 3, 4])),
        (TypeError, r"x\['a'\] is of type ndarray", lambda x, y: fl.batches({"a": np.zeros(4)})),
        (TypeError, "the data is a ndarray; pass tensors", lambda x, y: fl.batches(np.zeros(4))),
        (TypeError, r"x is of type tuple", lambda x, y: fl.batches(())),
        (ValueError, "drop_last drops its 4 rows", lambda x, y: fl.batches(x, y, batch_size=5, drop_last=True)),
        (ValueError, r"weights .* of shape \(4,\), not \(3,\)", lambda x, y: fl.batches(x, y, weights=[1, 1, 1])),
        (ValueError, "weights must be finite", lambda x, y: fl.batches(x, y, weights=[1, 1, 1, float("nan")])),
        (ValueError, "weights must be finite", lambda x, y: fl.batches(x, y, weights=[1, 1, 1, -1])),
        (ValueError, "not all zero", lambda x, y: fl.batches(x, y, weights=torch.zeros(4))),
        (
            ValueError,
            "shuffle and weights exclude each other",
            lambda x, y: fl.batches(x, y, shuffle=True, weights=torch.ones(4)),
        ),
        (ValueError, "sampler is empty", lambda x, y: fl.batches(x, y, sampler=[])),
        (TypeError, "sampler must be an iterable of row", lambda x, y: fl.batches(x, y, sampler=iter([1, 2]))),
        (
            ValueError,
            "sampler: WeightedRandomSampler has a generator of its own",
            lambda x, y: fl.batches(x, sampler=WeightedRandomSampler([1.0], 4, generator=torch.Generator())),
        ),
        (TypeError, "batches of a dataset take no y", lambda x, y: fl.batches(TensorDataset(x), y)),
        (ValueError, "num_workers must be an int", lambda x, y: fl.batches(TensorDataset(x), num_workers=-1)),
        (ValueError, "timeout=3 is for workers", lambda x, y: fl.batches(TensorDataset(x), timeout=3)),
        (TypeError, "collate_fn must be a function", lambda x, y: fl.batches(TensorDataset(x), collate_fn=3)),
        (TypeError, "not str", lambda x, y: fl.batches("data.csv")),
    ],
)
def test_bad_input_is_refused_by_name(kind, message, make):
    with pytest.raises(kind, match=message):
        make(*data(4))


def test_a_source_is_true_and_has_the_length_of_an_epoch():
    source = fl.batches(torch.zeros(5, 1), batch_size=2)
    assert source
    assert len(source) == len(list(islice(source.fetch(0, 1, 0, ()), 10))) == 3


@laws
@given(rows, seeds, epochs, epochs, st.booleans())
def test_a_bootstrap_sample_is_the_same_in_all_epochs(n, seed, epoch, other, shuffle):
    source = fl.batches(*data(n), batch_size=4, shuffle=shuffle, bootstrap=True)
    first, second = source.order(seed, epoch), source.order(seed, other)
    assert first.sort().values.tolist() == second.sort().values.tolist()
    assert len(first) == n
    if not shuffle:
        assert torch.equal(first, second)
    assert torch.equal(index_of(read(source, seed, epoch, start=1)), first[4:]) if n > 4 else True


def test_bootstrap_samples_differ_between_seeds_and_leave_a_third_out():
    source = fl.batches(*data(3000), bootstrap=True)
    one, other = (source.order(seed, 1) for seed in (1, 2))
    assert not torch.equal(one.sort().values, other.sort().values)
    assert len(one.unique()) / 3000 == pytest.approx(1 - math.exp(-1), abs=0.03)


def test_a_bootstrap_sample_is_shuffled_anew_in_every_epoch_with_repeats_apart():
    source = fl.batches(*data(500), shuffle=True, bootstrap=True)
    assert not torch.equal(source.order(0, 1), source.order(0, 2))
    alone = fl.batches(*data(500), bootstrap=True).order(0, 1)
    assert torch.equal(source.order(0, 1), alone[fl.batches(*data(500), shuffle=True).order(0, 1)])


def test_workers_read_the_bootstrap_sample_too():
    dataset = TensorDataset(*data(11))
    here, there = (fl.batches(dataset, batch_size=4, bootstrap=True, num_workers=n) for n in (0, 1))
    assert torch.equal(index_of(read(here)), index_of(read(there)))
    assert torch.equal(index_of(read(here)), fl.batches(*data(11), bootstrap=True).order(0, 1))


@pytest.mark.parametrize("options", [{"weights": torch.ones(5)}, {"sampler": [0, 1]}])
def test_bootstrap_of_rows_that_are_drawn_already_is_an_error(options):
    with pytest.raises(ValueError, match=r"bootstrap and (weights|sampler) exclude each other"):
        fl.batches(*data(5), bootstrap=True, **options)
    with pytest.raises(TypeError, match="bootstrap must be True or False"):
        fl.batches(*data(5), bootstrap=1)


def test_a_run_on_a_bootstrap_sample_resumes_exactly_and_on_no_other_data(tmp_path):
    def loop(**options):
        return make_loop(train=fl.batches(*ensemble_data(), batch_size=16, shuffle=True, **options))

    ctx = fl.init(loop(bootstrap=True), seed=3)
    fl.CheckpointStore(tmp_path).save(fl.train(ctx, steps=6))
    assert fl.digest(fl.train(fl.resume(loop(bootstrap=True), tmp_path, seed=3))) == fl.digest(fl.train(ctx))
    assert fl.digest(fl.train(ctx)) != fl.digest(fl.train(fl.init(loop(), seed=3)))
    with pytest.raises(fl.StateDictError, match="bootstrap"):
        fl.resume(loop(), tmp_path, seed=3)
