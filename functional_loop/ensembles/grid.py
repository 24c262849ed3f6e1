"""Grids of hyperparameters and seeds as one ensemble, and the choice among its members."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..core.context import Context
from ..core.record import did_you_mean, tree_map
from ..engine.evaluate import predict
from ..engine.init import init
from ..engine.loop import Loop
from .ensemble import stack

HOW = ("mean", "vote", "spread")


def grid(
    loop: Loop, *, seeds: int | Iterable[int] = 1, mode: str = "auto", batch_hooks: str = "vectorised", **values: Any
) -> tuple[Context, list[dict[str, Any]]]:
    """Every combination of hyperparameters and seeds as a member of one ensemble.

    Args:
        loop: what to train.
        seeds: a number of seeds, from 0, or the seeds themselves.
        mode, batch_hooks: see `stack`.
        values: for a hyperparameter of the optimizer, such as ``lr``, the values to try, in all parameter groups.

    Returns:
        The stacked context, and for every member a dict of its ``member`` number, its ``seed`` and its hyperparameters.

    Raises:
        KeyError: the optimizer has no such hyperparameter.
        TypeError, ValueError: values that are not a list, or none.

    >>> from functional_loop.examples.digits import loop
    >>> import functional_loop as fl
    >>> ctx, table = fl.grid(loop(), lr=[1e-3, 1e-2], seeds=2)
    >>> table[2]
    {'member': 2, 'seed': 0, 'lr': 0.01}
    >>> ctx.optimizer_state["groups"][0]["lr"]
    tensor([0.0010, 0.0010, 0.0100, 0.0100], dtype=torch.float64)
    """
    for name, tried in values.items():
        if not isinstance(tried, (list, tuple)):
            raise TypeError(f"grid: {name} is a list of the values to try, not {tried!r}")
    chosen = list(range(seeds) if isinstance(seeds, int) else seeds)
    starts = {seed: init(loop, seed) for seed in chosen}
    members: list[Context] = []
    table: list[dict[str, Any]] = []
    for *combination, seed in itertools.product(*values.values(), chosen):
        own = dict(zip(values, combination, strict=True))
        plain = {name: _plain(value, values[name]) for name, value in own.items()}
        members.append(starts[seed].with_hyperparameters(**plain))
        table.append({"member": len(table), "seed": seed, **own})
    if not members:
        raise ValueError("grid: there is nothing to train: every list of values, and seeds, needs an entry")
    return stack(members, mode, batch_hooks), table


def _plain(value: Any, tried: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return float(value) if any(isinstance(other, float) for other in tried) else value


def best(ctx: Context, measure: str) -> int:
    """The member with the best last score, by its number; of equal ones the first.

    Args:
        ctx: a stacked context.
        measure: id of a validation measure, or of a training measure if there is no validation measure of that id.

    Raises:
        KeyError: no such measure.
        ValueError: neither high nor low is better, or no member has a score.

    >>> from functional_loop.examples.digits import loop
    >>> import functional_loop as fl
    >>> ctx, table = fl.grid(loop(epochs=1), lr=[1e-5, 1e-2])
    >>> fl.best(fl.train(ctx), "accuracy")
    1
    """
    if ctx.ensemble is None:
        raise ValueError("best takes a stacked context, made by stack(contexts) or grid(loop, ...)")
    sources = [(ctx.loop.measures_valid, ctx.last_scores_valid), (ctx.loop.measures_train, ctx.last_scores_train)]
    found = [(m, dict(scores)) for measures, scores in sources for m in measures if m.id == measure]
    if not found:
        known = [m.id for measures, _ in sources for m in measures]
        raise KeyError(f"the loop has no measure {measure!r}{did_you_mean(measure, known)}")
    chosen, scores = found[0]
    if chosen.minimize is None:
        raise ValueError(f"of {chosen} neither high nor low is better: give it minimize=True or minimize=False")
    value: Any = scores.get(measure, math.nan)
    each = torch.as_tensor(value, dtype=torch.float64).expand(ctx.ensemble.members)
    if bool(each.isnan().all()):
        raise ValueError(f"no member has a score {measure!r} yet: it is made at the end of an epoch that evaluates")
    return int((-each if chosen.minimize else each).nan_to_num(nan=-math.inf).argmax())


def predict_ensemble(ctx: Context, x: Any, how: str = "mean", *, batch_size: int | None = None) -> Any:
    """What all members together predict, in evaluation mode.

    Args:
        ctx: a stacked context.
        x: as for `predict`, which gives the outputs of every member.
        how: ``"mean"`` of the outputs; ``"vote"``, the class (last axis) that most members rank highest, of equally
            many the lowest; ``"spread"``, the standard deviation of the outputs over members.
        batch_size: rows at a time.

    Returns:
        A tensor, tuple or dict as the network returns, without the member axis.

    Raises:
        ValueError: the context is not stacked, or there is no such ``how``.

    >>> from functional_loop.examples.digits import loop
    >>> import torch, functional_loop as fl
    >>> ctx, _ = fl.grid(loop(), seeds=3)
    >>> x = torch.zeros(5, 1, 8, 8)
    >>> fl.predict_ensemble(ctx, x).shape, fl.predict_ensemble(ctx, x, "vote").shape, fl.predict(ctx, x).shape
    (torch.Size([5, 10]), torch.Size([5]), torch.Size([3, 5, 10]))
    """
    if ctx.ensemble is None:
        raise ValueError("predict_ensemble takes a stacked context; predict(ctx, x) is for a single run")
    if how not in HOW:
        raise ValueError(f"predict_ensemble: how is one of {', '.join(map(repr, HOW))}, not {how!r}")
    return tree_map(_JOINED[how], predict(ctx, x, batch_size=batch_size))


def _vote(outputs: Tensor) -> Tensor:
    # torch.mode takes the smallest of those that are equally frequent.
    return outputs.argmax(-1).mode(0).values


_JOINED: dict[str, Any] = {
    "mean": lambda outputs: outputs.mean(0),
    "vote": _vote,
    "spread": lambda outputs: outputs.std(0, correction=0),
}
