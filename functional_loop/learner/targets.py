"""Targets: what a learner is to predict, as tensors, and predictions as what the user knows."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from ..core.errors import StateDictError
from .arrays import as_tensor


@attrs.frozen(eq=False)
class Classes:
    """Labels of any type, as numbers from 0.

    >>> target = Classes.of(np.array(["cat", "dog", "cat"]))
    >>> target.encode(np.array(["dog", "cat"]))
    tensor([1, 0])
    >>> target.decode(torch.tensor([[0.2, 0.8]]))
    array(['dog'], dtype='<U3')
    """

    labels: np.ndarray[Any, Any]

    @classmethod
    def of(cls, y: Any) -> Classes:
        return cls(np.unique(y))

    @property
    def n_outputs(self) -> int:
        return len(self.labels)

    def encode(self, y: np.ndarray[Any, Any]) -> Tensor:
        """The number of every label: int64 ``[rows]``.

        Raises:
            ValueError: there is a label that is not among the classes.
        """
        unknown = np.setdiff1d(y, self.labels).tolist()
        if unknown:
            raise ValueError(f"y has the label {unknown[0]!r}, which is not among the classes {self.labels.tolist()}")
        return torch.from_numpy(np.searchsorted(self.labels, y).astype(np.int64))

    def decode(self, scores: Tensor) -> np.ndarray[Any, Any]:
        """The label of the highest of the scores ``[rows, classes]``, for every row."""
        found: np.ndarray[Any, Any] = self.labels[scores.argmax(1).numpy()]
        return found

    def plain(self) -> dict[str, Any]:
        """What a file keeps of it."""
        return {"labels": self.labels.tolist(), "dtype": str(self.labels.dtype)}

    @classmethod
    def from_plain(cls, saved: dict[str, Any]) -> Classes:
        if saved.keys() != {"labels", "dtype"}:
            raise StateDictError("what was saved is no classifier")
        return cls(np.array(saved["labels"], dtype=np.dtype(saved["dtype"])))


@attrs.frozen(eq=False)
class Numbers:
    """Numbers: one per row (``shape`` is ``()``) or several.

    >>> target = Numbers.of(np.array([1.0, 2.0]))
    >>> target.encode(np.array([1.5]))
    tensor([[1.5000]])
    >>> target.decode(torch.tensor([[3.0]]))
    array([3.])
    """

    shape: tuple[int, ...]

    @classmethod
    def of(cls, y: Any) -> Numbers:
        return cls(tuple(y.shape[1:]))

    @property
    def n_outputs(self) -> int:
        return self.shape[0] if self.shape else 1

    def encode(self, y: np.ndarray[Any, Any]) -> Tensor:
        """The targets: float32 ``[rows, n_outputs]``.

        Raises:
            ValueError: there are more or fewer per row than before.
        """
        if y.shape[1:] != self.shape:
            raise ValueError(f"y has rows of shape {y.shape[1:]}, not {self.shape} as those that it was fitted to")
        return as_tensor(y).reshape(len(y), self.n_outputs)

    def decode(self, outputs: Tensor) -> np.ndarray[Any, Any]:
        """The predictions in float64, of the shape of the targets."""
        predicted: np.ndarray[Any, Any] = outputs.double().numpy().reshape(len(outputs), *self.shape)
        return predicted

    def plain(self) -> dict[str, Any]:
        """What a file keeps of it."""
        return {"shape": list(self.shape)}

    @classmethod
    def from_plain(cls, saved: dict[str, Any]) -> Numbers:
        if saved.keys() != {"shape"}:
            raise StateDictError("what was saved is no regressor")
        return cls(tuple(saved["shape"]))
