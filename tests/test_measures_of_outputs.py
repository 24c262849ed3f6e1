"""Measures get what the loss gets: all outputs of the network, in the form in which it returns them."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import functional_loop as fl
from functional_loop.callbacks import CallbackSet, t_clbk
from functional_loop.core import outputs
from functional_loop.learner import TorchClassifier
from tests.learners import X as ROWS_X
from tests.learners import Y as ROWS_Y
from tests.sample_loops import data, make_loop, mean_absolute, recorder


class Named(NamedTuple):
    mean: Tensor
    scale: Tensor

    @property
    def variance(self) -> Tensor:
        return self.scale.square()


class Model(OrderedDict[str, Any]):
    """As those of transformers: keys are attributes, and an index is a place among the values."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]


@dataclasses.dataclass(frozen=True)
class Data:
    mean: Tensor
    scale: Tensor
    states: Any = None


def model(mean: Tensor, scale: Tensor) -> Model:
    made = Model()
    made["mean"], made["scale"] = mean, scale
    return made


FORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda mean, scale: (mean, scale),
    "dict": lambda mean, scale: {"mean": mean, "scale": scale},
    "named tuple": Named,
    "subclass of dict": model,
    "data class": Data,
    "nested": lambda mean, scale: {"heads": [Named(mean, scale)], "mean": mean},
}


