from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import functional_loop as fl
from tests.sample_loops import full_loop, make_loop, middle
from tests.strategies import examples, specs

pytestmark = pytest.mark.filterwarnings("ignore:resuming in mid-epoch")


def steps_of(history: fl.History) -> list[int]:
    return [ctx.global_step for ctx in history]


@given(st.integers(1, 5), st.integers(1, 4))
@examples(0.5)
def test_it_keeps_the_newest_of_every_kth_batch(n: int, every: int) -> None:
    history = fl.History(n, every)
    for ctx in fl.iterate(fl.init(make_loop(epochs=3))):
        history.add(ctx)
    assert steps_of(history) == [step for step in range(1, 10) if step % every == 0][-n:]


@given(specs(data="tensors"), st.integers(1, 4))
@examples(0.3)
def test_every_context_that_is_kept_goes_on_to_the_same_end(spec: Any, n: int) -> None:
    history = fl.History(n)
    end = fl.train(fl.init(spec.loop(), seed=1))
    observed = spec.loop(callbacks=[*spec.loop().callbacks, history])
    assert fl.digest(fl.train(fl.init(observed, seed=1))) == fl.digest(end)
    plain = spec.loop()
    for ctx in history:
        assert fl.digest(fl.train(fl.evolve(ctx, loop=plain))) == fl.digest(end)


def test_contexts_share_what_has_not_changed() -> None:
    history = fl.History(3)
    loop = full_loop(accumulate=4, epochs=1, callbacks=[history])
    fl.train(fl.init(loop), steps=2)
    first, second = history
    assert all(first.params[name] is second.params[name] for name in first.params)


def test_a_run_that_goes_back_has_one_past() -> None:
    history = fl.History(5)
    start = fl.init(make_loop(callbacks=[history]))
    fl.train(start, steps=5)
    fl.train(history.before(4), steps=1)
    assert steps_of(history) == [1, 2, 3, 4]
    assert history.before(4) is history[2]
    assert history[-1:] == [history[3]]
    assert repr(history) == "History of steps 1, 2, 3, 4"


def test_it_may_come_and_go_when_a_run_is_resumed() -> None:
    ctx = fl.train(fl.init(make_loop(callbacks=[fl.History(2)])), steps=2)
    assert fl.load_state_dict(fl.init(make_loop()), fl.state_dict(ctx)).global_step == 2


def test_what_cannot_be_kept_or_found_is_an_error_that_says_so() -> None:
    with pytest.raises(ValueError, match="History: every must be a positive integer, not 0"):
        fl.History(1, every=0)
    with pytest.raises(TypeError, match=r"History\.add takes a Context, not int"):
        fl.History(1).add(3)  # type: ignore[arg-type]
    history = fl.History(2)
    with pytest.raises(LookupError, match="no context from before batch 3 is kept: History of steps none"):
        history.before(3)
    history.add(middle())
    with pytest.raises(LookupError, match="History of steps 4"):
        history.before(4)
