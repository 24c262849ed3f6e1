"""A run with everything on that makes resuming hard, and a program that trains it in a process of its own.

    python -m tests.resume.hard_loop FOLDER [--save-every N] [--steps N] [--data KIND] [--global-seed N]

resumes from FOLDER, saves at every N-th boundary, in mid-epoch and mid-validation too, and prints the digest.
"""

from __future__ import annotations

import argparse
import random
import warnings
from pathlib import Path

import numpy as np
import torch

import functional_loop as fl
from tests.hooks import CALLBACKS
from tests.loops import MEASURES, Spec

SEED = 7


def hard_spec(data: str = "dataset", epochs: int = 3) -> Spec:
    """Dropout, BatchNorm, shuffle, augmentation by three generators, accumulation, measures, callbacks with a state."""
    return Spec(
        network="cnn",
        dropout=0.4,
        optimizer="adamw",
        data=data,
        rows=29,
        batch_size=4,
        valid_rows=5,
        epochs=epochs,
        eval_freq=2,
        accumulate=3,
        measures=tuple(MEASURES),
        callbacks=tuple(name for name in CALLBACKS if name != "stopping"),
    )


def train_here(spec: Spec, folder: Path, save_every: int = 1, steps: int | None = None) -> fl.Context:
    """Go on with what is in ``folder``: to the end, or for some more steps, after the last of which it saves."""
    store = fl.CheckpointStore(folder, keep_last=3)
    start = ctx = fl.resume(spec.loop(), folder, seed=SEED, must_exist=False)
    for number, ctx in enumerate(fl.iterate(start), 1):
        if number % save_every == 0:
            store.save(ctx)
        if ctx.stage == "batch_end" and ctx.global_step - start.global_step == steps:
            break
    store.save(ctx)
    return ctx


def pollute_globals(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--save-every", type=int, default=1)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--data", default="dataset")
    parser.add_argument("--global-seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    pollute_globals(given.global_seed)
    # Nothing that was saved may be found damaged.
    warnings.simplefilter("error")
    print(fl.digest(train_here(hard_spec(given.data), given.folder, given.save_every, given.steps)))


if __name__ == "__main__":
    main()
