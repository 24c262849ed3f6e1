"""Ensembles whose members are trained at once by compiled graphs."""

from __future__ import annotations

import shutil
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import functional_loop as fl
from functional_loop import compiled_members
from functional_loop.record import leaves_with_paths
from tests.sample_loops import data, make_loop, mlp

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch's compiler needs a C++ compiler")

OPTIMIZERS: dict[str, Any] = {
    "AdamW": lambda: fl.optimizer(torch.optim.AdamW, lr=0.01),
    "SGD": lambda: fl.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01),
}


def ensemble(compile: bool, optimizer: str = "AdamW", rates: bool = False, **changes: Any) -> fl.Context:
    changes = {"network": mlp, "train": fl.batches(*data(3), batch_size=4, shuffle=True), **changes}
    loop = make_loop(optimizer=OPTIMIZERS[optimizer](), compile=compile, **changes)
    ctx = fl.stack([fl.init(loop, seed) for seed in range(3)], mode="vectorised")
    return ctx.with_hyperparameters(lr=torch.tensor([0.003, 0.01, 0.03])) if rates else ctx


@pytest.fixture(autouse=True)
def _compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings.simplefilter("error")


@pytest.mark.parametrize(("optimizer", "rates"), [("AdamW", False), ("AdamW", True), ("SGD", True)])
def test_members_agree_with_those_of_an_eager_run(optimizer: str, rates: bool) -> None:
    compiled, eager = (list(fl.iterate(ensemble(compile, optimizer, rates))) for compile in (True, False))
    assert [ctx.stage for ctx in compiled] == [ctx.stage for ctx in eager]
    for one, other in zip(compiled, eager):
        if one.stage == "batch_end":
            torch.testing.assert_close(one.last_loss, other.last_loss, rtol=1e-5, atol=1e-7)
    paths = [[path for path, _ in leaves_with_paths(fl.state_dict(end))] for end in (compiled[-1], eager[-1])]
    assert paths[0] == paths[1]
    graphs = compiled_members._graphs[compiled[0].loop]
    # Gradients of full and of last batches, and one update.
    assert None not in graphs.values()
    assert len(graphs) == 3


def test_a_run_goes_on_bit_for_bit_from_a_state_dict_and_by_the_same_graphs() -> None:
    start = ensemble(True)
    end = fl.train(start)
    before = len(compiled_members._graphs[start.loop])
    half = fl.state_dict(fl.train(start, steps=1))
    assert fl.digest(fl.train(fl.load_state_dict(start, half))) == fl.digest(end)
    assert len(compiled_members._graphs[start.loop]) == before


def test_a_member_that_has_finished_stays_as_it_is() -> None:
    def stop(ctx: fl.Context) -> fl.Context:
        return fl.evolve(ctx, terminate=ctx.seed == 1)

    ctx = ensemble(True, epochs=2, callbacks=[fl.Callback("stop", epoch_end=stop)])
    first = fl.unstack(next(c for c in fl.iterate(ctx) if c.stage == "epoch_end"))
    last = fl.unstack(fl.train(ctx))
    assert fl.tree_equal(last[1].params, first[1].params)
    assert not fl.tree_equal(last[0].params, first[0].params)


def test_what_draws_random_numbers_is_not_compiled_and_says_so() -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2))

    with pytest.warns(UserWarning, match="the network draws random numbers"):
        compiled = fl.train(ensemble(True, network=network), steps=1)
    eager = fl.train(ensemble(False, network=network), steps=1)
    assert torch.equal(compiled.last_loss, eager.last_loss)
