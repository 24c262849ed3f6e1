"""Signals stop a run at the next batch, with everything saved, from every way to train."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import functional_loop as fl
from functional_loop.callbacks import stop_on_signal
from tests.sample_loops import full_loop

ROOT = Path(__file__).parents[1]

# A program as a user writes it: trains in the folder of its first argument, by the way of its second; in the batch of
# its third it sends itself the signals of its fourth.
PROGRAM = """
import os, signal, sys, threading
import functional_loop as fl
from functional_loop.callbacks import stop_on_signal
from tests.sample_loops import counter, full_loop

folder, way, batch, names = sys.argv[1:]

def send(ctx):
    if ctx.global_step == int(batch):
        for name in names.split(","):
            os.kill(os.getpid(), getattr(signal, name))
    return ctx

def requeue():
    print("requeued", fl.CheckpointStore(folder).steps())

sending = fl.Callback("send", batch_begin=send)

def iterate():
    store = fl.CheckpointStore(folder)
    with fl.Signals(requeue) as signals:
        for ctx in fl.iterate(fl.resume(full_loop(callbacks=[counter(), sending]), folder, must_exist=False)):
            if signals.received:
                store.save(ctx)
            signals.exit()
    print(fl.digest(ctx))

def train():
    stopping = stop_on_signal(folder, requeue)
    print(fl.digest(fl.train(fl.resume(full_loop(callbacks=[stopping, counter(), sending]), folder, must_exist=False))))

def thread():
    store, codes = fl.CheckpointStore(folder), []
    # Long enough for the main thread to have its turn.
    loop = full_loop(callbacks=[counter(), sending], epochs=1000)
    with fl.Signals() as signals:
        def work():
            for ctx in fl.iterate(fl.resume(loop, folder, must_exist=False)):
                if signals.received:
                    store.save(ctx)
                    return
        worker = threading.Thread(target=work)
        worker.start()
        worker.join()
        signals.exit()

globals()[way]()
"""


def run(folder: Path, way: str, batch: int = 0, names: str = "SIGTERM") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, str(folder), way, str(batch), names],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("way", "name", "code"),
    [("iterate", "SIGINT", 130), ("iterate", "SIGUSR1", 138), ("train", "SIGTERM", 143), ("train", "SIGUSR1", 138)],
)
def test_a_signal_saves_at_the_next_batch_and_exits_with_the_usual_code(
    tmp_path: Path, way: str, name: str, code: int
) -> None:
    stopped = run(tmp_path, way, 4, name)
    assert stopped.returncode == code, stopped.stderr
    assert stopped.stdout == ("requeued [4]\n" if name == "SIGUSR1" else "")
    assert fl.CheckpointStore(tmp_path).load(full_loop()).stage == "batch_end"
    ended = run(tmp_path, way)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == fl.digest(fl.train(fl.init(full_loop())))


@pytest.mark.parametrize("way", ["iterate", "train"])
@pytest.mark.parametrize("names", ["SIGINT,SIGINT", "SIGTERM,SIGINT"])
def test_a_second_sigint_stops_at_once(tmp_path: Path, way: str, names: str) -> None:
    stopped = run(tmp_path, way, 4, names)
    assert stopped.returncode in (130, -signal.SIGINT)
    assert "KeyboardInterrupt" in stopped.stderr
    assert fl.CheckpointStore(tmp_path).steps() == []


@pytest.mark.parametrize("names", ["SIGTERM,SIGTERM", "SIGINT,SIGTERM"])
def test_other_signals_that_follow_change_nothing(tmp_path: Path, names: str) -> None:
    assert run(tmp_path, "iterate", 4, names).returncode == 128 + getattr(signal, names.split(",")[0])
    assert fl.CheckpointStore(tmp_path).steps() == [4]


def test_a_thread_trains_and_the_main_thread_has_the_signals(tmp_path: Path) -> None:
    stopped = run(tmp_path, "thread", 4, "SIGTERM")
    assert stopped.returncode == 143, stopped.stderr
    # The main thread handles the signal when it can, which may be a batch later.
    assert fl.CheckpointStore(tmp_path).steps()[0] >= 4


def in_a_thread(function: Any) -> list[Any]:
    """What ``function`` returns or raises in a thread of its own, in a list."""
    made = []

    def call() -> None:
        try:
            made.append(function())
        except BaseException as error:
            made.append(error)

    thread = threading.Thread(target=call, name="trainer")
    thread.start()
    thread.join()
    return made


def test_in_another_thread_signals_are_off_and_say_so(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    loop = full_loop(callbacks=[stop_on_signal(tmp_path)])
    with pytest.warns(UserWarning, match="signals are off: training runs in the thread 'trainer'"):
        (ctx,) = in_a_thread(lambda: fl.train(fl.init(loop)))
    assert ctx.stage == "end"
    assert signal.getsignal(signal.SIGTERM) is before


HANDLED = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in HANDLED]


def test_handlers_are_put_back_also_after_an_error() -> None:
    before = handlers()

    def noticing() -> None:
        with fl.Signals():
            assert all(a is not b for a, b in zip(handlers(), before, strict=True))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        noticing()
    assert handlers() == before


@pytest.mark.parametrize("steps", [None, 2])
def test_the_callback_puts_handlers_back(tmp_path: Path, steps: int | None) -> None:
    before = handlers()
    inside: list[Any] = []
    look = fl.Callback("look", batch_end=lambda ctx: inside.append(handlers()) or ctx)
    fl.train(fl.init(full_loop(callbacks=[look, stop_on_signal(tmp_path)])), steps=steps)
    assert all(found != before for found in inside)
    assert handlers() == before


def test_an_inner_one_leaves_the_work_to_the_outer_one() -> None:
    with fl.Signals() as outer, fl.Signals() as inner:
        signal.raise_signal(signal.SIGTERM)
        assert (outer.received, inner.received) == (signal.SIGTERM, None)
        inner.exit()
    assert (outer.exit_code, inner.exit_code) == (143, 0)


def test_a_forked_process_dies_of_sigterm_and_lives_on_after_sigint() -> None:
    with fl.Signals() as signals:
        for number, status in ((signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 7)):
            if (child := os.fork()) == 0:
                signal.raise_signal(number)
                os._exit(7)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status
    assert signals.received is None


def test_the_callback_saves_in_mid_validation_too(tmp_path: Path) -> None:
    sending = fl.Callback("send", batch_valid_end=lambda ctx: signal.raise_signal(signal.SIGTERM) or ctx)
    loop = full_loop(callbacks=[sending, stop_on_signal(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        fl.train(fl.init(loop))
    assert stopped.value.code == 143
    ctx = fl.CheckpointStore(tmp_path).load(loop)
    assert (ctx.stage, ctx.step_valid) == ("batch_valid_end", 1)


def test_a_requeue_that_is_no_function_is_refused() -> None:
    with pytest.raises(TypeError, match="requeue is a function of no arguments, not 'scontrol'"):
        fl.Signals("scontrol")  # type: ignore[arg-type]
