"""Where an epoch ends: found by reading ahead where a length is an estimate, and never by an error of other code."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

import functional_loop as fl
from functional_loop.callbacks import t_clbk
from functional_loop.core.batch import Batch, BatchSource
from tests.processes import in_a_fresh_process
from tests.sample_loops import data, full_loop, make_loop, recorder
from tests.strategies import examples

X, Y = data(3)

pytestmark = pytest.mark.filterwarnings("ignore:resuming in mid-epoch reads")


class Claiming:
    """A loader of some batches in a random order, which says that it has another number of them."""

    def __init__(self, batches: int, claims: int | None) -> None:
        self.batches, self.claims = batches, claims

    def __len__(self) -> int:
        if self.claims is None:
            raise TypeError
        return self.claims

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for i in torch.randperm(self.batches):
            yield X[i : i + 3], Y[i : i + 3]


def reloaded(ctx: fl.Context, loop: fl.Loop) -> fl.Context:
    return fl.load_state_dict(fl.init(loop), fl.state_dict(ctx))


# Lengths


@examples(0.5)
@given(
    batches=st.integers(1, 6),
    claims=st.none() | st.integers(1, 8),
    accumulate=st.integers(1, 3),
    skipped=st.frozensets(st.integers(1, 9), max_size=3),
    steps=st.lists(st.integers(1, 5), max_size=4),
    hooks=st.booleans(),
    valid=st.integers(1, 3),
)
def test_a_run_is_the_same_whatever_a_loader_says_of_its_length(
    batches: int,
    claims: int | None,
    accumulate: int,
    skipped: frozenset[int],
    steps: list[int],
    hooks: bool,
    valid: int,
) -> None:
    def loop(claims: int | None) -> fl.Loop:
        return full_loop(
            train=fl.batches(Claiming(batches, claims)),
            valid=fl.batches(Claiming(valid, claims)),
            accumulate=accumulate,
            skip_batches=skipped,
            **({} if hooks else {"callbacks": []}),
        )

    whole = fl.train(fl.init(loop(None), seed=3))
    assert whole.global_step == 2 * batches
    ctx = fl.init(loop(claims), seed=3)
    for n in steps:
        ctx = reloaded(fl.train(ctx, steps=n), loop(claims))
    assert fl.digest(fl.train(ctx)) == fl.digest(whole)
    *_, last = fl.iterate(fl.init(loop(claims), seed=3))
    assert fl.digest(last) == fl.digest(whole)


def windows(source: BatchSource, **options: Any) -> list[tuple[int, bool]]:
    """By batch its step, and whether it ends with an update."""
    seen: list[Any] = []
    look = recorder(seen, lambda ctx: (ctx.step, ctx.accumulated == ()), ("after_backward",))
    fl.train(fl.init(make_loop(train=source, epochs=1, callbacks=[look], **options)))
    return [found for _, found in seen]


@pytest.mark.parametrize("claims", [None, 2, 3, 4])
def test_the_last_batch_of_a_loader_closes_a_window(claims: int | None) -> None:
    assert windows(fl.batches(Claiming(3, claims)), accumulate=2) == [(1, False), (2, True), (3, True)]


@pytest.mark.parametrize("source", [fl.batches(X, Y, batch_size=2), fl.batches(Claiming(5, 3))])
def test_the_last_batch_that_is_not_skipped_closes_a_window(source: BatchSource) -> None:
    assert windows(source, accumulate=3, skip_batches={4, 5}) == [(1, False), (2, False), (3, True)]
    assert windows(source, accumulate=2, skip_batches={4, 5}) == [(1, False), (2, True), (3, True)]


class Shards(IterableDataset[Any]):
    """Two workers with five rows each make four batches of four rows at most, where the length says three."""

    def __len__(self) -> int:
        return 10

    def __iter__(self) -> Iterator[Any]:
        worker = torch.utils.data.get_worker_info()
        assert worker is not None
        return iter([(X[i], Y[i]) for i in range(worker.id, 10, worker.num_workers)])


@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
def test_a_loader_of_shards_gives_all_its_batches() -> None:
    def loop() -> fl.Loop:
        source = fl.batches(DataLoader(Shards(), batch_size=4, num_workers=2))
        return make_loop(train=source, network=lambda: nn.Linear(3, 2))

    whole = fl.train(fl.init(loop()))
    parts = fl.train(reloaded(fl.train(fl.init(loop()), steps=3), loop()))
    assert whole.global_step == parts.global_step == 8
    assert fl.digest(whole) == fl.digest(parts)


@pytest.mark.parametrize("mode", ["exact", "vectorised"])
@pytest.mark.parametrize("claims", [None, 2, 5])
def test_members_of_an_ensemble_end_their_epochs_as_solo_runs_do(mode: str, claims: int | None) -> None:
    loop = make_loop(train=fl.batches(Claiming(3, claims)), accumulate=2, network=lambda: nn.Linear(3, 2))
    start = fl.stack([fl.init(loop, seed=seed) for seed in (1, 2)], mode=mode)
    whole = fl.train(start)
    assert whole.global_step == 6
    assert fl.digest(fl.train(reloaded_members(fl.train(start, steps=3), start))) == fl.digest(whole)
    if mode == "exact":
        assert fl.digest(fl.unstack(whole)[1]) == fl.digest(fl.train(fl.init(loop, seed=2)))


def reloaded_members(ctx: fl.Context, start: fl.Context) -> fl.Context:
    return fl.load_state_dict(start, fl.state_dict(ctx))


def test_displays_and_schedules_go_by_what_a_loader_says() -> None:
    source = fl.batches(Claiming(3, 2))
    assert source.length is None
    assert source.expected_length == len(source) == 2
    one_cycle = t_clbk("lr_one_cycle", max_lr=0.1)
    with pytest.raises(ValueError, match="epoch 1 had 3 batches, but by the len of the training data it has 2"):
        fl.train(fl.init(make_loop(train=source, callbacks=[one_cycle])))
    fl.train(fl.init(make_loop(train=source, callbacks=[t_clbk("lr_one_cycle", max_lr=0.1, total_steps=6)])))
    fl.train(fl.init(make_loop(train=fl.batches(Claiming(3, 3)), callbacks=[one_cycle])))


def test_overfit_takes_as_many_batches_as_a_loader_really_has() -> None:
    loop = make_loop(train=fl.batches(Claiming(4, 2)), accumulate=3)
    assert fl.train(fl.init(fl.overfit(loop, 4))).global_step == 8
    with pytest.raises(ValueError, match="overfit: an epoch has 4 batches, fewer than k=5") as caught:
        fl.train(fl.init(fl.overfit(loop, 5)))
    ctx = fl.context_of(caught.value)
    assert ctx is not None
    assert ctx.step == 4


@attrs.frozen(eq=False)
class Counted(BatchSource):
    """A source that is sure of a length which is not that of its epochs."""

    length: int
    batches: int

    def fetch(self, seed: int, epoch: int, start: int, state: Any) -> Iterator[tuple[Batch, Any]]:
        return iter([(Batch(X[:2], Y[:2]), ())] * (self.batches - start))

    def fingerprint(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize("train", [fl.train, lambda ctx: [*fl.iterate(ctx)]])
@pytest.mark.parametrize(("batches", "message"), [(2, "ended after 2 batches"), (4, "went on after 3 batches")])
def test_another_number_of_batches_than_a_known_length_is_an_error(
    batches: int, message: str, train: Callable[..., Any]
) -> None:
    source = Counted(3, batches)
    with pytest.raises(ValueError, match=f"epoch 1 of the training data {message}") as caught:
        train(fl.init(make_loop(train=source)))
    assert caught.value.__notes__ == ["while reading the training data (epoch 1, step 3)"]
    with pytest.raises(ValueError, match=f"epoch 1 of the validation data {message}"):
        train(fl.init(make_loop(valid=source)))
    with pytest.raises(ValueError, match=message):
        fl.predict(fl.init(make_loop()), source)


# `train_step`


def begun(**options: Any) -> fl.Context:
    return next(ctx for ctx in fl.iterate(fl.init(make_loop(**options))) if ctx.stage == "epoch_begin")


def test_train_step_is_told_which_batch_is_the_last() -> None:
    own = [(X[i : i + 3], Y[i : i + 3]) for i in range(4)]
    expected = begun(train=fl.batches(X, Y, batch_size=3), accumulate=3)
    for batch in own:
        expected = fl.train_step(expected, batch)
    ctx = begun(train=fl.batches(Claiming(4, 3)), accumulate=3)
    for i, batch in enumerate(own, 1):
        ctx = fl.train_step(ctx, batch, last=i == 4)
    assert fl.tree_equal(ctx.params, expected.params)
    with pytest.raises(ValueError, match=r"last=True, but step 1 is not the last of an epoch of 4 batches"):
        fl.train_step(begun(train=fl.batches(X, Y, batch_size=3)), own[0], last=True)


def test_train_step_goes_by_what_a_loader_says_up_to_there() -> None:
    ctx = begun(train=fl.batches(Claiming(4, 3)), accumulate=2)
    for _ in range(3):
        ctx = fl.train_step(ctx, (X, Y))
    assert ctx.accumulated == ()
    with pytest.raises(ValueError, match="by its len the training data has 3 batches, and step 4 comes after them"):
        fl.train_step(ctx, (X, Y))
    ctx = begun(train=fl.batches(Claiming(4, 3)))
    for _ in range(5):
        ctx = fl.train_step(ctx, (X, Y))


def test_gradients_of_a_window_that_train_step_left_open_are_not_lost() -> None:
    ctx = fl.train_step(begun(train=fl.batches(Claiming(1, None)), accumulate=2), (X, Y))
    with pytest.raises(ValueError, match=r"window is open at the end of epoch 1, after step 1.*last=True"):
        fl.train(ctx)


def test_train_goes_on_after_batches_of_ones_own() -> None:
    loop = make_loop(train=fl.batches(Claiming(4, 4)))
    ctx = fl.train_step(fl.train(fl.init(loop), steps=1), (X, Y))
    assert fl.train(ctx).global_step == 8
    assert fl.digest(fl.train(ctx)) == fl.digest(fl.train(reloaded(ctx, loop)))


# Errors of other code


class Broken(Dataset[Any]):
    """StopIteration in the sixth row."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, i: int) -> Any:
        return next(iter([])) if i == 5 else (X[i], Y[i])


