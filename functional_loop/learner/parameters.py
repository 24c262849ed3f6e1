"""Parameters of a learner and of its parts, by name."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from sklearn.base import BaseEstimator

from ..core.record import did_you_mean
from . import parts

_PARTS = ("network", "loss", "optimizer")


class Parameters(BaseEstimator):  # type: ignore[misc]
    """``get_params`` and ``set_params`` that reach into network, loss, optimizer and callbacks."""

    callbacks: Any
    _usual_loss: ClassVar[Any]

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The parameters by name; with ``deep`` also those of network, loss, optimizer and callbacks."""
        params: dict[str, Any] = super().get_params(deep=False)
        if deep:
            for name in _PARTS:
                params |= {f"{name}__{key}": value for key, value in parts.parameters(self.part(name)).items()}
            own = parts.callback_parameters(self.callbacks)
            params |= {f"callbacks__{key}": value for key, value in own.items()}
        return params

    def set_params(self, **params: Any) -> Self:
        """Set parameters, in the way of scikit-learn; ``callbacks__<id>`` replaces a callback.

        Raises:
            ValueError: there is no such parameter.
            TypeError: a value is of a type that the part does not take.
        """
        super().set_params(**{name: value for name, value in params.items() if "__" not in name})
        nested: dict[str, dict[str, Any]] = {}
        for key, value in params.items():
            name, separator, rest = key.partition("__")
            if separator:
                nested.setdefault(name, {})[rest] = value
        for name, values in nested.items():
            if name == "callbacks":
                self.callbacks = parts.with_callback_parameters(self.callbacks, values)
            elif name in _PARTS:
                setattr(self, name, parts.with_parameters(self.part(name), name, values))
            else:
                known = [*_PARTS, "callbacks"]
                raise ValueError(f"{type(self).__name__}: {name!r} has no parameters{did_you_mean(name, known)}")
        return self

    def part(self, name: str) -> Any:
        """The network, loss or optimizer: the one given, or the usual one of the kind."""
        given = getattr(self, name)
        return self._usual_loss if name == "loss" and given is None else given
