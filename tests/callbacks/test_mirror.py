"""`ctx.network` and `ctx.optimizer`: real torch objects that show the context, and what is done to them counts."""

from __future__ import annotations

import collections
import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import functional_loop as fl
from functional_loop.callbacks.objects.callback_set import CallbackSet
from tests.callbacks.laws import holds_for
from tests.callbacks.objects import digests, doing, watching
from tests.loops import OPTIMIZERS
from tests.sample_loops import data, full_loop, hand_written, make_loop, mlp

VALIDATION = ("batch_valid_begin", "batch_valid_end", "valid_end")


def by_object(stage: str, write: Callable[[Any], object], **changes: Any) -> fl.Loop:
    """A loop in which ``write(ctx)`` runs at every ``stage``."""
    callback = doing("Writing", **{f"on_{stage}": lambda self: write(self.ctx)})
    return make_loop(**{"callbacks": [callback]} | changes)


def by_hook(stage: str, hook: fl.Hook, **changes: Any) -> fl.Loop:
    return make_loop(**{"callbacks": [fl.Callback("hook", **{stage: hook})]} | changes)  # type: ignore[arg-type]


def train(loop: fl.Loop) -> fl.Context:
    return fl.train(fl.init(loop))


def tied() -> nn.Module:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(3, 3)
            self.decoder = nn.Linear(3, 3)
            self.decoder.weight = self.encoder.weight
            self.head = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.decoder(self.encoder(x).relu()))

    return Tied()


def recurrent() -> nn.Module:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(3, 4, batch_first=True)
            self.head = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.gru(x.unsqueeze(1))[0][:, -1])

    return Recurrent()


def normed() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.BatchNorm1d(4), nn.Linear(4, 2))


NETWORKS = {"mlp": mlp, "tied": tied, "recurrent": recurrent, "normed": normed}


def network(kind: str) -> nn.Module:
    with fl.seeded(3):
        return NETWORKS[kind]()


# ---- what they show


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_network_shows_the_context(kind: str) -> None:
    def look(ctx: Any) -> bool:
        named = dict(ctx.network.named_parameters())
        grads = {name: p.grad for name, p in named.items() if p.grad is not None}
        return bool(
            fl.tree_equal({name: p.detach() for name, p in named.items()}, ctx.params)
            and fl.tree_equal(dict(ctx.network.named_buffers()), ctx.buffers)
            and fl.tree_equal(grads, ctx.grads or {})
        )

    callback, seen = watching(look)
    x, y = data(3)
    loop = make_loop(network=network(kind), callbacks=[callback], valid=fl.batches(x, y, batch_size=5))
    assert digests(loop) == digests(fl.evolve(loop, callbacks=[]))
    assert len(seen) > 20
    assert all(same for _, same in seen)


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_network_computes_what_the_loop_computes(kind: str) -> None:
    def look(ctx: Any) -> bool:
        with torch.no_grad():
            return torch.equal(ctx.network(ctx.batch.x), ctx.y_hat)

    callback, seen = watching(look, stages=("batch_valid_end",))
    x, y = data(3)
    train(make_loop(network=network(kind), callbacks=[callback], valid=fl.batches(x, y, batch_size=5)))
    assert [same for _, same in seen] == [True] * 4


def test_the_network_is_in_the_mode_of_the_stage() -> None:
    callback, seen = watching(lambda ctx: {part.training for part in ctx.network.modules()})
    train(full_loop(callbacks=[callback]))
    assert all(modes == {stage not in VALIDATION} for stage, modes in seen)


@pytest.mark.parametrize("stage", ["epoch_begin", "batch_end", "end"])
def test_a_part_in_another_mode_is_refused_since_it_would_have_no_effect(stage: str) -> None:
    with pytest.raises(ValueError, match=r"'1' of ctx\.network was put into evaluation mode.*before init\(\)"):
        train(by_object(stage, lambda ctx: ctx.network[1].eval()))


def test_the_whole_network_may_be_used_in_either_mode() -> None:
    def write(ctx: Any) -> None:
        assert all(part.training for part in ctx.network.modules())
        ctx.network.eval()

    assert digests(by_object("batch_end", write)) == digests(make_loop())


