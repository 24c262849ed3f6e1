# ruff: noqa: N803  (X is scikit-learn's name for the data)
"""A network that tells classes apart, as a scikit-learn classifier."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import numpy as np
from sklearn.base import ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from torch.nn import functional

from .estimator import TorchEstimator
from .scores import CLASSIFICATION
from .targets import Classes


class TorchClassifier(ClassifierMixin, TorchEstimator):  # type: ignore[misc]
    """A classifier that is a network.

    Its arguments are those of `TorchEstimator`. The network gives one score per class, whose softmax are the
    probabilities; the usual ``loss`` is ``torch.nn.functional.cross_entropy``. Labels are of any type; the loss gets
    them as numbers from 0. Measures known by name: ``"cross_entropy"`` and ``"accuracy"``, which are the usual
    ``measures_valid``. A ratio in ``validate`` takes the same share of every class.

    Attributes:
        classes_: the labels, sorted.

    All checks of scikit-learn's ``check_estimator`` apply and pass.

    >>> from sklearn.datasets import load_iris
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.preprocessing import StandardScaler
    >>> from functional_loop.learner import TorchClassifier
    >>> X, y = load_iris(return_X_y=True)
    >>> learner = TorchClassifier(epochs=20).set_params(network__hidden=64)
    >>> make_pipeline(StandardScaler(), learner).fit(X, y).score(X, y) > 0.8
    True
    >>> learner.model_.epochs, learner.model_.seed
    (20, 0)
    """

    _kind = "classifier"
    _target = Classes
    _usual_loss = staticmethod(functional.cross_entropy)
    _measures = CLASSIFICATION
    _usual_measures = ("cross_entropy", "accuracy")
    _checks_of_y: ClassVar[dict[str, Any]] = {}

    @property
    def classes_(self) -> np.ndarray[Any, Any]:
        labels: np.ndarray[Any, Any] = self.target_.labels
        return labels

    def partial_fit(self, X: Any, y: Any, classes: Any = None, *, epochs: int = 1) -> Self:
        """As `TorchEstimator.partial_fit`.

        Args:
            X, y: see `fit`.
            classes: all labels that there will be, for the first call; by default those of ``y``.
            epochs: how many epochs to train.

        Raises:
            ValueError: ``y`` or ``classes`` has labels that the first call did not know.
            StateDictError: the network, optimizer, measures or callbacks are others than in the run so far.
        """
        target = None if classes is None else Classes.of(classes)
        if target is not None and self.__sklearn_is_fitted__() and not np.array_equal(target.labels, self.classes_):
            raise ValueError(
                f"classes are {target.labels.tolist()}, and were {self.classes_.tolist()} in the first call"
            )
        return self._partial_fit(X, y, target, epochs)

    def predict_proba(self, X: Any) -> np.ndarray[Any, Any]:
        """The probability of every class: float32 ``[rows, classes]``, in the order of ``classes_``."""
        probabilities: np.ndarray[Any, Any] = self._outputs(X).softmax(1).numpy()
        return probabilities

    def predict(self, X: Any) -> np.ndarray[Any, Any]:
        """The most probable label of every row."""
        probabilities = self._outputs(X).softmax(1)
        predicted: np.ndarray[Any, Any] = self.target_.decode(probabilities)
        return predicted

    def _check_target(self, y: Any) -> None:
        check_classification_targets(y)
