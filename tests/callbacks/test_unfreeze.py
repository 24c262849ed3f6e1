from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import functional_loop as fl
from functional_loop.callbacks.control.rollback import rollback
from functional_loop.callbacks.gradients.unfreeze import unfreeze
from functional_loop.engine.template import template
from tests.callbacks.laws import holds_for
from tests.sample_loops import epoch_of, full_loop, make_loop, same_bits

HEAD = ("3.weight", "3.bias")
ALL = ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias")


def trainable(loop: fl.Loop) -> list[tuple[str, ...]]:
    """The parameters that every batch trains."""
    return [ctx.trainable for ctx in fl.iterate(fl.init(loop)) if ctx.stage == "batch_end"]


def test_parameters_are_unfrozen_at_epochs_and_batches() -> None:
    rows = [{"epoch": 2, "weights": ["1.*"]}, {"batch": 5, "weights": lambda name: name.startswith("0")}]
    seen = trainable(make_loop(callbacks=[unfreeze("3.*", rows)]))
    assert seen == [HEAD, HEAD, HEAD, ALL[2:], ALL, ALL]


@pytest.mark.parametrize("skipped", [{3}, {3, 4}, {2, 3, 4, 5}, {4, 5}])
def test_a_batch_that_is_passed_over_unfreezes_at_the_next(skipped: set[int]) -> None:
    loop = make_loop(callbacks=[unfreeze("3.*", [{"batch": 3, "weights": "1.*"}])], skip_batches=skipped)
    expected = [ALL[2:] if any(m >= 3 and m not in skipped for m in range(1, n + 1)) else HEAD for n in range(1, 7)]
    assert trainable(loop) == expected


def test_a_batch_that_is_undone_unfreezes_at_the_next() -> None:
    guard = rollback(when=lambda ctx: ctx.global_step == 3)
    loop = make_loop(callbacks=[unfreeze("3.*", [{"batch": 3, "weights": "1.*"}]), guard])
    ctx = fl.train(fl.init(loop))
    assert ctx.callbacks["rollback"]["skipped"] == [3]
    assert ctx.trainable == ALL[2:]
    never = fl.train(fl.init(fl.evolve(loop, callbacks=loop.callbacks[:1], skip_batches={3})))
    assert fl.tree_equal(ctx.params, never.params)


def test_what_is_frozen_again_later_stays_so() -> None:
    freeze = fl.Callback(
        "freeze", batch_end=fl.when(lambda c: c.global_step == 4, lambda c: fl.evolve(c, trainable=HEAD))
    )
    loop = make_loop(callbacks=[unfreeze("3.*", [{"batch": 3, "weights": "1.*"}]), freeze], skip_batches={5})
    assert trainable(loop) == [HEAD, HEAD, ALL[2:], HEAD, HEAD, HEAD]


def test_a_run_can_start_with_everything_frozen() -> None:
    loop = make_loop(callbacks=[unfreeze([], [{"batch": 2, "weights": "*.bias"}, {"batch": 2, "weights": "3.*"}])])
    assert trainable(loop)[:2] == [(), ("0.bias", "1.bias", "3.weight", "3.bias")]


def test_what_was_frozen_by_the_network_can_be_unfrozen() -> None:
    loop = make_loop()
    template(loop).requires_grad_(False)
    assert trainable(fl.evolve(loop, callbacks=[unfreeze("3.*", [{"epoch": 2, "weights": "*"}])]))[-1] == ALL


def test_it_is_the_hand_written_loop_with_requires_grad() -> None:
    adamw = fl.optimizer(torch.optim.AdamW, lr=0.05, weight_decay=0.1)
    gradually = unfreeze(["3.*"], [{"epoch": 2, "weights": "1.*"}, {"batch": 8, "weights": ["0.*"]}])
    loop = make_loop(optimizer=adamw, epochs=4, callbacks=[gradually])
    start = fl.init(loop)
    module = fl.to_module(start).train()
    optimizer = fl.to_optimizer(start, module)
    step = 0
    for epoch in range(1, 5):
        for x, y in epoch_of(loop, epoch):
            step += 1
            for name, parameter in module.named_parameters():
                since = {"3": 1, "1": 4, "0": 8}[name[0]]
                parameter.requires_grad_(step >= since)
            optimizer.zero_grad()
            loop.loss(module(x), y).backward()
            optimizer.step()
    assert same_bits(fl.train(start), module)


def test_frozen_parameters_are_not_touched() -> None:
    start = fl.init(make_loop(callbacks=[unfreeze("3.*", [])]))
    end = fl.train(start)
    moved = [name for name in start.params if not torch.equal(start.params[name], end.params[name])]
    assert tuple(moved) == HEAD
    assert end.optimizer_state["slots"].keys() == set(HEAD)


def test_it_resumes_anywhere_and_its_forks_do_not_mix(tmp_path: Path) -> None:
    rows = [{"batch": 2, "weights": "1.*"}, {"epoch": 2, "weights": "*"}]
    holds_for(lambda: full_loop(callbacks=[unfreeze("3.*", rows)]), tmp_path)


def test_patterns_that_match_nothing_are_refused_before_training() -> None:
    with pytest.raises(ValueError, match="pattern of starting_weights 'head' matches no parameter"):
        fl.init(make_loop(callbacks=[unfreeze("head", [])]))
    with pytest.raises(ValueError, match="pattern of unfreeze 'head' matches no parameter"):
        fl.init(make_loop(callbacks=[unfreeze("*", [{"epoch": 1, "weights": ["*.bias", "head"]}])]))
    only_head = fl.optimizer(torch.optim.SGD, lr=0.1, params="3.*")
    with pytest.raises(ValueError, match="matches no parameter"):
        fl.init(make_loop(optimizer=only_head, callbacks=[unfreeze("3.*", [{"epoch": 2, "weights": "0.*"}])]))


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ({"epoch": 1, "weights": "*"}, TypeError, "unfreeze is a list of rows"),
        (["*"], TypeError, "a row is a dict such as"),
        ([{"epoch": 1, "weight": "*"}], ValueError, "a row has no key 'weight'; did you mean 'weights'"),
        ([{"weights": "*"}], ValueError, 'one of "epoch" and "batch"'),
        ([{"epoch": 1, "batch": 1, "weights": "*"}], ValueError, 'one of "epoch" and "batch"'),
        ([{"epoch": 1}], ValueError, 'a row has "weights"'),
        ([{"epoch": 0, "weights": "*"}], ValueError, '"epoch" of a row must be an integer of at least 1, not 0'),
        ([{"batch": "2", "weights": "*"}], ValueError, '"batch" of a row must be an integer'),
        ([{"batch": 2, "weights": 3}], TypeError, '"weights" of a row must be a pattern'),
    ],
)
def test_bad_rows_are_refused(rows: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        unfreeze("*", rows)


def test_bad_starting_weights_are_refused() -> None:
    with pytest.raises(TypeError, match="starting_weights must be a pattern"):
        unfreeze(3, [])  # type: ignore[arg-type]
