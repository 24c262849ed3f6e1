"""Measures: scores of an epoch, accumulated batch by batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import attrs
import torch
from torch import Tensor

from ..purity.repeatable import checked, refuse_metrics
from .errors import add_note, noting
from .outputs import leaves, map_outputs, pick, plain, restored, tree_detach

Of: TypeAlias = str | int | Callable[[Any], Any] | None


@attrs.frozen(eq=False, repr=False)
class Measure:
    """A score by name, made by `measure`; a whole-epoch function, or a mergeable triple of pure functions."""

    id: str
    minimize: bool | None
    fn: Callable[[Any, Any], Any] | None
    init: Callable[[], Any] | None
    update: Callable[[Any, Any, Any], Any] | None
    compute: Callable[[Any], Any] | None
    of: Of = None
    is_loss: bool = False
    """Whether it is the loop's own loss: ``update`` takes that and the number of rows."""

    def picked(self, y_hats: Any) -> Any:
        """What the functions get of the outputs of the network."""
        return y_hats if self.of is None else tree_detach(pick(y_hats, self.of))

    def advance(self, state: Any, y_hats: Any, y: Any, loss: Any, rows: int) -> Any:
        """The state after one more batch, of a mergeable measure."""
        assert self.update is not None
        return self.update(state, loss, rows) if self.is_loss else self.update(state, self.picked(y_hats), y)

    def checked_advance(self, state: Any, y_hats: Any, y: Any, loss: Any, rows: int) -> Any:
        """As `advance`, outside of transforms; see `checked`."""
        return checked(self, "update", self.advance, (state, y_hats, y, loss, rows), slice(1, 3))

    def __repr__(self) -> str:
        return f"measure {self.id!r}"


def measure(
    id: str,
    fn: Callable[[Any, Any], Any] | None = None,
    *,
    of: Of = None,
    minimize: bool | None = None,
    init: Callable[[], Any] | None = None,
    update: Callable[[Any, Any, Any], Any] | None = None,
    compute: Callable[[Any], Any] | None = None,
) -> Measure:
    """A measure, in one of two forms; or, for ``measure("loss")``, the loop's own loss.

    With ``fn`` the score is ``fn(y_hats, y)`` over the predictions and targets of the whole epoch, concatenated along
    the first axis; they are kept until the epoch ends, once for all measures of this form. With ``init``, ``update``
    and ``compute`` memory is constant: ``state = init()``, then ``state = update(state, y_hats, y)`` for every batch,
    and the score is ``compute(state)``. The state is a tree of tensors and numbers; none of the functions may write
    to it.

    ``y_hats`` is what the loss gets: the tensor that the network returns, or all of its outputs. ``of`` picks one.

    ``measure("loss")`` is the mean of the losses of an epoch, each batch weighted by its rows; in validation the loss
    is called in evaluation mode, on the outputs that the other measures get.

    Args:
        id: the name of the score.
        fn: a function of predictions ``(rows, ...)`` and targets ``(rows, ...)`` that returns a number or a tensor of
            one element.
        of: which of several outputs the functions get: a key of a dict, the name of a field or attribute, the index in
            a tuple, or a function of the outputs of a batch. Only what whole-epoch measures pick is kept.
        minimize: whether lower is better; ``None`` if there is no better.
        init, update, compute: the mergeable form; ``compute`` returns what ``fn`` does.

    Raises:
        TypeError: neither form is given in full, or both are; a function uses an object that accumulates, such as a
            metric of torchmetrics.
        ValueError: the id is empty or ``"epoch"``, which is a column of every history.

    A measure that gives two results for the same predictions and targets is refused when it is first used.

    >>> accuracy = measure("accuracy", lambda y_hat, y: (y_hat.argmax(1) == y).float().mean(), minimize=False)
    >>> rows = measure("rows", init=lambda: 0, update=lambda n, y_hat, y: n + len(y), compute=lambda n: n)
    >>> rows
    measure 'rows'
    >>> of_a_head = measure("error", lambda mean, y: (mean - y).abs().mean(), of="mean", minimize=True)
    >>> measure("loss").minimize
    True
    """
    if not isinstance(id, str):
        raise TypeError(f"the id of a measure is a string, not {id!r}")
    if not id or id == "epoch":
        raise ValueError(f"a measure can't be named {id!r}: " + ("a column of every history is" if id else "empty"))
    if minimize is not None and not isinstance(minimize, bool):
        raise TypeError(f"measure {id!r}: minimize is True, False or None, not {minimize!r}")
    if isinstance(of, bool) or not (of is None or isinstance(of, (str, int)) or callable(of)):
        raise TypeError(f"measure {id!r}: of is the name or index of an output, or a function of them, not {of!r}")
    parts = {"init": init, "update": update, "compute": compute}
    given = [name for name, part in parts.items() if part is not None]
    if id == "loss" and fn is None and not given:
        if of is not None:
            raise TypeError(
                "measure 'loss': without functions it is the loop's own loss, which gets all outputs; no of="
            )
        return _loss(True if minimize is None else minimize)
    if (fn is None and len(given) < len(parts)) or (fn is not None and given):
        raise TypeError(f"measure {id!r}: give either fn or all of init, update and compute")
    for name, part in {"fn": fn, **parts}.items():
        if part is not None and not callable(part):
            raise TypeError(f"measure {id!r}: {name} must be a function, not {part!r}")
    for name, part in {"fn": fn, **parts}.items():
        refuse_metrics(f"measure {id!r}", name, part)
    return Measure(id, minimize, fn, init, update, compute, of)


