"""Work in the background: results come once, errors are never lost, and the process waits."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from functional_loop.checkpoint.background import Background


def fail() -> None:
    raise OSError(28, "No space left on device")


def test_a_result_is_taken_once() -> None:
    background = Background()
    assert background.wait() is None
    background.start(lambda: 1)
    assert background.wait() == 1
    assert background.wait() is None


def test_an_error_is_raised_once_where_somebody_waits() -> None:
    background = Background()
    background.start(fail)
    background.join()
    assert background.done
    with pytest.raises(OSError, match="No space"):
        background.wait()
    assert background.wait() is None


def test_one_thing_is_done_at_a_time() -> None:
    background, gate, order = Background(), threading.Event(), []

    def first() -> None:
        gate.wait()
        order.append(1)

    background.start(first)
    assert not background.done
    threading.Timer(0.05, gate.set).start()
    background.start(lambda: order.append(2))
    background.wait()
    assert order == [1, 2]


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)


def test_the_process_ends_after_the_work() -> None:
    program = (
        "import time\nfrom functional_loop.checkpoint.background import Background\n"
        "Background().start(lambda: (time.sleep(0.3), print('done', flush=True)))"
    )
    assert run(program).stdout == "done\n"


def test_an_error_that_nobody_waits_for_is_reported_at_the_end() -> None:
    program = (
        "from functional_loop.checkpoint.background import Background\n"
        "background = Background()\nbackground.start(lambda: 1 / 0)\nprint('training goes on')"
    )
    done = run(program)
    assert done.stdout == "training goes on\n"
    assert "ZeroDivisionError" in done.stderr
    assert "in the background, and nobody waited" in done.stderr
