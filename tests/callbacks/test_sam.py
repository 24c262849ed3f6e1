from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import functional_loop as fl
from functional_loop.callbacks import clip_grad_norm, sam
from tests.callbacks.laws import holds_for
from tests.closeness import ABSOLUTE, RELATIVE, in_doubles
from tests.sample_loops import call, epoch_of, full_loop, make_loop, mlp
from tests.strategies import examples


def by_hand(loop: fl.Loop, rho: float, adaptive: bool = False) -> nn.Module:
    """The loop as in the paper: step up, take the gradient there, step back, update."""
    start = fl.init(loop)
    module = fl.to_module(start).train()
    optimizer = fl.to_optimizer(start, module)
    for epoch in range(1, loop.epochs + 1):
        for x, y in epoch_of(loop, epoch):
            loop.loss(call(module, x), y).backward()
            before = [p.detach().clone() for p in module.parameters()]
            buffers = [b.clone() for b in module.buffers()]
            with torch.no_grad():
                scale = [p.abs() if adaptive else torch.ones_like(p) for p in module.parameters()]
                norm = torch.stack([(p.grad * s).norm() for p, s in zip(module.parameters(), scale)]).norm()
                for p, s in zip(module.parameters(), scale):
                    p += rho * p.grad * s * s / (norm + 1e-12)
            optimizer.zero_grad()
            loop.loss(call(module, x), y).backward()
            with torch.no_grad():
                for p, old in zip(module.parameters(), before):
                    p.copy_(old)
                for b, old in zip(module.buffers(), buffers):
                    b.copy_(old)
            optimizer.step()
            optimizer.zero_grad()
    return module


@given(st.floats(0, 0.5), st.booleans())
@examples(0.2)
def test_it_is_the_loop_of_the_paper(rho: float, adaptive: bool) -> None:
    loop = in_doubles(make_loop(callbacks=[sam(rho, adaptive)]))
    ctx, module = fl.train(fl.init(loop)), by_hand(loop, rho, adaptive)
    expected = {name: param.detach() for name, param in module.named_parameters()} | dict(module.named_buffers())
    torch.testing.assert_close({**ctx.params, **ctx.buffers}, expected, rtol=RELATIVE, atol=ABSOLUTE)


def test_no_distance_is_no_change() -> None:
    plain, near = (
        fl.train(fl.init(in_doubles(full_loop(accumulate=1)))),
        fl.train(fl.init(in_doubles(full_loop(accumulate=1, callbacks=[sam(0.0)])))),
    )
    torch.testing.assert_close(near.params, plain.params, rtol=RELATIVE, atol=ABSOLUTE)


def test_other_callbacks_get_its_gradients() -> None:
    seen = []

    def look(ctx: fl.Context) -> fl.Context:
        seen.append(torch.stack([g.norm() for g in dict(ctx.grads).values()]).norm().item())
        return ctx

    loop = make_loop(callbacks=[clip_grad_norm(0.01), fl.Callback("look", after_backward=look), sam(0.1)])
    fl.train(fl.init(loop))
    assert max(seen) <= 0.0101


def test_it_resumes_anywhere_and_its_forks_do_not_mix(tmp_path: Path) -> None:
    holds_for(lambda: full_loop(accumulate=1, callbacks=[sam(0.1)]), tmp_path)


def test_frozen_parameters_are_not_moved() -> None:
    ctx = fl.evolve(fl.init(make_loop(network=mlp(), callbacks=[sam(0.1)])), trainable=("3.weight", "3.bias"))
    after = fl.train(ctx)
    assert {n for n in ctx.params if not torch.equal(ctx.params[n], after.params[n])} == {"3.weight", "3.bias"}


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="sam: rho must be a number of at least 0, not -1"):
        sam(-1)
    with pytest.raises(ValueError, match="accumulate > 1"):
        fl.init(make_loop(accumulate=2, callbacks=[sam()]))
    with pytest.raises(ValueError, match="LBFGS evaluates the gradients itself"):
        fl.init(make_loop(optimizer=fl.optimizer(torch.optim.LBFGS), callbacks=[sam()]))
