"""Compiled steps: they compute what the eager ones do, compile once, and give the same bits in every process."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import functional_loop as fl
from functional_loop.callbacks import t_clbk
from functional_loop.compile import cache as graph_cache
from functional_loop.compile import graphs
from functional_loop.compile.cache import cache_folder
from functional_loop.optim.layouts import layout
from tests.closeness import ABSOLUTE, RELATIVE, in_doubles
from tests.networks import NETWORKS
from tests.processes import in_a_fresh_process
from tests.sample_loops import data, full_loop, make_loop, noisy_mlp, recorder
from tests.samplers import LAYOUTS, SAMPLERS, Drawing, loss_of_first

UNCOMPILABLE = {"changing parameters": "can't be traced", "cumulative batch norm": "can't be traced"}
"""What the warning says for those of the networks of which a graph can't be made."""
COMPILABLE = [name for name in NETWORKS if name not in UNCOMPILABLE]


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Graphs are traced but not compiled, which takes seconds for each; the list gets a number for every graph."""
    made: list[int] = []

    def interpret(module: torch.fx.GraphModule, inputs: list[Tensor], draws: bool) -> graphs.Code:
        def run(tensors: list[Tensor]) -> Any:
            return module(*tensors)

        made.append(len(inputs))
        return graphs.Code(run, draws, list(map(layout, graphs._try(run, inputs))))

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(graphs, "_ahead_of_time", lambda module, inputs, draws, key: interpret(module, inputs, draws))
    return made


def both(loop: fl.Loop, seed: int = 0) -> tuple[fl.Context, fl.Context]:
    """The ends of a compiled and of an eager run."""
    return fl.train(fl.init(fl.evolve(loop, compile=True), seed)), fl.train(fl.init(loop, seed))


def assert_close(a: fl.Context, b: fl.Context, **tolerance: float) -> None:
    names = ("params", "buffers", "last_loss", "optimizer_state", "measures", "accumulated")
    for name in names:
        torch.testing.assert_close(getattr(a, name), getattr(b, name), **tolerance)


@pytest.mark.parametrize("name", COMPILABLE)
def test_compiled_steps_compute_what_eager_ones_do(traced: list[int], name: str) -> None:
    make, x, y, loss = NETWORKS[name]
    with fl.seeded(0):
        network = make()
    source = fl.batches(x, y, batch_size=4, shuffle=True)
    loop = make_loop(network=network, train=source, **({} if loss is None else {"loss": loss}))
    compiled, eager = both(loop)
    assert_close(compiled, eager, rtol=1e-4, atol=1e-6)
    assert traced


@pytest.mark.parametrize("name", UNCOMPILABLE)
def test_what_cannot_be_compiled_is_computed_eagerly_and_the_warning_says_why(traced: list[int], name: str) -> None:
    make, x, y, _ = NETWORKS[name]
    loop = make_loop(network=make(), train=fl.batches(x, y, batch_size=5))
    with pytest.warns(UserWarning, match=f"without compiling it, because .*{UNCOMPILABLE[name]}"):
        compiled, eager = both(loop)
    assert fl.digest(compiled) == fl.digest(eager)
    assert not traced


class DrawingFromRandom(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * random.random()


def test_a_network_that_draws_from_random_is_not_compiled() -> None:
    with pytest.warns(UserWarning, match="draws from random or numpy"):
        compiled, eager = both(make_loop(network=DrawingFromRandom(3, 2), train=fl.batches(*data(3), batch_size=5)))
    assert fl.digest(compiled) == fl.digest(eager)


OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "SGD, decay": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "dampening": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "Adam": (torch.optim.Adam, {"lr": 0.01}),
    "Adam, decay": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}),
    "Adam, tensor": (torch.optim.Adam, {"lr": torch.tensor(0.01, dtype=torch.float64)}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01}),
    "AdamW, fused": (torch.optim.AdamW, {"lr": 0.01, "fused": True}),
    "AdamW, amsgrad": (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True, "betas": (0.8, 0.9)}),
    "AdamW, maximize": (torch.optim.AdamW, {"lr": 0.01, "maximize": True, "eps": 1e-4}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01}),
    "RMSprop, decay": (torch.optim.RMSprop, {"lr": 0.01, "weight_decay": 0.1, "maximize": True, "alpha": 0.8}),
    "RMSprop, momentum": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.9}),
    "RMSprop, centered": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5, "centered": True}),
    "groups": (torch.optim.AdamW, {"lr": 0.01, "groups": [{"params": "*.bias", "lr": 0.1, "weight_decay": 0.0}]}),
}


@pytest.mark.parametrize("hooks", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_those_of_torch(traced: list[int], name: str, hooks: bool) -> None:
    cls, flags = OPTIMIZERS[name]
    x, y = (tensor.double() for tensor in data(3))
    loop = make_loop(
        network=nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(),
        train=fl.batches(x, y, batch_size=5),
        optimizer=fl.optimizer(cls, **flags),
        callbacks=[t_clbk("clip_grad_norm", max_norm=0.5)] if hooks else [],
        epochs=4,
    )
    compiled, eager = both(loop)
    # Their numbers are doubles, so that only the order of operations is another.
    assert_close(compiled, eager, rtol=1e-11, atol=1e-13)
    assert fl.tree_equal(
        fl.tree_map(lambda leaf: getattr(leaf, "dtype", ()), compiled.optimizer_state),
        fl.tree_map(lambda leaf: getattr(leaf, "dtype", ()), eager.optimizer_state),
    )
    assert len(traced) == 1 + hooks


@pytest.mark.parametrize("cls", [torch.optim.Muon, torch.optim.LBFGS])
def test_other_optimizers_update_eagerly(traced: list[int], cls: Any) -> None:
    network = nn.Linear(3, 2, bias=False)
    loop = make_loop(network=network, optimizer=fl.optimizer(cls, lr=0.1), train=fl.batches(*data(3), batch_size=5))
    compiled, eager = both(loop)
    assert_close(compiled, eager, rtol=1e-3, atol=1e-5)
    assert not fl.tree_equal(compiled.params, dict(network.named_parameters()))
    assert len(traced) == 1


def test_schedules_counters_and_small_last_batches_compile_nothing_after_the_first_epoch(traced: list[int]) -> None:
    schedule = t_clbk("lr_one_cycle", max_lr=0.1)
    loop = make_loop(callbacks=[schedule], epochs=5, compile=True)
    graphs_after = [len(traced) for ctx in fl.iterate(fl.init(loop)) if ctx.stage == "epoch_end"]
    assert graphs_after == [2] * 5
    fl.train(fl.init(loop, seed=1))
    assert len(traced) == 2
    compiled, eager = both(fl.evolve(loop, compile=False))
    assert_close(compiled, eager, rtol=1e-4, atol=1e-6)


def test_many_shapes_are_compiled_with_a_warning(traced: list[int]) -> None:
    x, y = data(3)
    batches = [(x[:n], y[:n]) for n in range(1, 11)]
    loop = make_loop(network=nn.Linear(3, 2), train=fl.batches(batches), epochs=1, compile=True)
    with pytest.warns(UserWarning, match="more than 8 shapes"):
        fl.train(fl.init(loop))
    assert len(traced) == 10


@pytest.mark.parametrize("changes", [{"accumulate": 2}, {"accumulate": 1}, {"autocast": torch.bfloat16}])
def test_dropout_measures_windows_and_autocast(traced: list[int], changes: dict[str, Any]) -> None:
    # Adam would make large steps of the rounding errors that are the gradient of a bias before BatchNorm.
    momentum = fl.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
    compiled, eager = both(full_loop(optimizer=momentum, **changes))
    tolerance = 3e-2 if "autocast" in changes else 1e-4
    assert_close(compiled, eager, rtol=tolerance, atol=tolerance / 10)
    assert compiled.callbacks == eager.callbacks


def test_hooks_see_gradients_where_eager_hooks_do(traced: list[int]) -> None:
    def seen(compile: bool, *stages: str) -> list[Any]:
        found: list[Any] = []
        look = recorder(found, lambda ctx: (dict(ctx.grads), ctx.y_hats, ctx.batch.x), stages)
        fl.train(fl.init(make_loop(callbacks=[look], compile=compile, epochs=1)))
        return [gradients for _, gradients in found]

    for stages in (("batch_end",), ("after_backward", "batch_end")):
        torch.testing.assert_close(seen(True, *stages), seen(False, *stages), rtol=1e-4, atol=1e-6)


def test_hooks_can_drop_and_change_gradients(traced: list[int]) -> None:
    def half(ctx: fl.Context) -> fl.Context:
        kept = {name: grad.t().contiguous().t() for name, grad in ctx.grads.items() if "weight" in name}
        return fl.evolve(ctx, grads=kept if ctx.step % 2 else {})

    compiled, eager = both(make_loop(callbacks=[fl.Callback("half", after_backward=half)]))
    assert_close(compiled, eager, rtol=1e-4, atol=1e-6)


def test_sets_of_trainable_parameters_are_compiled_once_each(traced: list[int]) -> None:
    unfreeze = t_clbk("unfreeze", starting_weights="3.*", unfreeze=[{"epoch": 2, "weights": ["0.*"]}])
    adamw = fl.optimizer(torch.optim.AdamW, lr=0.01)
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Identity(), nn.Linear(4, 2))
    source = fl.batches(*data(3), batch_size=5)
    loop = make_loop(network=network, optimizer=adamw, callbacks=[unfreeze], train=source, epochs=4)
    compiled, eager = both(in_doubles(loop))
    assert_close(compiled, eager, rtol=RELATIVE, atol=ABSOLUTE)
    assert len(traced) == 2


def test_contexts_are_values(traced: list[int]) -> None:
    loop = full_loop(accumulate=1, compile=True)
    start = fl.init(loop, seed=3)
    kept = [ctx for ctx in fl.iterate(start) if ctx.stage == "batch_end"]
    digests = [fl.digest(ctx) for ctx in kept]
    assert fl.digest(start) == fl.digest(fl.init(loop, seed=3))
    for ctx in (kept[4], kept[1], kept[3], start):
        assert fl.digest(fl.train(ctx)) == fl.digest(fl.train(kept[-1]))
    assert [fl.digest(ctx) for ctx in kept] == digests


def test_tensors_of_other_strides_are_read_right(traced: list[int]) -> None:
    loop = make_loop(compile=True)
    start = fl.train(fl.init(loop), steps=2)
    turned = {name: p.t().contiguous().t() if p.dim() == 2 else p for name, p in start.params.items()}
    assert turned["3.weight"].stride() != start.params["3.weight"].stride()
    assert fl.digest(fl.train(fl.evolve(start, params=turned))) == fl.digest(fl.train(start))
    wrong = {**start.params, "3.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"'3.weight' is of dtype torch.float32 and shape \[2, 4\]"):
        fl.train(fl.evolve(start, params=wrong))


def test_a_tensor_that_the_loss_holds_is_read_in_every_step(traced: list[int]) -> None:
    weight = torch.ones(2)

    def loss(y_hat: Tensor, y: Tensor) -> Tensor:
        return (weight * (y_hat - y) ** 2).mean()

    loop = make_loop(network=nn.Linear(3, 2), loss=loss, compile=True)
    start = fl.train(fl.init(loop), steps=1)
    first = fl.train(start, steps=1).last_loss
    weight *= 2
    torch.testing.assert_close(fl.train(start, steps=1).last_loss, 2 * first)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"loss": lambda y_hat, y: y_hat}, ValueError, "must return a scalar tensor"),
        ({"loss": lambda y_hat, y: y_hat.mean().detach()}, ValueError, "nothing can be learnt"),
        ({"network": nn.Linear(4, 2)}, RuntimeError, "shapes cannot be multiplied"),
    ],
)
def test_what_is_wrong_with_a_network_is_said_as_without_compiling(
    traced: list[int], change: dict[str, Any], error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        fl.train(fl.init(make_loop(compile=True, **change)))
    assert not traced


def test_training_inside_inference_mode_is_refused(traced: list[int]) -> None:
    ctx = fl.train(fl.init(make_loop(compile=True)), steps=3)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        fl.train(ctx)


def noisy_loop(**changes: Any) -> fl.Loop:
    """Dropout and BatchNorm, all batches of one shape."""
    adamw = fl.optimizer(torch.optim.AdamW, lr=0.01)
    source = fl.batches(*data(3), batch_size=5, shuffle=True)
    return make_loop(network=noisy_mlp(), optimizer=adamw, train=source, compile=True, **changes)


def finish(sd: Any) -> tuple[str, bool]:
    """The digest at the end of the run of `noisy_loop` that ``sd`` is the state of; whether anything was traced."""
    traced: list[Any] = []
    trace, graphs._trace = graphs._trace, lambda *args: traced.append(args) or trace(*args)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ctx = fl.train(fl.load_state_dict(fl.init(noisy_loop()), sd))
    return fl.digest(ctx), bool(traced)


def test_a_compiled_run_goes_on_in_a_fresh_process_bit_for_bit_and_compiles_nothing_there() -> None:
    start = fl.init(noisy_loop(), seed=0)
    generator = torch.get_rng_state()
    end = fl.train(start)
    assert torch.equal(torch.get_rng_state(), generator)
    assert fl.digest(fl.train(start)) == fl.digest(end)
    assert cache_folder().exists()
    half = fl.train(start, steps=1)
    assert in_a_fresh_process(finish, fl.state_dict(half)) == (fl.digest(end), False)


def test_dropout_is_a_function_of_seed_and_step() -> None:
    masks: dict[int, list[Any]] = {0: [], 1: []}
    for seed, found in masks.items():
        look = recorder(found, lambda ctx: ctx.y_hats == 0, ("batch_end",))
        network = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))
        fl.train(fl.init(noisy_loop_of(network, callbacks=[look]), seed=seed))
    patterns = [tuple(mask.flatten().tolist()) for found in masks.values() for _, mask in found]
    assert len(set(patterns)) == len(patterns)


def noisy_loop_of(network: nn.Module, **changes: Any) -> fl.Loop:
    return make_loop(network=network, train=fl.batches(*data(3), batch_size=5), compile=True, **changes)


def test_a_graph_that_cannot_be_compiled_ahead_of_time_is_compiled_by_torch_compile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(graphs, "_ahead_of_time", refuse)
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    with pytest.warns(UserWarning, match=r"can't be compiled ahead of time \(RuntimeError: not today\)"):
        compiled, eager = both(make_loop())
    assert_close(compiled, eager, rtol=1e-4, atol=1e-6)


def refuse(*args: Any) -> graphs.Code:
    raise RuntimeError("not today")


def test_a_graph_that_cannot_be_kept_is_used_with_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setattr(graph_cache, "cache_folder", lambda: tmp_path / "a file" / "no folder")
    monkeypatch.setattr(graph_cache, "load", lambda library: lambda tensors: [2 * tensors[0]])
    with pytest.warns(UserWarning, match="can't be kept in .* compiled again in every process"):
        code = graph_cache.keep("key", tmp_path / "graph.so", False, lambda run: run([torch.ones(3)]))
    assert torch.equal(code.run([torch.ones(3)])[0], torch.full((3,), 2.0))
    assert code.layouts == [layout(torch.ones(3))]


def test_without_a_compiler_steps_are_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(graphs, "_ahead_of_time", refuse)
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: fail)
    with pytest.warns(UserWarning, match=r"can't be compiled \(RuntimeError: no compiler\)"):
        compiled, eager = both(make_loop())
    assert fl.digest(compiled) == fl.digest(eager)


HOOKS: dict[str, list[Any]] = {
    "nothing looks": [],
    "a hook sees the gradients": [recorder([], lambda ctx: 0, ("batch_end",))],
    "a hook changes the gradients": [t_clbk("clip_grad_norm", max_norm=9.0)],
}


@pytest.mark.parametrize("hooks", HOOKS)
def test_a_graph_that_computes_something_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hooks: str
) -> None:
    """Each of its results in turn, by one percent or by being NaN."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    parts = [nn.Linear(3, 2, bias=False), nn.BatchNorm1d(2), nn.Dropout(0.1)]
    adamw = fl.optimizer(torch.optim.AdamW, lr=0.1)
    source = fl.batches(*data(3), batch_size=5)
    loop = make_loop(network=nn.Sequential(*parts), train=source, optimizer=adamw, callbacks=HOOKS[hooks])
    eager, results, i = fl.digest(fl.train(fl.init(loop), steps=1)), 1, 0
    while i < results:

        def compiled(module: torch.fx.GraphModule, inputs: list[Tensor], draws: bool, key: str) -> graphs.Code:
            nonlocal results

            def run(tensors: list[Tensor], i: int = i) -> Any:
                made = list(module(*tensors))
                right = made[i % len(made)]
                wrong = right * (float("nan") if i % 2 else 1.01) if right.is_floating_point() else right + 1
                made[i % len(made)] = wrong
                return made

            made = run(inputs)
            results = max(results, len(made))
            return graphs.Code(run, draws, list(map(layout, made)))

        monkeypatch.setattr(graphs, "_ahead_of_time", compiled)
        with pytest.warns(UserWarning, match="without compiling it, because when it is compiled it is another: "):
            end = fl.train(fl.init(fl.evolve(loop, compile=True)), steps=1)
        assert fl.digest(end) == eager, f"result {i} of {results}"
        i += 1
    assert results > 5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_steps_draw_what_eager_ones_draw(traced: list[int], layout: str) -> None:
    compiled, eager = (draws_of_steps(layout, compile=compile) for compile in (True, False))
    assert traced
    assert len(eager) == 2
    for some, others in zip(compiled, eager, strict=True):
        assert [name for name, one, other in zip(SAMPLERS, some, others) if not torch.equal(one, other)] == []


