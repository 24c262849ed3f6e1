"""What a run depends on is in its context: all else is refused by name at the first step, and what is legal trains."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import functional_loop as fl
from functional_loop.engine.template import template

from .processes import in_a_fresh_process
from .sample_loops import data, make_loop
from .stateful import (
    DRAWN,
    ELSEWHERE,
    EVALUATING,
    KEEPING,
    LEGAL,
    OTHER_FORMS,
    Annealed,
    Base,
    Hidden,
    InAPlainList,
    WritingThroughData,
)

VALID = fl.batches(*data(3, seed=2), batch_size=4)


def digests(network: Any) -> set[str]:
    """Of one run: in one go, once more, by every boundary, and resumed in mid-epoch."""
    loop = make_loop(network=network, valid=VALID)
    start = fl.init(loop, seed=3)
    resumed = fl.load_state_dict(fl.init(make_loop(network=network, valid=VALID)), fl.state_dict(fl.train(start, 2)))
    ends = fl.train(start), fl.train(start), [*fl.iterate(start)][-1], fl.train(resumed)
    return {fl.digest(ctx) for ctx in ends}


REFUSED = {**KEEPING, **ELSEWHERE, **OTHER_FORMS}


@pytest.mark.parametrize("made_by_function", [False, True])
@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_what_depends_on_more_than_its_context_is_refused_before_anything_is_updated(
    kind: type[Base], made_by_function: bool
) -> None:
    updates: list[fl.Context] = []
    log = fl.Callback("log", batch_end=lambda ctx: updates.append(ctx) or ctx)
    for callbacks in ([], [log]):
        start = fl.init(make_loop(network=kind if made_by_function else kind(), callbacks=callbacks))
        before = fl.digest(start)
        with pytest.raises((ValueError, TypeError), match=REFUSED[kind]) as caught:
            fl.train(start)
        assert fl.context_of(caught.value).global_step == 0
        assert fl.digest(start) == before
    assert not updates


@pytest.mark.parametrize("kind", EVALUATING, ids=lambda kind: kind.__name__)
def test_a_state_between_training_and_evaluation_is_refused(kind: type[Base]) -> None:
    start = fl.init(make_loop(network=kind, valid=VALID))
    with pytest.raises(ValueError, match=EVALUATING[kind]) as caught:
        fl.train(start)
    assert fl.context_of(caught.value).stage == "before_valid"


@pytest.mark.parametrize("kind", DRAWN, ids=lambda kind: kind.__name__)
def test_what_a_factory_draws_and_does_not_register_is_refused(kind: type[Base]) -> None:
    for seed in (0, 1):
        with pytest.raises(ValueError, match=DRAWN[kind]):
            fl.train(fl.init(make_loop(network=kind), seed))
    # A module has one value of it.
    assert len(digests(kind())) == 1


@pytest.mark.parametrize("made_by_function", [False, True])
@pytest.mark.parametrize("kind", LEGAL, ids=lambda kind: kind.__name__)
def test_what_is_legal_trains(kind: type[Base], made_by_function: bool) -> None:
    assert len(digests(kind if made_by_function else kind())) == 1


def end(number: int, saved: dict[str, Any]) -> str:
    loop = make_loop(network=LEGAL[number], valid=VALID)
    return fl.digest(fl.train(fl.load_state_dict(fl.init(loop), saved)))


@pytest.mark.parametrize("number", range(len(LEGAL)), ids=[kind.__name__ for kind in LEGAL])
def test_what_is_legal_resumes_in_a_fresh_process(number: int) -> None:
    start = fl.init(make_loop(network=LEGAL[number], valid=VALID))
    assert in_a_fresh_process(end, number, fl.state_dict(fl.train(start, 4))) == fl.digest(fl.train(start))


def test_writes_to_parameters_that_torch_does_not_see_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'a\.weight' in place"):
        fl.train(fl.init(make_loop(network=WritingThroughData)))


def one_by_one(start: fl.Context) -> None:
    ctx = next(ctx for ctx in fl.iterate(start) if ctx.stage == "epoch_begin")
    fl.train_step(ctx, data(3))


def unrolled(start: fl.Context) -> None:
    fl.unroll(start, [data(3)])


def members(mode: str) -> Callable[[fl.Context], None]:
    def run(start: fl.Context) -> None:
        fl.train(fl.stack([start, fl.init(start.loop, seed=1)], mode=mode))

    return run


WAYS: dict[str, Callable[[fl.Context], Any]] = {
    "iterate": lambda start: [*fl.iterate(start)],
    "train_step": one_by_one,
    "unroll": unrolled,
    "vectorised": members("vectorised"),
    "exact": members("exact"),
    "accumulate": lambda start: fl.train(fl.evolve(start, loop=fl.evolve(start.loop, accumulate=2))),
    "compile": lambda start: fl.train(fl.evolve(start, loop=fl.evolve(start.loop, compile=True))),
}


@pytest.mark.parametrize("kind", [Hidden, Annealed, InAPlainList])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_training_refuses(way: str, kind: type[Base]) -> None:
    optimizer = fl.optimizer(torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match=REFUSED[kind]):
        WAYS[way](fl.init(make_loop(network=kind(), optimizer=optimizer)))


def test_predictions_refuse_too() -> None:
    ctx = fl.init(make_loop(network=Hidden))
    with pytest.raises(ValueError, match=r"network\.h,"):
        fl.predict(ctx, data(3)[0])


def test_it_is_looked_at_once_for_a_loop() -> None:
    calls: list[bool] = []

    class Noting(Base):
        def middle(self, h: Tensor) -> Tensor:
            calls.append(self.training)
            return h

    loop = make_loop(network=Noting(), epochs=1)
    start = fl.init(loop)
    fl.train(start)
    # Of three batches the first is computed twice. What is computed of others beside leaves nothing behind.
    assert len(calls) == 3 + 1
    calls.clear()
    fl.train(start)
    [*fl.iterate(start)]
    assert len(calls) == 6


class ArrayOverABuffer(Base):
    def set_up(self) -> None:
        self.register_buffer("mean", torch.zeros(4))
        self.array = self.mean.numpy()


@pytest.mark.parametrize("made_by_function", [False, True])
def test_an_array_over_the_memory_of_a_buffer_is_refused(made_by_function: bool) -> None:
    with pytest.raises(ValueError, match=r"network\.array is an array over the memory of 'mean'"):
        fl.init(make_loop(network=ArrayOverABuffer if made_by_function else ArrayOverABuffer()))


def test_a_refusal_comes_again() -> None:
    start = fl.init(make_loop(network=Hidden))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"network\.h,"):
            fl.train(start)


class CountingLoss:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, y_hat: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return nn.functional.mse_loss(y_hat, y) * self.calls


class CountingModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, y_hat: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return nn.functional.mse_loss(y_hat, y) * self.calls


def relative_to_the_first() -> Any:
    first: Any = None

    def loss(y_hat: Tensor, y: Tensor) -> Tensor:
        nonlocal first
        found = nn.functional.mse_loss(y_hat, y)
        if first is None:
            first = found.item()
        return found / first

    return loss


class RelativeToTheFirst:
    first: Any = None

    def __call__(self, y_hat: Tensor, y: Tensor) -> Tensor:
        found = nn.functional.mse_loss(y_hat, y)
        if self.first is None:
            self.first = found.item()
        return found / self.first


@pytest.mark.parametrize("make", [relative_to_the_first, RelativeToTheFirst])
def test_what_a_loss_keeps_of_the_first_batch_is_refused_again_and_again(make: Callable[[], Any]) -> None:
    start = fl.init(make_loop(loss=make()))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"after another batch.*first"):
            fl.train(start)


@pytest.mark.parametrize("loss", [CountingLoss(), CountingModule(), CountingLoss().__call__])
def test_a_state_of_the_loss_is_refused(loss: Any) -> None:
    with pytest.raises(ValueError, match=r"loss\.calls"):
        fl.train(fl.init(make_loop(loss=loss)))


def test_a_penalty_on_the_original_module_is_refused() -> None:
    network = nn.Linear(3, 2)

    def loss(y_hat: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(y_hat, y) + sum(p.pow(2).sum() for p in network.parameters())

    with pytest.raises(ValueError, match=r"'(weight|bias)', reached by loss > network\..*weight_decay"):
        fl.train(fl.init(make_loop(network=network, loss=loss)))


def test_a_factory_may_give_modules_that_share_parameters() -> None:
    backbone = nn.Linear(3, 4)
    before = backbone.weight.clone()
    loop = make_loop(network=lambda: nn.Sequential(backbone, nn.Tanh(), nn.Linear(4, 2)))
    for seed in (0, 1):
        start = fl.init(loop, seed)
        fl.train(start)
        assert torch.equal(start.params["0.weight"], before)
    assert torch.equal(backbone.weight, before)


def test_templates_hold_no_numbers() -> None:
    loop = make_loop(network=lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    fl.init(loop)
    module = template(loop)
    floating = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    assert all(tensor.isnan().all() for tensor in floating)


class RaisingLater(Base):
    """What is wrong with it shows in the second step only."""

    def set_up(self) -> None:
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def middle(self, h: Tensor) -> Tensor:
        self.calls += 1  # type: ignore[operator]
        return h


def test_a_counter_in_a_buffer_is_what_is_meant() -> None:
    assert len(digests(RaisingLater)) == 1


@pytest.mark.parametrize("real_batch", [False, True])
def test_a_dry_run_finds_it_with_a_real_batch(real_batch: bool) -> None:
    loop = make_loop(network=Annealed)
    if not real_batch:
        fl.dry_run(loop)
        return
    with pytest.raises(ValueError, match=r"network\.calls"):
        fl.dry_run(loop, real_batch=True)


def test_kernels_that_add_in_no_fixed_order_are_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A difference that is gone on one thread with deterministic kernels is one of rounding."""

    class Rounding(Base):
        def middle(self, h: Tensor) -> Tensor:
            return h if torch.are_deterministic_algorithms_enabled() else h * next(noise)

    noise = iter([1.0, 1.0 + 1e-6] * 20)
    monkeypatch.setattr("functional_loop.purity.reachable.MOST", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            fl.train(fl.init(make_loop(network=Rounding, epochs=1)))
    finally:
        torch.set_num_threads(threads)
    assert any("no fixed order" in str(warning.message) for warning in found)


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
