"""How members run, grids, the best member, and what an ensemble predicts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import functional_loop as fl
from tests.closeness import ABSOLUTE, RELATIVE
from tests.ensembles import accuracy, data, digests, make_loop, starts


class DrawsElsewhere(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (1 + random.random())  # type: ignore[no-any-return]


class Branches(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y if y.sum() > 0 else -y  # type: ignore[no-any-return]


class Embeds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2, 2, max_norm=0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table((x[:, 0] > 0).long())  # type: ignore[no-any-return]


class Convolves(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 5), nn.Flatten(), nn.Linear(4, 2))


IN_TURN: list[tuple[dict[str, Any], str]] = [
    ({"optimizer": fl.optimizer(torch.optim.Rprop)}, "Rprop has no vectorised form"),
    ({"network": lambda: DrawsElsewhere(nn.Linear(6, 2))}, "random numbers from numpy or random"),
    ({"network": lambda: Branches(nn.Linear(6, 2))}, "torch.func.vmap can't run it"),
    ({"network": Embeds}, "writes to its parameters"),
]


@pytest.mark.parametrize(("changes", "reason"), IN_TURN)
def test_members_run_in_turn_where_they_can_not_run_at_once(changes: dict[str, Any], reason: str) -> None:
    contexts = starts(make_loop(**changes, epochs=1))
    stacked = fl.stack(contexts)
    assert fl.ensemble_mode(stacked).startswith("in turn: ")
    assert reason in fl.ensemble_mode(stacked)
    assert digests(fl.unstack(fl.train(stacked))) == digests([fl.train(ctx) for ctx in contexts])
    with pytest.raises(ValueError, match=r"mode='vectorised'.*mode='exact'"):
        fl.train(fl.stack(contexts, mode="vectorised"))


def test_convolutions_run_in_turn_unless_it_is_demanded() -> None:
    contexts = starts(make_loop(network=Convolves, epochs=1))
    assert "Conv1d of several members at once is slower" in fl.ensemble_mode(fl.stack(contexts))
    demanded = fl.stack(contexts, mode="vectorised")
    assert fl.ensemble_mode(demanded) == "vectorised"
    for member, ctx in zip(fl.unstack(fl.train(demanded)), contexts, strict=True):
        torch.testing.assert_close(member.params, fl.train(ctx).params, rtol=RELATIVE, atol=ABSOLUTE)


def test_members_of_different_forms_run_in_turn() -> None:
    loop = make_loop(epochs=1)
    a, b = starts(loop, members=2)
    stacked = fl.stack([a, fl.evolve(b, trainable=b.trainable[1:])])
    assert "ctx.trainable is not of the same form" in fl.ensemble_mode(stacked)
    assert digests(fl.unstack(fl.train(stacked)))[0] == fl.digest(fl.train(a))


def test_the_mode_is_that_of_a_stacked_context() -> None:
    loop = make_loop()
    assert fl.ensemble_mode(fl.stack(starts(loop))) == "vectorised"
    assert fl.ensemble_mode(fl.stack(starts(loop), mode="exact")) == "in turn: mode='exact'"
    with pytest.raises(ValueError, match="stacked context"):
        fl.ensemble_mode(fl.init(loop))


def test_a_grid_has_every_combination() -> None:
    ctx, table = fl.grid(make_loop(), lr=[1e-3, 1e-2], weight_decay=[0, 0.1, 0.2], seeds=[3, 5])
    assert len(table) == 12
    assert table[7] == {"member": 7, "seed": 5, "lr": 1e-2, "weight_decay": 0}
    for row, member in zip(table, fl.unstack(ctx), strict=True):
        group = member.optimizer_state["groups"][0]
        assert (member.seed, group["lr"], group["weight_decay"]) == (row["seed"], row["lr"], row["weight_decay"])
        assert fl.tree_equal(member.params, fl.init(make_loop(), row["seed"]).params)


def test_a_grid_of_lists_of_numbers() -> None:
    ctx, _ = fl.grid(make_loop(), betas=[(0.9, 0.99), (0.8, 0.9)])
    first, second = ctx.optimizer_state["groups"][0]["betas"]
    assert (first.tolist(), second.tolist()) == ([0.9, 0.8], [0.99, 0.9])


def test_a_grid_refuses_what_can_not_work() -> None:
    with pytest.raises(KeyError, match="no hyperparameter 'rate'"):
        fl.grid(make_loop(), rate=[1.0])
    with pytest.raises(TypeError, match="lr is a list"):
        fl.grid(make_loop(), lr=1e-3)
    with pytest.raises(ValueError, match="nothing to train"):
        fl.grid(make_loop(), lr=[])


def test_the_best_member_is_that_of_the_best_score() -> None:
    ctx = fl.train(fl.grid(make_loop(), lr=[1e-5, 1e-2, 1e-1])[0])
    assert fl.best(ctx, "accuracy") == int(torch.as_tensor(dict(ctx.last_scores_valid)["accuracy"]).argmax())
    assert fl.best(ctx, "error") == int(torch.as_tensor(dict(ctx.last_scores_valid)["error"]).argmin())
    nan = torch.full((3,), torch.nan, dtype=torch.float64)
    broken = fl.evolve(ctx, last_scores_valid={"accuracy": nan.index_fill(0, torch.tensor([1]), 0.1), "error": nan})
    assert fl.best(broken, "accuracy") == 1
    with pytest.raises(ValueError, match="no member has a score"):
        fl.best(broken, "error")
    with pytest.raises(KeyError, match="did you mean 'accuracy'"):
        fl.best(ctx, "acuracy")
    undecided = make_loop(measures_valid=[fl.measure("accuracy", accuracy)], measures_train=())
    with pytest.raises(ValueError, match="neither high nor low"):
        fl.best(fl.stack(starts(undecided)), "accuracy")


@pytest.mark.parametrize("mode", ["vectorised", "exact"])
def test_evaluation_is_that_of_the_members(mode: str) -> None:
    ctx = fl.train(fl.stack(starts(make_loop()), mode=mode), steps=6)
    x = data()[0]
    members = fl.unstack(ctx)
    outputs = fl.predict(ctx, x)
    torch.testing.assert_close(outputs, torch.stack([fl.predict(member, x) for member in members]))
    torch.testing.assert_close(outputs, fl.predict(ctx, fl.batches(x, batch_size=9)))
    torch.testing.assert_close(fl.predict_ensemble(ctx, x), outputs.mean(0))
    torch.testing.assert_close(fl.predict_ensemble(ctx, x, "spread"), outputs.std(0, correction=0))
    votes = outputs.argmax(2).sum(0) >= 2
    assert torch.equal(fl.predict_ensemble(ctx, x, "vote"), votes.long())
    for name, scores in fl.validate(ctx).items():
        expected = [fl.validate(member)[name] for member in members]
        assert torch.as_tensor(scores).expand(3).tolist() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="'mean', 'vote', 'spread'"):
        fl.predict_ensemble(ctx, x, "median")
    with pytest.raises(ValueError, match="stacked context"):
        fl.predict_ensemble(members[0], x)


def test_one_member_as_a_module_and_optimizer() -> None:
    ctx = fl.train(fl.stack(starts(make_loop())), steps=6)
    module = fl.to_module(ctx, member=2)
    assert fl.tree_equal(dict(module.state_dict()), fl.state_dict(fl.unstack(ctx)[2])["network"])
    assert fl.to_optimizer(ctx, module, member=2).param_groups[0]["lr"] == 1e-2
    with pytest.raises(ValueError, match="3 members; say which"):
        fl.to_module(ctx)
    with pytest.raises(IndexError, match="no member 3"):
        fl.to_module(ctx, member=3)
    with pytest.raises(ValueError, match="single run"):
        fl.to_module(fl.unstack(ctx)[0], member=0)


def test_what_is_for_one_run_says_so(tmp_path: Path) -> None:
    stacked = fl.stack(starts(make_loop()))
    with pytest.raises(ValueError, match="to_checkpoint takes the context of one run"):
        fl.to_checkpoint(stacked)
    with pytest.raises(ValueError, match="to_safetensors takes the context of one run"):
        fl.to_safetensors(stacked, tmp_path / "network.safetensors")


class Bag(nn.Module):
    """An embedding with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4, sparse=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.embedding(x).mean(1))
        return y


def test_members_with_sparse_slots_are_stacked_saved_and_trained(tmp_path: Path) -> None:
    x, y = torch.arange(60).reshape(20, 3) % 10, torch.linspace(-1, 1, 40).reshape(20, 2)
    loop = fl.Loop(
        Bag,
        nn.functional.mse_loss,
        fl.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9),
        fl.batches(x, y, batch_size=4),
        epochs=2,
    )
    solos = [fl.train(fl.init(loop, seed), steps=3) for seed in (0, 1)]
    assert solos[0].optimizer_state["slots"]["embedding.weight"]["momentum_buffer"].is_sparse
    stacked = fl.stack(solos)
    assert [fl.digest(member) for member in fl.unstack(stacked)] == [fl.digest(solo) for solo in solos]
    with fl.CheckpointStore(tmp_path) as store:
        store.save(stacked)
    ends = [fl.digest(fl.train(solo)) for solo in solos]
    for ctx in (stacked, fl.CheckpointStore(tmp_path).load(loop)):
        assert [fl.digest(member) for member in fl.unstack(fl.train(ctx))] == ends
