"""The purity check: every way to cheat is found and named, and nothing that ships is taken for a cheat."""

from __future__ import annotations

import ctypes
import gc
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import functional_loop as fl
from functional_loop.callbacks import CallbackSet, t_clbk, torch_callbacks
from functional_loop.testing import check_hook

from .callbacks.test_dictionary import REQUIRED
from .hooks import CALLBACKS
from .sample_loops import data, make_loop, mlp

Hook = Callable[[fl.Context], Any]
CHEATS: dict[str, tuple[Callable[[], Hook], str]] = {}
"""By what it does: a function that makes the hook, and what must be said of it."""


def cheat(name: str, said: str, makes_hook: bool = False) -> Callable[[Any], Any]:
    def add(hook: Any) -> Any:
        CHEATS[name] = (hook if makes_hook else lambda: hook), said
        return hook

    return add


def weight(ctx: fl.Context) -> Tensor:
    return ctx.params["0.weight"]


@cheat("in place", "wrote to ctx.params['0.weight'] by aten.add_.Tensor")
def _(ctx: fl.Context) -> fl.Context:
    weight(ctx).add_(1)
    return ctx


@cheat("in place, swallowed", "wrote to ctx.params['0.weight'] by aten.add_.Tensor")
def _(ctx: fl.Context) -> fl.Context:
    try:
        weight(ctx).add_(1)
    except Exception:
        return ctx
    return ctx


@cheat("through .data", "wrote to ctx.params['0.weight'] by aten.mul_.Tensor through .data")
def _(ctx: fl.Context) -> fl.Context:
    weight(ctx).data.mul_(2)
    return ctx


@cheat("assigns .data", "wrote to ctx.params['0.weight'] by assigning .data")
def _(ctx: fl.Context) -> fl.Context:
    weight(ctx).data = torch.zeros(4, 3)
    return ctx


@cheat("through a view", "wrote to ctx.params['0.weight'] by aten.fill_")
def _(ctx: fl.Context) -> fl.Context:
    weight(ctx).T[0, 1:] = 0
    return ctx


@cheat("into out=", "wrote to ctx.buffers['1.running_mean'] by aten.add.out")
def _(ctx: fl.Context) -> fl.Context:
    torch.add(ctx.buffers["1.running_mean"], 1, out=ctx.buffers["1.running_mean"])
    return ctx


@cheat("fused optimizer", "wrote to ctx.params['0.weight'] by aten._fused_adamw_")
def _(ctx: fl.Context) -> fl.Context:
    params = list(ctx.params.values())
    optimizer = torch.optim.AdamW(params, fused=True)
    for name, param in ctx.params.items():
        param.grad = torch.zeros_like(param) if name not in ctx.grads else ctx.grads[name].clone()
    optimizer.step()
    for param in params:
        param.grad = None
    return ctx


@cheat("foreach", "wrote to ctx.grads['0.weight'] by aten._foreach_mul_")
def _(ctx: fl.Context) -> fl.Context:
    torch._foreach_mul_(list(ctx.grads.values()), 0.5)
    return ctx


@cheat("clips in place", "wrote to ctx.grads")
def _(ctx: fl.Context) -> fl.Context:
    parameters = [nn.Parameter(p) for p in ctx.params.values()]
    for parameter, grad in zip(parameters, ctx.grads.values(), strict=True):
        parameter.grad = grad
    nn.utils.clip_grad_norm_(parameters, 1e-3)
    return ctx


@cheat("numpy alias", "wrote to ctx.params['0.weight'] through .numpy()")
def _(ctx: fl.Context) -> fl.Context:
    weight(ctx).numpy()[0] = 7
    return ctx


@cheat("asarray", "wrote to ctx.grads['0.bias'] through a numpy array")
def _(ctx: fl.Context) -> fl.Context:
    np.asarray(ctx.grads["0.bias"])[:] = 0
    return ctx


@cheat("DLPack", "wrote to ctx.params['0.weight'] through DLPack")
def _(ctx: fl.Context) -> fl.Context:
    torch.from_dlpack(weight(ctx)).zero_()
    return ctx


@cheat("pointer", "wrote to ctx.y_hats through .data_ptr()")
def _(ctx: fl.Context) -> fl.Context:
    ctypes.c_float.from_address(ctx.y_hats.data_ptr()).value = 7
    return ctx


@cheat("undeclared", "the last operator to see it was aten.native_batch_norm.default")
def _(ctx: fl.Context) -> fl.Context:
    mean, var = ctx.buffers["1.running_mean"], ctx.buffers["1.running_var"]
    nn.functional.batch_norm(torch.arange(8.0).view(2, 4), mean, var, training=True)
    return ctx


