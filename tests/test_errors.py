"""Errors while training: they keep their type, say where, carry the last boundary, and every exit hook runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from torch import nn

import functional_loop as fl
from functional_loop.core.errors import notes_of as notes_of_error
from functional_loop.core.errors import region
from functional_loop.core.stages import BOUNDARIES
from tests.sample_loops import data, full_loop, make_loop, raising, recorder

X, Y = data(3)


class Mishap(Exception):  # noqa: N818  (no error of the library)
    pass


class Interrupted(BaseException):
    pass


def notes_of(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", []))


def boundary_of(error: BaseException) -> fl.Context:
    ctx = fl.context_of(error)
    assert ctx is not None
    return ctx


def hook_failing_in_epoch_two(stage: str, error: BaseException) -> fl.Callback:
    def fail(ctx: fl.Context) -> fl.Context:
        if ctx.epoch == 2 and (ctx.batch == () or ctx.step == 3):
            raise error
        return ctx

    return fl.Callback("faulty", **{stage: fail})


IN_EPOCHS = [stage for stage in fl.STAGES if stage not in ("begin", "end", "exit")]


@pytest.mark.parametrize("stage", IN_EPOCHS)
@pytest.mark.parametrize("kind", [Mishap, KeyboardInterrupt, Interrupted])
def test_a_hook_that_raises_anywhere(stage: str, kind: type[BaseException]) -> None:
    loop = full_loop()
    faulty = fl.evolve(loop, callbacks=[*loop.callbacks, hook_failing_in_epoch_two(stage, kind("no"))])
    contexts: list[fl.Context] = []
    with pytest.raises(kind, match="no") as caught:
        contexts.extend(fl.iterate(fl.init(faulty)))
    notes = notes_of(caught.value)
    assert f"in callback 'faulty' at stage '{stage}' (epoch 2, step " in notes
    last = boundary_of(caught.value)
    assert last is contexts[-1]
    mended = fl.load_state_dict(fl.init(loop), fl.state_dict(last))
    assert fl.digest(fl.train(mended)) == fl.digest(fl.train(fl.init(loop)))


def test_the_note_of_a_validation_hook_names_the_batch() -> None:
    loop = full_loop(callbacks=[raising("batch_valid_end", Mishap())])
    with pytest.raises(Mishap) as caught:
        fl.train(fl.init(loop))
    assert "(epoch 1, step 3, validation step 1)" in notes_of(caught.value)


@pytest.mark.parametrize("stage", ["begin", "end"])
def test_hooks_that_raise_at_the_ends(stage: str) -> None:
    start = fl.init(make_loop(callbacks=[raising(stage, Mishap())]))
    with pytest.raises(Mishap) as caught:
        fl.train(start)
    last = boundary_of(caught.value)
    assert last is start if stage == "begin" else last.stage == "epoch_end"


@pytest.mark.parametrize("stage", fl.STAGES)
@pytest.mark.parametrize("result", [None, {}, fl.Context])
def test_a_hook_must_return_a_context(stage: str, result: Any) -> None:
    broken = fl.Callback("broken", **{stage: lambda ctx: result})
    with pytest.raises(TypeError, match=f"must return a Context .*, not {type(result).__name__}") as caught:
        fl.train(fl.init(full_loop(callbacks=[broken])))
    assert f"in callback 'broken' at stage '{stage}'" in notes_of(caught.value)


def test_what_exit_returns_is_dropped() -> None:
    leave = fl.Callback("leave", exit=lambda ctx: fl.evolve(ctx, epoch=77))
    assert fl.train(fl.init(make_loop(callbacks=[leave]))).epoch == 2


class Failing(nn.Linear):
    """Fails in its fifth call while training, or in its first in evaluation mode."""

    def __init__(self, in_training: bool) -> None:
        super().__init__(3, 2)
        self.in_training = in_training
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = self.calls + 1
        if self.training is self.in_training and (not self.training or self.calls == 5):
            raise Mishap("no")
        return super().forward(x)


class FailingRows(torch.utils.data.Dataset[Any]):
    def __init__(self, fails: bool) -> None:
        self.fails = fails

    def __len__(self) -> int:
        return 6

    def __getitem__(self, row: int) -> Any:
        if self.fails and row == 5:
            raise Mishap("no")
        return X[row], Y[row]


class FailingOptimizer(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        raise Mishap("no")


def failing_loss(y_hat: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    raise Mishap("no")


FAILURES: dict[str, tuple[Callable[[], fl.Loop], str, tuple[str, int, int]]] = {
    "network": (
        lambda: make_loop(network=Failing(True)),
        "in the network or the loss, between 'batch_begin' and 'after_backward' (epoch 2, step 2)",
        ("batch_end", 2, 1),
    ),
    "evaluation": (
        lambda: make_loop(network=Failing(False), valid=fl.batches(X, Y)),
        "in the network, in evaluation mode (epoch 1, step 3, validation step 1)",
        ("before_valid", 1, 3),
    ),
    "loss": (
        lambda: make_loop(loss=failing_loss),
        "in the network or the loss, between 'batch_begin' and 'after_backward' (epoch 1, step 1)",
        ("epoch_begin", 1, 0),
    ),
    "training data": (
        lambda: make_loop(train=fl.batches(FailingRows(True), batch_size=2)),
        "while reading the training data (epoch 1, step 3)",
        ("batch_end", 1, 2),
    ),
    "validation data": (
        lambda: make_loop(valid=fl.batches(FailingRows(True), batch_size=2)),
        "while reading the validation data (epoch 1, step 3, validation step 3)",
        ("batch_valid_end", 1, 3),
    ),
    "optimizer": (
        lambda: make_loop(optimizer=fl.optimizer(FailingOptimizer, lr=0.1)),
        "in the optimizer, between 'after_backward' and 'batch_end' (epoch 1, step 1)",
        ("epoch_begin", 1, 0),
    ),
}


@pytest.mark.parametrize("what", FAILURES)
def test_errors_of_the_parts_keep_their_type_and_say_where(what: str) -> None:
    make, note, place = FAILURES[what]
    seen: list[tuple[str, Any]] = []
    loop = fl.evolve(make(), callbacks=[recorder(seen, lambda ctx: ctx, ("exit",))])
    with pytest.raises(Mishap, match="no") as caught:
        fl.train(fl.init(loop))
    assert note in notes_of(caught.value)
    last = boundary_of(caught.value)
    assert (last.stage, last.epoch, last.step) == place
    assert [ctx for _, ctx in seen] == [last]
    assert fl.digest(fl.load_state_dict(fl.init(loop), fl.state_dict(last))) == fl.digest(last)


def test_training_goes_on_from_the_boundary_with_mended_data() -> None:
    broken, mended = (make_loop(train=fl.batches(FailingRows(fails), batch_size=2)) for fails in (True, False))
    with pytest.raises(Mishap) as caught:
        fl.train(fl.init(broken))
    last = fl.state_dict(boundary_of(caught.value))
    resumed = fl.train(fl.load_state_dict(fl.init(mended), last))
    assert fl.digest(resumed) == fl.digest(fl.train(fl.init(mended)))


def test_a_loop_works_after_an_error_as_before() -> None:
    fail = [True]

    def sometimes(ctx: fl.Context) -> fl.Context:
        if fail[0] and ctx.global_step == 2:
            raise Mishap
        return ctx

    start = fl.init(make_loop(callbacks=[fl.Callback("sometimes", after_backward=sometimes)]))
    with pytest.raises(Mishap) as caught:
        fl.train(start)
    fail[0] = False
    assert fl.digest(fl.train(boundary_of(caught.value))) == fl.digest(fl.train(start))


def exits(ran: list[str]) -> list[fl.Callback]:
    """Exit hooks a to d, of which b and c fail."""

    def leave(id: str, error: Exception | None) -> fl.Callback:
        def run(ctx: fl.Context) -> fl.Context:
            ran.append(id)
            if error is not None:
                raise error
            return ctx

        return fl.Callback(id, exit=run)

    return [leave("a", None), leave("b", Mishap("first")), leave("c", ValueError("second")), leave("d", None)]


def test_all_exit_hooks_run_once_and_the_first_failure_is_raised() -> None:
    ran: list[str] = []
    with pytest.raises(Mishap, match="first") as caught:
        fl.train(fl.init(make_loop(callbacks=exits(ran))))
    assert ran == ["a", "b", "c", "d"]
    assert "in callback 'b' at stage 'exit'" in notes_of(caught.value)
    assert "ValueError('second')" in notes_of(caught.value)
    assert boundary_of(caught.value).stage == "end"


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_failing_exit_hooks_never_hide_the_error_before_them(kind: type[BaseException]) -> None:
    ran: list[str] = []
    loop = make_loop(callbacks=[*exits(ran), raising("after_backward", kind("the reason"))])
    with pytest.raises(kind, match="the reason") as caught:
        fl.train(fl.init(loop))
    assert ran == ["a", "b", "c", "d"]
    for failure in ("Mishap('first')", "ValueError('second')", "in callback 'c' at stage 'exit'"):
        assert failure in notes_of(caught.value)
    assert boundary_of(caught.value).stage == "epoch_begin"


def test_exit_runs_when_steps_are_used_up_and_its_failure_is_raised() -> None:
    ran: list[str] = []
    with pytest.raises(Mishap, match="first") as caught:
        fl.train(fl.init(make_loop(callbacks=exits(ran))), steps=2)
    assert ran == ["a", "b", "c", "d"]
    assert boundary_of(caught.value).global_step == 2


def test_exit_runs_when_the_iterator_is_closed() -> None:
    seen: list[tuple[str, Any]] = []
    contexts: Any = fl.iterate(fl.init(make_loop(callbacks=[recorder(seen, lambda ctx: ctx, ("exit",))])))
    next(contexts)
    second = next(contexts)
    assert seen == []
    contexts.close()
    contexts.close()
    assert seen == [("exit", second)]


def test_exit_runs_when_the_consumer_of_the_iterator_fails() -> None:
    seen: list[tuple[str, Any]] = []
    start = fl.init(make_loop(callbacks=[recorder(seen, lambda ctx: ctx.stage, ("exit",))]))

    def consume() -> None:
        for ctx in fl.iterate(start):
            if ctx.stage == "batch_end":
                raise Mishap

    with pytest.raises(Mishap):
        consume()
    assert seen == [("exit", "batch_end")]


def test_exit_runs_when_an_error_is_thrown_into_the_iterator() -> None:
    seen: list[tuple[str, Any]] = []
    contexts: Any = fl.iterate(fl.init(make_loop(callbacks=[recorder(seen, lambda ctx: ctx.stage, ("exit",))])))
    first = next(contexts)
    with pytest.raises(KeyboardInterrupt) as caught:
        contexts.throw(KeyboardInterrupt())
    assert seen == [("exit", "begin")]
    assert fl.context_of(caught.value) is first


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_exit_hook_that_stops_the_process_does_not_stop_the_others(kind: type[BaseException]) -> None:
    ran: list[tuple[str, Any]] = []
    stop = raising("exit", kind(), id="stop")
    loop = make_loop(callbacks=[stop, recorder(ran, lambda ctx: ctx.stage, ("exit",))])
    with pytest.raises(kind):
        fl.train(fl.init(loop))
    assert ran == [("exit", "end")]


def test_train_step_attaches_its_context_and_runs_no_exit_hook() -> None:
    ran: list[str] = []
    begun = next(c for c in fl.iterate(fl.init(make_loop(loss=failing_loss))) if c.stage == "epoch_begin")
    begun = fl.evolve(begun, loop=fl.evolve(begun.loop, callbacks=exits(ran)))
    with pytest.raises(Mishap) as caught:
        fl.train_step(begun, (X, Y))
    assert fl.context_of(caught.value) is begun
    assert ran == []


def test_an_error_from_elsewhere_carries_no_context() -> None:
    assert fl.context_of(ValueError("somewhere else")) is None


def test_the_boundary_of_an_error_is_a_boundary() -> None:
    for stage in IN_EPOCHS:
        with pytest.raises(Mishap) as caught:
            fl.train(fl.init(full_loop(callbacks=[hook_failing_in_epoch_two(stage, Mishap())])))
        last = boundary_of(caught.value)
        assert last.stage in BOUNDARIES
        assert last.batch == last.y_hats == last.grads == ()


def test_state_dict_errors_list_their_differences() -> None:
    error = fl.StateDictError("does not fit:", ["a: 1", "b: 2"])
    assert str(error) == "does not fit:\n  - a: 1\n  - b: 2"
    assert error.differences == ("a: 1", "b: 2")
    assert isinstance(error, ValueError)
    assert isinstance(error, fl.FunctionalLoopError)
    assert issubclass(fl.CheckpointError, fl.FunctionalLoopError)


@attrs.frozen
class FrozenByAttrs(Exception):  # noqa: N818
    code: int = 3


@dataclasses.dataclass(frozen=True)
class FrozenByDataclasses(Exception):  # noqa: N818
    code: int = 3


class Slotted(Exception):  # noqa: N818
    __slots__ = ()


class Refusing(Exception):  # noqa: N818
    """Refuses to be written to, says that it has any attribute, and can't be shown."""

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"no {name} here")

    def __getattr__(self, name: str) -> str:
        return "anything"

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


