"""Refuses measures that keep a state of their own: a score would depend on what was scored before."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any
from weakref import WeakSet

from torch import Tensor

from .lending import clone_tree
from .reachable import is_without_values, reachable
from .record import tree_equal, tree_map

_METRIC = ("update", "compute", "reset")
"""Methods of objects that accumulate, such as those of torchmetrics."""

_repeatable: WeakSet[Any] = WeakSet()
"""Measures that were found to be functions of their arguments."""


def refuse_metrics(called: str, function: Any) -> None:
    """Refuse a function that reaches an object that accumulates.

    Raises:
        TypeError: it does.

    >>> class Accuracy:
    ...     def update(self, y_hat, y): ...
    ...     def compute(self): ...
    ...     def reset(self): ...
    >>> refuse_metrics("measure 'accuracy'", Accuracy())
    Traceback (most recent call last):
        ...
    TypeError: measure 'accuracy' uses an Accuracy (fn), which accumulates in itself...
    """
    for path, found in reachable({"fn": function}):
        if all(callable(getattr(type(found), name, None)) for name in _METRIC):
            raise TypeError(
                f"{called} uses {_article(type(found).__name__)} ({path}), which accumulates in itself, so that scores "
                "would depend on what was scored before and be lost in a resume: give its sums as "
                "measure(id, init=, update=, compute=), or its plain function of predictions and targets"
            )


def _article(name: str) -> str:
    return f"{'an' if name[:1] in 'AEIOUaeiou' else 'a'} {name}"


def is_checked(measure: Any) -> bool:
    """Whether a measure was found to depend on its arguments alone."""
    return measure in _repeatable


def checked(measure: Any, function: Callable[..., Any], *given: Any) -> Any:
    """``function(*given)``, where predictions and targets are the last two of ``given``.

    The first time in a process it is called on other rows and then again, with copies of what comes before them, and
    compared.

    Raises:
        ValueError: the results differ.
    """
    if is_checked(measure) or is_without_values(given):
        return function(*given)
    *state, y_hats, y = given
    copies = [clone_tree(state) for _ in range(2)]
    first = function(*given)
    # Rows that it can't take tell nothing.
    with suppress(Exception):
        function(*copies[0], _half(y_hats), _half(y))
    if difference := tree_equal(first, function(*copies[1], y_hats, y)).reason:
        raise ValueError(
            f"{measure} gives two results for the same predictions and targets ({difference}): it depends on more than "
            "these, such as a state of its own or random numbers, so that scores could not be repeated or resumed. "
            "Give what is accumulated as measure(id, init=, update=, compute=), and draw under fl.seeded(...)"
        )
    _repeatable.add(measure)
    return first


def _half(tree: Any) -> Any:
    def half(leaf: Any) -> Any:
        return leaf[: (len(leaf) + 1) // 2] if isinstance(leaf, Tensor) and leaf.dim() else leaf

    return tree_map(half, tree)
