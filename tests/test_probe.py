"""The probe of the first step: what a network keeps outside of its context is refused, on any number of threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import functional_loop as fl
from tests.sample_loops import make_loop


class ScaledByItsFirstBatch(nn.Linear):
    """Initialised by data, in an attribute: two calls on one batch agree."""

    def __init__(self) -> None:
        super().__init__(3, 2)
        self.scale: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None:
            self.scale = x.std(0)
        return super().forward(x / self.scale)


class CachingByShape(nn.Linear):
    """Keeps what depends on the form of its input alone."""

    def __init__(self) -> None:
        super().__init__(3, 2)
        self.cache: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] not in self.cache:
            self.cache[x.shape[1]] = torch.arange(x.shape[1]).float().cos()
        return super().forward(x * self.cache[x.shape[1]])


@pytest.mark.parametrize("threads", [1, 2])
def test_what_is_kept_of_the_first_batch_is_refused(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with pytest.raises(ValueError, match=r"after another batch .*changed network.scale, outside of the context"):
            fl.train(fl.init(make_loop(network=ScaledByItsFirstBatch)))
        fl.train(fl.init(make_loop(network=CachingByShape)))
    finally:
        torch.set_num_threads(before)


class WritingToItsInput(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(0.5))


def test_an_evaluation_that_is_looked_at_sees_its_batch_as_any_other() -> None:
    x = torch.randn(4, 3)
    ctx = fl.init(make_loop(network=lambda: WritingToItsInput(3, 2)))
    looked_at = fl.predict(ctx, fl.batches(x, batch_size=4))
    assert torch.equal(fl.predict(ctx, fl.batches(x, batch_size=4)), looked_at)