class WithoutNotes(Exception):  # noqa: N818
    __notes__ = ("it is a tuple",)  # type: ignore[assignment]

    def add_note(self, note: str) -> None:
        raise TypeError(note)


class WithNotesOfItsOwn(Exception):  # noqa: N818
    @property
    def __notes__(self) -> list[str]:  # type: ignore[override]
        return ["written here"]


class Unwilling(BaseException):
    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(name)


UNWILLING = [FrozenByAttrs, FrozenByDataclasses, Slotted, Refusing, WithoutNotes, WithNotesOfItsOwn, Unwilling]


@pytest.mark.parametrize("kind", UNWILLING)
@pytest.mark.parametrize("stage", ["begin", "batch_end", "batch_valid_end", "epoch_end", "exit"])
@pytest.mark.parametrize("by", ["train", "iterate"])
def test_an_error_that_refuses_attributes_is_as_any_other(kind: type[BaseException], stage: str, by: str) -> None:
    def fail(ctx: fl.Context) -> fl.Context:
        raise kind()

    left: list[str] = []

    def leaves(name: str) -> fl.Callback:
        return fl.Callback(name, exit=lambda ctx: (left.append(name), ctx)[1])

    loop = full_loop()
    loop = fl.evolve(
        loop, callbacks=[*loop.callbacks, leaves("a"), fl.Callback("faulty", **{stage: fail}), leaves("b")]
    )
    with pytest.raises(kind) as caught:
        fl.train(fl.init(loop)) if by == "train" else list(fl.iterate(fl.init(loop)))
    assert type(caught.value) is kind
    assert left == ["a", "b"]
    boundary_of(caught.value)
    if kind is not WithNotesOfItsOwn:
        assert any(f"in callback 'faulty' at stage '{stage}'" in note for note in notes_of_error(caught.value))
    assert fl.context_of(kind()) is None