def test_a_network_that_keeps_a_part_in_evaluation_mode_is_shown_so() -> None:
    class Frozen(nn.Sequential):
        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            self[1].eval()
            return self

    callback, seen = watching(lambda ctx: [part.training for part in ctx.network], stages=("batch_end",))
    ctx = train(make_loop(network=Frozen(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), callbacks=[callback]))
    assert [modes for _, modes in seen] == [[True, False, True]] * 6
    assert not ctx.buffers["1.num_batches_tracked"]


def test_network_and_optimizer_stay_the_same_objects_and_the_parameters_too() -> None:
    callback, seen = watching(
        lambda ctx: (ctx.network, ctx.optimizer, *ctx.network.parameters(), *ctx.optimizer.param_groups[0]["params"])
    )
    train(full_loop(callbacks=[callback]))
    assert len({tuple(map(id, objects)) for _, objects in seen}) == 1
    net, optimizer, *_ = seen[0][1]
    assert isinstance(net, nn.Sequential)
    assert isinstance(optimizer, torch.optim.AdamW)


def test_the_networks_of_the_user_is_another_one() -> None:
    module = mlp()
    before = copy.deepcopy(module.state_dict())
    seen: list[nn.Module] = []

    def write(ctx: Any) -> None:
        seen.append(ctx.network)
        for parameter in ctx.network.parameters():
            parameter.data.zero_()

    train(by_object("batch_end", write, network=module))
    assert seen[0] is not module
    assert fl.tree_equal(dict(module.state_dict()), dict(before))
    assert not module[0].weight.is_set_to(seen[0][0].weight)  # type: ignore[index]


def test_a_network_made_by_a_function_is_shown_too() -> None:
    callback, seen = watching(lambda ctx: fl.tree_equal(ctx.network[0].weight.detach(), ctx.params["0.weight"]))
    train(make_loop(network=mlp, callbacks=[callback]))
    assert all(same for _, same in seen)


@pytest.mark.parametrize("name", ["adamw", "adamw, fused", "adam, groups", "rmsprop", "asgd", "lbfgs"])
def test_the_optimizer_shows_the_context(name: str) -> None:
    def look(ctx: Any) -> bool:
        shown = {n: ctx.optimizer.state[p] for n, p in ctx.network.named_parameters() if p in ctx.optimizer.state}
        groups = [
            {key: group[key] for key in values}
            for group, values in zip(ctx.optimizer.param_groups, ctx.optimizer_state["groups"], strict=True)
        ]
        as_lists = [{k: list(v) if isinstance(v, tuple) else v for k, v in group.items()} for group in groups]
        return bool(
            fl.tree_equal({n: dict(slot) for n, slot in shown.items()}, ctx.optimizer_state["slots"])
            and fl.tree_equal(as_lists, ctx.optimizer_state["groups"])
        )

    callback, seen = watching(look)
    cls, arguments = OPTIMIZERS[name]
    loop = make_loop(network=nn.Linear(3, 2), optimizer=fl.optimizer(cls, **arguments), callbacks=[callback])
    assert digests(loop) == digests(fl.evolve(loop, callbacks=[]))
    assert all(same for _, same in seen)


# ---- what is written to the network


def clamp(ctx: Any) -> None:
    with torch.no_grad():
        for parameter in ctx.network.parameters():
            parameter.clamp_(-0.1, 0.1)


def clamp_data(ctx: Any) -> None:
    for parameter in ctx.network.parameters():
        parameter.data.clamp_(-0.1, 0.1)


def assign_data(ctx: Any) -> None:
    for parameter in ctx.network.parameters():
        parameter.data = parameter.data.clamp(-0.1, 0.1)


def load_clamped(ctx: Any) -> None:
    names = dict(ctx.network.named_parameters())
    state = ctx.network.state_dict()
    ctx.network.load_state_dict({n: v.clamp(-0.1, 0.1) if n in names else v for n, v in state.items()})


def clamp_through_numpy(ctx: Any) -> None:
    for parameter in ctx.network.parameters():
        array = parameter.detach().numpy()
        array.clip(-0.1, 0.1, out=array)


