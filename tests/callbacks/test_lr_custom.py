from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler as torchs

import functional_loop as fl
from functional_loop.callbacks.schedules.lr_custom import as_lr_scheduler, lr_lambda, lr_multiplicative
from tests.callbacks.laws import holds_for
from tests.callbacks.torch_schedules import OPTIMIZERS, loop_of, rates, same_as_torch
from tests.sample_loops import full_loop
from tests.strategies import examples


def decay(step: int) -> float:
    return 1 / (1 + 0.3 * step)


def shrink(step: int) -> float:
    return 0.9 if step % 2 else 0.8


FUNCTIONS = {
    "lr_lambda": (lr_lambda, torchs.LambdaLR, decay),
    "lr_multiplicative": (lr_multiplicative, torchs.MultiplicativeLR, shrink),
    "one per group": (lr_lambda, torchs.LambdaLR, [decay, shrink, lambda step: step]),
}


class Remembering(torchs.LRScheduler):
    """A scheduler of one's own whose state has containers of many kinds, and grows."""

    def __init__(self, optimizer: Any, factor: float = 0.9, last_epoch: int = -1) -> None:
        self.factor = factor
        self.by_step: dict[int, float] = {}
        self.recent: tuple[float, ...] = ()
        self.seen: list[float] = []
        self.helper = deque
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[Any]:
        if self.last_epoch > 2:
            self.late = self.last_epoch
        new = [group["lr"] * (self.factor + 0.001 * len(self.by_step)) for group in self.optimizer.param_groups]
        self.by_step[self.last_epoch] = float(new[0])
        self.recent = (*self.recent[-2:], sum(self.by_step.values()))
        self.seen.append(self.recent[-1])
        return new


