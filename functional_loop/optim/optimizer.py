"""Optimizers: any `torch.optim` class as a pair of pure functions, `init` and `update`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from ..core.errors import StateDictError, add_note
from ..core.patterns import Patterns, check_patterns, select
from ..core.record import did_you_mean
from .fast_update import fast_update
from .torch_update import (
    Closure,
    State,
    Tensors,
    TorchUpdate,
    Updater,
    copied,
    fill,
    is_number,
    numbers_of,
    values_of,
    without_params,
)


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
        groups: parameter groups, ``{"params": patterns, **own hyperparameters}``; a parameter belongs to the
            first group that matches, and those that no group matches form the last group.
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
    _check_class(cls)
    if params is not None:
        check_patterns(params, "params")
    _check_known(cls, hyperparameters, _arguments(cls, hyperparameters))
    defaults = _defaults(cls, hyperparameters)
    for group in groups:
        _check_group(group)
        own = without_params(group)
        _check_known(cls, own, defaults)
        # torch looks at the values of the defaults alone.
        _defaults(cls, hyperparameters | own)
    if groups:
        cls([{**group, "params": [torch.zeros(1, 1)]} for group in groups], **hyperparameters)
    return Optimizer(cls, copied(hyperparameters), params, tuple(copied(group) for group in groups))


@attrs.frozen(eq=False)
class Optimizer:
    """A `torch.optim` class with its hyperparameters and groups; made by `optimizer`.

    Its state is ``{"groups": [{hyperparameter: value}, ...], "slots": {parameter: {...}}}``: the numbers among the
    hyperparameters (tuples as lists), free to be changed at any time, and what torch keeps for every parameter,
    made when torch makes it. Flags such as ``fused`` and ``nesterov`` do not change and are not in the state.

    To these a step may add what its class keeps in the groups. A class with methods ``train()`` and ``eval()``, which
    change the values of the parameters (schedule-free optimizers), is in its training mode: the parameters of a context
    are those to train on, and `evaluation_params` gives the others.

    ``needs_closure`` says whether a step evaluates the network itself, as that of `torch.optim.LBFGS` does.
    """

    cls: type[torch.optim.Optimizer]
    hyperparameters: dict[str, Any]
    params: Patterns | None = None
    groups: tuple[dict[str, Any], ...] = ()
    needs_closure: bool = attrs.field(init=False)

    @needs_closure.default
    def _closure_is_required(self) -> bool:
        closure = inspect.signature(self.cls.step).parameters.get("closure")
        return closure is not None and closure.default is inspect.Parameter.empty

    @property
    def needs_sparse(self) -> bool:
        """Whether the class takes sparse gradients alone."""
        return issubclass(self.cls, torch.optim.SparseAdam)

    @property
    def has_modes(self) -> bool:
        """Whether the class has other values of the parameters for evaluation than for training."""
        return callable(getattr(self.cls, "train", None)) and callable(getattr(self.cls, "eval", None))

    def covers(self, names: Iterable[str]) -> tuple[str, ...]:
        """The parameters that it updates, in the order of ``names``.

        Raises:
            ValueError: a pattern of ``params`` matches no name.

        >>> optimizer(torch.optim.SGD, params="head.*").covers(["body.weight", "head.weight"])
        ('head.weight',)
        """
        return tuple(names if self.params is None else select(self.params, names, "pattern of params"))

    def group_names(self, names: Iterable[str]) -> list[list[str]]:
        """The parameters of every group, in the order of torch's ``param_groups``.

        Raises:
            ValueError: a pattern matches no name, or all that a group matches belongs to earlier groups.
        """
        covered = self.covers(names)
        left, members = list(covered), []
        for i, group in enumerate(self.groups):
            matched = select(group["params"], covered, f"pattern of group {i}")
            own = [name for name in left if name in matched]
            if not own:
                raise ValueError(f"group {i} is empty: all that {group['params']!r} matches is in earlier groups")
            left = [name for name in left if name not in matched]
            members.append(own)
        return [*members, left] if left or not members else members

    def hyperparameters_of(self, params: Tensors) -> list[dict[str, Any]]:
        """All hyperparameters of every group, those left to torch and flags included.

        >>> sgd = optimizer(torch.optim.SGD, lr=0.1)
        >>> sgd.hyperparameters_of({"weight": torch.ones(2)})[0]["nesterov"]
        False
        """
        return [without_params(group) for group in self._instance(self._own(params)).param_groups]

    def init(self, params: Tensors) -> State:
        """The state before the first update.

        Args:
            params: all parameters by name.

        Raises:
            ValueError: ``params`` and the patterns, or the class and its flags, do not go together.

        >>> optimizer(torch.optim.SGD, lr=0.1).init({"weight": torch.ones(2)})
        {'groups': [{'lr': 0.1, 'momentum': 0, 'dampening': 0, 'weight_decay': 0}], 'slots': {}}
        """
        params = self._own(params)
        instance = self._instance(params)
        return {"groups": list(map(numbers_of, instance.param_groups)), "slots": self._slots(instance, params)}

    def update(
        self, grads: Tensors, state: State, params: Tensors, closure: Closure | None = None
    ) -> tuple[Tensors, State]:
        """One step: the new parameters and the new state; nothing that is given is written to.

        For many steps use `updater`, which plans once.

        Args:
            grads: gradients by name; a parameter without one is returned as it is, and its slot too.
            state: from `init` or an earlier update.
            params: all parameters by name.
            closure: ``closure(params) -> (loss, grads)`` at other parameters, for classes that need it.

        >>> sgd = optimizer(torch.optim.SGD, lr=0.5)
        >>> params = {"weight": torch.ones(2)}
        >>> sgd.update({"weight": torch.ones(2)}, sgd.init(params), params)[0]
        {'weight': tensor([0.5000, 0.5000])}
        """
        return self.updater(params)(grads, state, params, closure)

    def updater(self, params: Tensors) -> Updater:
        """`update`, planned for parameters with the names, shapes, dtypes and devices of ``params``.

        It holds a private instance of the class, and so must not be called from two threads at once.
        """
        names, instance = self.group_names(params), self._instance(self._own(params))
        generic = TorchUpdate(instance, names, self.needs_closure)
        groups = list(map(without_params, instance.param_groups))
        return fast_update(self.cls, names, groups, params, generic) or generic

    def evaluation_params(self, params: Tensors, state: State) -> Tensors:
        """The values of the parameters to evaluate with: those given, but for classes with a mode for evaluation."""
        if not self.has_modes:
            return params
        copies = {name: param.detach().clone() for name, param in params.items()}
        self.to_torch(copies, state).eval()  # type: ignore[attr-defined]
        return copies

    def to_torch(self, params: Tensors, state: State) -> torch.optim.Optimizer:
        """An ordinary optimizer, which goes on from its own copy of ``state``.

        Args:
            params: the tensors (`torch.nn.Parameter`) that it is to update, by name.

        >>> sgd = optimizer(torch.optim.SGD, lr=0.5)
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> sgd.to_torch({"weight": weight}, sgd.init({"weight": weight})).param_groups[0]["lr"]
        0.5
        """
        instance = self._instance(params)
        fill(instance, state, {name: params[name] for name in self.covers(params)})
        return instance

    def from_torch(self, instance: torch.optim.Optimizer, params: Tensors) -> State:
        """The state of an ordinary optimizer in mid-flight, copied.

        What learning rate schedulers keep beside the hyperparameters (``initial_lr``) is left out; what steps have
        added to the groups is not.

        Args:
            instance: an optimizer of this very class, whose groups are those of `group_names`, in any order.
            params: the tensors that ``instance`` updates, by name.

        Raises:
            StateDictError: the class, the groups or the flags differ, or it is in its mode for evaluation; all
                differences are listed.
        """
        if type(instance) is not self.cls:
            raise StateDictError(f"the state of {type(instance).__name__} can't be continued by {self.cls.__name__}")
        names = {id(param): name for name, param in params.items()}
        theirs = {
            tuple(names.get(id(p), f"unknown of shape {tuple(p.shape)}") for p in group["params"]): group
            for group in instance.param_groups
        }
        groups, differences = [], []
        for members, ours in zip(self.group_names(params), self._instance(params).param_groups, strict=True):
            group = theirs.pop(tuple(members), None)
            if group is None:
                differences.append(f"no group of the torch optimizer has the parameters {members}, in this order")
                continue
            differences += [f"group {members}: {line}" for line in _differing_flags(group, ours, self.cls)]
            if self.has_modes and group.get("train_mode") is False:
                differences.append(f"group {members} is in the mode for evaluation: call its train() first")
            added = {key: value for key, value in group.items() if key not in _OF_SCHEDULERS or key in ours}
            groups.append(values_of(added, without_params(ours), self.cls.__name__))
        differences += [f"only the torch optimizer has the group {list(members)}" for members in theirs]
        if differences:
            raise StateDictError("the torch optimizer and this optimizer differ", differences)
        return {"groups": groups, "slots": self._slots(instance, params)}

    def _slots(self, instance: torch.optim.Optimizer, params: Tensors) -> State:
        return {n: copied(instance.state[params[n]]) for n in self.covers(params) if instance.state.get(params[n])}

    def _own(self, params: Tensors) -> Tensors:
        """Tensors for an instance; one with modes may write to them."""
        return {name: param.detach().clone() if self.has_modes else param.detach() for name, param in params.items()}

    def _instance(self, params: Tensors) -> torch.optim.Optimizer:
        """A `torch.optim` optimizer of ``params``."""
        names = self.group_names(params)
        own = [*self.groups, {}][: len(names)]
        groups = [
            {**group, "params": [params[name] for name in members]} for group, members in zip(own, names, strict=True)
        ]
        try:
            instance = self.cls(groups, **copied(self.hyperparameters))
        except ValueError as error:
            add_note(error, f"{self.cls.__name__} was given {names}; optimizer(..., params=patterns) chooses")
            raise
        if self.has_modes:
            instance.train()  # type: ignore[attr-defined]
            # To ask for the state of a parameter has made an empty one.
            for param in [param for param, slot in instance.state.items() if not slot]:
                del instance.state[param]
        on_cpu = [name for name in self.covers(params) if params[name].is_cpu]
        if on_cpu and any(group.get("capturable") for group in instance.param_groups):
            raise ValueError(f"capturable=True is for accelerators, but {on_cpu[0]!r} is on the CPU; leave it out")
        return instance


_OF_SCHEDULERS = ("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr")


def _differing_flags(theirs: dict[str, Any], ours: dict[str, Any], cls: type[torch.optim.Optimizer]) -> Iterable[str]:
    """Hyperparameters that are missing, or that are no numbers and not the same; numbers may have changed."""
    arguments = _arguments(cls, ours)
    for key, value in without_params(ours).items():
        if key not in arguments:
            continue
        if key not in theirs:
            yield f"{key!r} is missing"
        elif not (is_number(value) and is_number(theirs[key])) and theirs[key] != value:
            yield f"{key} is {theirs[key]!r}, and here {value!r}"


def _arguments(cls: type[torch.optim.Optimizer], given: Iterable[str]) -> list[str]:
    """The names of the hyperparameters of ``cls``; all that are given if it takes any."""
    arguments = inspect.signature(cls).parameters.values()
    named = [argument.name for argument in arguments if argument.name != "params"]
    return [*named, *given] if any(a.kind is a.VAR_KEYWORD for a in arguments) else named


def _check_class(cls: object) -> None:
    if isinstance(cls, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer() takes the class, not an instance: optimizer({type(cls).__name__}, lr=...); "
            "the parameters come from the network"
        )
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise TypeError(f"optimizer() takes a subclass of torch.optim.Optimizer, not {cls!r}")


def _check_group(group: object) -> None:
    if not isinstance(group, dict) or "params" not in group:
        raise ValueError(f'a group is a dict such as {{"params": "*.bias", "lr": 0.01}}, not {group!r}')
    check_patterns(group["params"], 'the "params" of a group')


def _check_known(cls: type[torch.optim.Optimizer], given: Iterable[str], known: Iterable[str]) -> None:
    for name in given:
        if name not in known:
            raise TypeError(f"{cls.__name__} has no hyperparameter {name!r}{did_you_mean(name, known)}")


def _defaults(cls: type[torch.optim.Optimizer], hyperparameters: dict[str, Any]) -> dict[str, Any]:
    """All hyperparameters of ``cls``, once ``cls`` and we have accepted those given."""
    for name, value in hyperparameters.items():
        if _has_nan(value):
            raise ValueError(f"{cls.__name__}: {name} is NaN")
    defaults = cls([torch.zeros(1, 1)], **hyperparameters).defaults
    if defaults.get("differentiable"):
        raise ValueError("differentiable=True can't work: the update is made on copies, without a graph; leave it out")
    return defaults


def _has_nan(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_has_nan, value))
    if isinstance(value, Tensor):
        return bool(value.isnan().any())
    return isinstance(value, float) and math.isnan(value)
