"""Measures that a learner knows by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..core.context import first_output
from ..core.measures import Measure, measure
from ..core.record import did_you_mean


def _mean_over_rows(id: str, sum_of: Callable[[Tensor, Tensor], Tensor], minimize: bool) -> Measure:
    def update(state: dict[str, Any], y_hat: Tensor, y: Tensor) -> dict[str, Any]:
        return {"sum": state["sum"] + sum_of(y_hat, y).double(), "rows": state["rows"] + len(y)}

    return measure(
        id,
        of=first_output,
        minimize=minimize,
        init=lambda: {"sum": torch.zeros((), dtype=torch.float64), "rows": 0},
        update=update,
        compute=lambda state: state["sum"] / state["rows"],
    )


def _r2(y_hat: Tensor, y: Tensor) -> Tensor:
    residual = (y - y_hat).square().sum(0)
    return (1 - residual / (y - y.mean(0)).square().sum(0)).mean()


CLASSIFICATION = {
    "cross_entropy": _mean_over_rows(
        "cross_entropy", lambda y_hat, y: functional.cross_entropy(y_hat, y, reduction="sum"), minimize=True
    ),
    "accuracy": _mean_over_rows("accuracy", lambda y_hat, y: (y_hat.argmax(1) == y).sum(), minimize=False),
}

REGRESSION = {
    "mse": _mean_over_rows("mse", lambda y_hat, y: (y_hat - y).square().mean(1).sum(), minimize=True),
    "mae": _mean_over_rows("mae", lambda y_hat, y: (y_hat - y).abs().mean(1).sum(), minimize=True),
    "r2": measure("r2", _r2, of=first_output, minimize=False),
}


def as_measures(name: str, given: Any, known: dict[str, Measure]) -> list[Measure]:
    """Measures, or keys of known ones, as measures.

    Args:
        name: of the argument, for messages.

    Raises:
        TypeError: not a list.
        ValueError: there is no measure of that name.
    """
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"{name} is a list of measures or of {', '.join(map(repr, known))}, not {given!r}")
    for item in given:
        if isinstance(item, str) and item not in known:
            raise ValueError(f"{name}: there is no measure {item!r}{did_you_mean(item, known)}")
    return [known[item] if isinstance(item, str) else item for item in given]
