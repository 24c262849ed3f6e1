"""Finds tensors that share memory: of two names for the same bytes, training would move one and not the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import attrs
import torch
from torch import Tensor

_KINDS = (Tensor, torch.nn.Parameter)


def check_separate(named: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse different tensors that share memory.

    One tensor under several names is tied, and stays one; views into one storage that have no byte in common are
    separate.

    Raises:
        ValueError: two of them share memory, or one is both a parameter and a buffer.

    >>> whole = torch.zeros(2, 4)
    >>> check_separate([("left", whole[:, :2]), ("right", whole[:, 2:])])
    >>> check_separate([("whole", whole), ("row", whole[0])])
    Traceback (most recent call last):
        ...
    ValueError: 'whole' and 'row' share memory, but each has a tensor of its own in the context, so that a write to ...
    """
    reaching: list[_Span] = []
    for span in sorted(_spans(named), key=lambda span: (str(span.tensor.device), span.start)):
        reaching = [one for one in reaching if one.end > span.start and one.tensor.device == span.tensor.device]
        for other in reaching:
            if _overlap(other, span):
                first, second = sorted((other, span), key=lambda span: span.number)
                raise ValueError(_message(first, second))
        reaching.append(span)


@attrs.frozen(eq=False)
class _Span:
    """The addresses between which the bytes of a tensor are, of which some may be another tensor's."""

    number: int
    name: str
    tensor: Tensor
    start: int
    end: int


def _spans(named: Iterable[tuple[str, Tensor]]) -> Iterator[_Span]:
    """The spans of tensors that have memory of their own."""
    for number, (name, tensor) in enumerate(named):
        if type(tensor) in _KINDS and tensor.layout is torch.strided and not tensor.is_meta and tensor.numel():
            start = tensor.data_ptr()
            reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            yield _Span(number, name, tensor, start, start + (reach + 1) * tensor.element_size())


def _overlap(one: _Span, other: _Span) -> bool:
    """Whether two tensors with overlapping spans have a byte in common: they may be interleaved."""
    base = min(one.start, other.start)
    taken = torch.zeros(max(one.end, other.end) - base, dtype=torch.bool)
    taken[_bytes(one, base)] = True
    return bool(taken[_bytes(other, base)].any())


def _bytes(span: _Span, base: int) -> Tensor:
    """The numbers of all bytes of a tensor, counted from ``base`` on."""
    tensor, width = span.tensor, span.tensor.element_size()
    strides = [stride * width for stride in tensor.stride()]
    numbers = torch.arange(span.end - base)
    return numbers.as_strided([*tensor.shape, width], [*strides, 1], span.start - base).flatten()


def _message(first: _Span, second: _Span) -> str:
    if first.tensor is second.tensor:
        return (
            f"one tensor is both the parameter {first.name!r} and the buffer {second.name!r}, which would be two in "
            "the context: register it once"
        )
    return (
        f"{first.name!r} and {second.name!r} share memory, but each has a tensor of its own in the context, so that a "
        "write to one would not reach the other: register one of them and compute the other from it in forward(), or "
        "give it memory of its own by clone(). What is to stay one tensor under two names is registered under both"
    )