class BrokenAtOnce(Broken):
    def __getitems__(self, rows: list[int]) -> Any:
        return [self[row] for row in rows]


def stop(*_: Any) -> Any:
    return next(iter([]))


def stop_at_five(rows: Any) -> Any:
    made = torch.utils.data.default_collate(rows)
    return stop() if bool((made[0] == X[5]).all(1).any()) else made


class Rows(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([(x, y) for x, y in zip(X, Y, strict=True)])


def good() -> Any:
    return Subset(torch.utils.data.TensorDataset(X, Y), range(10))  # type: ignore[arg-type]


BROKEN: dict[str, Callable[[], Any]] = {
    "__getitem__": lambda: fl.batches(Broken(), batch_size=2),
    "__getitems__": lambda: fl.batches(BrokenAtOnce(), batch_size=2),
    "worker": lambda: fl.batches(Broken(), batch_size=2, num_workers=1),
    "collate_fn": lambda: fl.batches(good(), batch_size=2, collate_fn=stop_at_five),
    "to_batch": lambda: fl.batches(good(), batch_size=2, to_batch=stop_items),
    "DataLoader": lambda: fl.batches(DataLoader(Broken(), 2)),
    "DataLoader's worker": lambda: fl.batches(DataLoader(Broken(), 2, num_workers=1)),
    "DataLoader's collate_fn": lambda: fl.batches(DataLoader(good(), 2, collate_fn=stop_at_five)),
    "DataLoader's collate_fn of a stream": lambda: fl.batches(DataLoader(Rows(), 2, collate_fn=stop_at_five)),
    "DataLoader's collate_fn of a stream, in a worker": lambda: fl.batches(
        DataLoader(Rows(), 2, collate_fn=stop_at_five, num_workers=1)
    ),
    "DataLoader's to_batch": lambda: fl.batches(DataLoader(good(), 2), to_batch=stop_items),
}


def stop_items(item: Any) -> Any:
    return stop() if bool((item[0] == X[5]).all(1).any()) else item


@pytest.mark.parametrize("place", BROKEN)
def test_a_stop_iteration_of_the_data_ends_no_epoch(place: str) -> None:
    # Torch waits five seconds for a worker after an error.
    in_worker = "worker" in place
    for hooks in ([], [recorder([], repr, ("batch_end",))][in_worker:]):
        with pytest.raises(StopIteration) as caught:
            fl.train(fl.init(make_loop(train=BROKEN[place](), callbacks=hooks)))
        assert caught.value.__notes__ == ["while reading the training data (epoch 1, step 3)"]
        ctx = fl.context_of(caught.value)
        assert ctx is not None
        assert (ctx.step, ctx.stage) == (2, "batch_end")
    if in_worker:
        return
    with pytest.raises(StopIteration):
        fl.train(fl.init(make_loop(valid=BROKEN[place]())))
    with pytest.raises(StopIteration):
        fl.predict(fl.init(make_loop()), BROKEN[place]())
    with pytest.raises(RuntimeError) as chained:
        list(fl.iterate(fl.init(make_loop(train=BROKEN[place]()))))
    assert isinstance(chained.value.__cause__, StopIteration)
    assert "while reading the training data (epoch 1, step 3)" in chained.value.__notes__
    assert fl.context_of(chained.value) is not None


class Stopping(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return stop()


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"loss": stop}, "in the network or the loss"),
        ({"network": Stopping(3, 2)}, "in the network or the loss"),
        ({"measures_train": [fl.measure("a", stop)]}, "in measure 'a'"),
        (
            {"callbacks": [fl.Callback("a", batch_begin=stop)]},
            "in callback 'a' at stage 'batch_begin' (epoch 1, step 1)",
        ),
        (
            {"callbacks": [fl.Callback("a", epoch_begin=stop)]},
            "in callback 'a' at stage 'epoch_begin' (epoch 1, step 0)",
        ),
        ({"callbacks": [fl.Callback("a", exit=stop)]}, "in callback 'a' at stage 'exit'"),
        ({"callbacks": [t_clbk("lr_lambda", lr_lambda=lambda epoch: stop() if epoch else 1.0)]}, "in callback"),
    ],
)
def test_a_stop_iteration_in_training_keeps_its_type_and_says_where(options: dict[str, Any], note: str) -> None:
    with pytest.raises(StopIteration) as caught:
        fl.train(fl.init(make_loop(**options)))
    assert any(note in each for each in caught.value.__notes__), caught.value.__notes__
    assert fl.context_of(caught.value) is not None
    with pytest.raises(RuntimeError) as chained:
        list(fl.iterate(fl.init(make_loop(**options))))
    assert any(note in each for each in chained.value.__notes__)