@pytest.mark.parametrize("write", [clamp, clamp_data, assign_data, load_clamped, clamp_through_numpy])
@pytest.mark.parametrize("stage", ["begin", "epoch_begin", "batch_begin", "after_backward", "batch_end", "end"])
def test_in_place_changes_of_parameters_equal_the_pure_hook(write: Callable[[Any], None], stage: str) -> None:
    def pure(ctx: fl.Context) -> fl.Context:
        return fl.evolve(ctx, params=fl.tree_map(lambda p: p.clamp(-0.1, 0.1), ctx.params))

    assert digests(by_object(stage, write)) == digests(by_hook(stage, pure))


def test_changes_of_tied_weights_are_one_change() -> None:
    def write(ctx: Any) -> None:
        ctx.network.decoder.weight.data.zero_()

    ctx = train(by_object("end", write, network=network("tied")))
    assert "decoder.weight" not in ctx.params
    assert not ctx.params["encoder.weight"].any()
    assert ctx.params["head.weight"].any()


def test_buffers_can_be_written_in_place() -> None:
    def write(ctx: Any) -> None:
        ctx.network[1].running_mean.zero_()
        ctx.network[1].num_batches_tracked += 10

    def pure(ctx: fl.Context) -> fl.Context:
        changed = {"1.running_mean": torch.zeros(4), "1.num_batches_tracked": ctx.buffers["1.num_batches_tracked"] + 10}
        return fl.evolve(ctx, buffers={**ctx.buffers, **changed})

    assert digests(by_object("batch_end", write)) == digests(by_hook("batch_end", pure))


def replace_buffer(ctx: Any) -> None:
    ctx.network[1].running_mean = torch.ones(4)


def replace_parameter(ctx: Any) -> None:
    ctx.network[0].bias = nn.Parameter(torch.ones(4))


def load_by_assignment(ctx: Any) -> None:
    ctx.network.load_state_dict({n: torch.ones_like(v) for n, v in ctx.network.state_dict().items()}, assign=True)


@pytest.mark.parametrize("write", [replace_buffer, replace_parameter, load_by_assignment])
def test_tensors_that_were_replaced_reach_the_next_context(write: Callable[[Any], None]) -> None:
    ctx = train(by_object("end", write))
    name = "1.running_mean" if write is replace_buffer else "0.bias"
    assert ({**ctx.params, **ctx.buffers}[name] == 1).all()


def test_a_forward_call_moves_the_statistics_only_while_training() -> None:
    def call(ctx: Any) -> None:
        ctx.network(torch.full((4, 3), 100.0))

    x, y = data(3)
    usual = {"valid": fl.batches(x, y, batch_size=5)}
    plain = train(make_loop(**usual))
    assert fl.tree_equal(train(by_object("batch_valid_end", call, **usual)).buffers, plain.buffers)
    moved = train(by_object("epoch_end", call, **usual))
    assert moved.buffers["1.num_batches_tracked"] == plain.buffers["1.num_batches_tracked"] + 2


def test_requires_grad_freezes_and_thaws() -> None:
    def write(ctx: Any) -> None:
        ctx.network[0].requires_grad_(ctx.epoch != 1)

    def pure(ctx: fl.Context) -> fl.Context:
        frozen = {"0.weight", "0.bias"} if ctx.epoch == 1 else set()
        return fl.evolve(ctx, trainable=tuple(name for name in ctx.params if name not in frozen))

    loop = by_object("epoch_begin", write)
    assert digests(loop) == digests(by_hook("epoch_begin", pure))
    start = fl.init(loop)
    one = fl.train(start, steps=3)
    assert torch.equal(one.params["0.weight"], start.params["0.weight"])
    assert not torch.equal(fl.train(one).params["0.weight"], start.params["0.weight"])


def test_what_the_optimizer_does_not_cover_cannot_be_made_trainable() -> None:
    optimizer = fl.optimizer(torch.optim.SGD, lr=0.1, params="3.*")
    loop = by_object("begin", lambda ctx: ctx.network.requires_grad_(True), optimizer=optimizer)
    with pytest.raises(ValueError, match=r"'0\.bias' can't be made trainable: the optimizer does not cover it"):
        train(loop)


