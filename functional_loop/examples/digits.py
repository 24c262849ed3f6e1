"""Handwritten digits: a small convolutional network that reads 8x8 pictures.

    functional-loop train functional_loop.examples.digits:loop --run runs/digits

The pictures are those of ``sklearn.datasets.load_digits`` (Alpaydin and Kaynak, "Optical Recognition of Handwritten
Digits", UCI, 1998), which come with scikit-learn: nothing is downloaded.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import functional_loop as fl


def network() -> nn.Module:
    """A network from pictures ``[n, 1, 8, 8]`` to scores ``[n, 10]``."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.5),
        nn.Conv2d(64, 128, 3, padding=1, bias=False),
        nn.BatchNorm2d(128),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(128 * 2 * 2, 10),
    )


def accuracy(y_hat: Tensor, y: Tensor) -> Tensor:
    return (y_hat.argmax(1) == y).float().mean()


def digits() -> tuple[Tensor, Tensor]:
    """All 1797 pictures ``[n, 1, 8, 8]``, from 0 to 1, and their labels ``[n]``."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install functional-loop[examples]") from error
    bunch = load_digits()
    return torch.from_numpy(bunch.images).float().unsqueeze(1) / 16, torch.from_numpy(bunch.target)


def loop(epochs: int = 30, batch_size: int = 64, lr: float = 0.003) -> fl.Loop:
    """The loop: every fifth picture validates, the others train.

    >>> import functional_loop as fl
    >>> ctx = fl.train(fl.init(loop(epochs=2), seed=0))
    >>> ctx.last_scores_valid["accuracy"] > 0.9
    True
    """
    x, y = digits()
    valid = torch.arange(len(y)) % 5 == 0
    measures = [
        fl.measure("cross_entropy", cross_entropy, minimize=True),
        fl.measure("accuracy", accuracy, minimize=False),
    ]
    return fl.Loop(
        network,
        cross_entropy,
        fl.optimizer(torch.optim.AdamW, lr=lr),
        train=fl.batches(x[~valid], y[~valid], batch_size=batch_size, shuffle=True),
        valid=fl.batches(x[valid], y[valid], batch_size=360),
        epochs=epochs,
        measures_train=measures,
        measures_valid=measures,
    )
