"""Optimizers: any `torch.optim` class as a pair of pure functions, `init` and `update`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import attrs
import torch
from torch import Tensor

from .borrowed import Borrowed, Closure, State, Tensors, copied, fill, is_number, numbers_of
from .errors import StateDictError
from .kernels import fast_update
from .patterns import Patterns, check_patterns, select
from .record import did_you_mean

Updater: TypeAlias = Callable[[Tensors, State, Tensors, Closure | None], tuple[Tensors, State]]


def optimizer(
    cls: type[torch.optim.Optimizer],
    /,
    *,
    params: Patterns | None = None,
    groups: Sequence[dict[str, Any]] = (),
    **hyperparameters: Any,
) -> Optimizer:
    """A pure optimizer with the arithmetic of a `torch.optim` class, bit for bit.

    Args:
        cls: any subclass of `torch.optim.Optimizer`.
        params: which parameters it updates, as a pattern of names, a list of patterns or a function of the name;
            by default all.
        groups: parameter groups, ``{"params": patterns, **own hyperparameters}``; a parameter belongs to the first
            group that matches, and those that no group matches form the last group.
        hyperparameters: arguments of ``cls``, such as ``lr`` or ``fused=True``.

    Raises:
        TypeError: ``cls`` is no optimizer class, or it does not know a hyperparameter.
        ValueError: a value is refused by ``cls``, is NaN, or can't work in a pure update.

    >>> adamw = optimizer(torch.optim.AdamW, lr=0.1, groups=[{"params": "*.bias", "weight_decay": 0.0}])
    >>> params = {"0.weight": torch.ones(2, 2), "0.bias": torch.ones(2)}
    >>> adamw.group_names(params)
    [['0.bias'], ['0.weight']]
    >>> new, state = adamw.update(params, adamw.init(params), params)
    >>> new["0.bias"], params["0.bias"]
    (tensor([0.9000, 0.9000]), tensor([1., 1.]))
    """
    if isinstance(cls, torch.optim.Optimizer):
        name = type(cls).__name__
        raise TypeError(
            f"optimizer() takes the class, not an instance: optimizer(torch.optim.{name}, lr=...); "
            "the parameters come from the network"
        )
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise TypeError(f"optimizer() takes a subclass of torch.optim.Optimizer, not {cls!r}")
    if params is not None:
        check_patterns(params, "params")
    groups = tuple(map(_checked_group, groups))
    _check_known(cls, hyperparameters, _arguments(cls))
    defaults = _checked_defaults(cls, hyperparameters)
    for group in groups:
        own = _own(group)
        _check_known(cls, own, defaults)
        _checked_defaults(cls, hyperparameters | own)
    if groups:
        placeholders = [{**_own(group), "params": [torch.zeros(1, 1)]} for group in groups]
        cls(placeholders + [{"params": [torch.zeros(1, 1)]}], **hyperparameters)
    return Optimizer(cls, copied(hyperparameters), params, groups)


@attrs.frozen(eq=False)
class Optimizer:
    """A `torch.optim` class with its hyperparameters and groups; made by `optimizer`.

    Its state is ``{"groups": [{hyperparameter: value}, ...], "slots": {parameter: {...}}}``: the numbers among the
    hyperparameters (tuples as lists), free to be changed at any time, and what torch keeps for every parameter, made
    when torch makes it. Flags such as ``fused`` and ``nesterov`` do not change and are not in the state.
    """

    cls: type[torch.optim.Optimizer]
    hyperparameters: dict[str, Any]
    params: Patterns | None
    groups: tuple[dict[str, Any], ...]

    @property
    def needs_closure(self) -> bool:
        """Whether a step evaluates the network itself, as `torch.optim.LBFGS` does."""
        closure = inspect.signature(self.cls.step).parameters.get("closure")
        return closure is not None and closure.default is inspect.Parameter.empty

    def covers(self, names: Iterable[str]) -> tuple[str, ...]:
        """The parameters that it updates, in the order of ``names``.

        Raises:
            ValueError: a pattern of ``params`` matches no name.
        """
        return tuple(names if self.params is None else select(self.params, names, "pattern of params"))

    def group_names(self, names: Iterable[str]) -> list[list[str]]:
        """The parameters of every group, in the order of torch's ``param_groups``.

        Raises:
            ValueError: a pattern matches no name, or all that a group matches belongs to earlier groups.
        """
        left = self.covers(names)
        members = []
        for i, group in enumerate(self.groups):
            matched = select(group["params"], self.covers(names), f"pattern of group {i}")
            own = [name for name in left if name in matched]
            if not own:
                raise ValueError(f"group {i} is empty: all that {group['params']!r} matches is in earlier groups")
            left = tuple(name for name in left if name not in own)
            members.append(own)
        return [*members, list(left)] if left or not members else members

    def init(self, params: Tensors) -> State:
        """The state before the first update of ``params``."""
        params = detached(params)
        instance = self._instance(params)
        slots = {name: dict(instance.state[p]) for name, p in self._members(params) if p in instance.state}
        return {"groups": [numbers_of(group) for group in instance.param_groups], "slots": copied(slots)}

    def update(
        self, grads: Tensors, state: State, params: Tensors, closure: Closure | None = None
    ) -> tuple[Tensors, State]:
        """One step: the new parameters and the new state; nothing that is given is written to.

        Args:
            grads: gradients by name; a parameter without one is returned as it is, its slot too.
            state: from `init` or an earlier update.
            params: all parameters by name.
            closure: ``closure(params) -> (loss, grads)`` at other parameters, for classes that need it.

        Use `updater` for many steps: it plans once.
        """
        return self.updater(params)(grads, state, params, closure)

    def updater(self, params: Tensors) -> Updater:
        """`update`, planned for parameters with the names, shapes, dtypes and devices of ``params``.

        It holds a private instance of the class, and so must not be called from two threads at once.
        """
        instance, names = self._instance(detached(params)), self.group_names(params)
        fast = fast_update(self.cls, names, list(map(_own, instance.param_groups)), params)
        generic = Borrowed(instance, names, self.needs_closure)
        if fast is None:
            return generic

        def update(
            grads: Tensors, state: State, params: Tensors, closure: Closure | None = None
        ) -> tuple[Tensors, State]:
            return fast(grads, state, params) or generic(grads, state, params, closure)

        return update

    def to_torch(self, params: Tensors, state: State) -> torch.optim.Optimizer:
        """An ordinary optimizer of ``params`` (`torch.nn.Parameter`), which goes on from its own copy of ``state``."""
        instance = self._instance(params)
        fill(instance, state, dict(self._members(params)))
        return instance

    def from_torch(self, instance: torch.optim.Optimizer, params: Tensors) -> State:
        """The state of an ordinary optimizer in mid-flight, copied.

        What learning rate schedulers keep beside the hyperparameters (``initial_lr``) is left out.

        Args:
            instance: an optimizer of this very class, whose groups are those of `group_names`, in any order.
            params: the tensors that ``instance`` updates, by name.

        Raises:
            ValueError: the class, the groups or the flags differ; the message lists all differences.
        """
        if type(instance) is not self.cls:
            raise StateDictError(f"a {type(instance).__name__} can't be continued as a {self.cls.__name__}")
        names = {id(param): name for name, param in params.items()}
        theirs = {
            tuple(names.get(id(p), f"unnamed {tuple(p.shape)}") for p in group["params"]): group
            for group in instance.param_groups
        }
        groups, differences = [], []
        for members, ours in zip(self.group_names(params), self._instance(params).param_groups, strict=True):
            group = theirs.pop(tuple(members), None)
            if group is None:
                differences.append(f"no group of the torch optimizer is {members}, in this order")
                continue
            differences += [
                f"{key} of the group {members} is {group.get(key, 'missing')!r}, and here {value!r}"
                for key, value in _own(ours).items()
                if key not in group or is_number(group[key]) != is_number(value) or not (is_number(value) or group[key] == value)
            ]
            groups.append(numbers_of({key: value for key, value in group.items() if key in ours}))
        differences += [f"only the torch optimizer has a group {list(members)}" for members in theirs]
        if differences:
            raise StateDictError("the torch optimizer does not fit this optimizer", differences)
        slots = {n: copied(dict(instance.state[p])) for n, p in self._members(params) if p in instance.state}
        return {"groups": groups, "slots": slots}

    def _members(self, params: Tensors) -> list[tuple[str, Tensor]]:
        return [(name, params[name]) for name in self.covers(params)]

    def _instance(self, params: Tensors) -> torch.optim.Optimizer:
        """A `torch.optim` optimizer of ``params``."""
        own = [*map(_own, self.groups), {}]
        groups: list[dict[str, Any]] = [
            {**hyperparameters, "params": [params[name] for name in names]}
            for hyperparameters, names in zip(own, self.group_names(params), strict=False)
        ]
        return self.cls(groups, **copied(self.hyperparameters))


def _checked_group(group: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(group, dict) or "params" not in group:
        raise ValueError(f'a group is a dict such as {{"params": "*.bias", "weight_decay": 0.0}}, not {group!r}')
    check_patterns(group["params"], 'the "params" of a group')
    return copied(group)


def _own(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _arguments(cls: type[torch.optim.Optimizer]) -> list[str]:
    return [name for name in inspect.signature(cls).parameters if name != "params"]


def _check_known(cls: type, given: Iterable[str], known: Iterable[str]) -> None:
    for name in given:
        if name not in known:
            raise TypeError(f"{cls.__name__} has no hyperparameter {name!r}{did_you_mean(name, known)}")


def _checked_defaults(cls: type[torch.optim.Optimizer], hyperparameters: dict[str, Any]) -> dict[str, Any]:
    """All hyperparameters of a group, with the values of ``hyperparameters`` where given."""
    defaults = cls([torch.zeros(1, 1)], **hyperparameters).defaults
    for name, value in defaults.items():
        if is_number(value) and _has_nan(value):
            raise ValueError(f"{name} of {cls.__name__} is NaN")
    if defaults.get("differentiable"):
        raise ValueError("differentiable=True")
    return defaults


def _has_nan(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_has_nan, value))
    return bool(value.isnan().any()) if isinstance(value, Tensor) else math.isnan(value)


def detached(params: Tensors) -> Tensors:
    return {name: param.detach() for name, param in params.items()}
