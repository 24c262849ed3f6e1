"""Tapes: equal for runs that compute the same, different for others, none where values could have decided."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from functional_loop.compile import graphs
from functional_loop.compile.graphs import UncompilableError, compile_graph
from functional_loop.compile.op_log import record

OPERATORS: dict[str, Callable[..., Tensor]] = {
    "add": lambda a, b, c: a + b * c,
    "scale": lambda a, b, c: a * c,
    "in place": lambda a, b, c: a.clone().add_(b, alpha=c),
    "view": lambda a, b, c: a.view(2, 2).t().reshape(4) + c,
    "gradient": lambda a, b, c: gradient(a, c),
}
lines = st.tuples(st.sampled_from(sorted(OPERATORS)), st.integers(0, 9), st.integers(0, 9), st.integers(1, 3))
programs = st.lists(lines, min_size=1, max_size=5)


def gradient(a: Tensor, c: float) -> Tensor:
    with torch.enable_grad():
        leaf = a.detach().requires_grad_()
        return torch.autograd.grad((leaf.tanh() * c).sum(), leaf)[0]


def run(program: list[Any], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    made = list(inputs)
    for name, a, b, c in program:
        made.append(OPERATORS[name](made[a % len(made)], made[b % len(made)], c))
    return made[-1:]


def canonical(program: list[Any]) -> list[Any]:
    """The program with the operands that it uses, as numbers of what has been made."""
    return [
        (name, a % (i + 2), b % (i + 2) if name in ("add", "in place") else None, c)
        for i, (name, a, b, c) in enumerate(program)
    ]


@given(programs, programs)
def test_tapes_are_equal_where_programs_are(some: list[Any], others: list[Any]) -> None:
    first = record(lambda *inputs: run(some, inputs), [torch.ones(4), torch.arange(4.0)])
    second = record(lambda *inputs: run(others, inputs), [torch.zeros(4), torch.ones(4)])
    assert first is not None
    assert second is not None
    assert (first.text == second.text) == (canonical(some) == canonical(others))


@given(programs)
def test_what_is_found_by_a_tape_computes_the_same(program: list[Any]) -> None:
    inputs = [torch.randn(4), torch.randn(4)]
    again = [torch.randn(4), torch.randn(4)]
    flat = graphs._Flattened(lambda given: (run(program, tuple(given)), ()), [2])
    tape = record(flat, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = graphs._trace(flat, inputs)
    assert tape is not None
    assert graphs._equal(graphs._lift(module), tape.others)
    torch.testing.assert_close(module(*again), run(program, tuple(again)))


def test_defaults_that_no_operator_is_given_are_told_apart() -> None:
    def function(x: Tensor) -> Tensor:
        return x + torch.zeros(3)

    usual = record(function, [torch.ones(3)])
    torch.set_default_dtype(torch.float64)
    try:
        double = record(function, [torch.ones(3, dtype=torch.float32)])
    finally:
        torch.set_default_dtype(torch.float32)
    assert usual is not None
    assert double is not None
    assert usual.text != double.text


def test_tensors_from_elsewhere_are_told_from_what_was_given_and_kept_in_the_order_of_their_use() -> None:
    one, two = torch.ones(2), torch.zeros(2)
    tapes = [
        record(function, [torch.ones(2)])
        for function in (lambda x: x + one + two, lambda x: x + one + one, lambda x: x + one + x)
    ]
    assert len({tape.text for tape in tapes if tape is not None}) == 3
    assert tapes[0] is not None
    assert [other is wanted for other, wanted in zip(tapes[0].others, (one, two))] == [True, True]


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: float(x[0]),
        lambda x: x.tolist(),
        lambda x: x.numpy()[0],
        lambda x: torch.equal(x, x),
        lambda x: len(x.nonzero()),
        lambda x: len(x.unique()),
        lambda x: x[x > 0].shape,
        lambda x: copy.deepcopy(x),
        lambda x: x.data_ptr(),
        lambda x: torch.from_dlpack(x),
        lambda x: memoryview(x.numpy()),
    ],
)
def test_there_is_no_tape_where_values_of_tensors_are_read(read: Callable[[Tensor], Any]) -> None:
    def function(x: Tensor) -> Tensor:
        read(x)
        return x * 2

    assert record(function, [torch.ones(3)]) is None


def test_nothing_that_was_made_is_kept() -> None:
    refs = []

    def function(x: Tensor) -> Tensor:
        y = x * 2
        refs.append(weakref.ref(y))
        return y + 1

    tape = record(function, [torch.ones(3)])
    assert tape is not None
    assert refs[0]() is None


def linear(scale: float, weight: Tensor) -> Callable[[Any], Any]:
    return lambda given: ([nn.functional.linear(given[0], weight) * scale], {"shape": "plain"})


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> list[str]:
    """Keys of the graphs that are compiled, in a cache that is empty."""
    keys: list[str] = []
    ahead = graphs._ahead_of_time

    def counted(module: Any, inputs: Any, draws: bool, key: str) -> Any:
        keys.append(key)
        return ahead(module, inputs, draws, key)

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(graphs, "_ahead_of_time", counted)
    return keys


def test_a_graph_is_found_again_by_what_it_computes_and_nothing_else(compiled: list[str]) -> None:
    x, weight, other = torch.randn(2, 3), torch.randn(4, 3), torch.randn(4, 3)
    first = compile_graph(linear(2.0, weight), [x])
    assert len(compiled) == 1
    again = compile_graph(linear(2.0, other), [x])
    assert len(compiled) == 1
    assert again.layouts == first.layouts
    assert again.draws is first.draws is False
    made = again.run([x])
    torch.testing.assert_close(made[0], nn.functional.linear(x, other) * 2)
    assert again.tree(made) == {"shape": "plain"}
    other.zero_()
    assert not again.run([x])[0].any()
    three = compile_graph(linear(3.0, weight), [x])
    assert len(set(compiled)) == 2
    torch.testing.assert_close(three.run([x])[0], nn.functional.linear(x, weight) * 3)


def test_a_damaged_graph_is_compiled_again(compiled: list[str], tmp_path: Any) -> None:
    x, weight = torch.randn(2, 3), torch.randn(4, 3)
    compile_graph(linear(2.0, weight), [x])
    for path in tmp_path.rglob("about.json"):
        path.write_text("{")
    with pytest.warns(UserWarning, match="can't be read .* and is compiled again"):
        made = compile_graph(linear(2.0, weight), [x]).run([x])
    torch.testing.assert_close(made[0], nn.functional.linear(x, weight) * 2)
    assert len(compiled) == 2
    compile_graph(linear(2.0, weight), [x])
    assert len(compiled) == 2


def test_values_that_decide_are_refused_also_where_a_graph_of_the_same_operators_is_kept(compiled: list[str]) -> None:
    x, weight = torch.ones(2, 3), torch.randn(4, 3)
    compile_graph(linear(2.0, weight), [x])
    with pytest.raises(UncompilableError, match="can't be traced"):
        compile_graph(lambda given: linear(2.0 if given[0].tolist()[0][0] > 0 else 3.0, weight)(given), [x])
