"""Measures: scores of an epoch, accumulated batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch

from .errors import add_note, noting
from .record import tree_map


@attrs.frozen(eq=False, repr=False)
class Measure:
    """A score by name, made by `measure`; a whole-epoch function, or a mergeable triple of pure functions."""

    id: str
    minimize: bool | None
    fn: Callable[[Any, Any], Any] | None
    init: Callable[[], Any] | None
    update: Callable[[Any, Any, Any], Any] | None
    compute: Callable[[Any], Any] | None

    def __repr__(self) -> str:
        return f"measure {self.id!r}"


def measure(
    id: str,
    fn: Callable[[Any, Any], Any] | None = None,
    *,
    minimize: bool | None = None,
    init: Callable[[], Any] | None = None,
    update: Callable[[Any, Any, Any], Any] | None = None,
    compute: Callable[[Any], Any] | None = None,
) -> Measure:
    """A measure, in one of two forms.

    With ``fn`` the score is ``fn(y_hat, y)`` over the predictions and targets of the whole epoch, concatenated along
    the first axis; they are kept until the epoch ends, once for all measures of this form. With ``init``, ``update``
    and ``compute`` memory is constant: ``state = init()``, then ``state = update(state, y_hat, y)`` for every batch,
    and the score is ``compute(state)``. The state is a tree of tensors and numbers; none of the functions may write
    to it.

    Args:
        id: the name of the score.
        fn: a function of predictions ``(rows, ...)`` and targets ``(rows, ...)`` that returns a number or a tensor of
            one element.
        minimize: whether lower is better; ``None`` if there is no better.
        init, update, compute: the mergeable form; ``compute`` returns what ``fn`` does.

    Raises:
        TypeError: neither form is given in full, or both are.
        ValueError: the id is empty or ``"epoch"``, which is a column of every history.

    >>> accuracy = measure("accuracy", lambda y_hat, y: (y_hat.argmax(1) == y).float().mean(), minimize=False)
    >>> rows = measure("rows", init=lambda: 0, update=lambda n, y_hat, y: n + len(y), compute=lambda n: n)
    >>> rows
    measure 'rows'
    """
    if not isinstance(id, str):
        raise TypeError(f"the id of a measure is a string, not {id!r}")
    if not id or id == "epoch":
        raise ValueError(f"a measure can't be named {id!r}: " + ("a column of every history is" if id else "empty"))
    if minimize is not None and not isinstance(minimize, bool):
        raise TypeError(f"measure {id!r}: minimize is True, False or None, not {minimize!r}")
    parts = {"init": init, "update": update, "compute": compute}
    given = [name for name, part in parts.items() if part is not None]
    if (fn is None and len(given) < len(parts)) or (fn is not None and given):
        raise TypeError(f"measure {id!r}: give either fn or all of init, update and compute")
    for name, part in {"fn": fn, **parts}.items():
        if part is not None and not callable(part):
            raise TypeError(f"measure {id!r}: {name} must be a function, not {part!r}")
    return Measure(id, minimize, fn, init, update, compute)


Chunk = dict[str, Any]
"""Predictions ``y_hat`` and targets ``y`` of ``2**level`` successive batches."""


def start(measures: Sequence[Measure]) -> dict[str, Any]:
    """Accumulators before the first batch."""
    return {"predictions": [], "states": {m.id: m.init() for m in measures if m.init is not None}}


def accumulate(measures: Sequence[Measure], state: dict[str, Any], y_hat: Any, y: Any) -> dict[str, Any]:
    """Accumulators after one more batch."""
    chunks, states = keep(measures, state["predictions"], y_hat, y), {}
    for m in measures:
        if m.update is not None:
            with noting(lambda m=m: f"in {m}"):  # type: ignore[misc]
                states[m.id] = m.update(state["states"][m.id], y_hat, y)
    return {"predictions": chunks, "states": states}


def keep(measures: Sequence[Measure], chunks: list[Chunk], y_hat: Any, y: Any, axis: int = 0) -> list[Chunk]:
    """The predictions and targets kept for measures of a whole epoch, with those of one more batch."""
    whole = [m.id for m in measures if m.fn is not None]
    if not whole:
        return chunks
    with noting(lambda: f"in the predictions for measure {', '.join(map(repr, whole))}"):
        return append(chunks, {"level": 0, "y_hat": y_hat, "y": y}, axis)


def append(chunks: list[Chunk], chunk: Chunk, axis: int = 0) -> list[Chunk]:
    """The list with ``chunk`` at its end and no two chunks of one level.

    Two neighbours of a level are merged, as in binary counting: n batches are log2(n) chunks, every row is copied
    log2(n) times, and the lists of earlier contexts stay as they are.
    """
    chunks = list(chunks)
    while chunks and chunks[-1]["level"] == chunk["level"]:
        chunk = {**concatenate([chunks.pop(), chunk], axis), "level": chunk["level"] + 1}
    return [*chunks, chunk]


def concatenate(chunks: Sequence[Chunk], axis: int = 0) -> Chunk:
    """All rows of ``chunks``, which are along ``axis``, as one chunk."""

    def join(*leaves: Any) -> Any:
        return _concatenate(leaves, axis)

    return {part: tree_map(join, *(chunk[part] for chunk in chunks)) for part in ("y_hat", "y")}


def _concatenate(leaves: Sequence[Any], axis: int) -> Any:
    try:
        return torch.cat(leaves, axis)  # type: ignore[arg-type]
    except RuntimeError as error:
        add_note(
            error,
            "the predictions or targets of several batches can't be joined along their first axis, as a whole-epoch "
            "measure needs: use measure(id, init=..., update=..., compute=...)",
        )
        raise


def scores(measures: Sequence[Measure], state: dict[str, Any]) -> dict[str, float]:
    """The scores of an epoch by measure id."""
    whole = concatenate(state["predictions"]) if state["predictions"] else None
    result = {}
    for m in measures:
        with noting(lambda m=m: f"in {m}"):  # type: ignore[misc]
            if m.compute is not None:
                result[m.id] = _as_float(m.compute(state["states"][m.id]))
            elif m.fn is not None and whole is not None:
                result[m.id] = _as_float(m.fn(whole["y_hat"], whole["y"]))
    return result


def _as_float(score: Any) -> float:
    if isinstance(score, torch.Tensor) and score.numel() != 1:
        raise ValueError(f"a score is one number, not a tensor of shape {list(score.shape)}: take its mean")
    try:
        return float(score)
    except (TypeError, ValueError):
        raise TypeError(f"a score is a number or a tensor of one element, not {score!r}") from None
