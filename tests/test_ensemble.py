"""Laws of ensembles: a stacked context trains as its members do, stops as they do, and is saved as they are."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import functional_loop as fl
from functional_loop.ensembles import turns, vmap_rules
from tests.closeness import ABSOLUTE, RELATIVE, assert_close
from tests.ensembles import data, digests, make_loop, starts

OPTIMIZERS: dict[str, fl.Optimizer] = {
    "adamw": fl.optimizer(torch.optim.AdamW, lr=1e-2),
    "adamw groups": fl.optimizer(torch.optim.AdamW, lr=1e-2, groups=[{"params": "*.bias", "weight_decay": 0.0}]),
    "adam": fl.optimizer(torch.optim.Adam, lr=1e-2, amsgrad=True, weight_decay=0.01),
    "sgd": fl.optimizer(torch.optim.SGD, lr=0.1),
    "nesterov": fl.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "rmsprop": fl.optimizer(torch.optim.RMSprop, lr=1e-2, momentum=0.5, centered=True),
}


def losses(ctx: fl.Context) -> list[torch.Tensor]:
    """Of every batch."""
    return [torch.as_tensor(c.last_loss) for c in fl.iterate(ctx) if c.stage == "batch_end"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_vectorised_members_have_the_losses_of_their_solo_runs(name: str) -> None:
    loop = make_loop(optimizer=OPTIMIZERS[name], epochs=1)
    contexts = starts(loop)
    solo = torch.stack([torch.stack(losses(ctx)) for ctx in contexts], dim=1)
    stacked = fl.stack(contexts, mode="vectorised")
    torch.testing.assert_close(torch.stack(losses(stacked)), solo, rtol=RELATIVE, atol=0)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_in_single_precision_every_step_has_the_losses_of_solo_steps_from_the_same_states(name: str) -> None:
    loop = make_loop(double=False, optimizer=OPTIMIZERS[name], epochs=1)
    for solo in zip(*(fl.iterate(ctx) for ctx in starts(loop)), strict=True):
        if solo[0].stage == "batch_end" and solo[0].step < len(loop.train):
            together = fl.train(fl.stack(solo, mode="vectorised"), steps=1).last_loss
            alone = [fl.train(ctx, steps=1).last_loss for ctx in solo]
            torch.testing.assert_close(together, torch.stack(alone), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_vectorised_members_end_as_their_solo_runs(name: str, accumulate: int) -> None:
    loop = make_loop(optimizer=OPTIMIZERS[name], accumulate=accumulate)
    contexts = starts(loop)
    for member, ctx in zip(fl.unstack(fl.train(fl.stack(contexts, mode="vectorised"))), contexts, strict=True):
        assert_close(member, fl.train(ctx))


def test_without_the_levels_of_vmap_members_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    contexts = starts(make_loop())
    usual = fl.train(fl.stack(contexts, mode="vectorised"))
    monkeypatch.setattr(vmap_rules, "_is_known", False)
    monkeypatch.setattr(vmap_rules, "_RULES", dict(vmap_rules._BY_ROWS))
    for member, other in zip(fl.unstack(fl.train(fl.stack(contexts, mode="vectorised"))), fl.unstack(usual)):
        assert_close(member, other)


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS.values(), fl.optimizer(torch.optim.Rprop)], ids=lambda o: "")
def test_exact_members_have_the_bits_of_their_solo_runs(optimizer: fl.Optimizer) -> None:
    contexts = starts(make_loop(optimizer=optimizer, accumulate=2))
    exact = fl.train(fl.stack(contexts, mode="exact"))
    assert digests(fl.unstack(exact)) == digests([fl.train(ctx) for ctx in contexts])


def short_loop(**changes: Any) -> fl.Loop:
    """Seven batches in every epoch."""
    x, y = data()
    return make_loop(train=fl.batches(x[:50], y[:50], batch_size=8, shuffle=True), epochs=2, **changes)


@pytest.mark.parametrize("stride", [1, 3, 7, 20])
def test_members_in_turn_train_for_a_while_each_and_nobody_can_tell(
    stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "STRIDE", stride)
    start = fl.stack(starts(short_loop()), mode="exact")
    given = fl.digest(start)
    watched = list(fl.iterate(start))
    assert len([ctx for ctx in watched if ctx.stage == "batch_end"]) == 14
    after = {ctx.global_step: fl.digest(ctx) for ctx in watched if ctx.stage == "batch_end"}
    assert fl.digest(fl.train(start)) == fl.digest(watched[-1])
    ctx = start
    for steps in (1, 3, 5):
        ctx = fl.train(ctx, steps=steps)
        assert fl.digest(ctx) == after[ctx.global_step]
    assert ctx.global_step == 9
    assert fl.digest(fl.train(ctx)) == fl.digest(watched[-1])
    assert fl.digest(start) == given


def test_hooks_for_the_whole_ensemble_see_every_batch_of_members_in_turn() -> None:
    seen: list[int] = []

    def look(ctx: fl.Context) -> fl.Context:
        seen.append(ctx.global_step)
        return ctx

    fl.train(fl.stack(starts(short_loop(callbacks=[fl.Callback("look", whole=True, batch_end=look)])), mode="exact"))
    assert seen == list(range(1, 15))


def test_an_error_in_a_member_in_turn_carries_a_context_of_all_from_which_to_go_on() -> None:
    fails = [True]

    class Fails(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if fails[0] and self.training and len(x) == 2:
                raise ArithmeticError("odd batch")
            return super().forward(x)

    start = fl.stack(starts(short_loop(network=lambda: Fails(6, 2))), mode="exact")
    with pytest.raises(ArithmeticError, match="odd batch") as caught:
        fl.train(start)
    last = fl.context_of(caught.value)
    assert last is not None
    fails[0] = False
    assert fl.digest(fl.train(last)) == fl.digest(fl.train(start))


@pytest.mark.parametrize("mode", ["vectorised", "exact"])
def test_the_argument_of_train_stays_as_it_is(mode: str) -> None:
    stacked = fl.stack(starts(make_loop()), mode=mode)
    half = fl.train(stacked, steps=5)
    before = fl.digest(stacked), fl.digest(half)
    fl.train(half)
    assert (fl.digest(stacked), fl.digest(half)) == before


def test_stack_and_unstack_are_inverse() -> None:
    contexts = [fl.train(ctx, steps=5) for ctx in starts(make_loop())]
    stacked = fl.stack(contexts)
    assert digests(fl.unstack(stacked)) == digests(contexts)
    assert stacked.params["4.weight"].shape == (3, 8, 8)
    assert torch.as_tensor(stacked.last_loss).shape == (3,)
    assert fl.digest(fl.stack(fl.unstack(stacked))) == fl.digest(stacked)


@pytest.mark.parametrize("mode", ["vectorised", "exact"])
def test_training_in_pieces_is_training_at_once(mode: str) -> None:
    stacked = fl.stack(starts(make_loop(accumulate=2)), mode=mode)
    whole = fl.digest(fl.train(stacked))
    for steps in (0, 1, 3, 4, 7, 12):
        part = fl.train(stacked, steps=steps)
        assert part.global_step == steps
        assert fl.digest(fl.train(part)) == whole


@pytest.mark.parametrize("mode", ["vectorised", "exact"])
def test_the_boundaries_are_those_of_a_solo_run(mode: str) -> None:
    loop = make_loop(eval_freq=2)
    contexts = starts(loop)
    solo = [(c.stage, c.epoch, c.step, c.step_valid) for c in fl.iterate(contexts[0])]
    stacked = list(fl.iterate(fl.stack(contexts, mode=mode)))
    assert [(c.stage, c.epoch, c.step, c.step_valid) for c in stacked] == solo
    for place in stacked[:: len(stacked) // 5]:
        assert fl.digest(fl.train(place)) == fl.digest(stacked[-1])


def stop_early(epochs: dict[int, int]) -> fl.Callback:
    """Member by seed: the epoch after which it terminates."""

    def stop(ctx: fl.Context) -> fl.Context:
        return fl.evolve(ctx, terminate=True) if epochs.get(ctx.seed) == ctx.epoch else ctx

    return fl.Callback("stop", valid_end=stop)


@pytest.mark.parametrize("mode", ["vectorised", "exact"])
def test_a_member_that_has_terminated_never_changes(mode: str) -> None:
    contexts = starts(make_loop(epochs=5, callbacks=[stop_early({1: 2, 2: 3})]), members=4)
    solo = [fl.train(ctx) for ctx in contexts]
    ends: dict[int, str] = {}
    for place in fl.iterate(fl.stack(contexts, mode=mode)):
        for i, member in enumerate(fl.unstack(place)):
            if member.stage == "end":
                assert ends.setdefault(i, fl.digest(member)) == fl.digest(member)
        if place.stage == "epoch_begin":
            assert sorted(ends) == [i for i, end in enumerate(solo) if end.epoch < place.epoch]
    for member, expected in zip(fl.unstack(place), solo, strict=True):
        assert (member.epoch, member.terminate) == (expected.epoch, expected.terminate)
        assert_close(member, expected)


@pytest.mark.parametrize("steps", [0, 5, 11, None])
def test_stacking_commutes_with_save_and_load(steps: int | None, tmp_path: Path) -> None:
    loop = make_loop(callbacks=[stop_early({1: 2})])
    stacked = fl.train(fl.stack(starts(loop)), steps=steps)
    sd = fl.state_dict(stacked)
    loaded = fl.load_state_dict(fl.stack([fl.init(loop, 7)] * 3), sd)
    apart = [fl.load_state_dict(fl.init(loop), fl.state_dict(member)) for member in fl.unstack(stacked)]
    assert fl.digest(loaded) == fl.digest(stacked) == fl.digest(fl.stack(apart))
    assert fl.digest(fl.train(loaded)) == fl.digest(fl.train(stacked))
    fl.CheckpointStore(tmp_path).save(stacked)
    assert fl.digest(fl.CheckpointStore(tmp_path).load(loop)) == fl.digest(stacked)
    assert fl.digest(fl.resume(fl.stack(starts(loop)), tmp_path)) == fl.digest(stacked)


def test_a_state_dict_has_that_of_every_member_and_is_plain() -> None:
    stacked = fl.train(fl.stack(starts(make_loop())), steps=5)
    sd = fl.state_dict(stacked)
    fl.to_module(stacked, member=1).load_state_dict(sd["members"][1]["network"], strict=True)
    buffer = io.BytesIO()
    torch.save(sd, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=True)
    assert fl.digest(fl.load_state_dict(fl.stack(starts(make_loop())), again)) == fl.digest(stacked)


def test_how_members_run_is_saved_with_them() -> None:
    loop = make_loop()
    sd = fl.state_dict(fl.train(fl.stack(starts(loop), mode="exact", batch_hooks="each"), steps=2))
    loaded = fl.load_state_dict(fl.stack(starts(loop)), sd)
    assert loaded.ensemble is not None
    assert (loaded.ensemble.mode, loaded.ensemble.batch_hooks) == ("exact", "each")


@pytest.mark.parametrize("stacked", [True, False])
def test_a_state_dict_of_other_members_is_refused(stacked: bool) -> None:
    loop = make_loop()
    sd = fl.state_dict(fl.stack(starts(loop, members=3)))
    with pytest.raises(fl.StateDictError, match=r"members: 3 in what was saved, (2|none) here"):
        fl.load_state_dict(fl.stack(starts(loop, members=2)) if stacked else fl.init(loop), sd)
    with pytest.raises(fl.StateDictError, match="members: none in what was saved, 3 here"):
        fl.load_state_dict(fl.stack(starts(loop)), fl.state_dict(fl.init(loop)))


def test_a_store_refuses_an_ensemble_of_other_seeds(tmp_path: Path) -> None:
    loop = make_loop()
    store = fl.CheckpointStore(tmp_path)
    store.save(fl.stack(starts(loop)))
    with pytest.raises(fl.StateDictError, match=r"members: \[0, 1, 2\] in what was saved, \[0, 1, 2, 3\] here"):
        store.save(fl.stack(starts(loop, members=4)))
    with pytest.raises(fl.StateDictError, match="another seed"):
        fl.resume(loop, tmp_path, seed=0)


HYPERPARAMETERS: list[tuple[Any, dict[str, Any], dict[str, list[Any]]]] = [
    (torch.optim.AdamW, {}, {"lr": [1e-3, 1e-2, 0.1], "weight_decay": [0.0, 0.1, 0.5]}),
    (
        torch.optim.Adam,
        {"amsgrad": True},
        {"betas": [[0.9, 0.999], [0.5, 0.9], [0.0, 0.99]], "weight_decay": [0, 0.1, 0.2]},
    ),
    (torch.optim.SGD, {"lr": 0.1, "dampening": 0.1}, {"momentum": [0.0, 0.5, 0.9]}),
    (
        torch.optim.SGD,
        {"momentum": 0.9, "nesterov": True},
        {"lr": [0.1, 0.01, 0.001], "weight_decay": [0.0, 0.1, 0.01]},
    ),
    (torch.optim.RMSprop, {"centered": True}, {"lr": [1e-3, 1e-2, 0.02], "alpha": [0.9, 0.99, 0.5]}),
    (torch.optim.RMSprop, {"maximize": True, "momentum": 0.9}, {"lr": [1e-4, 1e-3, 2e-3], "eps": [1e-8, 1e-3, 0.1]}),
]


@pytest.mark.parametrize(("cls", "flags", "values"), HYPERPARAMETERS)
def test_members_may_have_hyperparameters_of_their_own(
    cls: type[torch.optim.Optimizer], flags: dict[str, Any], values: dict[str, list[Any]]
) -> None:
    loop = make_loop(optimizer=fl.optimizer(cls, **flags), epochs=1)
    contexts = [
        ctx.with_hyperparameters(**{name: tried[i] for name, tried in values.items()})
        for i, ctx in enumerate(starts(loop))
    ]
    solo = torch.stack([torch.stack(losses(ctx)) for ctx in contexts], dim=1)
    stacked = fl.stack(contexts, mode="vectorised")
    torch.testing.assert_close(torch.stack(losses(stacked)), solo, rtol=RELATIVE, atol=ABSOLUTE)


def test_hyperparameters_of_members_can_be_set_as_a_tensor() -> None:
    loop = make_loop(epochs=1)
    rates = [0.1, 0.01, 0.001]
    stacked = fl.stack(starts(loop)).with_hyperparameters(lr=torch.tensor(rates, dtype=torch.float64))
    apart = fl.stack([c.with_hyperparameters(lr=lr) for c, lr in zip(starts(loop), rates, strict=True)])
    assert fl.digest(stacked) == fl.digest(apart)
    assert stacked.optimizer_state["groups"][0]["lr"].shape == (3,)
    with pytest.raises(ValueError, match=r"lr is a tensor of shape \[2\]"):
        stacked.with_hyperparameters(lr=torch.ones(2))


def test_a_measure_may_need_values() -> None:
    rows = fl.measure(
        "largest",
        init=lambda: 0.0,
        update=lambda largest, y_hat, y: max(largest, y_hat.max().item()),
        compute=lambda largest: largest,
    )
    loop = make_loop(measures_train=[rows], measures_valid=[rows], epochs=1)
    contexts = starts(loop)
    for member, ctx in zip(fl.unstack(fl.train(fl.stack(contexts, mode="vectorised"))), contexts, strict=True):
        assert_close(member, fl.train(ctx))


def sources() -> dict[str, fl.BatchSource]:
    x, y = data()
    rows = torch.utils.data.TensorDataset(x, y)
    return {
        "in order": fl.batches(x, y, batch_size=16),
        "redrawn": fl.batches(x, y, batch_size=16, weights=torch.ones(70)),
        "bootstrap": fl.batches(x, y, batch_size=16, shuffle=True, bootstrap=True),
        "bootstrap of a dataset": fl.batches(rows, batch_size=16, bootstrap=True),
        "dataset": fl.batches(rows, batch_size=16, shuffle=True),
        "same order": fl.same_order(fl.batches(x, y, batch_size=16, shuffle=True), seed=3),
        "loader": fl.batches(torch.utils.data.DataLoader(rows, batch_size=16, shuffle=True)),
    }


@pytest.mark.parametrize("kind", sources())
def test_every_member_reads_the_data_of_its_solo_run(kind: str) -> None:
    loop = make_loop(train=sources()[kind], epochs=1)
    contexts = starts(loop)
    solo = torch.stack([torch.stack(losses(ctx)) for ctx in contexts], dim=1)
    torch.testing.assert_close(torch.stack(losses(fl.stack(contexts, mode="vectorised"))), solo, rtol=RELATIVE, atol=0)


def test_members_can_read_the_data_in_the_same_order() -> None:
    source = fl.same_order(fl.batches(*data(), batch_size=16, shuffle=True), seed=3)
    seen: list[torch.Tensor] = []

    def look(ctx: fl.Context) -> fl.Context:
        seen.append(ctx.batch.index)
        return ctx

    loop = make_loop(train=source, callbacks=[fl.Callback("look", batch_end=look)], epochs=1)
    fl.train(fl.stack(starts(loop), mode="vectorised", batch_hooks="each"), steps=1)
    alone = next(fl.batches(*data(), batch_size=16, shuffle=True).fetch(3, 1, 0, ()))[0].index
    assert all(torch.equal(index, alone) for index in seen)
    assert len(seen) == 3


def test_a_single_member_and_equal_seeds_work() -> None:
    loop = make_loop()
    one = fl.train(fl.init(loop, 5))
    for members in (1, 2):
        for member in fl.unstack(fl.train(fl.stack([fl.init(loop, 5)] * members, mode="vectorised"))):
            assert_close(member, one)


class OfComplexNumbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 2, dtype=torch.complex128))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.to(self.weight.dtype) @ self.weight).abs()


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_parameters_may_be_complex(cls: type[torch.optim.Optimizer]) -> None:
    loop = make_loop(network=OfComplexNumbers, optimizer=fl.optimizer(cls, lr=1e-2))
    contexts = starts(loop, 2)
    ensemble = fl.stack(contexts, mode="vectorised")
    for member, ctx in zip(fl.unstack(fl.train(ensemble)), contexts, strict=True):
        assert_close(member, fl.train(ctx))


def test_reduced_precision_works() -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 2))

    contexts = starts(make_loop(double=False, network=network, autocast=torch.bfloat16))
    together = fl.train(fl.stack(contexts, mode="vectorised"), steps=1).last_loss
    # Two steps of bfloat16 from one number to the next are 1.6 %.
    alone = torch.stack([fl.train(ctx, steps=1).last_loss for ctx in contexts])
    torch.testing.assert_close(together, alone, rtol=0.02, atol=0)


def test_stack_refuses_what_does_not_belong_together() -> None:
    loop = make_loop()
    a, b = starts(loop, members=2)
    with pytest.raises(ValueError, match="no context"):
        fl.stack([])
    with pytest.raises(TypeError, match="takes a Context, not str"):
        fl.stack(["a"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="another Loop"):
        fl.stack([a, fl.init(make_loop())])
    with pytest.raises(ValueError, match="same place"):
        fl.stack([a, fl.train(b, steps=1)])
    with pytest.raises(ValueError, match="stacked one"):
        fl.stack([fl.stack([a, b])])
    with pytest.raises(ValueError, match="mode is one of 'auto', 'vectorised', 'exact', not 'fast'"):
        fl.stack([a, b], mode="fast")
    with pytest.raises(ValueError, match=r"train\(ctx, steps=1\)"):
        fl.train_step(fl.train(fl.stack([a, b]), steps=1), data())


def test_an_error_in_the_network_carries_the_last_good_context() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[-2] != 16:
                raise ArithmeticError("odd batch")
            return self.layer(x)  # type: ignore[no-any-return]

    stacked = fl.stack(starts(make_loop(network=Fails)), mode="vectorised")
    with pytest.raises(ArithmeticError, match="odd batch") as caught:
        fl.train(stacked)
    last = fl.context_of(caught.value)
    assert last is not None
    assert (last.global_step, last.stage) == (3, "batch_end")
    assert fl.digest(last) == fl.digest(fl.train(stacked, steps=3))
