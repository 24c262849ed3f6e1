"""``python -m tests.released``: make the checkpoint of this version's format that stays in ``tests/data``.

Run it once per version of the state dict, when that is released, and record what it prints in
``tests/test_migrations.py``; the file and the loop here must not be changed afterwards. A later version adds a loop
where this one doesn't fit.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import functional_loop as fl
from functional_loop.checkpoint import header
from functional_loop.checkpoint.migrations import VERSION

FOLDER = Path(__file__).parent / "data"


def error(y_hat: Tensor, y: Tensor) -> Tensor:
    return (y_hat - y).abs().mean()


def count(ctx: fl.Context) -> fl.Context:
    seen = ctx.callbacks["counter"]
    return ctx.with_callback_state("counter", {**seen, "batches": seen["batches"] + 1, "best": ctx.last_loss})


def loop() -> fl.Loop:
    """Something of all that a state dict can hold: buffers, groups, open window, running scores, slots of callbacks."""
    x = torch.arange(40.0).reshape(20, 2) / 40
    y = x.sum(1, keepdim=True)
    return fl.Loop(
        network=lambda: nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.25), nn.Linear(3, 1)),
        loss=nn.functional.mse_loss,
        optimizer=fl.optimizer(torch.optim.AdamW, lr=0.01, groups=[{"params": "*.bias", "weight_decay": 0.0}]),
        train=fl.batches(x, y, batch_size=4, shuffle=True, hash_content=True),
        valid=fl.batches(x, y, batch_size=10),
        epochs=3,
        measures_train=[fl.measure("error", error, minimize=True)],
        measures_valid=[fl.measure("error", error, minimize=True)],
        callbacks=[
            fl.Callback("counter", init=lambda ctx: {"batches": 0, "best": float("inf"), "none": ()}, batch_end=count)
        ],
        accumulate=2,
    )


def main() -> None:
    torch.set_num_threads(1)
    ctx = fl.train(fl.init(loop(), seed=2**70), steps=8)
    end = fl.train(ctx)
    folder = FOLDER / f"version-{VERSION}"
    if folder.exists():
        raise SystemExit(f"{folder} is there already, and a released file stays as it is")
    path = fl.CheckpointStore(folder).save(ctx)
    print(path, path.stat().st_size, "bytes", fl.digest(ctx), end.last_scores_valid, header.VERSION)


if __name__ == "__main__":
    main()