@pytest.mark.parametrize("kind", UNWILLING)
@pytest.mark.parametrize("where", ["network", "loss", "data", "drawing network", "failing exit"])
def test_so_it_is_wherever_it_comes_from(kind: type[BaseException], where: str) -> None:
    class Failing(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if where == "drawing network":
                np.random.rand()
            if "network" in where:
                raise kind()
            return super().forward(x)

    class Rows:
        def __len__(self) -> int:
            return 8

        def __getitem__(self, row: int) -> Any:
            if where == "data":
                raise kind()
            return X[row], Y[row]

    def loss(y_hat: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if where == "loss":
            raise kind()
        return y_hat.square().mean()

    def fail(ctx: fl.Context) -> fl.Context:
        raise kind()

    left: list[int] = []
    exits = [fl.Callback("left", exit=lambda ctx: (left.append(1), ctx)[1])]
    if where == "failing exit":
        exits = [fl.Callback("c", exit=fail), *exits, fl.Callback("d", exit=fail), fl.Callback("e", batch_end=fail)]
    loop = fl.Loop(
        lambda: Failing(X.shape[1], 2),
        loss,
        fl.optimizer(torch.optim.SGD, lr=0.1),
        fl.batches(Rows(), batch_size=4),
        epochs=1,
        callbacks=exits,
    )
    with pytest.raises(kind) as caught:
        fl.train(fl.init(loop))
    assert type(caught.value) is kind
    assert left == [1]
    assert boundary_of(caught.value).stage == "epoch_begin"


def fails_with(error: BaseException, at: int) -> fl.Callback:
    def fail(ctx: fl.Context) -> fl.Context:
        if ctx.global_step == at:
            raise error
        return ctx

    return fl.Callback("faulty", batch_end=fail)


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, GeneratorExit, FrozenByAttrs])
def test_an_error_that_is_raised_twice_carries_the_context_of_the_second_run(kind: type[BaseException]) -> None:
    error = kind()
    for at in (3, 2):
        loop = fl.evolve(full_loop(), callbacks=[fails_with(error, at)])
        for start in (fl.init(loop), fl.stack([fl.init(loop, seed) for seed in (1, 2)])):
            with pytest.raises(kind) as caught:
                fl.train(start)
            assert caught.value is error
            boundary = fl.context_of(error)
            assert boundary is not None
            assert (boundary.loop, boundary.global_step, boundary.ensemble) == (loop, at - 1, start.ensemble)


