"""Runs a function and reports in-place writes, torch settings left changed, and draws from global generators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..core.draws import have_moved, put_back, states
from ..core.errors import PurityError
from ..core.rng import put_torch_back, torch_has_moved, torch_states
from .before import Given

_Tensor: Any = torch.Tensor
_WAYS_OUT = {
    torch.Tensor.numpy: "through .numpy()",
    torch.Tensor.__array__: "through a numpy array",
    torch.Tensor.__dlpack__: "through DLPack",
    torch.Tensor.data_ptr: "through .data_ptr()",
    torch.Tensor.untyped_storage: "through .untyped_storage()",
    torch.Tensor.requires_grad_: "by requires_grad_()",
    torch.Tensor.backward: "by backward()",
    _Tensor.data.__get__: "through .data",
    _Tensor.data.__set__: "by assigning .data",
    _Tensor.requires_grad.__set__: "by assigning .requires_grad",
    _Tensor.grad.__set__: "by assigning .grad",
}
"""Functions of a tensor by which its memory or its form can be changed without an operator of torch that says so."""


class Watch:
    """Runs functions, and says of each what a pure one would not do.

    A write by an operator of torch is an error at that operator, before anything is written; other writes are seen
    afterwards, by their bits, and put back.

    Args:
        who: the function, for messages.
        given: what it may not write to.
        advice: what to do instead of writing.
    """

    def __init__(self, who: str, given: Given, advice: str) -> None:
        self._who = who
        self._given = given
        self._advice = advice
        self._ways: dict[str, str] = {}
        self._readers: dict[str, str] = {}
        self.findings: list[str] = []
        self.draws = False
        """Whether a function that it ran has drawn from a global generator."""

    def run(self, function: Callable[[Any], Any], argument: Any) -> Any:
        """What ``function`` makes of ``argument``; look at `findings` afterwards.

        Raises:
            PurityError: an operator is about to write to something given.
        """
        generators, settings = GlobalGenerators(), _settings()
        try:
            with _Functions(self), _Operators(self):
                return function(argument)
        finally:
            self._look_at_writes()
            self.draws |= generators.have_moved()
            self._look_at_settings(settings)

    def function(self, function: Any, arguments: tuple[Any, ...]) -> None:
        """A function of torch is about to be called."""
        for known, way in _WAYS_OUT.items():
            if function == known and arguments and isinstance(arguments[0], Tensor):
                if (path := self._given.path_of(arguments[0])) is not None:
                    self._ways[path] = way
                elif function == torch.Tensor.backward:
                    self._ways["backward"] = way

    def operator(self, operator: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """An operator of torch is about to run."""
        for argument, tensor in _tensors(operator, arguments, named):
            if (path := self._given.path_of(tensor)) is None:
                continue
            # Fused kernels declare that they write to gradients, which they only do to scale them.
            writes = argument.alias_info is not None and argument.alias_info.is_write and argument.name != "grads"
            if not writes:
                self._readers[path] = str(operator)
                continue
            way = self._ways.get(path, "")
            self._wrote(path, f"by {operator}" + (f" {way}" if way == "through .data" else ""))
            raise PurityError(self._who, self.findings)

    def _wrote(self, path: str, how: str) -> None:
        self.findings.append(f"wrote to {path} {how}; {self._advice}")

    def _look_at_writes(self) -> None:
        changes = self._given.changes()
        for path, what in changes:
            if what == "item":
                self._wrote(path, "by assigning an item of its container")
                continue
            way = self._ways.get(path) or (self._ways.get("backward") if what == "form" else None)
            reader = self._readers.get(path)
            last = f"; the last operator to see it was {reader}" if reader else ""
            self._wrote(path, way or f"outside of torch's operators, or by one that does not declare it{last}")
        if changes:
            self._given.put_back()

    def _look_at_settings(self, before: dict[str, Any]) -> None:
        for name, value in _settings().items():
            if value != before[name]:
                self.findings.append(f"left {name} at {value}, which was {before[name]}")
                _SETTINGS[name][1](before[name])


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, watch: Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self._watch.operator(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self._watch.function(func, args)
        return func(*args, **(kwargs or {}))


def _tensors(operator: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Iterator[tuple[Any, Tensor]]:
    """Every tensor that an operator is called with, and what its schema says of the argument."""
    for i, argument in enumerate(operator._schema.arguments):
        value = arguments[i] if i < len(arguments) else named.get(argument.name)
        for part in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(part, Tensor):
                yield argument, part


class GlobalGenerators:
    """The states of the global generators of torch, numpy and `random`."""

    def __init__(self) -> None:
        self._torch, self._others = torch_states(), states()

    def have_moved(self) -> bool:
        """Whether they are in other states now."""
        return torch_has_moved(self._torch) or have_moved(self._others)

    def put_back(self) -> None:
        put_torch_back(self._torch)
        put_back(self._others)


_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "torch.is_grad_enabled()": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch.get_default_dtype()": (torch.get_default_dtype, torch.set_default_dtype),
    "torch.get_num_threads()": (torch.get_num_threads, torch.set_num_threads),
    "torch.are_deterministic_algorithms_enabled()": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
}


def _settings() -> dict[str, Any]:
    return {name: get() for name, (get, _) in _SETTINGS.items()}