@pytest.mark.parametrize(
    ("write", "what"),
    [
        (lambda ctx: ctx.network.half(), "dtype"),
        (lambda ctx: setattr(ctx.network[0].weight, "data", torch.zeros(2, 2)), "shape"),
        (lambda ctx: ctx.network[1].running_mean.resize_(7), "shape"),
    ],
)
def test_tensors_keep_their_shape_and_type(write: Callable[[Any], None], what: str) -> None:
    with pytest.raises(ValueError, match=f"has {what} .* but was set to") as caught:
        train(by_object("epoch_end", write))
    assert any("in callback 'writing' at stage 'epoch_end'" in note for note in caught.value.__notes__)


def test_a_numpy_view_that_is_kept_does_not_reach_a_context() -> None:
    def begin(self: Any) -> None:
        self.view = self.ctx.network[0].bias.detach().numpy()
        self.view[:] = 1

    def end_of_batch(self: Any) -> None:
        self.view += 1

    # No digests on the way: they would make the tensors of a context its own.
    first = next(run := fl.iterate(fl.init(make_loop(callbacks=[doing(on_begin=begin, on_batch_end=end_of_batch)]))))
    list(run)
    assert first.params["0.bias"].tolist() == [1, 1, 1, 1]


def test_what_exit_writes_is_dropped() -> None:
    assert digests(by_object("exit", clamp)) == digests(make_loop())


def test_a_copy_of_the_network_may_be_kept() -> None:
    class CallbackSetBest(CallbackSet):
        def on_batch_end(self) -> None:
            if self.ctx.global_step == 2:
                self.kept = copy.deepcopy(self.ctx.network)

    callback = CallbackSetBest()
    loop = make_loop(callbacks=[callback])
    train(loop)
    assert fl.tree_equal(
        {name: p.detach() for name, p in callback.kept.named_parameters()}, fl.train(fl.init(loop), steps=2).params
    )


# ---- gradients


def test_gradients_can_be_clipped_in_place() -> None:
    def clip(ctx: Any) -> None:
        nn.utils.clip_grad_norm_(ctx.network.parameters(), 0.05)

    def pure(ctx: fl.Context) -> fl.Context:
        factor = (0.05 / (nn.utils.get_total_norm(ctx.grads.values()) + 1e-6)).clamp(max=1.0)
        return fl.evolve(ctx, grads={name: grad * factor for name, grad in ctx.grads.items()})

    assert digests(by_object("after_backward", clip)) == digests(by_hook("after_backward", pure))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_can_be_removed_and_replaced(accumulate: int) -> None:
    def write(ctx: Any) -> None:
        ctx.network[0].weight.grad = None
        ctx.network[3].bias.grad = torch.ones(2)

    def pure(ctx: fl.Context) -> fl.Context:
        grads = {name: grad for name, grad in ctx.grads.items() if name != "0.weight"}
        return fl.evolve(ctx, grads={**grads, "3.bias": torch.ones(2)})

    loops = (make("after_backward", do, accumulate=accumulate) for make, do in ((by_object, write), (by_hook, pure)))
    one, other = loops
    assert digests(one) == digests(other)


def test_no_gradients_no_update() -> None:
    ctx = train(by_object("after_backward", lambda ctx: ctx.optimizer.zero_grad()))
    assert fl.tree_equal(ctx.params, fl.init(make_loop()).params)


# ---- the optimizer


def test_hyperparameters_are_those_of_the_groups() -> None:
    def write(ctx: Any) -> None:
        for group in ctx.optimizer.param_groups:
            group["lr"] *= 0.5
            group["momentum"] = 0.5

    def pure(ctx: fl.Context) -> fl.Context:
        return ctx.with_hyperparameters(lr=ctx.optimizer_state["groups"][0]["lr"] * 0.5, momentum=0.5)

    assert digests(by_object("batch_end", write)) == digests(by_hook("batch_end", pure))


