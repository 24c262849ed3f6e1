"""Ensembles whose members are trained at once by compiled graphs."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import functional_loop as fl
from functional_loop.callbacks import lr_one_cycle, lr_step
from functional_loop.compile import graphs
from functional_loop.core.record import leaves_with_paths
from functional_loop.ensembles import compiled_members
from functional_loop.optim.layouts import layout
from tests.closeness import ABSOLUTE, RELATIVE, in_doubles
from tests.processes import in_a_fresh_process
from tests.sample_loops import data, make_loop, mlp

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch's compiler needs a C++ compiler")

OPTIMIZERS: dict[str, Any] = {
    "AdamW": (torch.optim.AdamW, {"lr": 0.01}),
    "Adam": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.01}),
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "centered": True, "weight_decay": 0.01}),
}
OWN: dict[str, dict[str, Any]] = {
    "lr": {"lr": torch.tensor([0.003, 0.01, 0.03])},
    "momentum": {"momentum": torch.tensor([0.0, 0.5, 0.9])},
    "betas": {"betas": (torch.tensor([0.8, 0.9, 0.95]), 0.99), "weight_decay": torch.tensor([0.0, 0.1, 0.2])},
}


def shallow() -> nn.Module:
    """Without the noise of the gradients of a bias before BatchNorm, which Adam makes large."""
    with fl.seeded(0):
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def ensemble(
    compile: bool, optimizer: str = "AdamW", own: str = "", double: bool = False, **changes: Any
) -> fl.Context:
    changes = {"network": mlp, "train": fl.batches(*data(3), batch_size=4, shuffle=True), **changes}
    cls, hyperparameters = OPTIMIZERS[optimizer]
    loop = make_loop(optimizer=fl.optimizer(cls, **hyperparameters), compile=compile, **changes)
    loop = in_doubles(loop) if double else loop
    ctx = fl.stack([fl.init(loop, seed) for seed in range(3)], mode="vectorised")
    return ctx.with_hyperparameters(**OWN[own]) if own else ctx


@pytest.fixture(autouse=True)
def _compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings.simplefilter("error")


@pytest.mark.parametrize(
    ("optimizer", "own", "changes"),
    [
        ("AdamW", "", {"network": mlp}),
        ("AdamW", "lr", {"callbacks": [lr_step(1, gamma=0.5)]}),
        ("Adam", "betas", {"callbacks": [lr_one_cycle(max_lr=0.1, total_steps=6)]}),
        ("SGD", "lr", {"network": mlp}),
        ("SGD", "momentum", {}),
        ("RMSprop", "momentum", {}),
    ],
)
def test_members_agree_with_those_of_an_eager_run(optimizer: str, own: str, changes: dict[str, Any]) -> None:
    changes = {"network": shallow, **changes}
    compiled, eager = (
        list(fl.iterate(ensemble(compile, optimizer, own, double=True, **changes))) for compile in (True, False)
    )
    assert [ctx.stage for ctx in compiled] == [ctx.stage for ctx in eager]
    if changes["network"] is shallow:
        torch.testing.assert_close(dict(compiled[-1].params), dict(eager[-1].params), rtol=RELATIVE, atol=ABSOLUTE)
    for one, other in zip(compiled, eager):
        if one.stage == "batch_end":
            torch.testing.assert_close(one.last_loss, other.last_loss, rtol=RELATIVE, atol=ABSOLUTE)
    paths = [[path for path, _ in leaves_with_paths(fl.state_dict(end))] for end in (compiled[-1], eager[-1])]
    assert paths[0] == paths[1]
    graphs = compiled_members._graphs[compiled[0].loop]
    # Gradients of full and of last batches, and one update.
    assert None not in graphs.values()
    assert len(graphs) == 3


def finish(sd: Any) -> str:
    """The digest at the end of the run that ``sd`` is the state of."""
    warnings.simplefilter("error")
    return fl.digest(fl.train(fl.load_state_dict(ensemble(True), sd)))


def test_a_run_goes_on_bit_for_bit_from_a_state_dict_and_by_the_same_graphs() -> None:
    start = ensemble(True, own="lr")
    end = fl.train(start)
    before = len(compiled_members._graphs[start.loop])
    for steps in (1, 2, 3):
        half = fl.state_dict(fl.train(start, steps=steps))
        assert fl.digest(fl.train(fl.load_state_dict(start, half))) == fl.digest(end)
    assert len(compiled_members._graphs[start.loop]) == before
    assert in_a_fresh_process(finish, half) == fl.digest(end)


def test_a_member_that_has_finished_stays_as_it_is() -> None:
    def stop(ctx: fl.Context) -> fl.Context:
        return fl.evolve(ctx, terminate=ctx.seed == 1)

    ctx = ensemble(True, epochs=2, callbacks=[fl.Callback("stop", epoch_end=stop)])
    first = fl.unstack(next(c for c in fl.iterate(ctx) if c.stage == "epoch_end"))
    last = fl.unstack(fl.train(ctx))
    assert fl.tree_equal(last[1].params, first[1].params)
    assert not fl.tree_equal(last[0].params, first[0].params)


class Noisy(nn.Module):
    """Dropout, noise on its input, and noise of a shape of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.dropout = nn.Linear(3, 8), nn.Linear(8, 2), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.1 * torch.randn_like(x)
        x = self.dropout(self.first(x)) + torch.rand(8) - x.new_empty(8).uniform_()
        return self.last(x)  # type: ignore[no-any-return]


