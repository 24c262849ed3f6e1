"""``set_epoch``: every dataset, sampler and loader that has it is told the epoch, wherever it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    StackDataset,
    Subset,
)

import functional_loop as fl
from tests.processes import in_a_fresh_process
from tests.sample_loops import data, make_loop

X, Y = data(3)

pytestmark = pytest.mark.filterwarnings("ignore:resuming in mid-epoch reads")


class Curriculum(Dataset[Any]):
    """Rows that are those of the epoch."""

    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Any:
        return torch.tensor(float(self.epoch)), i


class Wrapper(Dataset[Any]):
    """A transform of another dataset."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Any:
        return self.dataset[i]


class Stream(IterableDataset[Any]):
    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        return iter([(torch.tensor(float(self.epoch)), i) for i in range(8)])


class Told:
    """A loader of one's own, or a part of one, that is told."""

    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        return iter([(torch.full((2,), float(self.epoch)), torch.zeros(2))])

    def __call__(self, rows: Any) -> Any:
        return torch.full((len(rows),), float(self.epoch)), torch.zeros(len(rows))


def stack() -> Any:
    return Wrapper(StackDataset(Curriculum()))


MAPPED: dict[str, Callable[[], Any]] = {
    "dataset": Curriculum,
    "subset": lambda: Subset(Curriculum(), [3, 1]),
    "concatenation": lambda: ConcatDataset([Curriculum(), Subset(Curriculum(), [0])]),
    "wrapper": lambda: Wrapper(Wrapper(Curriculum())),
}
SOURCES: dict[str, Callable[[], fl.data.BatchSource]] = {
    **{name: lambda make=make: fl.batches(make(), batch_size=2) for name, make in MAPPED.items()},  # type: ignore[misc]
    **{f"DataLoader of {name}": lambda make=make: fl.batches(DataLoader(make(), 2)) for name, make in MAPPED.items()},  # type: ignore[misc]
    "workers": lambda: fl.batches(Wrapper(Curriculum()), batch_size=2, num_workers=2),
    "DataLoader with workers": lambda: fl.batches(DataLoader(Wrapper(Curriculum()), 2, num_workers=2)),
    "stack": lambda: fl.batches(stack(), batch_size=2, to_batch=lambda item: item[0]),
    "stream": lambda: fl.batches(DataLoader(Stream(), 2)),
    "loader": lambda: fl.batches(Told()),
    "collate_fn": lambda: fl.batches(Curriculum(), batch_size=2, collate_fn=Told()),
    "DataLoader's collate_fn": lambda: fl.batches(DataLoader(range(8), 2, collate_fn=Told())),  # type: ignore[arg-type]
    "same order": lambda: fl.same_order(fl.batches(Curriculum(), batch_size=2)),
}


def epochs_of(source: Any, epoch: int, start: int = 0) -> set[float]:
    return {value for batch, _ in source.fetch(0, epoch, start, ()) for value in batch.x.flatten().tolist()}


@pytest.mark.parametrize("name", SOURCES)
def test_all_that_has_set_epoch_is_told_the_epoch(name: str) -> None:
    source = SOURCES[name]()
    assert [epochs_of(source, epoch) for epoch in (1, 2, 5)] == [{1.0}, {2.0}, {5.0}]
    if name != "loader":
        assert epochs_of(SOURCES[name](), 3, start=0 if name == "subset" else 1) <= {3.0}


def orders(sampler: Any) -> list[list[int]]:
    return [[row for batch, _ in sampler.fetch(0, epoch, 0, ()) for row in batch.y.tolist()] for epoch in (1, 2)]


@pytest.mark.parametrize(
    "make",
    [
        lambda sampler, data: fl.batches(data, batch_size=2, sampler=sampler),
        lambda sampler, data: fl.batches(DataLoader(data, 2, sampler=sampler)),
        lambda sampler, data: fl.batches(DataLoader(data, batch_sampler=BatchSampler(sampler, 2, drop_last=False))),
    ],
)
def test_a_sampler_within_others_is_told_too(make: Callable[..., Any]) -> None:
    first, second = orders(make(DistributedSampler(Curriculum(), 1, 0), Curriculum()))
    assert sorted(first) == sorted(second) == list(range(8))
    assert first != second


def test_a_dataset_that_two_sources_share_is_in_the_epoch_of_each_batch() -> None:
    shared = Curriculum()
    one, other = (fl.batches(part, batch_size=4) for part in (shared, Wrapper(shared)))
    pairs = zip(one.fetch(0, 1, 0, ()), other.fetch(0, 7, 0, ()), strict=True)
    assert [(a.x.unique().item(), b.x.unique().item()) for (a, _), (b, _) in pairs] == [(1, 7), (1, 7)]


def curriculum_loop(workers: int) -> fl.Loop:
    def as_batch(item: Any) -> Any:
        return item[0].unsqueeze(1).expand(-1, 3) / 4, torch.ones(len(item[0]), 2)

    shared = Curriculum()
    train = fl.batches(shared, batch_size=2, shuffle=True, num_workers=workers, to_batch=as_batch)
    valid = fl.batches(shared, batch_size=3, to_batch=as_batch)
    score = fl.measure("sum", lambda y_hat, y: y_hat.sum(), minimize=False)
    return make_loop(train=train, valid=valid, measures_valid=[score], epochs=3)


def ends_of(workers: list[int], saved: Any) -> list[str]:
    return [fl.digest(fl.train(fl.load_state_dict(fl.init(curriculum_loop(n)), saved))) for n in workers]


def test_a_curriculum_resumes_in_mid_epoch_in_a_fresh_process() -> None:
    whole = fl.digest(fl.train(fl.init(curriculum_loop(0))))
    assert fl.digest(fl.train(fl.init(curriculum_loop(2)))) == whole
    part = fl.state_dict(fl.train(fl.init(curriculum_loop(0)), steps=6))
    assert in_a_fresh_process(ends_of, [0, 2], part) == [whole, whole]


def test_a_dataset_or_sampler_whose_length_follows_the_epoch_is_refused() -> None:
    class Growing(Curriculum):
        def __len__(self) -> int:
            return 8 + max(self.epoch, 1)

    source = fl.batches(Growing(), batch_size=2)
    with pytest.raises(ValueError, match="the dataset had 9 rows when the source was made, and has 10 in epoch 2"):
        list(source.fetch(0, 2, 0, ()))

    class Growing2:
        epoch = 1

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __len__(self) -> int:
            return 2 * self.epoch

        def __iter__(self) -> Any:
            return iter(range(2 * self.epoch))

    source = fl.batches(Curriculum(), batch_size=2, sampler=Growing2())
    with pytest.raises(ValueError, match="its length was 2 when the source was made, but in epoch 2 it gave 4"):
        list(source.fetch(0, 2, 0, ()))


def test_a_sampler_of_another_length_is_another_run() -> None:
    def loop(replicas: int) -> fl.Loop:
        dataset = torch.utils.data.TensorDataset(X, Y)
        sampler = DistributedSampler(dataset, num_replicas=replicas, rank=0)
        return make_loop(train=fl.batches(dataset, batch_size=2, sampler=sampler))

    sd = fl.state_dict(fl.train(fl.init(loop(1)), steps=1))
    with pytest.raises(fl.StateDictError, match="train/sampled: 10 in what was saved, 5 here"):
        fl.load_state_dict(fl.init(loop(2)), sd)
    del sd["fingerprint"]["train"]["sampled"]
    fl.load_state_dict(fl.init(loop(2)), sd)