def test_a_group_is_changed_on_its_own() -> None:
    optimizer = fl.optimizer(torch.optim.AdamW, lr=0.01, groups=[{"params": "*.bias", "lr": 0.1, "betas": (0.5, 0.9)}])

    def write(ctx: Any) -> None:
        group = next(group for group in ctx.optimizer.param_groups if group["lr"] == 0.1)
        assert group["betas"] == (0.5, 0.9)
        group["betas"] = (0.6, 0.9)

    ctx = train(by_object("begin", write, optimizer=optimizer, epochs=1))
    assert sorted(tuple(group["betas"]) for group in ctx.optimizer_state["groups"]) == [(0.6, 0.9), (0.9, 0.999)]


@pytest.mark.parametrize("value", ["a", None, True, [1, "a"]])
def test_hyperparameters_that_are_no_numbers_are_refused(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="lr"):
        train(by_object("begin", lambda ctx: ctx.optimizer.param_groups[0].update(lr=value)))


def test_flags_of_the_optimizer_are_refused() -> None:
    with pytest.raises((TypeError, ValueError, AttributeError), match="nesterov"):
        train(by_object("begin", lambda ctx: ctx.optimizer.param_groups[0].update(nesterov=True)))


def test_groups_cannot_be_added() -> None:
    def write(ctx: Any) -> None:
        ctx.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})

    with pytest.raises((TypeError, ValueError), match="group"):
        train(by_object("begin", write))


def test_the_slots_of_the_optimizer_can_be_written() -> None:
    def write(ctx: Any) -> None:
        for slot in ctx.optimizer.state.values():
            slot["momentum_buffer"].zero_()

    def pure(ctx: fl.Context) -> fl.Context:
        slots = fl.tree_map(torch.zeros_like, ctx.optimizer_state["slots"])
        return fl.evolve(ctx, optimizer_state={**ctx.optimizer_state, "slots": slots})

    assert digests(by_object("epoch_end", write)) == digests(by_hook("epoch_end", pure))


def test_the_slots_of_the_optimizer_can_be_forgotten() -> None:
    ctx = train(by_object("end", lambda ctx: ctx.optimizer.state.clear()))
    assert ctx.optimizer_state["slots"] == {}


def test_the_optimizer_takes_a_state_dict() -> None:
    def write(self: Any) -> None:
        if self.ctx.epoch == 1:
            self.saved = copy.deepcopy(self.ctx.optimizer.state_dict())
        else:
            self.ctx.optimizer.load_state_dict(self.saved)

    loop = make_loop(callbacks=[doing(on_epoch_end=write)])
    run = list(fl.iterate(fl.init(loop)))
    first, second = (ctx for ctx in run if ctx.stage == "epoch_end")
    assert fl.tree_equal(second.optimizer_state, first.optimizer_state)


def test_a_step_of_its_own_is_a_change_like_any_other() -> None:
    def write(ctx: Any) -> None:
        ctx.optimizer.step()

    once, twice = train(make_loop(epochs=1)), digests(by_object("after_backward", write, epochs=1))
    assert twice[-1] != fl.digest(once)


# ---- schedulers


class CallbackSetSchedule(CallbackSet):
    """A scheduler of torch, built on the optimizer that ``ctx`` shows."""

    def __init__(self, make: Callable[[torch.optim.Optimizer], Any], per_batch: bool = False) -> None:
        self.make = make
        self.per_batch = per_batch

    def on_begin(self) -> None:
        self.scheduler = self.make(self.ctx.optimizer)

    def on_batch_end(self) -> None:
        if self.per_batch:
            self.scheduler.step()

    def on_epoch_end(self) -> None:
        if not self.per_batch:
            self.scheduler.step()

    def state_dict(self) -> dict[str, Any] | None:
        if not hasattr(self, "scheduler"):
            return None
        return {key: value for key, value in self.scheduler.state_dict().items() if key != "_get_lr_called_within_step"}

    def load_state_dict(self, state_dict: dict[str, Any] | None) -> None:
        if state_dict is not None:
            self.scheduler.load_state_dict(state_dict)


def exponential(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=9)


def warm_restarts(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=2)


