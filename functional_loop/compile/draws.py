"""Random numbers that are drawn before a program runs, by the operators that draw them in the eager step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..core.rng import generators_lock

R = TypeVar("R")


class Blank(NamedTuple):
    """A tensor without its values: generators fill memory in its order, so that layouts decide what is drawn."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def empty(self) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)

    def empty_for(self, members: int) -> Tensor:
        """One for each of several, with these along the first axis."""
        extent = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides))
        shape, strides = (members, *self.shape), (extent if 0 not in self.shape else 0, *self.strides)
        return torch.empty_strided(shape, strides, dtype=self.dtype, device=self.device)

    def filled(self, values: Tensor) -> Tensor:
        if values.stride() == self.strides:
            return values
        # What has been expanded can't be written to.
        once = self._replace(shape=tuple(size if stride else 1 for size, stride in zip(self.shape, self.strides)))
        rows = values[tuple(slice(size) for size in once.shape)]
        return once.empty().copy_(rows).expand(self.shape)


class Draw(NamedTuple):
    """A call of an operator that draws, in which `Blank`s stand for tensors.

    Attributes:
        reads: the arguments of which the operator reads values; where it reads none, the call can be made beforehand.
        again: the number of the earlier draw that this one repeats, because the generator was put back to it.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: frozenset[str]
    again: int | None = None

    def __call__(self, generator: torch.Generator | None = None, given: dict[str, Tensor] | None = None) -> Any:
        """Draw from ``generator``, or from torch's own.

        Args:
            given: tensors for `reads`, by the names of the arguments.
        """
        given = given or {}
        # Reading the schema takes as long as a small draw.
        names = [argument.name for argument in self.func._schema.arguments] if given else [""] * len(self.args)
        args = [_filled(value, given.get(name)) for name, value in zip(names, self.args)]
        kwargs = {name: _filled(value, given.get(name)) for name, value in self.kwargs.items()}
        if generator is None:
            return self.func(*args, **kwargs)
        if (overload := with_generator(self.func)) is None:
            return _drawn_from(generator, lambda: self.func(*args, **kwargs))
        return overload(*args, **kwargs, generator=generator)

    def is_by(self, func: Any) -> bool:
        """Whether ``func`` is its operator, or the form in or out of place of that."""
        ours, others = (str(operator._schema.name).rstrip("_") for operator in (self.func, func))
        return ours == others

    def arguments(self) -> dict[str, Any]:
        return named(self.func, self.args, self.kwargs)


def _drawn_from(generator: torch.Generator, call: Callable[[], R]) -> R:
    """A call that draws from torch's own generator, in the state of ``generator``, which goes on from there."""
    with generators_lock:
        own = _generator(generator.device)
        before = own.get_state()
        try:
            own.set_state(generator.get_state())
            made = call()
            generator.set_state(own.get_state())
        finally:
            own.set_state(before)
    return made


def _filled(value: Any, given: Tensor | None) -> Any:
    if not isinstance(value, Blank):
        return value
    return value.empty() if given is None else value.filled(given)


