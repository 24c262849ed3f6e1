"""Parameters and buffers of a loss: trained, saved, continued and given back like those of the network."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import functional_loop as fl
from functional_loop.callbacks import CallbackSet, history
from functional_loop.callbacks.gradients.averaging import averaged, ema
from functional_loop.compile import graphs
from functional_loop.engine.network import has_tensors
from functional_loop.learner import TorchClassifier
from tests.learners import X as ROWS_X
from tests.learners import Y as ROWS_Y
from tests.processes import in_a_fresh_process
from tests.sample_loops import data, epoch_of, make_loop, mlp, recorder


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.ReLU())
        self.left, self.right = nn.Linear(8, 1), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        return self.left(h), self.right(h)


class TaskWeights(nn.Module):
    """A log variance for every task: Kendall et al., "Multi-Task Learning Using Uncertainty to Weigh Losses", 2018."""

    seen: Tensor

    def __init__(self, tasks: int = 2) -> None:
        super().__init__()
        self.log_variances = nn.Parameter(torch.zeros(tasks))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, y_hats: tuple[Tensor, ...], y: Tensor) -> Tensor:
        if self.training:
            self.seen += len(y)
        errors = torch.stack([(y_hat - y[:, i : i + 1]).square().mean() for i, y_hat in enumerate(y_hats)])
        return ((-self.log_variances).exp() * errors + self.log_variances).sum()


class Temperature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.ones(()))

    def forward(self, y_hat: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.t * y_hat, y) + 0.1 * self.t**2


def two_heads() -> nn.Module:
    with fl.seeded(0):
        return TwoHeads()


def tasks(**changes: Any) -> fl.Loop:
    return make_loop(**{"network": two_heads(), "loss": TaskWeights(), "epochs": 3, **changes})


def fresh_tasks() -> fl.Loop:
    return tasks(optimizer=fl.optimizer(torch.optim.AdamW, lr=0.05), accumulate=2)


def by_hand(
    loop: fl.Loop, network: nn.Module, loss: nn.Module, optimizer: torch.optim.Optimizer, epochs: int = 3
) -> None:
    """The loop that one would write, without dropout: `tasks` with it are compared to each other."""
    for epoch in range(1, epochs + 1):
        network.train()
        loss.train()
        for x, y in epoch_of(loop, epoch):
            optimizer.zero_grad()
            loss(network(x), y).backward()
            optimizer.step()


def quiet() -> nn.Module:
    network = two_heads()
    network.body[2].p = 0.0  # type: ignore[index, union-attr]
    return network


def assert_same(ctx: fl.Context, network: nn.Module, loss: nn.Module) -> None:
    both = [dict(network.state_dict()), dict(loss.state_dict())]
    assert fl.tree_equal([dict(fl.to_module(ctx).state_dict()), dict(fl.to_module(ctx, "loss").state_dict())], both)


looking = recorder([], lambda ctx: ())
WAYS: dict[str, Any] = {
    "in place": ({}, fl.train),
    "iterated": ({}, lambda ctx: list(fl.iterate(ctx))[-1]),
    "with hooks": ({"callbacks": [looking]}, fl.train),
    "checked": ({"callbacks": [looking], "check_pure": True}, fl.train),
    "in turn": ({}, lambda ctx: fl.unstack(fl.train(fl.stack([ctx, ctx], mode="exact")))[1]),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("cls", "flags"),
    [
        (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
        (torch.optim.AdamW, {"lr": 0.05}),
        (torch.optim.Adagrad, {"lr": 0.05}),
    ],
    ids=["sgd", "adamw", "adagrad"],
)
def test_learned_task_weights_are_those_of_the_loop_by_hand(way: str, cls: Any, flags: dict[str, Any]) -> None:
    changes, train = WAYS[way]
    network, loss = quiet(), TaskWeights()
    loop = tasks(network=copy.deepcopy(network), loss=copy.deepcopy(loss), optimizer=fl.optimizer(cls, **flags))
    ctx = train(fl.init(fl.evolve(loop, **changes)))
    by_hand(loop, network, loss, cls([*network.parameters(), *loss.parameters()], **flags))
    assert_same(ctx, network, loss)
    assert not torch.equal(ctx.params["loss.log_variances"], torch.zeros(2))
    assert ctx.buffers["loss.seen"].item() == 30


def test_every_way_to_train_is_the_same_with_dropout_too() -> None:
    found = {way: train(fl.init(tasks(**changes), seed=3)) for way, (changes, train) in WAYS.items()}
    assert len({fl.digest(ctx) for ctx in found.values()}) == 1


def test_a_temperature_is_trained_and_the_module_of_the_user_left_alone() -> None:
    loss = Temperature()
    loss.eval()
    ctx = fl.train(fl.init(make_loop(loss=loss)))
    assert loss.t.item() == 1.0
    assert loss.t.grad is None
    assert not loss.training
    assert ctx.params["loss.t"].item() != 1.0
    module = fl.to_module(ctx, "loss")
    assert isinstance(module, Temperature)
    assert torch.equal(module.t, ctx.params["loss.t"])


def test_groups_and_trainable_parameters_are_chosen_by_pattern() -> None:
    slow = fl.optimizer(torch.optim.SGD, lr=0.1, groups=[{"params": "loss.*", "lr": 0.001}])
    network, loss = quiet(), TaskWeights()
    loop = tasks(network=copy.deepcopy(network), loss=copy.deepcopy(loss), optimizer=slow)
    groups = [{"params": loss.parameters(), "lr": 0.001}, {"params": network.parameters()}]
    by_hand(loop, network, loss, torch.optim.SGD(groups, lr=0.1))
    assert_same(fl.train(fl.init(loop)), network, loss)

    fixed = fl.train(fl.init(tasks(optimizer=fl.optimizer(torch.optim.SGD, lr=0.1, params=["body.*", "left.*"]))))
    assert torch.equal(fixed.params["loss.log_variances"], torch.zeros(2))
    loss = TaskWeights().requires_grad_(False)
    frozen = fl.train(fl.init(tasks(loss=loss)))
    assert torch.equal(frozen.params["loss.log_variances"], torch.zeros(2))
    assert "loss.log_variances" not in frozen.trainable


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_cut_anywhere_goes_on_bit_for_bit(accumulate: int) -> None:
    loop = tasks(optimizer=fl.optimizer(torch.optim.AdamW, lr=0.05), accumulate=accumulate, valid=make_loop().train)
    whole = [fl.digest(ctx) for ctx in fl.iterate(fl.init(loop))]
    for ctx in fl.iterate(fl.init(loop)):
        loaded = fl.load_state_dict(fl.init(tasks(**_arguments(loop))), fl.state_dict(ctx))
        assert fl.digest(loaded) == fl.digest(ctx)
        assert fl.digest(fl.train(loaded)) == whole[-1]


def _arguments(loop: fl.Loop) -> dict[str, Any]:
    return {name: getattr(loop, name) for name in ("optimizer", "accumulate", "valid")}


def continued(folder: Path) -> str:
    return fl.digest(fl.train(fl.resume(fresh_tasks(), folder)))


def test_it_goes_on_in_a_fresh_process(tmp_path: Path) -> None:
    whole = fl.train(fl.init(fresh_tasks()))
    fl.CheckpointStore(tmp_path).save(fl.train(fl.init(fresh_tasks()), steps=4))
    assert in_a_fresh_process(continued, tmp_path) == fl.digest(whole)


def test_the_state_dict_loads_into_plain_modules() -> None:
    ctx = fl.train(fl.init(tasks()))
    sd = fl.state_dict(ctx)
    two_heads().load_state_dict(sd["network"], strict=True)
    loss = TaskWeights()
    loss.load_state_dict(sd["loss"], strict=True)
    assert torch.equal(loss.log_variances, ctx.params["loss.log_variances"])
    assert "loss" not in fl.state_dict(fl.init(make_loop()))


@pytest.mark.parametrize("loss", [TaskWeights(3), Temperature(), nn.functional.mse_loss], ids=["shape", "name", "none"])
def test_the_state_of_another_loss_is_refused(loss: Any) -> None:
    with pytest.raises(fl.StateDictError, match="loss"):
        fl.load_state_dict(fl.init(tasks(loss=loss)), fl.state_dict(fl.init(tasks())))


class Weighted(nn.Module):
    """A buffer that is not in the state_dict() of the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(2), persistent=False)

    def forward(self, y_hat: Tensor, y: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * y.mean(0)
        return (y_hat - y + self.mean).square().mean()


def test_buffers_of_a_loss_that_has_no_parameters_are_state_too() -> None:
    loss = Weighted()
    loop = make_loop(loss=loss)
    ctx = fl.train(fl.init(loop))
    assert not torch.equal(ctx.buffers["loss.mean"], torch.zeros(2))
    assert torch.equal(loss.mean, torch.zeros(2))
    part = fl.train(fl.init(loop), steps=2)
    assert fl.digest(fl.train(fl.load_state_dict(fl.init(make_loop(loss=Weighted())), fl.state_dict(part)))) == (
        fl.digest(ctx)
    )


def test_the_loss_is_in_the_mode_of_the_step() -> None:
    loss = TaskWeights().eval()
    ctx = fl.train(fl.init(tasks(loss=loss)))
    assert ctx.buffers["loss.seen"].item() == 30


class Watching(nn.Module):
    """Without parameters: called as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, y_hat: Tensor, y: Tensor) -> Tensor:
        self.seen.append(len(y))
        return (y_hat - y).square().mean()


def test_a_loss_without_parameters_and_buffers_is_called_itself() -> None:
    loss = Watching()
    fl.train(fl.init(make_loop(loss=loss)))
    assert len(loss.seen) >= 6
    assert not has_tensors(loss)
    assert has_tensors(nn.CrossEntropyLoss(weight=torch.ones(2)))
    assert not has_tensors(nn.CrossEntropyLoss())


class WithChildLoss(nn.Sequential):
    def __init__(self) -> None:
        super().__init__()
        self.loss = nn.Linear(3, 2)


@pytest.mark.parametrize("network", [WithChildLoss(), WithChildLoss], ids=["module", "function"])
def test_a_network_with_a_child_loss_is_refused_beside_a_loss_with_parameters(network: Any) -> None:
    with pytest.raises(ValueError, match=r"the network has a child 'loss'.*Temperature.*give that child"):
        fl.init(make_loop(network=network, loss=Temperature()))
    ctx = fl.train(fl.init(make_loop(network=network)))
    WithChildLoss().load_state_dict(fl.state_dict(ctx)["network"], strict=True)
    assert fl.digest(fl.load_state_dict(fl.init(ctx.loop), fl.state_dict(ctx))) == fl.digest(ctx)
    assert set(fl.loss_function(ctx, data(3))(ctx.params).shape) == set()


class Penalised(nn.Module):
    """A loss that has the network as its child."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.strength = network, nn.Parameter(torch.tensor(0.1))

    def forward(self, y_hat: Tensor, y: Tensor) -> Tensor:
        penalty = sum(parameter.square().sum() for parameter in self.network.parameters())
        return (y_hat - y).square().mean() + self.strength * penalty


def test_tensors_that_the_loss_shares_with_the_network_are_trained_once() -> None:
    network = mlp()
    loss = Penalised(network)
    both = copy.deepcopy(nn.ModuleList([network, loss]))
    loop = make_loop(network=network, loss=loss, optimizer=fl.optimizer(torch.optim.AdamW, lr=0.05), epochs=2)
    start = fl.init(loop)
    assert [name for name in start.params if name.startswith("loss.")] == ["loss.strength"]
    by_hand(loop, both[0], both[1], torch.optim.AdamW(both.parameters(), lr=0.05), epochs=2)
    ctx = fl.train(start)
    assert_same(ctx, both[0], both[1])
    assert fl.digest(fl.load_state_dict(start, fl.state_dict(ctx))) == fl.digest(ctx)
    again = fl.from_checkpoint(loop, fl.to_checkpoint(ctx))
    assert fl.tree_equal((again.params, again.buffers), (ctx.params, ctx.buffers))


def test_members_are_trained_at_once_as_alone() -> None:
    loop = tasks(network=two_heads, epochs=1)
    contexts = [fl.init(loop, seed) for seed in range(3)]
    for mode in ("vectorised", "exact"):
        together = fl.unstack(fl.train(fl.stack(contexts, mode=mode)))
        for ctx, start in zip(together, contexts, strict=True):
            alone = fl.train(start)
            torch.testing.assert_close(ctx.params, alone.params, rtol=1e-4, atol=1e-5)
            assert torch.equal(ctx.buffers["loss.seen"], alone.buffers["loss.seen"])
            if mode == "exact":
                assert fl.digest(ctx) == fl.digest(alone)
    stacked = fl.stack(contexts)
    assert torch.equal(fl.to_module(stacked, "loss", member=2).log_variances, torch.zeros(2))


def test_compiled_steps_train_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interpret(module: torch.fx.GraphModule, inputs: list[Tensor], draws: bool, key: str) -> graphs.Code:
        def run(tensors: list[Tensor]) -> Any:
            return module(*tensors)

        return graphs.Code(run, draws, list(map(graphs.layout, graphs._try(run, inputs))))

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(graphs, "_ahead_of_time", interpret)
    loop = tasks(network=quiet(), epochs=1)
    eager, compiled = fl.train(fl.init(loop)), fl.train(fl.init(fl.evolve(loop, compile=True)))
    torch.testing.assert_close(compiled.params, eager.params)
    torch.testing.assert_close(compiled.buffers, eager.buffers)
    together = fl.train(fl.stack([fl.init(fl.evolve(loop, compile=True))] * 2, mode="vectorised"))
    torch.testing.assert_close(fl.unstack(together)[0].params, eager.params)


def test_derivatives_go_through_it() -> None:
    sgd = fl.optimizer(torch.optim.SGD, lr=0.1)
    loop = tasks(network=quiet(), optimizer=sgd)
    ctx = next(c for c in fl.iterate(fl.init(loop)) if c.stage == "epoch_begin")
    x, y = data(3)
    stepped, unrolled = fl.train_step(ctx, (x, y)), fl.unroll(ctx, [(x, y)])
    torch.testing.assert_close(unrolled.params, stepped.params)
    assert unrolled.buffers["loss.seen"].item() == 10
    slopes = torch.func.grad(fl.loss_function(ctx, (x, y)))(fl.trainable_params(ctx))
    assert slopes["loss.log_variances"].abs().min() > 0
    rows = fl.per_sample_gradients(ctx, (x, y))
    torch.testing.assert_close(rows["loss.log_variances"].mean(0), slopes["loss.log_variances"])


def test_a_torch_optimizer_over_both_modules_goes_out_and_comes_back() -> None:
    adamw = fl.optimizer(torch.optim.AdamW, lr=0.05)
    loop = tasks(network=quiet(), optimizer=adamw)
    first = next(ctx for ctx in fl.iterate(fl.init(loop)) if ctx.stage == "epoch_end")
    network, loss = fl.to_module(first), fl.to_module(first, "loss")
    with pytest.raises(ValueError, match=r"'loss.log_variances'.*one of the loss.*to_module\(ctx, \"loss\"\)"):
        fl.to_optimizer(first, network)
    optimizer = fl.to_optimizer(first, network, loss)
    resumed = fl.evolve(loop, network=network, loss=loss)
    adopted = fl.init(resumed, optimizer_state_from=optimizer)
    assert fl.tree_equal(
        (adopted.params, adopted.buffers, adopted.optimizer_state), (first.params, first.buffers, first.optimizer_state)
    )


def test_plain_checkpoints_hold_the_loss() -> None:
    loop = tasks(optimizer=fl.optimizer(torch.optim.AdamW, lr=0.05))
    ctx = fl.train(fl.init(loop))
    checkpoint = fl.to_checkpoint(ctx)
    TaskWeights().load_state_dict(checkpoint["loss"], strict=True)
    again = fl.from_checkpoint(loop, checkpoint)
    fields = ("params", "buffers", "optimizer_state")
    assert fl.tree_equal([getattr(again, name) for name in fields], [getattr(ctx, name) for name in fields])
    fresh = fl.from_checkpoint(loop, {"network": checkpoint["network"]})
    assert torch.equal(fresh.params["loss.log_variances"], torch.zeros(2))
    with pytest.raises(fl.StateDictError, match="does not fit the loss"):
        fl.from_checkpoint(loop, {**checkpoint, "loss": {"t": torch.ones(())}})
    with pytest.raises(ValueError, match="has the keys network and optimizer, not 'loss'"):
        fl.from_checkpoint(make_loop(network=two_heads()), checkpoint)


def test_the_first_version_saved_nothing_of_a_loss() -> None:
    """Class weights were a constant of the loop; they still are what the loss says."""
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0]))
    x, _ = data(3)
    loop = make_loop(loss=loss, train=fl.batches(x, (x.sum(1) > 0).long(), batch_size=4))
    ctx = fl.train(fl.init(loop), steps=2)
    sd = fl.state_dict(ctx)
    del sd["loss"]
    assert fl.digest(fl.load_state_dict(fl.init(loop), sd)) == fl.digest(ctx)