def test_an_error_of_nested_training_carries_at_each_level_the_context_of_that_level() -> None:
    inner = fl.evolve(full_loop(), callbacks=[fails_with(ValueError("no"), 1)])
    found = []

    def train_another(ctx: fl.Context) -> fl.Context:
        try:
            fl.train(fl.init(inner))
        except ValueError as error:
            found.append(fl.context_of(error))
            raise
        return ctx

    outer = fl.evolve(full_loop(), callbacks=[fl.Callback("outer", epoch_end=train_another)])
    with pytest.raises(ValueError, match="no") as caught:
        fl.train(fl.init(outer))
    assert found[0].loop is inner
    boundary = fl.context_of(caught.value)
    assert boundary is not None
    assert boundary.loop is outer
    fl.state_dict(boundary)


def test_a_region_is_left_as_a_context_manager_is() -> None:
    events: list[str] = []

    @region
    def tidying() -> Generator[int]:
        try:
            yield 1
        except ValueError as error:
            events.append(f"saw {error}")
            raise TypeError("instead") from error
        finally:
            events.append("tidied")

    with tidying() as found:
        events.append(str(found))
    with pytest.raises(TypeError, match="instead"), tidying():
        raise ValueError("no")
    for kind in (KeyError, StopIteration, GeneratorExit, FrozenByDataclasses):
        with pytest.raises(kind), tidying():
            raise kind()
    assert events == ["1", "tidied", "saw no", "tidied", *["tidied"] * 4]
