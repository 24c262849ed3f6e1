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

HASH_SEED = "4711"


def server() -> ForkServerContext:
    """A server whose hashes of strings are not those of this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "pytest", "tests.strategies", "tests.resume.hard_loop"])
    before = os.environ.get("PYTHONHASHSEED")
    os.environ["PYTHONHASHSEED"] = HASH_SEED
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        del os.environ["PYTHONHASHSEED"]
        if before is not None:
            os.environ["PYTHONHASHSEED"] = before
    return context


def in_a_fresh_process(function: Callable[..., T], *args: Any) -> T:
    """The result of ``function``, which with its arguments can be pickled, in a process that has done nothing else."""
    with ProcessPoolExecutor(1, mp_context=server(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return pool.submit(function, *args).result()