def _loss(minimize: bool) -> Measure:
    def update(state: dict[str, Any], loss: Tensor, rows: int) -> dict[str, Any]:
        return {"sum": state["sum"] + loss.double() * rows, "rows": state["rows"] + rows}

    return Measure(
        "loss",
        minimize,
        fn=None,
        init=lambda: {"sum": torch.zeros((), dtype=torch.float64), "rows": 0},
        update=update,
        compute=lambda state: state["sum"] / state["rows"],
        is_loss=True,
    )


def need_loss(measures: Sequence[Measure]) -> bool:
    """Whether one of them is the loop's own loss."""
    return any(m.is_loss for m in measures)


Chunk = dict[str, Any]
"""Predictions ``y_hat`` and targets ``y`` of ``2**level`` successive batches."""


def start(measures: Sequence[Measure]) -> dict[str, Any]:
    """Accumulators before the first batch."""
    return {"predictions": [], "states": {m.id: m.init() for m in measures if m.init is not None}}


def accumulate(
    measures: Sequence[Measure], state: dict[str, Any], y_hats: Any, y: Any, x: Any = (), loss: Any = ()
) -> dict[str, Any]:
    """Accumulators after one more batch.

    Args:
        x: input of the network, whose rows are counted where ``y`` has none.
        loss: of the batch, if there is a measure of it.
    """
    chunks = keep(measures, state["predictions"], lambda m: m.picked(y_hats), y, x)
    states, rows = {}, count_rows(y, x) if need_loss(measures) else 0
    for m in measures:
        if m.update is not None:
            with noting(lambda m=m: f"in {m}"):  # type: ignore[misc]
                states[m.id] = m.checked_advance(state["states"][m.id], y_hats, y, loss, rows)
    return {"predictions": chunks, "states": states}


def keep(
    measures: Sequence[Measure],
    chunks: list[Chunk],
    picked: Callable[[Measure], Any],
    y: Any,
    x: Any = (),
    axis: int = 0,
) -> list[Chunk]:
    """The predictions and targets kept for measures of a whole epoch, with those of one more batch."""
    keepers = _keepers(measures)
    if not keepers:
        return chunks
    kept = []
    for m in keepers:
        with noting(lambda m=m: f"in the predictions for {m}"):  # type: ignore[misc]
            kept.append(picked(m))
            _check_rows(m, kept[-1], y, x, axis)
            kept[-1] = plain(kept[-1])
    with noting(lambda: f"in the predictions for {', '.join(map(str, keepers))}"):
        return append(chunks, {"level": 0, "y_hat": kept[0] if len(kept) == 1 else kept, "y": y}, axis)