def test_a_stop_iteration_elsewhere_keeps_its_type() -> None:
    resuming = make_loop(callbacks=[fl.Callback("a", resume=stop)])
    with pytest.raises(StopIteration):
        fl.train(fl.train(fl.init(resuming), steps=1))
    with pytest.raises(StopIteration):
        fl.init(make_loop(callbacks=[fl.Callback("a", init=stop)]))
    with pytest.raises(StopIteration):
        fl.train_step(begun(loss=stop), (X, Y))
    with pytest.raises(StopIteration):
        fl.predict(fl.init(make_loop(network=Stopping(3, 2))), X)
    scoring = make_loop(measures_valid=[fl.measure("a", stop)])
    with pytest.raises(StopIteration):
        fl.validate(fl.init(scoring), fl.batches(X, Y))
    members = make_loop(callbacks=[fl.Callback("a", epoch_begin=stop)], network=lambda: nn.Linear(3, 2))
    for mode in ("exact", "vectorised"):
        with pytest.raises(StopIteration) as caught:
            fl.train(fl.stack([fl.init(members, seed=seed) for seed in (1, 2)], mode=mode))
        assert fl.context_of(caught.value) is not None


def generated() -> Iterator[Any]:
    yield X, Y
    yield stop()


class Generated:
    def __iter__(self) -> Iterator[Any]:
        return generated()


