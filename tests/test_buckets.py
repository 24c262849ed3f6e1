"""Small tensors side by side: the same bits as each alone, and nobody outside sees it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import functional_loop as fl
from functional_loop.optim.buckets import Buckets
from functional_loop.optim.layouts import layout
from tests.sample_loops import make_loop

SIZES = st.lists(st.one_of(st.integers(0, 300), st.sampled_from([64, 128, 1280, 4096, 16384, 20000])), min_size=1)

OPERATORS: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
    "mul": lambda a, b, c: a.mul_(torch.tensor(0.37)),
    "lerp": lambda a, b, c: a.lerp_(b, 0.1),
    "addcmul": lambda a, b, c: a.addcmul_(b, b, value=0.001),
    "sqrt": lambda a, b, c: torch.sqrt(c, out=a),
    "div": lambda a, b, c: a.div_(torch.tensor(0.37)),
    "add": lambda a, b, c: a.add_(torch.tensor(1e-8)),
    "add scaled": lambda a, b, c: a.add_(b, alpha=-0.3),
    "addcdiv": lambda a, b, c: a.addcdiv_(b, c, value=-0.01),
    "maximum": lambda a, b, c: torch.maximum(a, b, out=a),
}


def columns(sizes: list[int], dtype: torch.dtype) -> list[list[Tensor]]:
    with fl.seeded(len(sizes)):
        a, b, c = ([torch.randn(size, dtype=dtype) for size in sizes] for _ in range(3))
    return [a, b, [tensor.abs() + 1e-3 for tensor in c]]


@example([20000, 64], "add", torch.float32)
@given(SIZES, st.sampled_from(sorted(OPERATORS)), st.sampled_from([torch.float32, torch.float64]))
def test_an_operator_on_a_bucket_has_the_bits_of_one_on_each_member(
    sizes: list[int], name: str, dtype: torch.dtype
) -> None:
    alone = columns(sizes, dtype)
    buckets = Buckets([layout(tensor) for tensor in alone[0]])
    joined = [buckets.join([tensor.clone() for tensor in column]) for column in alone]
    for tensors in zip(*alone):
        OPERATORS[name](*tensors)
    for tensors in zip(*joined):
        OPERATORS[name](*tensors)
    assert fl.tree_equal(list(buckets.split(joined[0])), alone[0])


@given(SIZES)
def test_no_loop_over_a_bucket_is_long_enough_to_be_split_between_threads(sizes: list[int]) -> None:
    column = [torch.empty(size) for size in sizes]
    joined = Buckets([layout(tensor) for tensor in column]).join(column)
    assert len(joined) <= len(column)
    assert all(tensor.numel() < 32768 or any(tensor is member for member in column) for tensor in joined)


@pytest.mark.parametrize("fused", [False, True])
def test_leaves_of_a_context_share_no_memory(fused: bool) -> None:
    loop = make_loop(optimizer=fl.optimizer(torch.optim.AdamW, lr=0.01, fused=fused))
    start = fl.init(loop, seed=0)
    for ctx in (fl.train(start, steps=3), fl.train(start), list(fl.iterate(start))[-1]):
        slots = [slot[key] for slot in ctx.optimizer_state["slots"].values() for key in ("exp_avg", "exp_avg_sq")]
        leaves = [*ctx.params.values(), *slots]
        assert len({leaf.untyped_storage().data_ptr() for leaf in leaves}) == len(leaves)
        assert all(leaf.untyped_storage().nbytes() == leaf.numel() * leaf.element_size() for leaf in leaves)
