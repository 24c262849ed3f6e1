"""The check that users call in their own tests: it passes what resumes, and finds what does not."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import functional_loop as fl
from functional_loop.callbacks.logs.history import history
from functional_loop.callbacks.objects.callback_set import CallbackSet
from functional_loop.callbacks.registry.descriptor import TorchCallback
from functional_loop.testing import check_callback
from tests.callbacks.objects import CallbackSetBatches, CallbackSetCounter, doing
from tests.hooks import CALLBACKS
from tests.sample_loops import full_loop, make_loop


class CallbackSetMomentum(CallbackSet):
    """A state that the parameters depend on."""

    def __init__(self, decay: float = 0.9) -> None:
        self.decay = decay
        self.mean = torch.zeros(4)

    def on_after_backward(self) -> None:
        self.mean = self.decay * self.mean + self.ctx.grads["0.bias"]

    def on_batch_end(self) -> None:
        self.ctx.network[0].bias.data.sub_(0.1 * self.mean)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.mean = state_dict["mean"]


@pytest.mark.parametrize("factory", [CallbackSetBatches, CallbackSetCounter, CallbackSetMomentum, CallbackSet])
def test_objects_with_a_complete_state_pass(factory: Callable[[], CallbackSet]) -> None:
    check_callback(factory)


@pytest.mark.parametrize("name", CALLBACKS)
def test_pure_callbacks_pass(name: str) -> None:
    check_callback(CALLBACKS[name])
    check_callback(CALLBACKS[name]())


def test_descriptors_pass() -> None:
    check_callback(TorchCallback(CallbackSetMomentum, "mine", weight=2, values={"decay": 0.5}))
    check_callback(TorchCallback(history))
    check_callback(lambda: TorchCallback(history))


def test_a_pure_callback_may_be_made_from_something_that_keeps_no_state() -> None:
    check_callback(fl.Callback("pure", source=object(), init=lambda ctx: 0))


def test_another_loop_and_seed_can_be_given() -> None:
    check_callback(CallbackSetMomentum, loop=full_loop(), seed=4)
    check_callback(CallbackSetMomentum, loop=make_loop(callbacks=[history()], epochs=1))


def forgetting(**methods: Any) -> Callable[[], CallbackSet]:
    """Objects that keep less than they know."""
    return type("CallbackSetForgetting", (CallbackSetMomentum,), methods)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (
            forgetting(state_dict=CallbackSet.state_dict, load_state_dict=CallbackSet.load_state_dict),
            r"callback 'forgetting': a run that is continued with a new callback after 'batch_end' \(epoch 1, step 1\) "
            r"parts from the one that went on at 'batch_end' \(epoch 1, step 2\): \['network'\]\['0.bias'\] is \d of 4 "
            "elements differ",
        ),
        (
            forgetting(state_dict=lambda self: {"decay": self.decay}, load_state_dict=lambda self, state: None),
            r"'batch_end' \(epoch 1, step 2\): \['network'\]\['0.bias'\]",
        ),
    ],
    ids=["no state", "another state"],
)
def test_a_state_that_leaves_something_out_is_found_where_the_runs_part(factory: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_callback(factory)


def test_a_state_that_is_not_taken_is_found() -> None:
    with pytest.raises(AssertionError, match=r"after load_state_dict\(\), .* not what was loaded: \['mean'\]"):
        check_callback(forgetting(load_state_dict=lambda self, state_dict: None))


def test_a_stage_of_validation_is_named() -> None:
    class CallbackSetScores(CallbackSet):
        batches = 0

        def on_batch_valid_end(self) -> None:
            self.batches += 1

        def on_valid_end(self) -> None:
            self.ctx.terminate = self.batches == 2

    with pytest.raises(
        AssertionError, match=r"continued .* after 'batch_valid_end' .* at 'valid_end' \(epoch 1, step 3\)"
    ):
        check_callback(CallbackSetScores)


def test_the_callback_of_a_descriptor_is_checked_too() -> None:
    with pytest.raises(AssertionError, match="callback 'mine': a run that is continued"):
        check_callback(
            TorchCallback(forgetting(state_dict=lambda self: {}, load_state_dict=lambda self, s: None), "mine")
        )


def test_a_run_that_is_never_the_same_is_told_from_one_that_forgets() -> None:
    class CallbackSetClock(CallbackSet):
        at = 0.0

        def on_batch_end(self) -> None:
            self.at = time.perf_counter()

        def state_dict(self) -> dict[str, float]:
            return {"at": self.at}

        def load_state_dict(self, state_dict: dict[str, float]) -> None:
            self.at = state_dict["at"]

    with pytest.raises(AssertionError, match=r"two runs of one seed part at 'batch_end' .*volatile = True"):
        check_callback(CallbackSetClock)
    CallbackSetClock.volatile = True
    check_callback(CallbackSetClock)


def test_a_hook_that_writes_to_an_earlier_context_is_found() -> None:
    def append(ctx: fl.Context) -> fl.Context:
        ctx.callbacks["rows"].append(ctx.step)
        return ctx

    def double(ctx: fl.Context) -> fl.Context:
        ctx.params["0.bias"].mul_(2)
        return ctx

    for hook in (append, double):
        with pytest.raises(AssertionError, match=r"callback 'rows': the context of .* was changed by what came later"):
            check_callback(lambda hook=hook: fl.Callback("rows", init=lambda ctx: [], epoch_end=hook))


def test_one_object_again_and_again_proves_nothing() -> None:
    callback = CallbackSetBatches()
    for factory in (callback, lambda: callback):
        with pytest.raises(TypeError, match="needs a new object whenever it asks for one"):
            check_callback(factory)


def test_errors_of_the_callback_are_raised_as_they_are() -> None:
    def fail(self: Any) -> None:
        raise RuntimeError("no such file")

    with pytest.raises(RuntimeError, match="no such file"):
        check_callback(lambda: doing(on_valid_end=fail))


WITHOUT_SHIM = """
import sys, torch, functional_loop as fl
torch.set_num_threads(1)
fl.testing.check_callback(lambda: fl.Callback("nothing"))
assert not any(name.startswith("functional_loop.callbacks") for name in sys.modules)
"""


def test_it_does_not_need_object_callbacks() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_SHIM], check=True)
