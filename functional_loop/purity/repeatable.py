"""Refuses measures that keep a state of their own: a score would depend on what was scored before."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import Tensor

from ..core.record import tree_equal, tree_map
from .reachable import EVERYTHING, is_without_values, reachable, state_of

if TYPE_CHECKING:
    from ..core.measures import Measure

_METRIC = ("update", "compute", "reset")
"""Methods of objects that accumulate, such as those of torchmetrics."""

_repeatable: WeakKeyDictionary[Measure, set[str]] = WeakKeyDictionary()
"""Of measures, which of their functions were found to depend on their arguments alone."""


def refuse_metrics(called: str, name: str, function: Any) -> None:
    """Refuse a function that is, or reaches, an object that accumulates; ``name`` is that of the function.

    Raises:
        TypeError: it does.

    >>> class Accuracy:
    ...     def update(self, y_hat, y): ...
    ...     def compute(self): ...
    ...     def reset(self): ...
    >>> refuse_metrics("measure 'accuracy'", "fn", Accuracy())
    Traceback (most recent call last):
        ...
    TypeError: measure 'accuracy' uses an Accuracy (fn), which accumulates in itself...
    """
    for path, found in reachable({name: function}):
        if all(callable(getattr(type(found), name, None)) for name in _METRIC):
            raise TypeError(
                f"{called} uses {_article(type(found).__name__)} ({path}), which accumulates in itself, so that scores "
                "would depend on what was scored before and be lost in a resume: give its sums as "
                "measure(id, init=, update=, compute=), or its plain function of predictions and targets"
            )


def _article(name: str) -> str:
    return f"{'an' if name[:1] in 'AEIOUaeiou' else 'a'} {name}"


def is_repeatable(measure: Measure, what: str) -> bool:
    return what in _repeatable.get(measure, ())


def checked(measure: Measure, what: str, function: Callable[..., Any], given: tuple[Any, ...], rows: slice) -> Any:
    """``function(*given)``; the first time in a process it is called on parts of the rows and then again, and compared.

    Args:
        what: which function of the measure it is.
        rows: which of ``given`` have rows.

    Raises:
        ValueError: the results differ, or the function writes to the state that it is given.
    """
    first = function(*given)
    if is_repeatable(measure, what) or is_without_values(given):
        return first
    expected = state_of({"result": first}, most=EVERYTHING)
    # Of two parts one scores higher than the whole, and one lower; one more often than the other moves a mean.
    for part in (_first_part, _rest, _first_part):
        # Rows that it can't take tell nothing.
        with suppress(Exception):
            function(*given[: rows.start], *map(part, given[rows]), *given[rows.stop :])
    second = function(*given)
    if state_of({"result": first}, most=EVERYTHING) != expected:
        raise ValueError(f"{measure}: {what} writes to the state that it is given: it has to return a new one")
    if state_of({"result": second}, most=EVERYTHING) != expected:
        raise ValueError(
            f"{measure} gives two results for the same predictions and targets ({what}: {tree_equal(first, second)}): "
            "it depends on more than these, such as a state of its own or random numbers, so that scores could not be "
            "repeated or resumed. Give what is accumulated as measure(id, init=, update=, compute=), and draw under "
            "fl.seeded(...)"
        )
    _repeatable.setdefault(measure, set()).add(what)
    return first


def _first_part(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf[: (len(leaf) + 2) // 3] if _has_rows(leaf) else leaf, tree)


def _rest(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf[(len(leaf) + 2) // 3 :] if _has_rows(leaf) and len(leaf) > 1 else leaf, tree)


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0
