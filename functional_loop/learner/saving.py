"""What was fitted as a file, and back."""

from __future__ import annotations

import os
from typing import Any, ClassVar, Self

import numpy as np
from sklearn.utils.validation import check_is_fitted

from ..checkpoint import file as checkpoint_file
from ..core.errors import StateDictError, loading
from .assembly import as_device
from .model import TrainedModel
from .networks import network_for
from .targets import Classes, Numbers


class Saving:
    """``save`` and ``load`` of a learner, and what they are about."""

    network: Any
    device: Any
    model_: TrainedModel
    input_shape_: tuple[int, ...]
    n_features_in_: int
    target_: Any

    _kind: ClassVar[str]
    _target: ClassVar[type[Classes] | type[Numbers]]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what was fitted to one file, durably and without pickle; see `load`.

        The arguments of the learner are not in it: they are code.

        Raises:
            NotFittedError: nothing was fitted.
            TypeError: labels that are neither numbers nor strings.
            OSError: the file could not be written.
        """
        check_is_fitted(self)
        names = getattr(self, "feature_names_in_", None)
        metadata = {
            "learner": self._kind,
            "input_shape": list(self.input_shape_),
            "feature_names": None if names is None else names.tolist(),
            "target": self.target_.plain(),
        }
        checkpoint_file.write(path, self.model_.plain(), metadata)

    def load(self, path: str | os.PathLike[str]) -> Self:
        """Take what another learner of the same arguments has saved; every bit of the file is verified.

        Raises:
            CheckpointError: the file is damaged.
            StateDictError: it is of another kind of learner, or of another network.

        >>> import tempfile
        >>> from functional_loop.learner import TorchRegressor
        >>> x, path = np.linspace(0, 1, 20).reshape(-1, 1), tempfile.mkdtemp() + "/model.safetensors"
        >>> TorchRegressor(epochs=2).fit(x, x).save(path)
        >>> TorchRegressor().load(path).model_.epochs
        2
        """
        saved, metadata = checkpoint_file.read(path)
        if metadata.get("learner") != self._kind:
            raise StateDictError(f"{path} does not hold a {self._kind}")
        with loading(path):
            input_shape = tuple(metadata["input_shape"])
            target = self._target.from_plain(metadata["target"])
            network = network_for(self.network, input_shape, target.n_outputs)
            self.model_ = TrainedModel.from_plain(saved, network, as_device(self.device))
        self.target_, self.input_shape_, self.n_features_in_ = target, input_shape, input_shape[0]
        self.__dict__.pop("feature_names_in_", None)
        if metadata["feature_names"] is not None:
            self.feature_names_in_ = np.array(metadata["feature_names"], dtype=object)
        return self
