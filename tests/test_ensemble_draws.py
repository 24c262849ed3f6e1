"""Vectorised members draw the random numbers of their solo runs, or a reason says why they are not vectorised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import functional_loop as fl
from functional_loop.compile.draws import Recording, StrangeDrawError
from functional_loop.core.rng import torch_seeded
from functional_loop.ensembles.member_draws import OwnDraws, check_draws
from functional_loop.ensembles.vmap_rules import over_members

from .closeness import assert_close
from .ensembles import data, digests, make_loop, starts
from .samplers import LAYOUTS, SAMPLERS

MORE_SAMPLERS: dict[str, Callable[[Tensor], Tensor]] = {
    "native_dropout": lambda x: torch.native_dropout(x, 0.5, True)[1],
    "multinomial of values": lambda x: torch.multinomial(x.abs().flatten(0, -2) + 0.1, 2),
    "multinomial of a row": lambda x: torch.multinomial(x.abs().flatten() + 0.1, 2),
    "binomial": lambda x: torch.binomial(torch.full_like(x, 5.0), x.sigmoid()),
    "gamma": lambda x: torch._standard_gamma(x.exp()),
    "dirichlet": lambda x: torch._sample_dirichlet(x.exp()),
    "gumbel": lambda x: F.gumbel_softmax(x, dim=-1),
    "channels": lambda x: torch.randn_like(x[None], memory_format=torch.channels_last),
    "of a constant": lambda x: F.dropout(torch.ones(3, 5), 0.5) * torch.rand_like(torch.ones(3, 5)),
    "of an expanded tensor": lambda x: torch.bernoulli(x.sigmoid()[:1, :, :1].expand(3, -1, 5)),
    "in half precision": lambda x: torch.randn(7, dtype=torch.float16),
    "of no rows": lambda x: torch.rand(0, 3).sum() + torch.randn(()),
    "one row": lambda x: torch.randperm(5)[:1] + torch.randint(1, 9, (1,)),
    "from the same state": lambda x: _forked(x) + torch.rand(x.shape),
}


def _forked(x: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=()):
        return torch.rand(x.shape)


@given(
    names=st.lists(st.sampled_from([*SAMPLERS, *MORE_SAMPLERS]), min_size=1, max_size=3),
    layout=st.sampled_from([*LAYOUTS]),
    shape=st.tuples(st.integers(1, 5), st.integers(4, 6), st.integers(4, 6)),
    seeds=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4),
)
def test_members_draw_what_their_solo_runs_draw(
    names: list[str], layout: str, shape: tuple[int, ...], seeds: list[int]
) -> None:
    samplers = [(SAMPLERS | MORE_SAMPLERS)[name] for name in names]

    def draw(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(sampler(LAYOUTS[layout](x)) for sampler in samplers)

    with torch_seeded(1):
        x = torch.randn(len(seeds), *shape)
    alone = []
    for row, seed in zip(x, seeds, strict=True):
        with torch_seeded(seed), Recording(seed) as recording:
            alone.append(draw(row))
    check_draws(draws := recording.all_draws())
    before = torch.get_rng_state()
    with OwnDraws(draws, [torch.Generator().manual_seed(seed) for seed in seeds]):
        together = over_members(draw, (x,), len(seeds), "different")
    assert torch.equal(torch.get_rng_state(), before)
    for i, own in enumerate(alone):
        for made, expected in zip(together, own, strict=True):
            assert torch.equal(made[i], expected)


STRANGE: dict[str, Callable[[Tensor], Any]] = {
    "rrelu_with_noise": lambda x: F.rrelu(x, training=True),
    "sets the state of torch's generator": lambda x: (torch.rand(2), torch.manual_seed(3), torch.rand(2)),
    "a generator that it is given": lambda x: torch.rand(2, generator=torch.Generator()),
}


@pytest.mark.parametrize("reason", STRANGE)
def test_what_can_not_be_drawn_for_all_members_is_refused_by_name(reason: str) -> None:
    with torch_seeded(0), Recording(0) as recording:
        STRANGE[reason](torch.ones(3))
    with pytest.raises(StrangeDrawError, match=reason):
        check_draws(recording.all_draws())


@pytest.mark.parametrize("draws", [0, 2])
def test_other_draws_than_those_of_a_solo_run_are_refused(draws: int) -> None:
    with torch_seeded(0), Recording(0) as recording:
        for _ in range(draws):
            torch.rand(2)
    with pytest.raises(StrangeDrawError), OwnDraws(recording.all_draws(), [torch.Generator(), torch.Generator()]):
        over_members(lambda x: x + torch.rand(2), (torch.ones(2, 2),), 2, "different")


class Sequence(nn.Module):
    """A body of tokens, and a head of their mean."""

    def __init__(self, body: nn.Module, head: int = 6) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(head, 2)

    def forward(self, x: Tensor) -> Tensor:
        made = self.body(x)
        return self.head((made[0] if isinstance(made, tuple) else made).mean(1))


class Function(nn.Module):
    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.drop, self.function = nn.Linear(6, 6), nn.Dropout(0.5), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.linear(x))


class NoisyGradient(torch.autograd.Function):
    """Noise on a gradient, by a function that vmap knows."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * torch.rand_like(grads[0])


def encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.3, batch_first=True)
    return nn.TransformerEncoder(layer, 2, **options)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 3, dropout=0.4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]


def sampled(own: nn.Module, x: Tensor) -> Tensor:
    picked = torch.multinomial(x.detach().flatten(0, 1).softmax(1), 2)
    return x + x.detach().flatten(0, 1).gather(1, picked).mean() + torch.randperm(6) + torch.normal(0.0, 1.0, x.shape)


VECTORISED: dict[str, Callable[[], nn.Module]] = {
    "transposed": lambda: Sequence(Function(lambda own, x: own.drop(x.transpose(1, 2)).transpose(1, 2))),  # type: ignore[operator]
    "attention": lambda: Sequence(Attends()),
    "an encoder": lambda: Sequence(encoder(enable_nested_tensor=False)),
    "samplers": lambda: Sequence(Function(sampled)),
    "a noisy gradient": lambda: Sequence(Function(lambda own, x: NoisyGradient.apply(x))),  # type: ignore[no-untyped-call]
    "batch norm and dropout": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(24, 6), nn.BatchNorm1d(6), nn.AlphaDropout(0.2), nn.Linear(6, 2)
    ),
}


def tokens_loop(network: Callable[[], nn.Module], **changes: Any) -> fl.Loop:
    """Two batches of eight sequences and one of four, and validation on six."""
    with fl.seeded(0):
        x = torch.randn(26, 4, 6, dtype=torch.float64)
    y = (x.sum((1, 2)) > 0).long()
    train, valid = fl.batches(x[:20], y[:20], batch_size=8), fl.batches(x[20:], y[20:], batch_size=6)
    return make_loop(network=network, train=train, valid=valid, **({"epochs": 1} | changes))


@pytest.mark.parametrize("kind", VECTORISED)
def test_vectorised_members_that_draw_end_as_their_solo_runs(kind: str) -> None:
    contexts = starts(tokens_loop(VECTORISED[kind]))
    stacked = fl.stack(contexts, mode="vectorised")
    for member, ctx in zip(fl.unstack(fl.train(stacked)), contexts, strict=True):
        assert_close(member, fl.train(ctx))


def test_batches_keep_their_layout_which_decides_what_is_drawn() -> None:
    x, y = data()
    rows = torch.utils.data.TensorDataset(x.view(70, 2, 3), y)

    def to_batch(item: Any) -> fl.Batch:
        return fl.Batch(x=item[0].transpose(1, 2), y=item[1])

    source = fl.batches(torch.utils.data.DataLoader(rows, batch_size=16, shuffle=True), to_batch=to_batch)
    network = nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.Linear(6, 2))
    contexts = starts(make_loop(network=lambda: network, train=source, valid=None, measures_valid=(), epochs=1))
    for member, ctx in zip(fl.unstack(fl.train(fl.stack(contexts, mode="vectorised"))), contexts, strict=True):
        assert_close(member, fl.train(ctx))


def hooked(own: nn.Module, x: Tensor) -> Tensor:
    if x.requires_grad:
        # The first gradients are too small to be changed by it.
        x.register_hook(lambda grad: grad.clamp(-0.1, 0.1))
    return x


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = encoder(), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x, src_key_padding_mask=x[..., 0] > 1.2).mean(1))  # type: ignore[no-any-return]


def hooked_module() -> nn.Module:
    body = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    body[1].register_full_backward_hook(lambda module, into, out: (into[0].clamp(-0.1, 0.1),))
    return Sequence(body)