class Foreign:
    """A scheduler that is no subclass of torch's."""

    def __init__(self, optimizer: Any, gamma: float) -> None:
        self.optimizer, self.gamma, self.count = optimizer, gamma, 0

    def step(self) -> None:
        self.count += 1
        for group in self.optimizer.param_groups:
            group["lr"] *= self.gamma**self.count

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("step_on", "accumulate"), [("epoch", 1), ("batch", 1), ("batch", 2)])
@pytest.mark.parametrize(("make", "cls", "function"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions_give_the_rates_of_torch_at_every_step(
    make: Any, cls: Any, function: Any, step_on: str, accumulate: int, optimizer: str
) -> None:
    if isinstance(function, list) and optimizer != "adamw, groups":
        function = function[:1]
    loop = loop_of(optimizer, accumulate=accumulate)
    same_as_torch(loop, make(function, step_on=step_on), lambda o: cls(o, function), step_on)


@pytest.mark.parametrize("step_on", ["epoch", "batch"])
@pytest.mark.parametrize("cls", [Remembering, Foreign])
def test_classes_of_ones_own_give_the_rates_they_give_in_a_hand_written_loop(cls: Any, step_on: str) -> None:
    arguments = {"gamma": 0.97} if cls is Foreign else {"factor": 0.8}
    same_as_torch(loop_of(), as_lr_scheduler(cls, step_on)(**arguments), lambda o: cls(o, **arguments), step_on)


@given(st.lists(st.floats(0, 2), min_size=5, max_size=5))
@examples(0.2)
def test_a_function_of_the_step_multiplies_the_initial_rates(factors: list[float]) -> None:
    start = fl.init(loop_of("sgd", callbacks=[as_lr_scheduler(factors.__getitem__)]))
    seen = [rates(ctx) for ctx in fl.iterate(start) if ctx.stage in ("begin", "epoch_end")]
    assert seen == [[0.1 * factor] for factor in factors]


MAKERS: dict[str, Callable[[], fl.Callback]] = {
    "lr_lambda": lambda: lr_lambda(decay, step_on="batch"),
    "lr_multiplicative": lambda: lr_multiplicative(shrink),
    "function": lambda: as_lr_scheduler(decay),
    "class": lambda: as_lr_scheduler(Remembering, step_on="batch")(factor=0.8),
    "foreign class": lambda: as_lr_scheduler(Foreign)(gamma=0.9),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_it_resumes_anywhere_and_its_forks_do_not_mix(make: Callable[[], fl.Callback], tmp_path: Path) -> None:
    holds_for(lambda: full_loop(callbacks=[make()]), tmp_path)


def test_objects_that_are_called_are_functions_and_are_not_written_to() -> None:
    class Decay:
        def __init__(self) -> None:
            self.rate = 0.3

        def __call__(self, step: int) -> float:
            return 1 / (1 + self.rate * step)

    function = Decay()
    ctx = fl.train(fl.init(loop_of(callbacks=[lr_lambda(function)])))
    function.rate = 0.0
    assert rates(ctx) == rates(fl.train(fl.init(loop_of(callbacks=[lr_lambda(decay)]))))
    fl.train(fl.init(loop_of(callbacks=[lr_lambda(function)])))
    assert function.rate == 0.0


def test_ids_and_kinds_are_those_of_the_class() -> None:
    callback = as_lr_scheduler(Foreign)(gamma=0.5)
    assert (callback.id, callback.kind) == ("foreign", f"{__name__}.Foreign")
    assert as_lr_scheduler(Foreign, id="mine")(gamma=0.5).id == "mine"
    assert as_lr_scheduler(decay).id == "lr_scheduler"
    assert as_lr_scheduler(decay, id="mine").id == "mine"


def test_a_run_that_began_with_other_arguments_is_refused() -> None:
    make = as_lr_scheduler(Foreign)
    ctx = fl.train(fl.init(loop_of(callbacks=[make(gamma=0.9)])), steps=4)
    here = fl.load_state_dict(fl.init(loop_of(callbacks=[make(gamma=0.8)])), fl.state_dict(ctx))
    with pytest.raises(fl.StateDictError, match=r"gamma: 0\.9 in what was saved, 0\.8 here"):
        fl.train(here)


def test_arguments_may_be_tensors() -> None:
    make = as_lr_scheduler(Foreign)
    ctx = fl.train(fl.init(loop_of(callbacks=[make(gamma=torch.tensor([0.9]))])), steps=2)
    resumed = fl.load_state_dict(fl.init(loop_of(callbacks=[make(gamma=torch.tensor([0.9]))])), fl.state_dict(ctx))
    assert fl.digest(fl.train(resumed)) == fl.digest(fl.train(ctx))
    other = fl.load_state_dict(fl.init(loop_of(callbacks=[make(gamma=torch.tensor([0.8]))])), fl.state_dict(ctx))
    with pytest.raises(fl.StateDictError, match="gamma/0"):
        fl.train(other)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="lr_lambda: lr_lambda must be a function of the step, not 3"):
        lr_lambda(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="lr_multiplicative: lr_lambda must be a function of the step, not 1"):
        lr_multiplicative([decay, 1])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="as_lr_scheduler: dict is no scheduler class, it has no method step"):
        as_lr_scheduler(dict)
    with pytest.raises(TypeError, match="as_lr_scheduler: ReduceLROnPlateau steps on a score"):
        as_lr_scheduler(torchs.ReduceLROnPlateau)
    with pytest.raises(TypeError, match="as_lr_scheduler: x must be a function of the step, not 3"):
        as_lr_scheduler(3)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="as_lr_scheduler: step_on is 'epoch' or 'batch', not 'step'"):
        as_lr_scheduler(decay, step_on="step")
    with pytest.raises(TypeError, match="missing a required argument: 'gamma'"):
        as_lr_scheduler(Foreign)()
    with pytest.raises(TypeError, match="unexpected keyword argument 'delta'"):
        as_lr_scheduler(Foreign)(gamma=0.9, delta=0.9)
    with pytest.raises(ValueError, match="Expected 3 lr_lambdas, but got 2"):
        fl.init(loop_of(callbacks=[lr_lambda([decay, decay])]))