@cheat("batch", "wrote to ctx.batch.x by aten.zero_")
def _(ctx: fl.Context) -> fl.Context:
    ctx.batch.x.zero_()
    return ctx


@cheat("optimizer state", "wrote to ctx.optimizer_state['slots']['0.weight']['momentum_buffer'] by aten.zero_")
def _(ctx: fl.Context) -> fl.Context:
    ctx.optimizer_state["slots"]["0.weight"]["momentum_buffer"].zero_()
    return ctx


@cheat("the Loop's network", "wrote to ctx.loop.network['0.weight'] by aten.fill_")
def _(ctx: fl.Context) -> fl.Context:
    with torch.no_grad():
        ctx.loop.network[0].weight.fill_(0)  # type: ignore[index, union-attr]
    return ctx


@cheat("the training data", "wrote to ctx.loop.train.x through .numpy()")
def _(ctx: fl.Context) -> fl.Context:
    ctx.loop.train.x.numpy()[0] += 1  # type: ignore[attr-defined]
    return ctx


@cheat("item of a dict", "wrote to ctx.optimizer_state['groups'][0]['lr'] by assigning an item")
def _(ctx: fl.Context) -> fl.Context:
    ctx.optimizer_state["groups"][0]["lr"] = 0.5
    return ctx


@cheat("new item", "wrote to ctx.params['new'] by assigning an item")
def _(ctx: fl.Context) -> fl.Context:
    ctx.params["new"] = torch.ones(1)
    return ctx


@cheat("list in a slot", "wrote to ctx.callbacks['cheat'][0] by assigning an item")
def _(ctx: fl.Context) -> fl.Context:
    ctx.callbacks["cheat"].append(1)
    return ctx


@cheat("frozen record", "wrote to ctx.terminate by assigning an item")
def _(ctx: fl.Context) -> fl.Context:
    object.__setattr__(ctx, "terminate", True)
    return ctx


@cheat("shape in place", "wrote to ctx.grads['0.weight'] by aten.t_")
def _(ctx: fl.Context) -> fl.Context:
    ctx.grads["0.weight"].t_()
    return ctx


@cheat("requires_grad", "wrote to ctx.params['0.weight'] by requires_grad_()")
def _(ctx: fl.Context) -> fl.Context:
    weight(ctx).requires_grad_()
    return ctx


@cheat("own output", "it keeps a tensor that it has given away", makes_hook=True)
def _() -> Hook:
    total = torch.zeros(())

    def add(ctx: fl.Context) -> fl.Context:
        total.copy_(ctx.last_loss)
        return ctx.with_callback_state("cheat", [total])

    return add


@cheat("own output, through numpy", "wrote to ctx, as it was returned before.callbacks['cheat']", makes_hook=True)
def _() -> Hook:
    array = np.zeros(1)
    total = torch.from_numpy(array)

    def add(ctx: fl.Context) -> fl.Context:
        array[0] += 1
        return ctx.with_callback_state("cheat", [total])

    return add


@cheat("generator put back", "depends on more than the context")
def _(ctx: fl.Context) -> fl.Context:
    state = torch.get_rng_state()
    drawn = torch.rand(())
    torch.set_rng_state(state)
    return ctx.with_callback_state("cheat", [drawn])


@cheat("own generator", "depends on more than the context", makes_hook=True)
def _() -> Hook:
    generator = torch.Generator().manual_seed(0)
    return lambda ctx: ctx.with_callback_state("cheat", [torch.rand((), generator=generator)])


@cheat("entropy", "depends on more than the context")
def _(ctx: fl.Context) -> fl.Context:
    return ctx.with_callback_state("cheat", [float(np.random.default_rng().random())])


@cheat("grad mode", "left torch.is_grad_enabled() at False, which was True")
def _(ctx: fl.Context) -> fl.Context:
    torch.set_grad_enabled(False)
    return ctx


@cheat("default dtype", "left torch.get_default_dtype() at torch.float64")
def _(ctx: fl.Context) -> fl.Context:
    torch.set_default_dtype(torch.float64)
    return ctx


@cheat("dtype", "returned ctx.params['0.weight'] with dtype torch.float64, which was torch.float32")
def _(ctx: fl.Context) -> fl.Context:
    return fl.evolve(ctx, params={**ctx.params, "0.weight": weight(ctx).double()})


@cheat("shape", "returned ctx.params['0.weight'] with shape [3, 4], which was [4, 3]")
def _(ctx: fl.Context) -> fl.Context:
    return fl.evolve(ctx, params={**ctx.params, "0.weight": weight(ctx).T.clone()})


