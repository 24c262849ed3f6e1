"""The loops that ship: they can be built and trained anywhere, and learn."""

from __future__ import annotations

import math
import sys

import pytest
import torch

import functional_loop as fl
from functional_loop.examples import branch, char_gpt, digits, hypergradient, maml

TINY = {"context": 16, "width": 16, "layers": 1, "heads": 2, "characters": 4000, "batch_size": 8, "epochs": 2}


def tiny_gpt() -> fl.Context:
    return fl.init(char_gpt.loop(**TINY), seed=0)


def test_seeds_of_the_digits_differ_in_initialisation() -> None:
    a, b = (fl.init(digits.loop(), seed=seed) for seed in (0, 1))
    assert not fl.tree_equal(a.params, b.params)
    assert fl.tree_equal(a.params, fl.init(digits.loop(), seed=0).params)


def test_no_picture_is_in_both_parts_of_the_digits() -> None:
    loop = digits.loop()
    pictures = [
        {tuple(picture.flatten().tolist()) for batch, _ in source.fetch(0, 1, 0, ()) for picture in batch.x}
        for source in (loop.train, loop.valid)
        if source is not None
    ]
    assert [len(part) for part in pictures] == [1437, 360]
    assert not pictures[0] & pictures[1]


def test_without_scikit_learn_the_digits_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install functional-loop\[examples\]"):
        digits.loop()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_the_digits_are_learnt_with_any_seed(seed: int) -> None:
    ctx = fl.train(fl.init(digits.loop(), seed=seed))
    assert dict(ctx.last_scores_valid)["accuracy"] >= 0.98


def test_the_gpt_learns_and_resumes_to_the_same_bits() -> None:
    start = tiny_gpt()
    end = fl.train(start)
    assert dict(end.last_scores_valid)["bits_per_character"] < fl.validate(start)["bits_per_character"] - 1
    middle = fl.train(start, steps=7)
    resumed = fl.train(fl.load_state_dict(tiny_gpt(), fl.state_dict(middle)))
    assert fl.digest(resumed) == fl.digest(end)


def test_the_gpt_does_not_look_ahead() -> None:
    ctx = tiny_gpt()
    x = char_gpt.encode("The quick brown.").unsqueeze(0)
    changed = char_gpt.encode("The quick black!").unsqueeze(0)
    same = len("The quick b")
    assert torch.equal(fl.predict(ctx, x)[:, :same], fl.predict(ctx, changed)[:, :same])
    assert not torch.equal(fl.predict(ctx, x)[:, same:], fl.predict(ctx, changed)[:, same:])


def test_bits_per_character_weighs_characters_and_not_batches() -> None:
    measure = char_gpt.bits_per_character()
    assert measure.init is not None
    assert measure.update is not None
    assert measure.compute is not None
    uniform, certain = torch.zeros(3, 5, 4), torch.tensor([100.0, 0.0, 0.0, 0.0]).expand(1, 5, 4)
    state = measure.update(measure.init(), uniform, torch.zeros(3, 5, dtype=torch.int64))
    state = measure.update(state, certain, torch.zeros(1, 5, dtype=torch.int64))
    assert round(float(measure.compute(state)), 6) == 1.5
    assert state["characters"] == 20


def test_a_gpt_that_knows_nothing_needs_the_bits_of_its_alphabet() -> None:
    assert abs(fl.validate(tiny_gpt())["bits_per_character"] - math.log2(len(char_gpt.alphabet()))) < 0.1


def test_windows_predict_the_next_character() -> None:
    x, y = char_gpt.windows(torch.arange(11), 3)
    assert x.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert torch.equal(y, x + 1)


def test_samples_are_a_function_of_the_context() -> None:
    ctx = fl.train(tiny_gpt(), steps=3)
    written = char_gpt.sample(ctx, "What is ", 30)
    assert written.startswith("What is ")
    assert len(written) == 38
    torch.rand(5)
    assert char_gpt.sample(ctx, "What is ", 30) == written


@pytest.mark.parametrize(("prompt", "message"), [("", "prompt"), ("日本", "the text has no '日'")])
def test_a_prompt_that_the_gpt_cannot_read_is_refused(prompt: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        char_gpt.sample(tiny_gpt(), prompt, 5)


def test_a_branch_is_a_run_of_its_own_and_its_origin_stays() -> None:
    start = fl.train(tiny_gpt(), steps=3)
    before = fl.digest(start)
    ends = branch.branch(start, (0.1, 0.001), steps=2)
    assert fl.digest(start) == before
    for lr, end in ends.items():
        assert fl.digest(end) == fl.digest(fl.train(start.with_hyperparameters(lr=lr), steps=2))
    assert not fl.tree_equal(ends[0.1].params, ends[0.001].params)


def test_an_initialisation_learnt_for_a_task_family_adapts_better() -> None:
    ctx = fl.init(maml.loop(), seed=0)
    x, y = maml.tasks(50, seed=-1)
    learnt = maml.meta_train(ctx, 60)

    def after(start: fl.Context, steps: int) -> float:
        losses = [maml.adapted_loss(start, start.params, *task, steps).item() for task in zip(x, y)]
        return sum(losses) / len(losses)

    assert after(learnt, 5) < after(ctx, 5)
    assert after(learnt, 0) - after(learnt, 5) > after(ctx, 0) - after(ctx, 5)


def test_hypergradients_lower_the_validation_loss() -> None:
    ctx = fl.init(hypergradient.loop(), seed=0)
    logs = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (-6.0, -7.0)]
    before = hypergradient.validation_loss(ctx, *logs)
    slopes = torch.autograd.grad(before, logs)
    moved = [log - 0.1 * slope for log, slope in zip(logs, slopes)]
    assert hypergradient.validation_loss(ctx, *moved) < before
