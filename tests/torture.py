"""Runs with everything that makes resuming hard, killed again and again.

    python -m tests.torture --kills 1000 [--seed N]

Each run is killed by SIGKILL, half of the time at a random moment and half of the time in the middle of a save, and
started again by the same call until it ends. Then the digest of its end, the rows of its history and of its CSV file,
and the points that TensorBoard shows must be those of the run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

import functional_loop as fl
from functional_loop import callbacks as cb
from tests.resume.hard_loop import SEED, hard_spec
from tests.resume.lives import Wait, after, in_a_save, outlive, temporary_files

_SLOWEST = 0.6  # seconds until a kill at a random moment
_SAVES = 12  # saves that are let through before one is hit


def train_everything(folder: Path, epochs: int) -> dict[str, Any]:
    """Go on with the run in ``folder`` to its end, and say how it ended.

    Dropout, BatchNorm, shuffling, augmentation from torch, numpy and `random` in two workers, accumulation, one cycle
    of the learning rate, averaged weights, early stopping that restores the best, and logs of several kinds.
    """
    loop = hard_spec("workers", epochs).loop(
        callbacks=[
            cb.clip_grad_norm(1.0),
            cb.lr_one_cycle(max_lr=0.05),
            cb.ema(decay=0.9),
            cb.early_stopping(patience=4, measure="accuracy"),
            cb.history(),
            cb.digest_trace(every=5),
            cb.csv_log(folder / "scores.csv"),
            cb.tb(folder / "tb", log_train_loss=True),
            cb.checkpoint(folder / "checkpoints", every_steps=1, keep_last=3),
        ]
    )
    ctx = fl.train(fl.resume(loop, folder / "checkpoints", SEED, must_exist=False))
    return {"digest": fl.digest(ctx), "history": ctx.callbacks["history"], "steps": ctx.global_step}


def what_is_left(folder: Path) -> dict[str, Any]:
    """What somebody who looks into the folder sees."""
    # It tells of every point that a run that was killed had behind its last checkpoint.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]
    points = {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in tags}
    return {"tensorboard": points, "csv": (folder / "scores.csv").read_text()}


@attrs.define
class Torture:
    """Counts of what was done to the runs."""

    kills: int = 0
    aimed: int = 0
    in_saves: int = 0
    runs: int = 0

    def __str__(self) -> str:
        return (
            f"{self.kills} kills ({self.aimed} aimed at a save, {self.in_saves} of all left a half-written file) in "
            f"{self.runs} runs: every end, history, CSV file and TensorBoard log is that of the undisturbed run"
        )


def torture(folder: Path, kills: int, seed: int = 0, epochs: int = 12) -> Torture:
    """Kill runs so many times; each must end as the undisturbed one.

    Raises:
        AssertionError: one does not; the message says in what it differs.
    """
    chance, done = random.Random(seed), Torture()
    undisturbed = _outcome(folder / "undisturbed", iter(()), epochs)[0]
    while done.kills < kills:
        here = folder / f"run-{done.runs}"
        outcome, killed = _outcome(here, _waits(chance, here / "checkpoints", kills - done.kills, done), epochs)
        for name, value in outcome.items():
            assert value == undisturbed[name], f"{here}: {name} is {value!r} and should be {undisturbed[name]!r}"
        done.runs += 1
        done.kills += killed
    return done


def _outcome(folder: Path, waits: Iterator[Wait], epochs: int) -> tuple[dict[str, Any], int]:
    lives = outlive(train_everything, (folder, epochs), waits)
    return {**lives.result, **what_is_left(folder)}, lives.kills


def _waits(chance: random.Random, folder: Path, most: int, done: Torture) -> Iterator[Wait]:
    for _ in range(most):
        before, aimed = temporary_files(folder), chance.random() < 0.5
        if aimed:
            yield in_a_save(folder, chance.randrange(1, _SAVES))
        else:
            yield after(chance.uniform(0, _SLOWEST))
        # Asked for the next one: the process was killed.
        done.aimed += aimed
        done.in_saves += bool(temporary_files(folder) - before)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.torture")
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which runs are killed")
    given = parser.parse_args()
    start, total = time.monotonic(), Torture()
    # In portions, to show how far it is; a folder that is not as it should be stays.
    for number in itertools.count():
        if (left := given.kills - total.kills) <= 0:
            break
        folder = Path(tempfile.mkdtemp(prefix="torture-"))
        made = torture(folder, min(left, 20), seed=given.seed + number)
        for name in attrs.fields_dict(Torture):
            setattr(total, name, getattr(total, name) + getattr(made, name))
        print(f"{total} ({time.monotonic() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