class Heads(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.mean, self.scale = form, nn.Linear(3, 2), nn.Linear(3, 1)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Any:
        x = self.dropout(x)
        return FORMS[self.form](self.mean(x), self.scale(x).exp())


def heads(y_hats: Any) -> tuple[Tensor, Tensor]:
    """The two outputs, by the ways in which one gets at them in their form."""
    if isinstance(y_hats, dict) and "heads" in y_hats:
        return tuple(y_hats["heads"][0])  # type: ignore[return-value]
    if type(y_hats) is dict:
        return y_hats["mean"], y_hats["scale"]
    if type(y_hats) is tuple:
        return y_hats
    return y_hats.mean, y_hats.scale


def nll(y_hats: Any, y: Tensor) -> Tensor:
    mean, scale = heads(y_hats)
    return (scale.log() + (mean - y).square() / scale).mean()


def of_heads(form: str, **changes: Any) -> fl.Loop:
    with fl.seeded(0):
        network = Heads(form)
    x, y = data(3, seed=1)
    usual = {"network": network, "loss": nll, "valid": fl.batches(x, y, batch_size=4)}
    return make_loop(**{**usual, **changes})


def mergeable(id: str, fn: Callable[[Any, Tensor], Tensor], of: Any = None) -> fl.Measure:
    return fl.measure(
        id,
        of=of,
        init=lambda: {"sum": torch.zeros(()), "rows": 0},
        update=lambda s, y_hats, y: {"sum": s["sum"] + fn(y_hats, y) * len(y), "rows": s["rows"] + len(y)},
        compute=lambda s: s["sum"] / s["rows"],
    )


@pytest.mark.parametrize("form", FORMS)
def test_a_measure_that_is_the_loss_is_the_loss(form: str) -> None:
    types: set[type] = set()

    def seen(y_hats: Any, y: Tensor) -> Tensor:
        types.add(type(y_hats))
        return nll(y_hats, y)

    both = [fl.measure("whole", seen), mergeable("mergeable", nll), fl.measure("loss")]
    loop = of_heads(form, measures_train=both, measures_valid=both)
    ctx = fl.train(fl.init(loop))
    x, y = data(3, seed=1)
    expected = nll(fl.to_module(ctx).eval()(x), y).item()
    assert dict(ctx.last_scores_valid) == pytest.approx(dict.fromkeys(("whole", "mergeable", "loss"), expected))
    scores = dict(ctx.last_scores_train)
    assert scores["whole"] == pytest.approx(scores["loss"])
    assert scores["mergeable"] == pytest.approx(scores["loss"])
    assert types == {type(FORMS[form](x, x))}
    assert dict(fl.validate(ctx)) == dict(ctx.last_scores_valid)


@pytest.mark.parametrize("form", FORMS)
def test_hooks_and_predict_have_outputs_as_the_network_returns_them(form: str) -> None:
    seen: list[Any] = []
    look = recorder(seen, lambda ctx: ctx.y_hats, ("after_backward", "batch_valid_end"))
    ctx = fl.train(fl.init(of_heads(form, callbacks=[look])))
    x, _ = data(3)
    made = fl.predict(ctx, x, batch_size=3)
    alone = fl.to_module(ctx).eval()(x)
    assert {type(y_hats) for _, y_hats in seen} == {type(made)} == {type(alone)}
    assert not any(leaf.requires_grad for _, y_hats in seen for leaf in heads(y_hats))
    torch.testing.assert_close(heads(made), heads(alone))


class CallbackSetLooking(CallbackSet):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_after_backward(self) -> None:
        self.seen.append(self.ctx.y_hats)


@pytest.mark.parametrize("form", FORMS)
def test_object_callbacks_have_copies_of_the_same_form(form: str) -> None:
    looking = CallbackSetLooking()
    fl.train(fl.init(of_heads(form, callbacks=[looking])))
    x, _ = data(3)
    assert {type(y_hats) for y_hats in looking.seen} == {type(FORMS[form](x, x))}
    assert all(heads(y_hats)[0].shape[1] == 2 for y_hats in looking.seen)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("known", [True, False])
def test_scores_of_a_run_cut_anywhere_are_those_of_the_whole(
    form: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a process that has never seen an output of the network."""
    both = [fl.measure("whole", nll), mergeable("mergeable", nll), fl.measure("loss")]
    loop = of_heads(form, measures_train=both, measures_valid=both, epochs=1)
    final = fl.train(fl.init(loop))
    for ctx in list(fl.iterate(fl.init(loop))):
        sd = fl.state_dict(ctx)
        if not known:
            monkeypatch.setattr(outputs, "_seen", {})
        loaded = fl.load_state_dict(fl.init(loop), sd)
        assert fl.tree_equal(loaded.measures, ctx.measures)
        ended = fl.train(loaded)
        assert ended.last_scores_train == final.last_scores_train
        assert ended.last_scores_valid == final.last_scores_valid


PICKS: dict[str, list[Any]] = {
    "tuple": [0, -2, lambda y_hats: y_hats[0]],
    "dict": ["mean", lambda y_hats: y_hats["mean"]],
    "named tuple": ["mean", 0, lambda y_hats: y_hats.mean],
    "subclass of dict": ["mean", 0, lambda y_hats: y_hats["mean"]],
    "data class": ["mean", lambda y_hats: y_hats.mean],
    "nested": ["mean", lambda y_hats: y_hats["heads"][0].mean],
}


@pytest.mark.parametrize("form", FORMS)
def test_of_picks_an_output(form: str) -> None:
    x, y = data(3, seed=1)
    for of in PICKS[form]:
        both = [fl.measure("whole", mean_absolute, of=of), mergeable("mergeable", mean_absolute, of=of)]
        ctx = fl.train(fl.init(of_heads(form, measures_train=both, measures_valid=both)))
        expected = mean_absolute(heads(fl.to_module(ctx).eval()(x))[0], y).item()
        assert dict(ctx.last_scores_valid) == pytest.approx({"whole": expected, "mergeable": expected})
        assert ctx.last_scores_train["whole"] == pytest.approx(ctx.last_scores_train["mergeable"])  # type: ignore[call-overload]


def test_an_attribute_of_the_outputs_can_be_picked() -> None:
    x, _ = data(3, seed=1)
    ctx = fl.init(
        of_heads("named tuple", measures_valid=[fl.measure("variance", lambda v, y: v.mean(), of="variance")])
    )
    expected = fl.to_module(ctx).eval()(x).variance.mean().item()
    assert fl.validate(ctx)["variance"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("form", "of", "message"),
    [
        ("dict", "maen", r"the network has no output 'maen'; did you mean 'mean'\?"),
        ("tuple", 2, r"the network has no output 2; there is '0', '1'"),
        ("tuple", "mean", "the network has no output 'mean'"),
        ("dict", "items", "the network has no output 'items'"),
        ("dict", 0, "the network has no output 0"),
    ],
)
def test_an_output_that_is_not_there_is_refused_by_name(form: str, of: Any, message: str) -> None:
    for faulty in (fl.measure("mine", mean_absolute, of=of), mergeable("mine", mean_absolute, of=of)):
        with pytest.raises(LookupError, match=message) as caught:
            fl.train(fl.init(of_heads(form, measures_train=[faulty])))
        assert "measure 'mine'" in "\n".join(caught.value.__notes__)


@pytest.mark.parametrize("of", [0, "mean", "T"])
def test_the_rows_of_a_single_output_are_no_outputs(of: Any) -> None:
    loop = make_loop(measures_train=[fl.measure("mine", mean_absolute, of=of)])
    with pytest.raises(LookupError, match=r"it returns one Tensor, so leave of= out"):
        fl.train(fl.init(loop))


def predictions(loop: fl.Loop) -> list[tuple[int, ...]]:
    """The shapes of what is kept after the first batch."""
    ctx = fl.train(fl.init(loop), steps=1)
    leaves = fl.state_dict(ctx)["measures"]["train"]["predictions"]
    found: list[tuple[int, ...]] = []
    fl.tree_map(lambda leaf: found.append(tuple(leaf.shape)) if isinstance(leaf, Tensor) else None, leaves)
    return sorted(found)


@pytest.mark.parametrize("form", ["tuple", "dict", "subclass of dict"])
def test_only_what_is_picked_is_kept(form: str) -> None:
    def measuring(*measures: fl.Measure) -> fl.Loop:
        return of_heads(form, measures_train=[mergeable("m", nll), *measures])

    of = PICKS[form][0]
    picked = fl.measure("a", mean_absolute, of=of), fl.measure("b", mean_absolute, of=of)
    assert predictions(measuring()) == []
    assert predictions(measuring(*picked)) == [(4, 2), (4, 2)]
    assert predictions(measuring(fl.measure("c", nll))) == [(4, 1), (4, 2), (4, 2)]
    assert predictions(measuring(*picked, fl.measure("c", nll))) == [(4, 1), (4, 2), (4, 2)]


class WithLoss(nn.Linear):
    """A scalar among the outputs, and one whose first axis is of layers."""

    def forward(self, x: Tensor) -> Any:
        y_hat = super().forward(x)
        return Model(loss=y_hat.square().mean(), logits=y_hat, hidden=y_hat.expand(3, *y_hat.shape), none=None)


@pytest.mark.parametrize(
    ("of", "message"),
    [
        (None, r"measure 'mine' .* output \['loss'\] has no axis of rows: it is of shape \[\], .* 4 rows.*of="),
        ("loss", "what it gets has no axis of rows"),
        ("hidden", r"it is of shape \[3, 4, 2\], and the batch has 4 rows"),
        (lambda out: 3, "it is a int"),
    ],
)
def test_a_prediction_without_rows_is_refused(of: Any, message: str) -> None:
    loop = make_loop(network=WithLoss(3, 2), loss=lambda out, y: nn.functional.mse_loss(out.logits, y))
    with pytest.raises(ValueError, match=message):
        fl.train(fl.init(fl.evolve(loop, measures_train=[fl.measure("mine", lambda y_hats, y: 0.0, of=of)])))
    ctx = fl.train(fl.init(fl.evolve(loop, measures_train=[fl.measure("error", mean_absolute, of="logits")])))
    assert set(ctx.last_scores_train) == {"error"}
    with pytest.raises(ValueError, match=r"predict: output \['loss'\] of the network has no axis of rows"):
        fl.predict(ctx, data(3)[0])


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.table(x).flatten(0, 1)


def test_rows_may_be_those_of_flattened_targets() -> None:
    x = torch.arange(40).reshape(10, 4) % 7
    loop = make_loop(
        network=Tokens(),
        loss=lambda y_hat, y: nn.functional.cross_entropy(y_hat, y.flatten()),
        train=fl.batches(x, x, batch_size=4),
        measures_train=[fl.measure("accuracy", lambda y_hat, y: (y_hat.argmax(1) == y.flatten()).float().mean())],
    )
    assert 0 <= dict(fl.train(fl.init(loop)).last_scores_train)["accuracy"] <= 1


def test_targets_are_not_needed() -> None:
    loop = make_loop(
        train=fl.batches(data(3)[0], batch_size=4),
        loss=lambda y_hat, y: y_hat.square().mean(),
        measures_train=[fl.measure("size", lambda y_hat, y: y_hat.square().mean()), fl.measure("loss")],
    )
    scores = dict(fl.train(fl.init(loop)).last_scores_train)
    assert scores["size"] == pytest.approx(scores["loss"])


class Tempered(nn.Module):
    """A loss with a parameter, and dropout of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.t, self.dropout = nn.Parameter(torch.ones(())), nn.Dropout(0.5)

    def forward(self, y_hat: Tensor, y: Tensor) -> Tensor:
        return (self.dropout(y_hat) * self.t - y).square().mean()


class Untrained(nn.Module):
    """A loss without parameters that is another one in evaluation mode."""

    def forward(self, y_hat: Tensor, y: Tensor) -> Tensor:
        return (y_hat - y).square().mean() + float(self.training)


def test_the_loss_of_an_epoch_is_the_mean_over_rows() -> None:
    losses: list[Any] = []
    look = recorder(losses, lambda ctx: (ctx.last_loss.item(), len(ctx.batch.y)), ("batch_end",))
    ctx = fl.train(fl.init(make_loop(measures_train=[fl.measure("loss")], callbacks=[look], epochs=1)))
    total = sum(loss * rows for _, (loss, rows) in losses)
    assert [rows for _, (_, rows) in losses] == [4, 4, 2]
    assert dict(ctx.last_scores_train)["loss"] == pytest.approx(total / 10, rel=1e-12)
    quick = fl.train(fl.init(make_loop(measures_train=[fl.measure("loss")], epochs=1)))
    assert quick.last_scores_train == ctx.last_scores_train


@pytest.mark.parametrize("loss", [Tempered(), Untrained()], ids=["module with parameters", "module without"])
def test_the_loss_is_in_evaluation_mode_in_validation(loss: nn.Module) -> None:
    x, y = data(3, seed=1)
    loop = make_loop(loss=loss, valid=fl.batches(x, y, batch_size=4), measures_valid=[fl.measure("loss")])
    ctx = fl.train(fl.init(loop))
    expected = fl.to_module(ctx, "loss").eval()(fl.to_module(ctx).eval()(x), y).item()
    assert dict(ctx.last_scores_valid)["loss"] == pytest.approx(expected, rel=1e-6)
    assert loss.training
    without = fl.train(fl.init(fl.evolve(loop, measures_valid=[])))
    assert fl.tree_equal((without.params, without.buffers), (ctx.params, ctx.buffers))


def test_a_measure_of_the_loss_draws_nothing_from_other_scores() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    network = nn.Sequential(nn.Linear(3, 2), Noisy())
    error = fl.measure("error", mean_absolute)
    x, y = data(3, seed=1)

    def noisy_loss(y_hat: Tensor, y: Tensor) -> Tensor:
        return (y_hat - y + torch.rand_like(y)).square().mean()

    loop = make_loop(network=network, loss=noisy_loss, valid=fl.batches(x, y, batch_size=4), measures_valid=[error])
    alone = fl.train(fl.init(loop))
    both = fl.train(fl.init(fl.evolve(loop, measures_valid=[error, fl.measure("loss")])))
    assert dict(alone.last_scores_valid)["error"] == dict(both.last_scores_valid)["error"]
    assert dict(both.last_scores_valid) == fl.validate(both)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"id": "loss", "of": "mean"}, TypeError, "the loop's own loss, which gets all outputs; no of="),
        ({"id": "a", "fn": max, "of": True}, TypeError, "of is the name or index of an output"),
        ({"id": "a", "fn": max, "of": 1.5}, TypeError, "of is the name or index of an output"),
        ({"id": "lose"}, TypeError, "give either fn or all of"),
        ({"id": "loss", "init": dict}, TypeError, "give either fn or all of"),
    ],
)
def test_wrong_picks_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fl.measure(**arguments)
    assert fl.measure("loss").minimize is True
    assert fl.measure("loss", max).minimize is None