def test_to_module_says_what_it_can_give() -> None:
    ctx = fl.init(make_loop())
    with pytest.raises(ValueError, match="the loss is no module, but <function mse_loss"):
        fl.to_module(ctx, "loss")
    with pytest.raises(ValueError, match="the part is 'network' or 'loss', not 1; a member is given as member="):
        fl.to_module(ctx, 1)  # type: ignore[arg-type]
    assert isinstance(fl.to_module(fl.init(make_loop(loss=nn.MSELoss())), "loss"), nn.MSELoss)


class CallbackSetLooking(CallbackSet):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_after_backward(self) -> None:
        loss = self.ctx.loss_fn
        assert loss.t.grad is not None
        assert any(parameter is loss.t for group in self.ctx.optimizer.param_groups for parameter in group["params"])
        assert not any("loss" in name for name, _ in self.ctx.network.named_parameters())
        self.seen.append(loss.t.item())

    def on_epoch_end(self) -> None:
        self.ctx.loss_fn.t.data.fill_(5.0)


def test_object_callbacks_see_it_and_may_write_to_it() -> None:
    looking = CallbackSetLooking()
    loop = make_loop(loss=Temperature(), callbacks=[looking])
    ctx = fl.train(fl.init(loop))
    assert looking.seen[0] == 1.0
    assert looking.seen[3] == 5.0
    assert ctx.params["loss.t"].item() == 5.0


