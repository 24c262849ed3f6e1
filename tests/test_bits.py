"""Bits of tensors, and the distance of floating-point numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from functional_loop.core.bits import bits, most_ulps, same_bits
from functional_loop.core.record import tensor_bytes

numbers = st.floats(allow_nan=False)


@given(numbers, st.integers(0, 50))
def test_ulps_count_the_steps_of_nextafter(start: float, steps: int) -> None:
    there = start
    for _ in range(steps):
        there = math.nextafter(there, math.inf)
    x, y = torch.tensor([start], dtype=torch.float64), torch.tensor([there], dtype=torch.float64)
    assert most_ulps(x, y) == min(steps, most_ulps(x, torch.tensor([math.inf], dtype=torch.float64)) or 0)


@given(numbers, numbers)
def test_ulps_are_symmetric_and_zero_only_for_equal_numbers(a: float, b: float) -> None:
    x, y = torch.tensor([a], dtype=torch.float64), torch.tensor([b], dtype=torch.float64)
    assert most_ulps(x, y) == most_ulps(y, x)
    assert (most_ulps(x, y) == 0) == (a == b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_farthest_numbers_of_a_dtype(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    n = most_ulps(torch.tensor([largest], dtype=dtype), torch.tensor([-largest], dtype=dtype))
    exponents, mantissa = {torch.float16: (5, 10), torch.bfloat16: (8, 7), torch.float32: (8, 23)}.get(dtype, (11, 52))
    assert n == 2 * (((2**exponents - 1) << mantissa) - 1)


def test_nan_and_other_dtypes_have_no_distance() -> None:
    assert most_ulps(torch.tensor([torch.nan, 1.0]), torch.tensor([1.0, 1.0])) == 0
    assert most_ulps(torch.tensor([torch.nan]), torch.tensor([1.0])) == 0
    assert most_ulps(torch.tensor([1]), torch.tensor([2])) is None
    assert most_ulps(torch.tensor([1 + 1j]), torch.tensor([1 + (1 + 2**-23) * 1j])) == 1


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 5),
        torch.randn(3, 5).t(),
        torch.randn(9)[1:],
        torch.randn(4, 6)[:, ::2],
        torch.tensor(2.5),
        torch.empty(0, 3),
        torch.tensor([True, False, True]),
        torch.randn(4).to(torch.bfloat16),
        torch.randn(3, dtype=torch.complex64).conj(),
        torch.arange(5, dtype=torch.uint8)[1:],
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    ],
)
def test_bits_are_the_bytes_in_row_major_order(tensor: torch.Tensor) -> None:
    assert bytes(bits(tensor).numpy()) == bytes(tensor_bytes(tensor))
    assert bits(tensor).storage_offset() % 8 == 0
    assert same_bits(tensor, tensor.clone())
    assert not same_bits(tensor, tensor.reshape(-1, 1, 1))