def test_early_stopping_can_watch_the_loss() -> None:
    x, y = data(3, seed=1)
    loop = make_loop(
        valid=fl.batches(x, y),
        measures_valid=[fl.measure("loss")],
        callbacks=[t_clbk("early_stopping", patience=1), t_clbk("history")],
        epochs=20,
    )
    rows = fl.train(fl.init(loop)).callbacks["history"]
    assert rows[-1]["valid.loss"] > min(row["valid.loss"] for row in rows)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["auto", "exact"])
def test_members_have_the_scores_of_their_solo_runs(form: str, mode: str) -> None:
    of = PICKS[form][-1]
    both = [
        fl.measure("whole", nll),
        fl.measure("picked", mean_absolute, of=of),
        mergeable("mergeable", nll),
        mergeable("head", mean_absolute, of=of),
        fl.measure("loss"),
    ]
    loop = of_heads(form, measures_train=both, measures_valid=both, epochs=1)
    starts = [fl.init(loop, seed) for seed in range(3)]
    stacked = fl.train(fl.stack(starts, mode=mode))
    vectorised = form not in ("subclass of dict", "data class") and mode == "auto"
    assert fl.ensemble_mode(stacked).startswith("vectorised" if vectorised else "in turn")
    again = fl.validate(stacked)
    for i, (member, start) in enumerate(zip(fl.unstack(stacked), starts, strict=True)):
        alone = fl.train(start)
        for part in ("last_scores_train", "last_scores_valid"):
            assert dict(getattr(member, part)) == pytest.approx(dict(getattr(alone, part)), rel=1e-4)
        for id, score in dict(member.last_scores_valid).items():
            assert float(torch.as_tensor(again[id]).reshape(-1)[i if torch.is_tensor(again[id]) else 0]) == (
                pytest.approx(score, rel=1e-5)
            )