def test_every_member_draws_the_random_numbers_of_its_eager_run() -> None:
    compiled, eager = (list(fl.iterate(ensemble(compile, network=Noisy, double=True))) for compile in (True, False))
    for one, other in zip(compiled, eager):
        if one.stage == "batch_end":
            torch.testing.assert_close(one.last_loss, other.last_loss, rtol=RELATIVE, atol=ABSOLUTE)
    assert None not in compiled_members._graphs[compiled[0].loop].values()
    start = ensemble(True, network=Noisy, double=True)
    half = fl.state_dict(fl.train(start, steps=2))
    assert fl.digest(fl.train(fl.load_state_dict(start, half))) == fl.digest(fl.train(start))
    alone = fl.stack([fl.init(start.loop, seed) for seed in (1, 2)], mode="vectorised")
    torch.testing.assert_close(fl.train(alone).last_loss, compiled[-1].last_loss[1:], rtol=RELATIVE, atol=ABSOLUTE)


def test_a_graph_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each of its results in turn, for one member."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    eager, results, i = fl.digest(fl.train(ensemble(False, network=shallow), steps=1)), 1, 0
    while i < results:

        def compiled(module: torch.fx.GraphModule, inputs: list[Tensor], draws: bool, key: str) -> graphs.Code:
            nonlocal results

            def run(tensors: list[Tensor], i: int = i) -> Any:
                made = [tensor.clone() for tensor in module(*tensors)]
                made[i % len(made)][1] *= 1.02
                return made

            made = run(inputs)
            results = max(results, len(made))
            return graphs.Code(run, draws, list(map(layout, made)))

        monkeypatch.setattr(graphs, "_ahead_of_time", compiled)
        with pytest.warns(UserWarning, match="without compiling it, because when it is compiled it is another: "):
            end = fl.train(ensemble(True, network=shallow), steps=1)
        assert fl.digest(end) == eager, f"result {i} of {results}"
        i += 1
    assert results > 5


def test_draws_that_depend_on_values_are_not_compiled_and_say_so() -> None:
    class Gated(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.bernoulli(x[:, :1].sigmoid())

    with pytest.warns(UserWarning, match="draws random numbers in a way that depends on values"):
        compiled = fl.train(ensemble(True, network=lambda: Gated(3, 2)), steps=1)
    eager = fl.train(ensemble(False, network=lambda: Gated(3, 2)), steps=1)
    assert torch.equal(compiled.last_loss, eager.last_loss)


def test_precision_is_that_of_the_loop_whatever_is_set_around_the_call() -> None:
    outside = fl.train(ensemble(True))
    with torch.autocast("cpu", torch.bfloat16):
        inside = fl.train(ensemble(True))
    assert fl.tree_equal(inside.params, outside.params)


def test_mixed_precision_is_compiled() -> None:
    compiled, eager = (
        fl.train(ensemble(compile, network=shallow, autocast=torch.bfloat16), steps=1) for compile in (True, False)
    )
    torch.testing.assert_close(compiled.last_loss, eager.last_loss, rtol=2e-2, atol=1e-3)
    assert None not in compiled_members._graphs[compiled.loop].values()
    assert not torch.allclose(eager.last_loss, fl.train(ensemble(False, network=shallow), steps=1).last_loss, rtol=1e-6)
