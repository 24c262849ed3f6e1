# ruff: noqa: N803  (X is scikit-learn's name for the data)
"""A network that predicts numbers, as a scikit-learn regressor."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from sklearn.base import RegressorMixin
from torch.nn import functional

from .estimator import TorchEstimator
from .scores import REGRESSION
from .targets import Numbers


class TorchRegressor(RegressorMixin, TorchEstimator):  # type: ignore[misc]
    """A regressor that is a network.

    Its arguments are those of `TorchEstimator`. Targets are one number per row or several; network and loss have them
    as ``[rows, n_outputs]`` in float32 either way. The usual ``loss`` is ``torch.nn.functional.mse_loss``. Measures
    known by name: ``"mse"``, ``"mae"`` and ``"r2"``; the usual ``measures_valid`` are ``"mse"`` and ``"r2"``. Inputs
    and targets far from zero and one are better scaled (``StandardScaler``, ``TransformedTargetRegressor``).

    All checks of scikit-learn's ``check_estimator`` apply and pass.

    >>> import numpy as np
    >>> from functional_loop.learner import TorchRegressor
    >>> X = np.linspace(-1, 1, 200).reshape(-1, 1)
    >>> TorchRegressor(epochs=100).fit(X, X[:, 0] ** 2).score(X, X[:, 0] ** 2) > 0.9
    True
    """

    _kind = "regressor"
    _target = Numbers
    _usual_loss = staticmethod(functional.mse_loss)
    _measures = REGRESSION
    _usual_measures = ("mse", "r2")
    _checks_of_y: ClassVar[dict[str, Any]] = {"multi_output": True, "y_numeric": True}

    def predict(self, X: Any) -> np.ndarray[Any, Any]:
        """The predicted numbers: float64, of the shape of the targets."""
        outputs = self._outputs(X)
        predicted: np.ndarray[Any, Any] = self.target_.decode(outputs)
        return predicted

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags
