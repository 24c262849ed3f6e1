"""Random numbers of all members at once: every member draws from a generator of its own, as in its solo run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Draw(NamedTuple):
    """A draw for all members whose arguments do not depend on values, so that it can be made beforehand."""

    func: Any
    first: Any
    """A tensor without values, or a shape."""
    rest: tuple[Any, ...]
    options: dict[str, Any]

    def __call__(self, generators: Sequence[torch.Generator]) -> Tensor:
        first = self.first
        if isinstance(first, Tensor):
            first = torch.empty_like(first, device=generators[0].device)
        return _drawn(self.func, first, self.rest, self.options, generators)


class OwnDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A region in which every draw for all members is made member by member, each from a generator of its own.

    Args:
        record: is given every draw, or ``None`` for one that depends on values.
    """

    def __init__(self, generators: Sequence[torch.Generator], record: list[Draw | None] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generators = generators
        self._record = record

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        first, *rest = args
        if self._record is not None:
            self._record.append(_as_draw(func, first, tuple(rest), kwargs))
        drawn = _drawn(func, first, rest, kwargs, self._generators)
        return first.copy_(drawn) if func._schema.is_mutable else drawn


class GivenDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A region in which nothing is drawn: what `Draw`s have made beforehand is taken, in their order."""

    def __init__(self, drawn: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._drawn = iter(drawn)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        drawn = next(self._drawn)
        return args[0].copy_(drawn) if func._schema.is_mutable else drawn


def _as_draw(func: Any, first: Any, rest: tuple[Any, ...], options: dict[str, Any]) -> Draw | None:
    shape_is_all = func in _OF_A_SHAPE or func._schema.is_mutable or func._schema.name.endswith("_like")
    if any(isinstance(value, Tensor) for value in (*rest, *options.values())):
        return None
    if isinstance(first, Tensor):
        return Draw(func, torch.empty_like(first, device="meta"), rest, options) if shape_is_all else None
    return Draw(func, list(first), rest, options)


_OF_A_SHAPE = (torch.ops.aten.bernoulli.p,)
"""Operators that read no value of their first argument."""


def _drawn(
    func: Any, first: Any, rest: Sequence[Any], options: dict[str, Any], generators: Sequence[torch.Generator]
) -> Tensor:
    overload = _with_generator(func)
    drawn = []
    for member, generator in enumerate(generators):
        own = first[member].contiguous() if isinstance(first, Tensor) else first[1:]
        drawn.append(overload(own, *rest, **options, generator=generator))
    return torch.stack(drawn)


def _with_generator(func: Any) -> Any:
    """The overload of an operator that takes a generator."""
    if any(argument.name == "generator" for argument in func._schema.arguments):
        return func
    packet = func.overloadpacket
    for name in ("generator", "default_generator"):
        if name in packet.overloads():
            return getattr(packet, name)
    raise RuntimeError(f"{func} draws random numbers for all members at once, from no generator of their own")
