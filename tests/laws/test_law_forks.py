"""Contexts are values: runs that are forked, interleaved or in threads of one process equal runs on their own."""

from __future__ import annotations

import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import functional_loop as fl
from tests.loops import Augmented, Spec, tensors
from tests.strategies import IN_PROCESS, boundaries, examples, seeds, specs

pytestmark = pytest.mark.filterwarnings("ignore:resuming in mid-epoch reads")

# A loader with a state of its own can be read by one run at a time, and says so.
SHARED = [name for name in IN_PROCESS if name != "stateful loader"]
shared_specs = st.sampled_from(SHARED).flatmap(lambda data: specs(data=data))


@pytest.fixture(autouse=True, scope="module")
def threads_take_turns_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@given(shared_specs, seeds, seeds, st.lists(st.booleans(), max_size=60))
def test_interleaved_runs_of_one_loop_equal_separate_runs(spec, seed, another_seed, turns):
    alone = [[fl.digest(ctx) for ctx in boundaries(spec.loop(), s)][1:] for s in (seed, another_seed)]
    loop = spec.loop()
    runs = [fl.iterate(fl.init(loop, s)) for s in (seed, another_seed)]
    together: list[list[str]] = [[], []]
    for turn in turns:
        together[turn] += [fl.digest(ctx) for ctx in (next(runs[turn], None),) if ctx is not None]
    for run, digests in zip(runs, together, strict=True):
        digests += [fl.digest(ctx) for ctx in run]
    assert together == alone


@given(shared_specs, seeds, st.data())
def test_a_fork_does_not_disturb_the_run_that_it_leaves(spec, seed, data):
    loop = spec.loop()
    alone = [fl.digest(ctx) for ctx in boundaries(spec.loop(), seed)][1:]
    fork_at = data.draw(st.integers(0, len(alone) - 1))
    digests = []
    for place, ctx in enumerate(fl.iterate(fl.init(loop, seed))):
        digests.append(fl.digest(ctx))
        if place == fork_at:
            fl.train(ctx.with_hyperparameters(lr=0.001))
            assert fl.digest(fl.train(ctx)) == alone[-1]
    assert digests == alone


@examples(0.5)
@given(shared_specs, st.lists(seeds, min_size=2, max_size=4))
def test_threads_that_train_one_loop_equal_sequential_runs(spec, many_seeds):
    alone = [fl.digest(fl.train(fl.init(spec.loop(), seed))) for seed in many_seeds]
    loop = spec.loop()
    with ThreadPoolExecutor(len(many_seeds)) as threads:
        together = list(threads.map(lambda seed: fl.digest(fl.train(fl.init(loop, seed))), many_seeds))
    assert together == alone


@pytest.mark.parametrize("data", SHARED)
@pytest.mark.parametrize(("network", "optimizer"), [("mlp", "adamw"), ("noisy", "nadam")])
def test_two_threads_for_many_steps(network, optimizer, data):
    """Long enough for the threads to meet everywhere, with randomness in the network and in the data."""
    spec = Spec(network, optimizer=optimizer, data=data, rows=48, epochs=4, callbacks=("gradient_noise", "ema"))
    many_seeds = range(4)
    alone = [fl.digest(fl.train(fl.init(spec.loop(), seed))) for seed in many_seeds]
    loop = spec.loop()
    fl.train(fl.init(loop))  # The loop has something planned now, which the threads could fight over.
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(lambda seed: fl.digest(fl.train(fl.init(loop, seed))), many_seeds))
    assert together == alone


def test_workers_may_be_started_while_another_thread_draws_random_numbers():
    """A worker is a fork of the process, at a moment when another thread may be in the middle of anything."""
    spec = Spec("noisy", epochs=2, valid_rows=0)
    # Without a timeout, a worker that hangs would let the test hang.
    source = fl.batches(Augmented(*tensors(spec.rows)), batch_size=4, shuffle=True, num_workers=1, timeout=20)
    alone = fl.digest(fl.train(fl.init(spec.loop(train=source), seed=1)))
    done = threading.Event()

    def draw():
        while not done.is_set():
            with fl.seeded(3):
                torch.rand(()), random.random()
                time.sleep(0.001)

    with ThreadPoolExecutor(1) as threads:
        drawing = threads.submit(draw)
        try:
            assert fl.digest(fl.train(fl.init(spec.loop(train=source), seed=1))) == alone
        finally:
            done.set()
    drawing.result()


@attrs.frozen(eq=False)
class Meeting(fl.BatchSource):
    """Batches that wait for others: before the batch of a number, until an event is set; and set one themselves."""

    waits: dict[int, threading.Event]
    sets: dict[int, threading.Event]

    @property
    def length(self):
        return 3

    def fetch(self, seed, epoch, start, state):
        for step in range(start + 1, 4):
            if step in self.sets:
                self.sets[step].set()
            if step in self.waits:
                assert self.waits[step].wait(20)
            yield fl.Batch(torch.ones(4, 3), torch.ones(4, 2)), ()

    def fingerprint(self):
        return {"kind": "meeting"}


def test_overlapping_runs_leave_the_global_generator_as_the_first_of_them_found_it():
    """The first run to start is the first to end, while the other is in the middle."""
    first_runs, second_runs, first_is_over = threading.Event(), threading.Event(), threading.Event()

    def network():
        return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout(0.5))

    def loop(source):
        optimizer = fl.optimizer(torch.optim.SGD, lr=0.1)
        return fl.Loop(network, torch.nn.functional.mse_loss, optimizer, source, epochs=1)

    def in_turn(source):
        return fl.digest(fl.train(fl.init(loop(source), seed=1)))

    def first():
        ended = in_turn(Meeting({3: second_runs}, {1: first_runs}))
        first_is_over.set()
        return ended

    def second():
        assert first_runs.wait(20)
        return in_turn(Meeting({3: first_is_over}, {2: second_runs}))

    alone = in_turn(Meeting({}, {}))
    before = torch.get_rng_state()
    with ThreadPoolExecutor(2) as threads:
        one = threads.submit(first)
        two = threads.submit(second)
    assert torch.equal(torch.get_rng_state(), before)
    assert one.result() == two.result() == alone