def test_an_ensemble_that_must_be_vectorised_says_why_it_cannot_be() -> None:
    ctx = fl.init(of_heads("data class"))
    with pytest.raises(ValueError, match="the network returns a Data and not tensors"):
        fl.train(fl.stack([ctx, ctx], mode="vectorised"))


def test_a_learner_scores_the_output_that_it_predicts() -> None:
    class Classes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits, self.other = nn.Linear(3, 3), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Any:
            return self.logits(x), self.other(x)

    mine = fl.measure("other", lambda y_hats, y: y_hats[1].mean())
    learner = TorchClassifier(
        network=Classes,
        loss=lambda y_hats, y: nn.functional.cross_entropy(y_hats[0], y),
        epochs=2,
        validate=0.5,
        measures_valid=["accuracy", mine],
        device="cpu",
    )
    assert set(learner.fit(ROWS_X, ROWS_Y).model_.scores_valid) == {"accuracy", "other"}


def test_measures_of_validation_data_that_are_not_there_are_refused_before_training() -> None:
    ctx = fl.init(make_loop(measures_valid=[fl.measure("error", mean_absolute)]))
    for train in (fl.train, lambda ctx: next(fl.iterate(ctx)), lambda ctx: fl.train(fl.stack([ctx, ctx]))):
        with pytest.raises(ValueError, match=r"measures_valid \('error'\), and no validation data.*valid=batches"):
            train(ctx)
    begun = next(c for c in fl.iterate(fl.init(make_loop())) if c.stage == "epoch_begin")
    with pytest.raises(ValueError, match="train_step: the Loop has measures_valid"):
        fl.train_step(fl.evolve(begun, loop=ctx.loop), data(3))
    assert set(fl.validate(ctx, fl.batches(*data(3)))) == {"error"}
    with pytest.raises(ValueError, match="no validation data; give a source"):
        fl.validate(ctx)


@pytest.mark.parametrize("valid", [None, 0.25])
def test_a_learner_measures_where_it_validates(valid: float | None) -> None:
    learner = TorchClassifier(epochs=1, validate=valid, device="cpu").fit(ROWS_X, ROWS_Y)
    assert bool(learner.model_.scores_valid) is (valid is not None)
    learner.partial_fit(ROWS_X, ROWS_Y, epochs=1)
    assert learner.model_.epochs == 2
