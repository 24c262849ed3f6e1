"""Functions run in processes of their own: forked from a server that has imported the tests, and trained nothing."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import ForkServerContext
from typing import Any, TypeVar

import torch

T = TypeVar("T")

# torch.optim imports torch._dynamo at its first use, which takes longer than all that a test does.
PRELOADED = [
    "__main__",
    "pytest",
    "torch._dynamo",
    "torch.utils.tensorboard",
    "tests.strategies",
    "tests.resume.hard_loop",
]


def server() -> ForkServerContext:
    """A server whose hashes of strings are not those of this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    before = os.environ.get("PYTHONHASHSEED")
    os.environ["PYTHONHASHSEED"] = "4711"
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        del os.environ["PYTHONHASHSEED"]
        if before is not None:
            os.environ["PYTHONHASHSEED"] = before
    return context


def set_up_process() -> None:
    torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))
    # Inherited from the server would be its own method, and data workers take seconds to start by that.
    multiprocessing.set_start_method("fork", force=True)


def in_a_fresh_process(function: Callable[..., T], *args: Any) -> T:
    """The result of ``function``, which with its arguments can be pickled, in a process that has done nothing else."""
    with ProcessPoolExecutor(1, mp_context=server(), initializer=set_up_process) as pool:
        return pool.submit(function, *args).result()
