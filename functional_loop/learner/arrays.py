"""Data of users as arrays and tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset


def as_array(data: Any) -> Any:
    """A tensor as an array, which scikit-learn can look at; anything else as it is."""
    if not isinstance(data, Tensor):
        return data
    plain = data.detach().cpu()
    return (plain.float() if plain.dtype is torch.bfloat16 else plain).numpy()


def as_tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """An array as a float32 tensor, which shares its memory where it can.

    >>> as_tensor(np.arange(3))
    tensor([0., 1., 2.])
    """
    array = np.ascontiguousarray(array, dtype=np.float32)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def as_python(value: Any) -> Any:
    """A number of numpy's, such as one from a grid of parameters, as Python's."""
    return value.item() if isinstance(value, np.generic) else value


def checked_integer(name: str, value: Any) -> int:
    """A positive integer of Python's or numpy's.

    Raises:
        ValueError: it is something else.
    """
    value = as_python(value)
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, not {value!r}")
    return value


def split(x: Tensor, y: Tensor, ratio: float, seed: int, labels: Tensor) -> tuple[TensorDataset, TensorDataset]:
    """Two parts of the rows, in their order: one to train on, and a share of ``ratio`` to validate on.

    Args:
        labels: int64 ``[rows]``; the share is taken of every label, and one row at least is left to train on.

    Raises:
        ValueError: there are too few rows.

    >>> parts = split(torch.arange(8), torch.zeros(8), 0.25, seed=0, labels=torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))
    >>> [len(part) for part in parts]
    [6, 2]
    """
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    valid = torch.zeros(len(x), dtype=torch.bool)
    kinds = set(labels.tolist())
    for label in kinds:
        rows = order[labels[order] == label]
        valid[rows[: min(round(ratio * len(rows)), len(rows) - 1)]] = True
    if not valid.any():
        raise ValueError(f"validate: {ratio} of so few rows ({len(x)} of {len(kinds)} kinds) is none of them")
    return TensorDataset(x[~valid], y[~valid]), TensorDataset(x[valid], y[valid])