def recomputed(own: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(own.drop, x, use_reentrant=False)  # type: ignore[no-any-return]


def branching(own: nn.Module, x: Tensor) -> Tensor:
    return x if own.training or x.sum() > 0 else -x


def other_in_evaluation(own: nn.Module, x: Tensor) -> Tensor:
    return x if own.training or not torch._C._functorch.is_batchedtensor(x) else -x


CAN_NOT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a mask": (Masked, "vmap can't run it"),
    "a recurrent network": (lambda: Sequence(nn.LSTM(6, 6, batch_first=True)), "vmap can't run it"),
    "a checkpoint": (lambda: Sequence(Function(recomputed)), "vmap can't run it"),
    "a branch in evaluation": (lambda: Sequence(Function(branching)), "vmap can't run it"),
    "a hook of a gradient": (lambda: Sequence(Function(hooked)), "registers a hook of a gradient"),
    "a hook of a module": (hooked_module, "asks whether a tensor requires gradients"),
    "noise": (lambda: Sequence(nn.RReLU()), "rrelu_with_noise"),
}


@pytest.mark.parametrize("kind", CAN_NOT)
def test_members_that_can_not_be_computed_at_once_take_turns(kind: str) -> None:
    network, reason = CAN_NOT[kind]
    contexts = starts(tokens_loop(network), members=2)
    stacked = fl.stack(contexts)
    assert reason in fl.ensemble_mode(stacked)
    assert digests(fl.unstack(fl.train(stacked))) == digests([fl.train(ctx) for ctx in contexts])
    with pytest.raises(ValueError, match=f"can't be trained at once.*{reason}"):
        fl.train(fl.stack(contexts, mode="vectorised"), steps=1)


DIFFERS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "an evaluation of member 0 is not that of its solo run": other_in_evaluation,
    "a step of member 0 is not that of its solo run": lambda own, x: (
        x * (1 + own.training * torch._C._functorch.is_batchedtensor(x))
    ),
}


@pytest.mark.parametrize("reason", DIFFERS)
def test_members_that_would_be_others_at_once_take_turns_with_a_warning(reason: str) -> None:
    contexts = starts(tokens_loop(lambda: Sequence(Function(DIFFERS[reason]))), members=2)
    with pytest.raises(ValueError, match=reason):
        fl.train(fl.stack(contexts, mode="vectorised"), steps=1)
    with pytest.warns(UserWarning, match=f"computed in turn, because {reason}: .* differs by"):
        trained = fl.train(stacked := fl.stack(contexts))
    assert digests(fl.unstack(trained)) == digests([fl.train(ctx) for ctx in contexts])
    # Once is enough.
    fl.train(stacked, steps=1)


def only_in_rows_of_eight(own: nn.Module, x: Tensor) -> Tensor:
    return x if len(x) != 4 or x.sum() < 1e9 else -x


@pytest.mark.parametrize("steps", [None, 4])
def test_members_take_turns_from_the_batch_on_that_can_not_be_computed_at_once(steps: int | None) -> None:
    loop = tokens_loop(lambda: Sequence(Function(only_in_rows_of_eight)), epochs=2)
    contexts = starts(loop, members=2)
    stacked = fl.stack(contexts)
    assert fl.ensemble_mode(stacked) == "vectorised"
    before = fl.train(stacked, steps=2)
    with pytest.raises(ValueError, match="mode='vectorised'"):
        fl.train(fl.stack(contexts, mode="vectorised"))
    with pytest.warns(UserWarning, match="computed in turn, because torch.func.vmap can't run it"):
        trained = fl.train(stacked, steps=steps)
    assert "vmap can't run it" in fl.ensemble_mode(stacked)
    assert fl.digest(trained) == fl.digest(fl.train(before, steps=None if steps is None else steps - 2))
    for member, ctx in zip(fl.unstack(trained), contexts, strict=True):
        assert_close(member, fl.train(ctx, steps=steps))


def test_predictions_that_can_not_be_computed_at_once_are_made_in_turn() -> None:
    loop = tokens_loop(lambda: Sequence(Function(only_in_rows_of_eight)))
    stacked = fl.stack(starts(loop, members=2))
    x = torch.ones(4, 4, 6, dtype=torch.float64)
    with pytest.warns(UserWarning, match="computed in turn"):
        made = fl.predict(stacked, x)
    assert torch.equal(made, torch.stack([fl.predict(ctx, x) for ctx in fl.unstack(stacked)]))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_rounding_is_no_reason_to_take_turns(scale: float) -> None:
    # The gradients of biases before batch norm are made of rounding errors.
    def network() -> nn.Module:
        blocks = [(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.1)) for _ in range(4)]
        return nn.Sequential(nn.Linear(6, 8), *(layer for block in blocks for layer in block), nn.Linear(8, 2))

    x, y = data()
    source = fl.batches(scale * x.float(), y, batch_size=10, shuffle=True)
    loop = make_loop(double=False, network=network, train=source, valid=None, measures_valid=())
    fl.train(fl.stack(starts(loop), mode="vectorised"), steps=8)