def _keepers(measures: Sequence[Measure]) -> list[Measure]:
    """A measure of a whole epoch for everything that has to be kept: what is in the outputs as a whole, if these are
    kept, is not kept twice."""
    whole = [m for m in measures if m.fn is not None]
    everything = any(m.of is None for m in whole)
    found: dict[Any, Measure] = {}
    for m in whole:
        if m.of is None or callable(m.of) or not everything:
            found.setdefault((type(m.of), m.of), m)
    return list(found.values())


def count_rows(y: Any, x: Any, axis: int = 0) -> int:
    """The number of rows of a batch, by its targets or, where it has none, by its inputs."""
    return next((leaf.shape[axis] for leaf in _with_rows(y, x, axis)), 1)


def _with_rows(y: Any, x: Any, axis: int) -> Iterator[Tensor]:
    tensors = (leaf for part in (y, x) for _, leaf in leaves(part) if isinstance(leaf, Tensor))
    return (tensor for tensor in tensors if tensor.dim() > axis)


def _check_rows(m: Measure, y_hats: Any, y: Any, x: Any, axis: int) -> None:
    """Refuse outputs that can't be joined along an axis of rows."""
    counts = {math.prod(t.shape[axis : i + 1]) for t in _with_rows(y, x, axis) for i in range(axis, t.dim())}
    for path, leaf in leaves(y_hats):
        has_rows = isinstance(leaf, Tensor) and leaf.dim() > axis and (not counts or leaf.shape[axis] in counts)
        if has_rows or leaf is None:
            continue
        form = f"of shape {list(leaf.shape[axis:])}" if isinstance(leaf, Tensor) else f"a {type(leaf).__name__}"
        raise ValueError(
            f"{m} is of the predictions of a whole epoch, but {f'output {path}' if path else 'what it gets'} has no "
            f"axis of rows: it is {form}, and the batch has {count_rows(y, x, axis)} rows. Pick another output, with "
            "measure(id, fn, of=...), or use the form measure(id, init=..., update=..., compute=...)"
        )


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
    return {part: join([chunk[part] for chunk in chunks], axis) for part in ("y_hat", "y")}


def join(parts: Sequence[Any], axis: int = 0) -> Any:
    """Trees of tensors of one form as one, with all rows along ``axis``."""
    try:
        return map_outputs(lambda *leaves: _join(leaves, axis), *parts)
    except (RuntimeError, TypeError, ValueError) as error:
        add_note(
            error,
            "the predictions or targets of several batches can't be joined along their first axis, as a whole-epoch "
            "measure needs: use measure(id, init=..., update=..., compute=...)",
        )
        raise


def _join(leaves: Sequence[Any], axis: int) -> Any:
    if not isinstance(leaves[0], Tensor) and all(
        type(leaf) is type(leaves[0]) and leaf == leaves[0] for leaf in leaves
    ):
        return leaves[0]
    return torch.cat(leaves, axis)  # type: ignore[arg-type]


def scores(measures: Sequence[Measure], state: dict[str, Any]) -> dict[str, float]:
    """The scores of an epoch by measure id."""
    whole = concatenate(state["predictions"]) if state["predictions"] else None
    keepers = _keepers(measures)
    kept: dict[Of, Any] = {}
    if whole is not None:
        of_keepers = [whole["y_hat"]] if len(keepers) == 1 else whole["y_hat"]
        kept = {m.of: restored(y_hats) for m, y_hats in zip(keepers, of_keepers, strict=True)}
    result = {}
    for m in measures:
        with noting(lambda m=m: f"in {m}"):  # type: ignore[misc]
            if m.compute is not None:
                result[m.id] = _as_float(checked(m, "compute", m.compute, (state["states"][m.id],), slice(0, 0)))
            elif m.fn is not None and whole is not None:
                y_hats = kept[m.of] if m.of in kept else m.picked(kept[None])
                result[m.id] = _as_float(checked(m, "fn", m.fn, (y_hats, whole["y"]), slice(0, 2)))
    return result


def _as_float(score: Any) -> float:
    if isinstance(score, Tensor) and score.numel() != 1:
        raise ValueError(f"a score is one number, not a tensor of shape {list(score.shape)}: take its mean")
    try:
        return float(score)
    except (TypeError, ValueError):
        raise TypeError(f"a score is a number or a tensor of one element, not {score!r}") from None
