"""A real optimizer that shows the state of a context to object callbacks, and what was done to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...core.context import Context
from ...core.copies import clone_tree, tree_was_written
from ...engine.loop import Loop
from ...optim.torch_update import is_number, values_of, without_params


class MirroredOptimizer:
    """The ``optimizer`` of one object callback, over the parameters of its network.

    Its ``state`` is filled on demand, as most callbacks want the hyperparameters alone; from then on at
    every stage, because the callback may have kept it.
    """

    def __init__(self, loop: Loop, params: dict[str, Tensor], ctx: Context) -> None:
        self._params = params
        self.optimizer = loop.optimizer.to_torch(dict(params), ctx.optimizer_state)
        self._flags = loop.optimizer.hyperparameters_of(dict(params))
        self._added: list[set[str]] = [set() for _ in self._flags]
        """Keys that are in the groups by way of a context alone."""
        # Schedulers warn if they step before the optimizer does; this one is stepped by the loop.
        self.optimizer._opt_called = True  # type: ignore[attr-defined]
        self._unshown: dict[str, Any] | None = None
        self._is_known = False
        _make_lazy(self.optimizer, self._fill)
        self.show(ctx)

    def show(self, ctx: Context) -> None:
        """Fill it with copies of the state in ``ctx``."""
        groups = self.optimizer.param_groups
        for i, (group, flags, values) in enumerate(
            zip(groups, self._flags, ctx.optimizer_state["groups"], strict=True)
        ):
            for key in self._added[i] - values.keys():
                group.pop(key, None)
            self._added[i] = values.keys() - flags.keys()
            for key, value in {**flags, **values}.items():
                group[key] = tuple(value) if isinstance(flags.get(key), tuple) else clone_tree(value)
        self._groups = [without_params(group) for group in groups]
        self._unshown = ctx.optimizer_state["slots"]
        if self._is_known:
            self._fill(vars(self.optimizer)["state"])

    def release(self) -> None:
        """Drop the state if it was never read."""
        self._unshown = None

    def changes(self, ctx: Context) -> dict[str, Any]:
        """The fields of ``ctx`` that are other ones now."""
        state = ctx.optimizer_state
        groups = self._checked_groups(state["groups"])
        slots = state["slots"]
        if self._is_known:
            found = vars(self.optimizer)["state"]
            shown = {name: found[p] for name, p in self._params.items() if p in found}
            if tree_was_written(shown, slots):
                slots = {name: clone_tree(dict(slot)) for name, slot in shown.items()}
        if slots is state["slots"] and not tree_was_written(groups, state["groups"]):
            return {}
        return {"optimizer_state": {"groups": groups, "slots": slots}}

    def _fill(self, state: dict[Any, Any]) -> None:
        slots, self._unshown = self._unshown, None
        if slots is None:
            return
        self._is_known = True
        known = dict(state)
        state.clear()
        for name, slot in slots.items():
            # The same dict as before, for a callback that has kept it.
            own = known.get(self._params[name], {})
            own.clear()
            own.update(clone_tree(slot))
            state[self._params[name]] = own

    def _checked_groups(self, before: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The hyperparameters of the groups.

        Raises:
            ValueError: there are other groups than before, or a flag was changed.
            TypeError: a hyperparameter is no number.
        """
        if len(self.optimizer.param_groups) != len(before):
            raise ValueError("the parameter groups of ctx.optimizer are those of the loop's optimizer: give it groups=")
        groups = []
        for i, (group, shown, values) in enumerate(zip(self.optimizer.param_groups, self._groups, before, strict=True)):
            where = f"ctx.optimizer.param_groups[{i}]"
            for key, value in shown.items():
                if key in values and is_number(values[key]) and not is_number(group.get(key)):
                    raise TypeError(f"{where}[{key!r}] must be a number, not {group.get(key)!r}")
                if key not in values and not is_number(value) and tree_was_written(group.get(key), value):
                    raise ValueError(f"{where}[{key!r}] belongs to the loop and can't be changed")
            found = values_of({key: group.get(key) for key in values}, {}, type(self.optimizer).__name__)
            groups.append({key: _like(found[key], values[key]) for key in values})
        return groups


def _like(value: Any, before: Any) -> Any:
    """A hyperparameter as a context has it, whose sequences are lists."""
    return list(value) if isinstance(before, list) and isinstance(value, tuple) else value


def _make_lazy(optimizer: torch.optim.Optimizer, fill: Callable[[dict[Any, Any]], None]) -> None:
    """Have ``fill(optimizer.state)`` be called before ``optimizer.state`` is first read; copies are ordinary ones."""
    cls = type(optimizer)

    def state(self: torch.optim.Optimizer) -> dict[Any, Any]:
        found: dict[Any, Any] = vars(self)["state"]
        fill(found)
        return found

    def replace(self: torch.optim.Optimizer, values: dict[str, Any]) -> None:
        fill(vars(self)["state"])
        cls.__setstate__(self, values)

    def reduce(self: torch.optim.Optimizer, protocol: Any) -> Any:
        return _new, (cls,), self.__getstate__()

    members = {
        "__module__": cls.__module__,
        "__setstate__": replace,
        "__reduce_ex__": reduce,
        "state": property(state, lambda self, value: replace(self, {"state": value})),
    }
    optimizer.__class__ = type(cls.__name__, (cls,), members)


def _new(cls: type[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    return cls.__new__(cls)
