"""Optimizers that keep their state in unusual places: the run of a hand-written loop, resumed exactly, or a refusal."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import functional_loop as fl
from functional_loop.callbacks import CallbackSet, early_stopping, ema
from functional_loop.cli.export import export
from functional_loop.cli.usage import UsageError
from functional_loop.interop.files import from_checkpoint, to_checkpoint, to_safetensors
from tests import odd_optimizers as odd
from tests.callbacks.laws import holds_for
from tests.callbacks.objects import digests, doing
from tests.sample_loops import data, full_loop, hand_written, make_loop, mlp

FINE: dict[str, dict[str, Any]] = {
    "CountingInGroups": {},
    "FlagOfTheFirstStep": {},
    "MovingBetas": {},
    "Nested": {},
    "StateOfTheStart": {},
    "ScheduleFreeSGD": {"lr": 0.1, "warmup_steps": 3},
    "Cached": {},
}


def made(name: str, **changes: Any) -> fl.Optimizer:
    return fl.optimizer(getattr(odd, name), **FINE.get(name, {}), **changes)


def by_hand(module: nn.Module, optimizer: torch.optim.Optimizer, loop: fl.Loop, epochs: range) -> None:
    if hasattr(optimizer, "train"):
        optimizer.train()
    hand_written(module, optimizer, loop, epochs)


@pytest.mark.parametrize("name", FINE)
def test_training_is_that_of_a_hand_written_loop(name: str) -> None:
    module = mlp()
    instance = getattr(odd, name)(module.parameters(), **FINE[name])
    loop = make_loop(optimizer=made(name), epochs=3)
    by_hand(module, instance, loop, range(1, 4))
    ctx = fl.train(fl.init(loop))
    assert fl.tree_equal(ctx.params, {n: p.detach() for n, p in module.named_parameters()})
    mirrored = fl.to_optimizer(ctx, fl.to_module(ctx))
    if hasattr(instance, "train"):
        instance.eval()
        assert fl.tree_equal(dict(fl.to_module(ctx).state_dict()), dict(module.state_dict()))
    assert fl.tree_equal(mirrored.state_dict(), instance.state_dict())


@pytest.mark.parametrize("name", FINE)
def test_a_run_resumes_exactly_from_everywhere(name: str, tmp_path: Path) -> None:
    holds_for(lambda: full_loop(optimizer=made(name)), tmp_path)


@pytest.mark.parametrize("name", FINE)
def test_groups_apart_resume_too(name: str) -> None:
    def loop() -> fl.Loop:
        return make_loop(optimizer=made(name, groups=[{"params": "*.bias", "lr": 0.05}]))

    whole = fl.digest(fl.train(fl.init(loop())))
    for steps in range(7):
        middle = fl.state_dict(fl.train(fl.init(loop()), steps=steps))
        assert fl.digest(fl.train(fl.load_state_dict(fl.init(loop()), middle))) == whole
        # Into a context that has made steps itself.
        assert fl.digest(fl.train(fl.load_state_dict(fl.train(fl.init(loop())), middle))) == whole


@pytest.mark.parametrize("name", FINE)
def test_one_loop_goes_back_and_forth(name: str) -> None:
    loop = make_loop(optimizer=made(name))
    run = [fl.init(loop), *fl.iterate(fl.init(loop))]
    for ctx in (run[5], run[1], run[8], run[0]):
        assert fl.digest(fl.train(ctx)) == fl.digest(run[-1])


@pytest.mark.parametrize("name", FINE)
def test_members_are_their_solo_runs(name: str) -> None:
    loop = make_loop(optimizer=made(name), network=mlp)
    start = [fl.init(loop, seed=seed) for seed in (0, 1)]
    ensemble = fl.train(fl.stack(start))
    assert [fl.digest(c) for c in fl.unstack(ensemble)] == [fl.digest(fl.train(c)) for c in start]


@pytest.mark.parametrize("name", FINE)
def test_objects_see_the_groups_of_the_context(name: str) -> None:
    def look(self: Any) -> None:
        for group, values in zip(self.ctx.optimizer.param_groups, self.ctx.optimizer_state["groups"], strict=True):
            assert {key: _listed(group[key]) for key in values} == {key: _listed(v) for key, v in values.items()}
            assert not self.ctx.global_step or group.get("initial_lr", 7.0) == 7.0
            group["initial_lr"] = 7.0

    callback = doing("Looking", on_begin=look, on_batch_end=look, on_epoch_end=look)
    loop = make_loop(optimizer=made(name), callbacks=[callback])
    assert digests(loop) == digests(make_loop(optimizer=made(name)))
    late = fl.train(fl.init(loop), steps=4)
    early = fl.train(fl.init(loop), steps=1)
    for ctx in (late, early, fl.init(loop)):
        fl.train(ctx)


def _listed(value: Any) -> Any:
    return [_listed(v) for v in value] if isinstance(value, (list, tuple)) else value


def test_objects_can_write_what_steps_have_added() -> None:
    def write(self: Any) -> None:
        self.ctx.optimizer.param_groups[0]["step"] = 10

    ctx = fl.train(fl.init(make_loop(optimizer=made("CountingInGroups"), callbacks=[doing(on_end=write)])))
    assert ctx.optimizer_state["groups"][0]["step"] == 10


@pytest.mark.parametrize("name", [n for n in FINE if n != "ScheduleFreeSGD"])
def test_an_optimizer_in_mid_flight_is_adopted_with_what_its_steps_added(name: str) -> None:
    module = mlp()
    instance = getattr(odd, name)(module.parameters(), **FINE[name])
    loop = make_loop(optimizer=made(name), network=module)
    hand_written(module, instance, loop, range(1, 2))
    start = fl.init(fl.evolve(loop, network=copy.deepcopy(module)))
    assert start.optimizer_state["groups"] != fl.init(loop, optimizer_state_from=instance).optimizer_state[
        "groups"
    ] or (name in ("Cached", "StateOfTheStart"))
    adopted = fl.init(loop, optimizer_state_from=instance)
    assert fl.tree_equal(fl.to_optimizer(adopted, fl.to_module(adopted)).state_dict(), instance.state_dict())


@pytest.mark.parametrize("name", FINE)
def test_a_plain_checkpoint_carries_it(name: str) -> None:
    loop = make_loop(optimizer=made(name))
    trained = fl.train(fl.init(loop), steps=3)
    assert fl.tree_equal(
        from_checkpoint(loop, to_checkpoint(trained)).optimizer_state["slots"], trained.optimizer_state["slots"]
    )


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("CountingInAttributes", "keeps a state in its attribute 'steps'"),
        ("AverageInAttributes", "keeps a state in its attribute 'norm'"),
        ("Started", "keeps a state in its attribute 'started'"),
        ("SharedState", "keeps a state that is of no parameter, under 'shared'"),
        ("FunctionInGroups", "into its groups under 'function', which can't be saved"),
    ],
)
def test_state_in_other_places_is_refused_at_the_first_step(name: str, match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match) as caught:
        fl.train(fl.init(make_loop(optimizer=made(name))))
    assert fl.context_of(caught.value).global_step == 0


# ---- modes


def schedule_free(**changes: Any) -> fl.Loop:
    usual: dict[str, Any] = {"optimizer": made("ScheduleFreeSGD"), "network": mlp()}
    return full_loop(**usual | {"callbacks": [], "accumulate": 1} | changes)


def evaluated(ctx: fl.Context) -> dict[str, Tensor]:
    """x, by the formula: y = (1 - beta) z + beta x."""
    slots = ctx.optimizer_state["slots"]
    return {
        name: torch.lerp(y, slots[name]["z"], 1 - 1 / 0.9) if name in slots else y for name, y in ctx.params.items()
    }


def test_outputs_and_scores_are_those_of_the_parameters_for_evaluation() -> None:
    loop = schedule_free()
    for ctx in fl.iterate(fl.init(loop)):
        if ctx.stage == "valid_end":
            module = mlp().eval()
            module.load_state_dict({**evaluated(ctx), **ctx.buffers})
            x, y = data(3, seed=1)
            with torch.no_grad():
                error = (module(x) - y).abs().mean().item()
            assert dict(ctx.last_scores_valid)["error"] == pytest.approx(error, rel=1e-6)
            assert fl.validate(ctx) == ctx.last_scores_valid
            assert torch.equal(fl.predict(ctx, x), fl.to_module(ctx).eval()(x).detach())
            assert fl.tree_equal({n: p.detach() for n, p in fl.to_module(ctx).named_parameters()}, evaluated(ctx))
            assert not fl.tree_equal(evaluated(ctx), ctx.params)


def test_validation_does_not_change_training() -> None:
    with_it, without = schedule_free(), schedule_free(valid=None, measures_valid=[])
    assert fl.tree_equal(fl.train(fl.init(with_it)).params, fl.train(fl.init(without)).params)


def test_objects_see_what_the_outputs_are_made_with() -> None:
    def look(self: Any) -> None:
        with torch.no_grad():
            assert torch.equal(self.ctx.network(self.ctx.batch.x), self.ctx.y_hat)
        assert fl.tree_equal(self.ctx.params, evaluated(self.ctx.context))

    def trained(self: Any) -> None:
        assert fl.tree_equal(self.ctx.params, self.ctx.context.params)

    looking = doing("Looking", on_batch_valid_end=look, on_batch_end=trained, on_epoch_end=trained)
    assert digests(schedule_free(callbacks=[looking])) == digests(schedule_free())


def test_parameters_for_evaluation_cannot_be_written() -> None:
    writing = doing(on_batch_valid_end=lambda self: self.ctx.network[0].weight.data.zero_())
    with pytest.raises(ValueError, match=r"'0\.weight' was written to in validation, where ScheduleFreeSGD has other"):
        fl.train(fl.init(schedule_free(callbacks=[writing])))


def test_the_best_weights_are_those_that_were_scored() -> None:
    def loop() -> fl.Loop:
        return schedule_free(callbacks=[early_stopping(patience=1)], epochs=6)

    run = list(fl.iterate(fl.init(loop())))
    best = run[-1].callbacks["early_stopping"]["best_epoch"]
    scored = next(ctx for ctx in run if ctx.stage == "valid_end" and ctx.epoch == best)
    assert fl.validate(run[-1]) == scored.last_scores_valid


def test_files_for_evaluation_have_the_parameters_for_evaluation(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    ctx = fl.train(fl.init(schedule_free(epochs=1)))
    to_safetensors(ctx, tmp_path / "network.safetensors")
    found = safetensors.load_file(tmp_path / "network.safetensors")
    assert fl.tree_equal({name: found[name] for name in ctx.params}, evaluated(ctx))
    saved = fl.CheckpointStore(tmp_path / "run").save(ctx)
    with pytest.raises(UsageError, match=r"to_safetensors\(ctx, path\) writes these"):
        export(saved, tmp_path / "out.safetensors")


def test_averages_of_their_own_are_refused() -> None:
    with pytest.raises(ValueError, match="ema: ScheduleFreeSGD averages the parameters itself"):
        fl.init(schedule_free(callbacks=[ema()]))


def test_training_goes_on_by_hand_in_the_mode_for_evaluation() -> None:
    ctx = fl.train(fl.init(schedule_free()), steps=4)
    module = fl.to_module(ctx)
    optimizer: Any = fl.to_optimizer(ctx, module)
    assert fl.tree_equal({n: p.detach() for n, p in module.named_parameters()}, evaluated(ctx))
    with pytest.raises(RuntimeError, match="not in train mode"):
        optimizer.step()
    optimizer.train()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.detach(), ctx.params[name])


def test_one_in_the_mode_for_evaluation_is_not_adopted() -> None:
    module = mlp()
    optimizer: Any = odd.ScheduleFreeSGD(module.parameters(), lr=0.1, warmup_steps=3)
    loop = make_loop(network=module, optimizer=made("ScheduleFreeSGD"))
    by_hand(module, optimizer, loop, range(1, 2))
    start = fl.init(loop, optimizer_state_from=optimizer)
    assert start.optimizer_state["slots"]["0.weight"]["z"].any()
    optimizer.eval()
    with pytest.raises(fl.StateDictError, match=r"call its train\(\) first"):
        fl.init(loop, optimizer_state_from=optimizer)


# ---- sparse sums


class CallbackSetSparse(CallbackSet):
    def on_after_backward(self) -> None:
        assert self.ctx.grads["weight"].is_sparse


@pytest.mark.parametrize("callbacks", [[], [CallbackSetSparse()]])
def test_sparse_adam_gets_the_mean_of_the_sparse_gradients_of_a_window(callbacks: list[Any]) -> None:
    class Averaged(nn.EmbeddingBag):
        pass

    rows = torch.arange(12).view(6, 2) % 7
    targets = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))

    def loop() -> fl.Loop:
        return make_loop(
            network=Averaged(7, 2, sparse=True, _weight=torch.ones(7, 2)),
            train=fl.batches(rows, targets, batch_size=2),
            optimizer=fl.optimizer(torch.optim.SparseAdam, lr=0.1),
            accumulate=2,
            callbacks=callbacks,
        )

    module = Averaged(7, 2, sparse=True, _weight=torch.ones(7, 2))
    optimizer = torch.optim.SparseAdam(module.parameters(), lr=0.1)
    for _ in range(2):
        for window in ([0, 1], [2]):
            optimizer.zero_grad()
            for i in window:
                part = slice(2 * i, 2 * i + 2)
                nn.functional.mse_loss(module(rows[part]), targets[part]).backward()
            module.weight.grad = module.weight.grad / len(window)
            optimizer.step()
    ctx = fl.train(fl.init(loop()))
    assert torch.equal(ctx.params["weight"], module.weight.detach())
    for steps in range(7):
        middle = fl.train(fl.init(loop()), steps=steps)
        assert fl.digest(fl.train(fl.load_state_dict(fl.init(loop()), fl.state_dict(middle)))) == fl.digest(ctx)