@pytest.mark.parametrize("make", [exponential, one_cycle, warm_restarts])
def test_a_scheduler_built_on_the_optimizer_works_as_in_a_loop_written_by_hand(make: Any) -> None:
    module = mlp()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    scheduler = make(optimizer)
    loop = make_loop(callbacks=[CallbackSetSchedule(make)], epochs=3)
    for epoch in (1, 2, 3):
        hand_written(module, optimizer, loop, range(epoch, epoch + 1))
        scheduler.step()
    ctx = train(loop)
    assert fl.tree_equal(ctx.params, {name: p.detach() for name, p in module.named_parameters()})
    assert ctx.optimizer_state["groups"][0]["lr"] == optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("per_batch", [False, True])
@pytest.mark.parametrize("make", [exponential, one_cycle])
def test_a_scheduler_resumes_forks_and_rewinds(make: Any, per_batch: bool, tmp_path: Any) -> None:
    def loop() -> fl.Loop:
        return make_loop(callbacks=[CallbackSetSchedule(make, per_batch)], epochs=2)

    digests(loop())
    holds_for(loop, tmp_path)


# ---- all of it at once


def test_contexts_made_earlier_are_not_touched() -> None:
    def everything(self: Any) -> None:
        clamp(self.ctx)
        self.ctx.network[1].running_mean.zero_()
        self.ctx.network[0].bias.requires_grad_(self.ctx.epoch % 2 == 0)
        self.ctx.optimizer.param_groups[0]["lr"] *= 0.5
        for slot in self.ctx.optimizer.state.values():
            slot["exp_avg"].mul_(0.5)

    callback = doing(**{f"on_{stage}": everything for stage in fl.STAGES})
    loop = full_loop(callbacks=[callback])
    whole = digests(loop)
    assert digests(loop) == whole


def test_two_objects_see_what_the_other_wrote() -> None:
    def write(self: Any) -> None:
        self.ctx.network[0].bias.data.fill_(self.ctx.global_step)
        self.ctx.optimizer.param_groups[0]["lr"] = 1.0 / self.ctx.global_step

    def look(ctx: Any) -> tuple[float, float]:
        return ctx.network[0].bias[0].item(), ctx.optimizer.param_groups[0]["lr"]

    callback, seen = watching(look, stages=("batch_end",))
    train(make_loop(callbacks=[doing("Writing", on_batch_end=write), callback]))
    assert [values for _, values in seen] == [(float(n), 1.0 / n) for n in range(1, 7)]


@pytest.mark.parametrize("replace", [True, False])
def test_the_state_of_the_optimizer_can_be_replaced_without_a_look_at_it(replace: bool) -> None:
    def write(ctx: Any) -> None:
        if replace:
            ctx.optimizer.state = collections.defaultdict(dict)
        else:
            ctx.optimizer.state.clear()

    momentum = fl.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
    assert train(by_object("epoch_end", write, optimizer=momentum)).optimizer_state["slots"] == {}


def test_a_rate_alone_leaves_the_tensors_of_the_optimizer_as_they_are() -> None:
    def write(ctx: Any) -> None:
        ctx.optimizer.param_groups[0]["lr"] *= 0.5

    start = fl.train(
        fl.init(by_object("before_valid", write, optimizer=fl.optimizer(torch.optim.AdamW, lr=0.1))), steps=3
    )
    after = next(fl.iterate(start))
    assert after.optimizer_state["groups"][0]["lr"] == 0.05
    assert after.optimizer_state["slots"] is start.optimizer_state["slots"]


def test_copies_of_the_optimizer_are_ordinary_ones() -> None:
    kept: list[torch.optim.Optimizer] = []

    def copied(ctx: Any) -> None:
        kept.append(copy.deepcopy(ctx.optimizer))
        kept.append(pickle.loads(pickle.dumps(ctx.optimizer)))
        assert isinstance(ctx.optimizer, torch.optim.AdamW)

    ctx = train(by_object("end", copied, optimizer=fl.optimizer(torch.optim.AdamW, lr=0.1)))
    expected = fl.to_optimizer(ctx, fl.to_module(ctx)).state_dict()
    for optimizer in kept:
        assert type(optimizer) is torch.optim.AdamW
        assert fl.tree_equal(optimizer.state_dict()["state"], expected["state"])
        optimizer.step()