@cheat("device", "returned ctx.buffers['1.running_mean'] with device meta, which was cpu")
def _(ctx: fl.Context) -> fl.Context:
    return fl.evolve(ctx, buffers={**ctx.buffers, "1.running_mean": torch.zeros(4, device="meta")})


@cheat("missing name", "returned ctx.params without '3.bias'")
def _(ctx: fl.Context) -> fl.Context:
    return fl.evolve(ctx, params={name: p for name, p in ctx.params.items() if name != "3.bias"})


@cheat("slot of the optimizer", "['momentum_buffer'] with shape [1]")
def _(ctx: fl.Context) -> fl.Context:
    slots = {name: {"momentum_buffer": torch.zeros(1)} for name in ctx.optimizer_state["slots"]}
    return fl.evolve(ctx, optimizer_state={**ctx.optimizer_state, "slots": slots})


@cheat("kind of a field", "returned ctx.terminate as Tensor, which was bool")
def _(ctx: fl.Context) -> fl.Context:
    return fl.evolve(ctx, terminate=torch.tensor(False))


@cheat("graph", "returned ctx.callbacks['cheat'][0] with a graph of autograd")
def _(ctx: fl.Context) -> fl.Context:
    return ctx.with_callback_state("cheat", [weight(ctx).detach().clone().requires_grad_().sum()])


@cheat("counts by itself", "depends on more than the context", makes_hook=True)
def _() -> Hook:
    seen: list[int] = []

    def count(ctx: fl.Context) -> fl.Context:
        seen.append(ctx.step)
        return ctx.with_callback_state("cheat", [len(seen)])

    return count


@cheat("clock", "depends on more than the context")
def _(ctx: fl.Context) -> fl.Context:
    return ctx.with_callback_state("cheat", [time.perf_counter_ns()])


def make_cheat(name: str) -> fl.Callback:
    hook = CHEATS[name][0]()
    second_step = fl.when(lambda ctx: ctx.global_step == 2, hook)  # when the optimizer has a state
    return fl.Callback("cheat", init=lambda ctx: [], batch_end=second_step)


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_is_found_and_named(name: str) -> None:
    with pytest.raises(fl.PurityError) as caught:
        check_hook(make_cheat(name), loop=make_loop())
    message = str(caught.value)
    assert "the hook of 'batch_end' of callback 'cheat' is not pure" in message
    assert CHEATS[name][1] in message
    assert caught.value.__notes__[-1] == "in callback 'cheat' at stage 'batch_end' (epoch 1, step 2)"


@pytest.mark.parametrize("name", CHEATS)
def test_what_a_cheat_did_is_undone(name: str) -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    generators = [torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())]
    settings = torch.is_grad_enabled(), torch.get_default_dtype()
    start = fl.train(fl.init(make_loop(callbacks=[make_cheat(name)], check_pure=True)), steps=1)
    before = fl.digest(start)
    with pytest.raises(fl.PurityError) as caught:
        fl.train(start)
    assert fl.digest(start) == before
    carried = fl.context_of(caught.value)
    assert carried is not None
    assert fl.digest(carried) == before
    assert torch.equal(start.loop.train.x, make_loop().train.x)  # type: ignore[attr-defined]
    assert [torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())] == generators
    assert settings == (torch.is_grad_enabled(), torch.get_default_dtype())


def test_there_are_more_than_twenty_ways() -> None:
    assert len(CHEATS) >= 20


def test_nothing_is_looked_at_when_it_is_off() -> None:
    callback = make_cheat("clock")
    assert make_loop(callbacks=[callback]).hooks["batch_end"] == (("cheat", callback.hooks["batch_end"]),)
    fl.train(fl.init(make_loop(callbacks=[callback])))