def test_callbacks_that_keep_parameters_keep_these() -> None:
    ctx = fl.train(fl.init(make_loop(loss=Temperature(), callbacks=[ema(0.5), history()])))
    assert averaged(ctx).params["loss.t"].item() != ctx.params["loss.t"].item()


def test_a_dry_run_counts_it() -> None:
    found = fl.dry_run(make_loop(loss=Temperature()))
    assert found.parameters == fl.dry_run(make_loop()).parameters + 1
    assert found.stages["init"]["params['loss.t']"] == "float32[]"


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, y_hat: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.scale * y_hat, y)


def test_a_learner_trains_it() -> None:
    loss = Scaled()
    learner = TorchClassifier(loss=loss, epochs=2, device="cpu").fit(ROWS_X, ROWS_Y)
    assert learner.model_.final["loss"]["scale"].item() != 1.0
    assert loss.scale.item() == 1.0
    whole = TorchClassifier(loss=loss, epochs=3, device="cpu").fit(ROWS_X, ROWS_Y)
    learner.partial_fit(ROWS_X, ROWS_Y, epochs=1)
    assert fl.tree_equal(learner.model_.final, whole.model_.final)
    wrong = TorchClassifier(network=nn.Linear(3, 5), loss=loss, epochs=1, device="cpu")
    with pytest.raises(ValueError, match="for this data it must be"):
        wrong.fit(ROWS_X, ROWS_Y)


def test_a_loss_that_cannot_be_swapped_is_refused_by_its_role() -> None:
    with pytest.raises(ValueError, match="the loss has lazy parameters"):
        fl.init(make_loop(loss=nn.Sequential(nn.LazyLinear(2))))