def named(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of an operator by the names in its schema."""
    return {**{argument.name: value for argument, value in zip(func._schema.arguments, args)}, **kwargs}


def is_draw(func: Any) -> bool:
    """Whether an operator draws random numbers, and does little else."""
    if func not in _drawing:
        alone = func._schema.name in _WITHOUT_GENERATOR or with_generator(func) is not None
        _drawing[func] = alone and may_draw(func)
    return _drawing[func]


_drawing: dict[Any, bool] = {}
_WITHOUT_GENERATOR = ("aten::native_dropout", "aten::rand_like", "aten::randn_like", "aten::randint_like")
"""Operators that draw, of which there are versions of torch that give them no generator."""


def may_draw(func: Any) -> bool:
    """Whether an operator draws random numbers, or does so with some arguments, as those of attention do."""
    return torch.Tag.nondeterministic_seeded in func.tags


def with_generator(func: Any) -> Any:
    """The overload of an operator that takes a generator; ``None`` if there is none."""
    wanted = [argument.name for argument in func._schema.arguments if argument.name != "generator"]
    packet = func.overloadpacket
    for overload in (func, *(getattr(packet, name) for name in packet.overloads())):
        names = [argument.name for argument in overload._schema.arguments]
        if "generator" in names and [name for name in names if name != "generator"] == wanted:
            return overload
    return None


class StrangeDrawError(Exception):
    """Why the draws of a function can't be made in another way than by it, in words for the user."""


class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A region whose draws are written down.

    Args:
        seed: what torch's generators are seeded with when the region draws for the first time.

    >>> with Recording(0) as recording:
    ...     _ = torch.manual_seed(0)
    ...     made = torch.randn(2)
    >>> [draw] = recording.draws
    >>> _ = torch.manual_seed(0)
    >>> torch.equal(draw(), made)
    True
    """

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.draws: list[Draw] = []
        self._seed = seed
        self._before: list[bytes] = []
        self._now: dict[torch.device, bytes] = {}
        """The state after the last draw on every device."""
        self._strange = ""

    def all_draws(self) -> tuple[Draw, ...]:
        """What was drawn.

        Raises:
            StrangeDrawError: from a state of the generator to which neither the seed nor an earlier draw had brought
                it.
        """
        if self._strange:
            raise StrangeDrawError(self._strange)
        return tuple(self.draws)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not may_draw(func):
            return func(*args, **kwargs)
        device = _device_of(args, kwargs)
        before = _state(device)
        if not is_draw(func):
            made = func(*args, **kwargs)
            if _state(device) != before:
                self._strange = f"{func} draws random numbers from no generator that it could be given"
            return made
        draw = _as_draw(func, args, kwargs)
        made = func(*args, **kwargs)
        if named(func, args, kwargs).get("generator") is not None:
            self._strange = f"{func} draws from a generator that it is given"
        if before == self._now.setdefault(device, _seeded_state(device, self._seed)):
            self._now[device] = _state(device)
        elif draw.reads or any(earlier.reads for earlier in self.draws):
            self._strange = "it draws random numbers that depend on values, and draws some again"
        else:
            earlier = next((i for i, state in enumerate(self._before) if state == before), None)
            if earlier is None or self.draws[earlier][:3] != draw[:3]:
                self._strange = "it sets the state of torch's generator"
            draw = draw._replace(again=earlier)
        self.draws.append(draw)
        self._before.append(before)
        return made


def _as_draw(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Draw:
    name = func._schema.name
    shape_is_all = name.endswith("_like") or func is torch.ops.aten.bernoulli.p
    written = {argument.name for argument in func._schema.arguments if argument.is_write}
    tensors = {key for key, value in named(func, args, kwargs).items() if isinstance(value, Tensor)}
    reads = frozenset() if shape_is_all else frozenset(tensors - written)
    return Draw(func, tuple(map(_blank, args)), {key: _blank(value) for key, value in kwargs.items()}, reads)


def _blank(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Blank(tuple(value.shape), value.stride(), value.dtype, value.device)
    return value


def _device_of(args: Sequence[Any], kwargs: dict[str, Any]) -> torch.device:
    tensor = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    return torch.device(kwargs.get("device") or "cpu") if tensor is None else tensor.device


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator


def _state(device: torch.device) -> bytes:
    return _generator(device).get_state().numpy().tobytes()


def _seeded_state(device: torch.device, seed: int) -> bytes:
    generator = torch.Generator(_generator(device).device)
    generator.manual_seed(seed)
    return generator.get_state().numpy().tobytes()


def beforehand(draws: Iterable[Draw]) -> tuple[Draw, ...]:
    """Those before the first that depends on values of tensors, which can be made before anything is computed."""
    found = []
    for draw in draws:
        if draw.reads or len(draw.func._schema.returns) != 1:
            break
        found.append(draw)
    return tuple(found)


def drawn(draws: Sequence[Draw]) -> list[Tensor]:
    """What they draw from torch's generators, one after the other."""
    made: list[Tensor] = []
    for draw in draws:
        made.append(draw() if draw.again is None else made[draw.again])
    return made


class GivenDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A region in which what was drawn beforehand is taken in the place of its first draws."""

    def __init__(self, made: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: Iterator[Tensor] = iter(made)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = next(self._made, None) if is_draw(func) else None
        return func(*args, **kwargs) if made is None else put(func, args, kwargs, made)


def put(func: Any, args: Sequence[Any], kwargs: dict[str, Any], made: Tensor) -> Tensor:
    """What a call of ``func`` that has drawn ``made`` returns."""
    written = [argument.name for argument in func._schema.arguments if argument.is_write]
    if not written:
        # The caller may write to it.
        return made.clone()
    target: Tensor = named(func, args, kwargs)[written[0]]
    return target.copy_(made)