def test_what_python_makes_of_it_in_a_generator_of_others_stays() -> None:
    with pytest.raises(RuntimeError, match="generator raised StopIteration"):
        fl.train(fl.init(make_loop(train=fl.batches(Generated()))))


def test_an_error_in_reading_ahead_comes_at_its_own_batch() -> None:
    class Failing:
        def __iter__(self) -> Iterator[Any]:
            yield X, Y
            yield X, Y
            raise OSError("no more")

    with pytest.raises(OSError, match="no more") as caught:
        fl.train(fl.init(make_loop(train=fl.batches(Failing()), accumulate=4)))
    assert caught.value.__notes__ == ["while reading the training data (epoch 1, step 3)"]
    ctx = fl.context_of(caught.value)
    assert ctx is not None
    assert ctx.step == 2
    assert ctx.accumulated != ()


# Nothing to read


class Empty(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


@pytest.mark.parametrize("measures", [[], [fl.measure("acc", lambda y_hat, y: 1.0, minimize=False)]])
def test_a_validation_without_batches_says_so(measures: list[Any]) -> None:
    empty = fl.batches(DataLoader(Empty()))
    for mode in ("exact", "vectorised", None):
        loop = make_loop(valid=empty, measures_valid=measures, network=lambda: nn.Linear(3, 2))
        start = fl.init(loop) if mode is None else fl.stack([fl.init(loop, seed=s) for s in (1, 2)], mode=mode)
        with pytest.raises(ValueError, match="the validation data gave no batch in epoch 1"):
            fl.train(start)
        with pytest.raises(ValueError, match="gave no batch"):
            fl.predict(start, empty)
        if measures:
            with pytest.raises(ValueError, match="gave no batch"):
                fl.validate(start)
    with pytest.raises(ValueError, match="the training data gave no batch in epoch 1"):
        fl.train(fl.init(make_loop(train=empty)))


# Coming back to a place


class Refilling:
    """A loader that fills one buffer again and again."""

    def __iter__(self) -> Iterator[Any]:
        x, y = torch.empty(2, 3), torch.empty(2, 2)
        for i in range(4):
            yield x.copy_(X[2 * i : 2 * i + 2]), y.copy_(Y[2 * i : 2 * i + 2])


def refilling() -> Callable[[Any], Any]:
    x = torch.empty(2, 3)
    return lambda item: (x.copy_(item[0]), item[1])


@pytest.mark.parametrize(
    "source",
    [
        fl.batches(Refilling()),
        fl.batches(DataLoader(torch.utils.data.TensorDataset(X[:8], Y[:8]), 2), to_batch=refilling()),
        fl.batches(torch.utils.data.TensorDataset(X[:8], Y[:8]), batch_size=2, to_batch=refilling()),
    ],
)
def test_no_batch_is_overwritten_by_the_next(source: Any) -> None:
    seen: list[Any] = []
    look = recorder(seen, lambda ctx: ctx.batch.x, ("batch_begin", "batch_end"))
    fl.train(fl.init(make_loop(train=source, epochs=1, callbacks=[look])))
    assert torch.equal(torch.cat([x for stage, x in seen if stage == "batch_end"]), X[:8])


class Own:
    """A loader that shuffles by a generator of its own, which goes on from epoch to epoch."""

    def __init__(self, seed: int | None = 0) -> None:
        self.generator = torch.Generator()
        self.generator.seed() if seed is None else self.generator.manual_seed(seed)

    def __iter__(self) -> Iterator[Any]:
        for i in torch.randperm(1000, generator=self.generator)[:8]:
            yield X[:2] + i, Y[:2]


class OwnAtEveryBatch(Own):
    def __iter__(self) -> Iterator[Any]:
        for _ in range(8):
            yield X[:2] + torch.rand((), generator=self.generator), Y[:2]


class Forgetful(Own):
    """Its state does not hold its place."""

    def state_dict(self) -> Any:
        return {"nothing": 0}

    def load_state_dict(self, state: Any) -> None:
        pass


def resumed(make: Callable[[], Any], steps: int) -> tuple[str, str]:
    def loop() -> fl.Loop:
        return make_loop(train=fl.batches(make()), epochs=3)

    part = fl.state_dict(fl.train(fl.init(loop()), steps=steps))
    return fl.digest(fl.train(fl.load_state_dict(fl.init(loop()), part))), fl.digest(fl.train(fl.init(loop())))


@pytest.mark.parametrize("make", [Own, OwnAtEveryBatch, Forgetful])
def test_a_loader_that_does_not_come_back_to_its_place_is_an_error(make: Callable[[], Any]) -> None:
    for steps in range(1, 24):
        try:
            there, whole = resumed(make, steps)
        except RuntimeError as error:
            assert "did not come back to its place" in str(error)  # noqa: PT017
        else:
            # The first epoch is read again as a whole.
            assert there == whole
            assert steps < 8
    with pytest.raises(RuntimeError, match=r"training data did not come back to its place: batch \d+ of epoch 2"):
        resumed(make, 12)


def test_a_loader_without_any_order_is_an_error() -> None:
    for steps in (3, 8, 12):
        with pytest.raises(RuntimeError, match="did not come back to its place"):
            resumed(lambda: Own(seed=None), steps)


def test_a_validation_loader_has_a_place_too() -> None:
    loop = full_loop(valid=fl.batches(Own(seed=None)))
    ctx = next(ctx for ctx in fl.iterate(fl.init(loop)) if ctx.step_valid == 3)
    with pytest.raises(RuntimeError, match="the validation data did not come back to its place: batch 4 of epoch 1"):
        fl.train(reloaded(ctx, loop))


def test_data_that_may_differ_go_on_at_the_same_number_of_batches() -> None:
    ctx = fl.train(fl.init(make_loop(train=fl.batches(Claiming(5, 5)))), steps=3)
    other = make_loop(train=fl.batches(Claiming(4, 4)))
    end = fl.train(fl.load_state_dict(fl.init(other), fl.state_dict(ctx), allow=["train"]))
    assert end.global_step == 8


@pytest.mark.parametrize("steps", range(1, 7))
def test_the_batch_after_the_last_one_is_not_read(steps: int) -> None:
    started: list[int] = []

    class Counting(Claiming):
        def __iter__(self) -> Iterator[Any]:
            started.append(1)
            return super().__iter__()

    loop = make_loop(train=fl.batches(Counting(3, 1)))
    fl.train(fl.init(loop), steps=steps)
    assert len(started) == (steps + 2) // 3


def test_a_state_of_a_loader_as_earlier_versions_saved_it() -> None:
    from tests.test_loaders import Tape

    def loop() -> fl.Loop:
        source = fl.batches(Tape(), to_batch=lambda item: (item[0].float().expand(2, 3), item[0].float().expand(2, 2)))
        return make_loop(train=source)

    whole = fl.train(fl.init(loop()))
    for steps in range(1, 12):
        sd = fl.state_dict(fl.train(fl.init(loop()), steps=steps))
        sd["data"] = sd["data"]["train"]["state"]
        end = fl.train(fl.load_state_dict(fl.init(loop()), sd))
        assert fl.tree_equal(end.params, whole.params)


# Loaders of others, in a fresh process


class Varying:
    """A batch sampler whose length is another in every epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 2 + self.epoch

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(10).tolist()
        return iter([order[i : i + 2] for i in range(len(self))])


def node_loader(shuffle: bool, threads: bool) -> Any:
    import torchdata.nodes as nodes
    from torch.utils.data import RandomSampler, SequentialSampler

    def rows(index: list[int]) -> Any:
        return X[index] + torch.zeros(()), Y[index]

    sampler = (RandomSampler if shuffle else SequentialSampler)(range(10))
    node: Any = nodes.Batcher(nodes.SamplerWrapper(sampler), 3)
    node = nodes.ParallelMapper(node, rows, num_workers=2, method="thread") if threads else nodes.Mapper(node, rows)
    return nodes.Loader(nodes.Prefetcher(node, 2) if threads else node)


def stateful_loader() -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(torch.utils.data.TensorDataset(X, Y), 3, shuffle=True)


LOADERS: dict[str, Callable[[], Any]] = {
    "varying": lambda: DataLoader(torch.utils.data.TensorDataset(X, Y), batch_sampler=Varying()),
    "iterable": lambda: Claiming(4, 9),
    "stateful": stateful_loader,
    "nodes": lambda: node_loader(shuffle=True, threads=False),
    "nodes in order": lambda: node_loader(shuffle=False, threads=False),
    "nodes with threads": lambda: node_loader(shuffle=True, threads=True),
}


def loop_over(name: str) -> fl.Loop:
    return full_loop(train=fl.batches(LOADERS[name]()), epochs=3, network=lambda: nn.Linear(3, 2))


def ends(parts: list[tuple[str, Any]]) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [fl.digest(fl.train(fl.load_state_dict(fl.init(loop_over(name)), part))) for name, part in parts]


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
def test_loaders_of_others_resume_in_a_fresh_process() -> None:
    parts, expected = [], []
    for name in LOADERS:
        whole = fl.train(fl.init(loop_over(name)))
        for steps in (2, 3, 4, 6, whole.global_step):
            parts.append((name, fl.state_dict(fl.train(fl.init(loop_over(name)), steps=steps))))
            expected.append(fl.digest(whole))
    assert in_a_fresh_process(ends, parts) == expected


def test_generators_in_nodes_are_refused() -> None:
    import torchdata.nodes as nodes
    from torch.utils.data import RandomSampler

    sampler = RandomSampler(range(10), generator=torch.Generator())
    with pytest.raises(ValueError, match="generator of the RandomSampler"):
        fl.batches(nodes.Loader(nodes.Batcher(nodes.SamplerWrapper(sampler), 2)))


@pytest.mark.parametrize("counts", ["loader", "to_batch"])
def test_data_that_go_on_where_a_run_before_has_stopped_are_refused_in_the_second_run(counts: str) -> None:
    """Two runs from one context would see other rows."""
    rows, calls = torch.randn(8, 3), itertools.count()

    class Going:
        def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            shift = next(calls) if counts == "loader" else 0
            yield from ((rows[i : i + 2] + shift, rows[i : i + 2, :1]) for i in range(0, 8, 2))

    def shifted(item: tuple[torch.Tensor, torch.Tensor]) -> fl.Batch:
        return fl.Batch(item[0] + next(calls), item[1])

    source = fl.batches(Going(), to_batch=shifted if counts == "to_batch" else None)
    start = fl.init(
        fl.Loop(nn.Linear(3, 1), nn.functional.mse_loss, fl.optimizer(torch.optim.SGD, lr=0.1), source, epochs=1)
    )
    fl.train(start)
    with pytest.raises(RuntimeError, match="batch 1 of epoch 1 is not the one that was read before"):
        fl.train(start)