def draws_of_steps(layout: str, **options: Any) -> list[list[Tensor]]:
    """What every sampler has drawn in every step."""
    found: list[Any] = []
    look = recorder(found, lambda ctx: [drawn.clone() for drawn in ctx.y_hats[1:]], ("batch_end",))
    source = fl.batches(torch.ones(8, 4), torch.zeros(8).long(), batch_size=4)
    loop = make_loop(network=Drawing(layout, *SAMPLERS), loss=loss_of_first, train=source, callbacks=[look], **options)
    fl.train(fl.init(loop), steps=2)
    return [draws for _, draws in found]


class Block(nn.Module):
    """The most common one, and every kind of noise."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 3))

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn_like(x) + torch.rand(x.shape) + torch.randint(3, x.shape) + torch.normal(0.0, 1.0, x.shape)
        chosen = torch.bernoulli(torch.full_like(x, 0.5)) * torch.randn_like(x)
        made: Tensor = self.block(x + noise + chosen)
        return made


def test_a_block_with_noise_is_compiled_and_stays_what_it_is() -> None:
    x, y = torch.randn(16, 12), torch.randint(3, (16,))
    loop = make_loop(network=Block(), train=fl.batches(x, y, batch_size=16), loss=nn.functional.cross_entropy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled, eager = both(loop)
    assert_close(compiled, eager, rtol=1e-3, atol=1e-5)


class Recomputed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))
        self._options = {"use_reentrant": use_reentrant}

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = checkpoint(lambda h: nn.functional.dropout(h, 0.5), x * self.weight, **self._options)
        return made


def test_what_is_computed_again_in_the_backward_pass_draws_the_same_again(traced: list[int]) -> None:
    ones, found = torch.ones(4, 64), list[Any]()
    look = recorder(found, lambda ctx: (ctx.y_hats.clone(), ctx.grads["weight"].clone()), ("batch_end",))
    loop = make_loop(
        network=Recomputed(use_reentrant=False),
        loss=lambda y_hat, y: (y_hat - y).sum(),
        train=fl.batches(ones, 0 * ones, batch_size=4),
        optimizer=fl.optimizer(torch.optim.SGD, lr=0.0),
        callbacks=[look],
    )
    both(loop)
    assert traced
    assert all(torch.equal(grad, y_hat.sum(0)) for _, (y_hat, grad) in found)


class DrawingAgainByValue(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        def noisy(x: Tensor) -> Tensor:
            return torch.bernoulli(x.detach().sigmoid()) * x

        made: Tensor = checkpoint(noisy, super().forward(x), use_reentrant=False)
        return made


class Distribution(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = torch.distributions.Normal(super().forward(x), 1.0).rsample()
        return made


class SettingTheGenerator(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        first = torch.rand_like(x)
        torch.manual_seed(3)
        return super().forward(x + first + torch.rand_like(x))


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (SettingTheGenerator, "it sets the state of torch's generator"),
        (DrawingAgainByValue, "it draws random numbers that depend on values, and draws some again"),
        (Distribution, "values of tensors decide what is computed, .* validate_args=False"),
    ],
)
def test_what_is_drawn_in_other_ways_is_not_compiled(traced: list[int], cls: Any, why: str) -> None:
    with pytest.warns(UserWarning, match=why):
        compiled, eager = both(make_loop(network=cls(3, 2), train=fl.batches(*data(3), batch_size=5)))
    assert fl.digest(compiled) == fl.digest(eager)


def test_a_first_step_that_is_computed_twice_is_drawn_once(traced: list[int]) -> None:
    plain, drawing = nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))
    for network in (plain, drawing):
        fl.train(fl.init(noisy_loop_of(network)), steps=1)
    assert traced[1] == traced[0] + 1


MAGNIFYING: dict[str, tuple[Any, dict[str, Any]]] = {
    "chaotic": (lambda y_hat, y: torch.sin(1e7 * y_hat).mean(), {}),
    "no gradient": (lambda y_hat, y: y_hat.softmax(1).sum(), {}),
    "small moves": (nn.functional.cross_entropy, {"optimizer": fl.optimizer(torch.optim.AdamW, lr=1e-8)}),
    "not finite": (lambda y_hat, y: nn.functional.cross_entropy(y_hat, y) * float("nan"), {}),
}


@pytest.mark.parametrize("kind", MAGNIFYING)
def test_graphs_of_steps_that_magnify_rounding_errors_are_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    """Here the graph computes as if its inputs were rounded up."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    used: list[int] = []

    def compiled(module: torch.fx.GraphModule, inputs: list[Tensor], draws: bool, key: str) -> graphs.Code:
        def run(tensors: list[Tensor]) -> Any:
            used.append(len(tensors))
            up = [t.nextafter(torch.tensor(9.0)) if t.is_floating_point() and t.dim() else t for t in tensors]
            return module(*up)

        return graphs.Code(run, draws, list(map(layout, run(inputs))))

    monkeypatch.setattr(graphs, "_ahead_of_time", compiled)
    loss, changes = MAGNIFYING[kind]
    with fl.seeded(0):
        network = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    loop = make_loop(network=network, loss=loss, train=fl.batches(*data(3), batch_size=5), compile=True, **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fl.train(fl.init(loop), steps=3)
    assert len(used) > 3


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILABLE)
def test_networks_of_all_kinds_compile(name: str) -> None:
    make, x, y, loss = NETWORKS[name]
    with fl.seeded(0):
        network = make()
    source = fl.batches(x, y, batch_size=5, shuffle=True)
    compiled, eager = both(make_loop(network=network, train=source, **({} if loss is None else {"loss": loss})))
    assert_close(compiled, eager, rtol=1e-3, atol=1e-5)