@pytest.mark.parametrize("key", sorted(torch_callbacks))
def test_what_ships_is_no_cheat(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    error = [fl.measure("error", lambda y_hat, y: (y_hat - y).abs().mean(), minimize=True)]
    changes: dict[str, Any] = {"network": mlp, "epochs": 3, "measures_train": error, "measures_valid": error}
    changes["valid"] = fl.batches(*data(3, seed=1), batch_size=6)
    if key == "dp_sgd":  # refuses batch normalisation
        changes["network"] = lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    plain = {**changes, "callbacks": [t_clbk(key, **REQUIRED.get(key, {}))]}
    with_check = fl.train(fl.init(make_loop(**plain, check_pure=True)))
    monkeypatch.chdir(tmp_path_of(tmp_path, "unchecked"))
    assert fl.digest(with_check) == fl.digest(fl.train(fl.init(make_loop(**plain))))


def tmp_path_of(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "SparseAdam"])
def test_pure_hooks_are_no_cheats(name: str, optimizer: str) -> None:
    if optimizer == "SparseAdam":
        embedding = nn.Sequential(nn.Embedding(5, 2, sparse=True), nn.Flatten(1))
        x = torch.arange(10).view(10, 1) % 5
        loop = make_loop(
            network=embedding,
            optimizer=fl.optimizer(torch.optim.SparseAdam, lr=0.1),
            train=fl.batches(x, torch.ones(10, 2), batch_size=4),
            valid=None,
        )
        if name in ("clipping", "gradient_noise", "input_noise"):
            pytest.skip("not for sparse gradients or integers")
    else:
        loop = make_loop(optimizer=fl.optimizer(getattr(torch.optim, optimizer), lr=0.1, fused=True))
    check_hook(CALLBACKS[name](), loop=loop)


def test_a_resumed_run_is_watched_too() -> None:
    def write(ctx: fl.Context) -> fl.Context:
        weight(ctx).zero_()
        return ctx

    loop = make_loop(callbacks=[fl.Callback("cheat", resume=write)], check_pure=True)
    ctx = fl.train(fl.init(loop), steps=1)
    with pytest.raises(fl.PurityError, match="the hook of 'resume' of callback 'cheat'"):
        fl.train(ctx)


def test_init_is_watched_too() -> None:
    def start(ctx: fl.Context) -> Tensor:
        return weight(ctx).zero_()

    with pytest.raises(fl.PurityError, match=r"init of callback 'cheat' is not pure: it wrote to ctx\.params"):
        fl.init(make_loop(callbacks=[fl.Callback("cheat", init=start)], check_pure=True))


class CallbackSetCheating(CallbackSet):
    """Writes to a tensor of the context behind the view's back, which the view's own network would not let through."""

    def on_batch_end(self) -> None:
        self.ctx.context.params["0.weight"].data.zero_()


class CallbackSetEffects(CallbackSet):
    """What objects are for: writes to its network, counts, looks at the clock."""

    calls = 0

    def on_batch_end(self) -> None:
        CallbackSetEffects.calls += 1
        with torch.no_grad():
            self.ctx.network[0].weight.clamp_(-0.1, 0.1)
        for group in self.ctx.optimizer.param_groups:
            group["lr"] = 0.01

    def on_after_backward(self) -> None:
        nn.utils.clip_grad_norm_(self.ctx.network.parameters(), 0.1)


def test_objects_are_watched_and_run_once() -> None:
    with pytest.raises(fl.PurityError, match=r"'cheating' is not pure: it wrote to ctx\.params"):
        check_hook(CallbackSetCheating)
    CallbackSetEffects.calls = 0
    check_hook(CallbackSetEffects, loop=make_loop(epochs=2))
    assert CallbackSetEffects.calls == 6


def test_a_descriptor_and_a_function_are_hooks_too() -> None:
    check_hook(t_clbk("history"))
    check_hook(lambda ctx: ctx, "epoch_end")
    with pytest.raises(fl.PurityError, match="the hook of 'epoch_end'"):
        check_hook(CHEATS["in place"][0](), "epoch_end")


def test_an_error_of_the_hook_is_its_own() -> None:
    def fail(ctx: fl.Context) -> fl.Context:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        check_hook(fail)
    with pytest.raises(TypeError, match="a hook must return a Context"):
        check_hook(lambda ctx: None)  # type: ignore[arg-type, return-value]


def test_check_pure_is_true_or_false() -> None:
    with pytest.raises(TypeError, match="check_pure is True or False, not 1"):
        make_loop(check_pure=1)


def test_nothing_is_kept_after_a_run() -> None:
    loop = make_loop(callbacks=[CALLBACKS["ema"]()], check_pure=True)
    fl.train(fl.init(loop))
    gc.collect()
    before = sum(type(o) is Tensor for o in gc.get_objects())
    fl.train(fl.init(loop))
    gc.collect()
    assert sum(type(o) is Tensor for o in gc.get_objects()) <= before


def test_the_check_goes_with_the_loop() -> None:
    loop = make_loop(callbacks=[make_cheat("in place")], check_pure=True)
    fl.train(fl.init(attrs.evolve(loop, check_pure=False)))
    with pytest.raises(fl.PurityError):
        fl.train(fl.init(attrs.evolve(loop, epochs=1)))
