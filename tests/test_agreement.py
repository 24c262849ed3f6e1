"""Agreement up to rounding: what another order of additions changes is nothing, and anything else is something."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from functional_loop.engine.step import Gradients
from functional_loop.purity.agreement import gradients_differ, nudged, outputs_differ, tolerance, update_differs

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def gradients_of(x: Tensor, params: dict[str, Tensor], noise: Tensor, sharpness: float = 1.0) -> Gradients:
    """Of a small network whose hidden layer is multiplied by ``noise``."""
    leaves = {name: param.detach().requires_grad_() for name, param in params.items()}
    hidden = torch.tanh(x @ leaves["first"]) * noise
    y_hats = hidden @ leaves["second"]
    loss = torch.sin(sharpness * y_hats).mean()
    grads = torch.autograd.grad(loss, [*leaves.values()])
    return Gradients(loss.detach(), y_hats.detach(), params, {"seen": hidden.detach()}, dict(zip(leaves, grads)))


def problem(dtype: torch.dtype, seed: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, first, second = (torch.randn(8, 8, generator=generator).to(dtype) for _ in range(3))
    return x, {"first": first, "second": second}, torch.empty(8, 8).bernoulli_(0.5, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=st.integers(0, 2**31))
def test_rounding_is_no_difference_and_another_draw_is_one(dtype: torch.dtype, seed: int) -> None:
    x, params, noise = problem(dtype, seed)
    right, order = gradients_of(x, params, noise), torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    permuted = gradients_of(x[:, order], {**params, "first": params["first"][order]}, noise)
    first = permuted.grads["first"][order.argsort()]
    within = tolerance(params.values(), autocast=None)
    assert not gradients_differ(permuted._replace(grads={**permuted.grads, "first": first}), right, within)
    assert gradients_differ(gradients_of(x, params, 1 - noise), right, within)


def test_where_rounding_errors_are_magnified_they_are_the_measure() -> None:
    x, params, noise = problem(torch.float32, 0)
    right, another = (gradients_of(x, some, noise, 1e8) for some in (params, nudged(params, None)))
    within = tolerance(params.values(), autocast=None)
    assert gradients_differ(another, right, within)

    def nearby() -> Gradients:
        return gradients_of(x, nudged(nudged(params, None), None), noise, 1e8)

    assert not gradients_differ(another, right, within, nearby)
    nan = right._replace(loss=right.loss * float("nan"))
    assert "the loss is not finite" in gradients_differ(nan, right, within, nearby)
    mild = gradients_of(x, params, noise)
    wrong = mild._replace(grads={name: 1.01 * grad for name, grad in mild.grads.items()})
    assert gradients_differ(wrong, mild, within, lambda: gradients_of(x, nudged(params, None), noise))


def test_what_is_not_finite_is_compared_where_the_other_is() -> None:
    nan, one = torch.tensor([float("nan"), 1.0, float("inf")]), torch.ones(3)
    assert not outputs_differ(nan, nan, 1e-3)
    assert "is not finite, and should be" in outputs_differ(nan, one, 1e-3)
    assert outputs_differ(torch.tensor([float("nan"), 2.0, 1.0]), nan, 1e-3)


@pytest.mark.parametrize(
    ("made", "right", "what"),
    [
        (torch.ones(2), torch.ones(3), r"of shape \[2\], and should be .* of shape \[3\]"),
        (torch.ones(2), torch.ones(2).double(), "is torch.float32 .* should be torch.float64"),
        ([torch.ones(2)], [torch.ones(2), torch.ones(2)], "has 1 outputs, and should have 2"),
        (torch.arange(9), torch.arange(9) + 1, "in 100% of its elements"),
        (torch.ones(9) > 0, torch.ones(9) < 0, "in 100% of its elements"),
    ],
)
def test_forms_and_integers_are_compared_too(made: Any, right: Any, what: str) -> None:
    with pytest.raises(AssertionError, match=what):
        raise AssertionError(outputs_differ(made, right, 1e-3))


def test_a_move_that_is_lost_in_the_last_bits_of_a_parameter_is_no_difference() -> None:
    before, grads = {"weight": torch.ones(100)}, {"weight": torch.randn(100)}
    right = {"weight": before["weight"] - 1e-7 * grads["weight"]}
    made = {"weight": torch.nextafter(right["weight"], torch.tensor(0.0))}
    state: dict[str, Any] = {"groups": [], "slots": {}}
    assert not update_differs(before, grads, (made, state), (right, state), 1e-3)
    assert update_differs(before, grads, ({"weight": before["weight"] * 1.01}, state), (right, state), 1e-3)


def test_a_gradient_of_rounding_errors_decides_nothing() -> None:
    """Adam makes whole steps of them: those of a bias before BatchNorm, for one."""
    grads = {"weight": torch.ones(4), "bias": torch.full((4,), 1e-9)}
    before: dict[str, Tensor] = {name: torch.zeros(4) for name in grads}
    state: dict[str, Any] = {"groups": [], "slots": {}}
    right, made = {"weight": torch.ones(4), "bias": torch.ones(4)}, {"weight": torch.ones(4), "bias": -torch.ones(4)}
    assert not update_differs(before, grads, (made, state), (right, state), 1e-3)
    assert update_differs(before, grads, ({**right, "weight": -torch.ones(4)}, state), (right, state), 1e-3)


def test_parameters_in_half_precision_have_the_tolerance_of_it() -> None:
    assert tolerance(nn.Linear(2, 2).parameters(), None) < tolerance(nn.Linear(2, 2).parameters(), torch.bfloat16)
