"""Names that share memory: refused, unless they are one tensor or have no byte in common."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import functional_loop as fl
from functional_loop.purity.overlaps import check_separate

from .sample_loops import make_loop


class Holding(nn.Module):
    def __init__(self, **tensors: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


TABLE = torch.zeros(4, 6)
STORAGE = torch.arange(24)
WEIGHT = nn.Parameter(torch.zeros(4, 6))
INTERLEAVED = torch.view_as_real(torch.zeros(4, dtype=torch.complex64))

SHARING = {
    "a view": {"table": TABLE, "row": TABLE[1]},
    "the same memory": {"table": TABLE, "other": TABLE.detach()},
    "a view of a parameter": {"weight": WEIGHT, "first": WEIGHT.detach()[0]},
    "two parameters": {"weight": WEIGHT, "other": nn.Parameter(WEIGHT.data)},
    "a parameter as a buffer": {"weight": WEIGHT},
    "views that meet in one element": {"left": TABLE[:, :4], "right": TABLE[:, 3:]},
    "other bytes of one dtype": {"table": TABLE, "bits": TABLE.view(torch.int64)},
    "through numpy": {"table": TABLE, "other": torch.from_numpy(TABLE.numpy())},
    "expanded": {"table": TABLE, "wide": TABLE[0, :1].expand(7)},
}
SEPARATE: dict[str, dict[str, Tensor]] = {
    "columns": {"left": TABLE[:, :3], "right": TABLE[:, 3:]},
    "interleaved": {"real": INTERLEAVED[..., 0], "imaginary": INTERLEAVED[..., 1]},
    "expanded by itself": {"mask": torch.ones(1).expand(7)},
    "without elements": {"none": TABLE[:0], "table": TABLE},
    "tied": {"table": TABLE, "same": TABLE},
    "tied parameters": {"weight": WEIGHT, "same": WEIGHT},
}


@pytest.mark.parametrize("made_by_function", [False, True])
@pytest.mark.parametrize("kind", SHARING)
def test_what_shares_memory_is_refused_by_name(kind: str, made_by_function: bool) -> None:
    def network() -> nn.Module:
        made = Holding(**SHARING[kind])
        if kind == "a parameter as a buffer":
            made.register_buffer("copy", made.weight)
        return made

    names = ["weight", "copy"] if kind == "a parameter as a buffer" else list(SHARING[kind])
    with pytest.raises(ValueError, match=f"'{names[0]}'.*'{names[1]}'"):
        fl.init(make_loop(network=network if made_by_function else network()))


@pytest.mark.parametrize("kind", SEPARATE)
def test_what_is_apart_or_tied_trains(kind: str) -> None:
    ctx = fl.train(fl.init(make_loop(network=Holding(**SEPARATE[kind]))), steps=2)
    assert fl.digest(fl.load_state_dict(fl.init(ctx.loop), fl.state_dict(ctx))) == fl.digest(ctx)


def test_recurrent_and_normalised_networks_are_no_views() -> None:
    for network in (nn.LSTM(3, 2, 2), nn.TransformerEncoderLayer(4, 2), nn.Sequential(nn.BatchNorm1d(3))):
        fl.init(make_loop(network=network))


@st.composite
def views(draw: st.DrawFn) -> tuple[Tensor, set[int]]:
    """A view of 24 elements, and the numbers of those that are in it."""
    size, stride = draw(st.integers(1, 4)), draw(st.integers(0, 4))
    rows, jump = draw(st.integers(1, 3)), draw(st.integers(0, 4))
    offset = draw(st.integers(0, 23 - (size - 1) * stride - (rows - 1) * jump))
    view = STORAGE.as_strided((rows, size), (jump, stride), offset)
    return view, set(view.flatten().tolist())


@given(views(), views())
def test_two_views_share_memory_where_they_share_an_element(one: Any, other: Any) -> None:
    try:
        check_separate([("one", one[0]), ("other", other[0])])
        refused = False
    except ValueError:
        refused = True
    assert refused is bool(one[1] & other[1])
