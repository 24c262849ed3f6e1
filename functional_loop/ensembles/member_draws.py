"""Random numbers of all members at once: those of their solo runs, each from a generator of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..compile.draws import Blank, Draw, StrangeDrawError, is_draw, named, with_generator

Made = Sequence[Tensor]
"""What a draw makes for all members, with these along the first axis."""
Given = dict[str, Tensor]
"""Tensors of all members that an operator reads, by the names of its arguments."""


class MemberDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A region in which the draws for all members are those of a solo run, one after the other.

    ``torch.func.vmap`` calls other operators than a solo run does, on tensors of other layouts; generators fill memory
    in its order, so that only the calls of the solo run make its random numbers.

    Args:
        draws: those of a solo run.
        draw: what a draw makes for all members, by its number.
    """

    def __init__(self, draws: Sequence[Draw], members: int, draw: Callable[[int, Given], Made]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._draws, self._members, self._draw = draws, members, draw
        self._done = 0
        self._one_by_one: list[Tensor] = []
        """What is left of a draw that is asked for member by member."""

    def __exit__(self, kind: Any, *others: Any) -> None:
        super().__exit__(kind, *others)  # type: ignore[no-untyped-call]
        if kind is None and (self._done < len(self._draws) or self._one_by_one):
            raise StrangeDrawError(
                f"it draws random numbers {self._done} times, and a solo run {len(self._draws)} times (as where a hook "
                "of a gradient draws them)"
            )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not is_draw(func):
            return func(*args, **kwargs)
        if self._one_by_one:
            return self._one_by_one.pop(0)
        if self._done == len(self._draws) or not (draw := self._draws[self._done]).is_by(func):
            raise StrangeDrawError(f"{func} draws random numbers that a solo run does not draw there")
        solo, given = draw.arguments(), named(func, args, kwargs)
        reads = {name: _of_members(given[name], solo[name].shape, self._members) for name in draw.reads}
        made = self._draw(self._done, reads)
        self._done += 1
        if _is_of_one_member(solo, given):
            self._one_by_one = list(made[0].unbind())
            return self._one_by_one.pop(0)
        return _put(func, given, [tensor.flatten(0, 1) for tensor in made] if _are_folded(solo, given) else made)


def _is_of_one_member(solo: dict[str, Any], given: dict[str, Any]) -> bool:
    """Whether a call takes no tensors, and the sizes of a solo run."""
    if any(isinstance(value, Tensor) for value in given.values()):
        return False
    return all(solo.get(name) == value for name, value in given.items() if isinstance(value, (int, list, tuple)))


def _are_folded(solo: dict[str, Any], given: dict[str, Any]) -> bool:
    """Whether members are folded into the rows, as where an operator takes no more axes."""
    ranks = [(given[name].dim(), len(blank.shape)) for name, blank in solo.items() if isinstance(blank, Blank)]
    return bool(ranks) and all(rank == own > 0 for rank, own in ranks)


def _of_members(tensor: Tensor, shape: tuple[int, ...], members: int) -> Tensor:
    """A tensor that an operator reads, with the members first."""
    if tuple(tensor.shape) == shape:
        return tensor.expand(members, *shape)
    if tensor.numel() != members * torch.Size(shape).numel():
        raise StrangeDrawError(
            f"an operator that draws is given a tensor of shape {list(tensor.shape)}, and one of {list(shape)} in a "
            "solo run"
        )
    return tensor.reshape(members, *shape)


def _put(func: Any, given: dict[str, Any], made: Made) -> Any:
    """What a call of ``func`` that has ``made`` this returns."""
    written = [argument.name for argument in func._schema.arguments if argument.is_write]
    if len(written) > 1 or len(made) != (1 if written else len(func._schema.returns)):
        raise StrangeDrawError(f"{func} draws random numbers, and writes or returns other tensors too")
    if written:
        return given[written[0]].copy_(made[0].reshape(given[written[0]].shape))
    return made[0] if len(made) == 1 else tuple(made)


class OwnDraws(MemberDraws):  # type: ignore[no-untyped-call]
    """A region in which members draw from generators of their own."""

    def __init__(self, draws: Sequence[Draw], generators: Sequence[torch.Generator]) -> None:
        made: dict[int, Made] = {}
        super().__init__(draws, len(generators), lambda i, given: _made(draws, i, generators, given, made))


class GivenDraws(MemberDraws):  # type: ignore[no-untyped-call]
    """A region in which nothing is drawn: what was drawn beforehand for all members is taken."""

    def __init__(self, draws: Sequence[Draw], made: Sequence[Tensor], members: int) -> None:
        super().__init__(draws, members, lambda i, given: [made[i].clone()])


def drawn(draws: Sequence[Draw], generators: Sequence[torch.Generator]) -> list[Tensor]:
    """What draws that read no values make for all members."""
    made: dict[int, Made] = {}
    return [_made(draws, i, generators, {}, made)[0] for i in range(len(draws))]


def _made(
    draws: Sequence[Draw],
    i: int,
    generators: Sequence[torch.Generator],
    given: Given,
    known: dict[int, Made],
) -> Made:
    """The ``i``-th draw of all members; it is noted in ``known`` if a later one repeats it."""
    if (again := draws[i].again) is not None:
        return [tensor.clone() for tensor in known[again]]
    made = for_members(draws[i], generators, given)
    if any(draw.again == i for draw in draws):
        # The caller may write to them.
        known[i] = [tensor.clone() for tensor in made]
    return made


def for_members(draw: Draw, generators: Sequence[torch.Generator], given: Given) -> Made:
    """What a draw makes for all members, with these first, and for each in the layout of its solo run."""
    if draw.func._schema.is_mutable and not given:
        (blank, *rest), overload = draw.args, with_generator(draw.func)
        made: Tensor = blank.empty_for(len(generators))
        for row, generator in zip(made.unbind(), generators, strict=True):
            overload(row, *rest, **draw.kwargs, generator=generator)
        return [made]
    rows = []
    for i, generator in enumerate(generators):
        row = draw(generator, {name: tensor[i] for name, tensor in given.items()})
        rows.append(row if isinstance(row, tuple) else (row,))
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def check_draws(draws: Iterable[Draw]) -> None:
    """Refuse draws of a solo run that can't be made for all members.

    Raises:
        StrangeDrawError: there is one.
    """
    for draw in draws:
        written = [argument.name for argument in draw.func._schema.arguments if argument.is_write]
        if written not in ([], ["self"]):
            raise StrangeDrawError(f"{draw.func} draws random numbers, and writes to other tensors too")
