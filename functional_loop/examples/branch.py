"""A branch: one context is trained on with three learning rates, and the best of them goes on.

python -m functional_loop.examples.branch
"""

from __future__ import annotations

import functional_loop as fl
from functional_loop.examples import digits


def branch(ctx: fl.Context, rates: tuple[float, ...], steps: int) -> dict[float, fl.Context]:
    """``ctx`` after ``steps`` more batches, by learning rate; ``ctx`` itself stays where it is.

    >>> start = fl.train(fl.init(digits.loop()), steps=5)
    >>> ends = branch(start, (0.01, 0.001), steps=2)
    >>> [(lr, ctx.global_step) for lr, ctx in ends.items()], start.global_step
    ([(0.01, 7), (0.001, 7)], 5)
    """
    return {lr: fl.train(ctx.with_hyperparameters(lr=lr), steps) for lr in rates}


def main() -> None:
    """Train for two epochs, branch, and say how each branch does."""
    loop = digits.loop()
    ctx = fl.train(fl.init(loop), steps=2 * len(loop.train))
    ends = branch(ctx, (0.01, 0.003, 0.0003), steps=len(loop.train))
    scores = {lr: fl.validate(end) for lr, end in ends.items()}
    for lr, score in scores.items():
        print(f"lr {lr:<6}  cross-entropy {score['cross_entropy']:.4f}  accuracy {score['accuracy']:.4f}")
    best = min(scores, key=lambda lr: scores[lr]["cross_entropy"])
    print(f"going on with {best}: {ends[best]}")


if __name__ == "__main__":
    main()
