"""State dicts: nothing is lost, and nothing foreign gets in."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import functional_loop as fl
from tests.sample_loops import counter, data, full_loop, make_loop, mean_absolute, middle, noisy_mlp, recorder

X, Y = data(3)
ERROR = fl.measure("error", mean_absolute)


def nodes(tree: Any) -> Iterator[Any]:
    yield tree
    for child in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from nodes(child)


def test_a_state_dict_has_plain_types_only() -> None:
    for ctx in fl.iterate(fl.init(full_loop())):
        sd = fl.state_dict(ctx)
        assert {type(node) for node in nodes(sd)} <= {dict, list, Tensor, int, float, bool, str, type(None)}
        assert all(type(key) is str for node in nodes(sd) if isinstance(node, dict) for key in node)


def test_a_state_dict_goes_through_torch_save_without_code() -> None:
    ctx = middle()
    file = io.BytesIO()
    torch.save(fl.state_dict(ctx), file)
    file.seek(0)
    loaded = fl.load_state_dict(fl.init(full_loop()), torch.load(file, weights_only=True))
    assert fl.digest(loaded) == fl.digest(ctx)
    assert fl.digest(fl.train(loaded)) == fl.digest(fl.train(ctx))


def test_loading_gives_the_context_back_and_mutates_nothing() -> None:
    loop = full_loop()
    for ctx in fl.iterate(fl.init(loop, seed=3)):
        sd = fl.state_dict(ctx)
        before = copy.deepcopy(sd)
        fresh = fl.init(loop)
        digest = fl.digest(fresh)
        loaded = fl.load_state_dict(fresh, sd)
        assert fl.tree_equal(loaded, ctx)
        fl.train(loaded)
        assert fl.tree_equal(sd, before)
        assert fl.digest(fresh) == digest


def storages(tree: Any) -> set[int]:
    return {node.untyped_storage().data_ptr() for node in nodes(tree) if isinstance(node, Tensor)}


def test_what_is_loaded_shares_no_memory_with_the_state_dict() -> None:
    sd = fl.state_dict(middle())
    loaded = fl.load_state_dict(fl.init(full_loop()), sd)
    assert not storages(sd) & storages(fl.state_dict(loaded))


def test_the_saved_seed_counts() -> None:
    ctx = middle()
    loaded = fl.load_state_dict(fl.init(full_loop(), seed=99), fl.state_dict(ctx))
    assert loaded.seed == 3
    assert fl.digest(fl.train(loaded)) == fl.digest(fl.train(ctx))


def test_a_longer_run_goes_on_from_a_shorter_one() -> None:
    longer = full_loop(epochs=4)
    shorter = fl.train(fl.init(full_loop(epochs=2)), steps=6)
    resumed = fl.train(fl.load_state_dict(fl.init(longer), fl.state_dict(shorter)))
    assert fl.digest(resumed) == fl.digest(fl.train(fl.init(longer)))


class TiedAndTransient(nn.Module):
    """Tied weights under two names, and a buffer that ``state_dict()`` leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embedding.weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return self.head(self.embedding(x).mean(1))


def tied_loop() -> fl.Loop:
    tokens = torch.arange(30).reshape(10, 3) % 5
    return make_loop(
        network=TiedAndTransient,
        loss=nn.functional.cross_entropy,
        train=fl.batches(tokens, tokens[:, 0], batch_size=4),
    )


@pytest.mark.parametrize(("make", "network"), [(full_loop, noisy_mlp), (tied_loop, TiedAndTransient)])
def test_the_network_part_loads_into_a_plain_module(
    make: Callable[[], fl.Loop], network: Callable[[], nn.Module]
) -> None:
    ctx = fl.train(fl.init(make()))
    module = network()
    module.load_state_dict(fl.state_dict(ctx)["network"], strict=True)
    for name, tensor in module.named_parameters():
        assert torch.equal(tensor, ctx.params[name])
    for name in module.state_dict().keys() & ctx.buffers.keys():
        assert torch.equal(module.get_buffer(name), ctx.buffers[name])


def test_buffers_that_are_not_persistent_are_kept() -> None:
    ctx = fl.train(fl.init(tied_loop()), steps=4)
    sd = fl.state_dict(ctx)
    assert list(sd["buffers"]) == ["calls"]
    assert fl.load_state_dict(fl.init(tied_loop()), sd).buffers["calls"] == 4


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 2))


def kind_of(kind: str) -> fl.Callback:
    return fl.Callback("counter", init=lambda ctx: 0, kind=kind)


DIFFERENCES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "shapes": ({"network": wide()}, ["network/0.weight", "float32[4, 3]", "float32[5, 3]", "1.running_mean"]),
    "dtype": (
        {"network": noisy_mlp().double(), "train": fl.batches(X.double(), Y.double(), batch_size=4, shuffle=True)},
        ["float32[4, 3]", "float64[4, 3]"],
    ),
    "missing layer": ({"network": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))}, ["3.weight", "missing here"]),
    "more layers": ({"network": nn.Sequential(*noisy_mlp(), nn.Linear(2, 2))}, ["4.bias", "missing in what was saved"]),
    "optimizer class": ({"optimizer": fl.optimizer(torch.optim.SGD, lr=0.1)}, ["optimizer/class", "AdamW", "SGD"]),
    "optimizer groups": (
        {"optimizer": fl.optimizer(torch.optim.AdamW, lr=0.01, groups=[{"params": "*.bias", "lr": 0.1}])},
        ["optimizer/groups"],
    ),
    "optimized parameters": ({"optimizer": fl.optimizer(torch.optim.AdamW, params="0.*")}, ["optimizer/groups"]),
    "rows": ({"train": fl.batches(X[:8], Y[:8], batch_size=4, shuffle=True)}, ["train/length", "10", "8"]),
    "batch size": ({"train": fl.batches(X, Y, batch_size=5, shuffle=True)}, ["train/batch_size", "4", "5"]),
    "shuffle": ({"train": fl.batches(X, Y, batch_size=4)}, ["train/shuffle", "True", "False"]),
    "drop_last": (
        {"train": fl.batches(X, Y, batch_size=4, shuffle=True, drop_last=True)},
        ["train/drop_last", "False", "True"],
    ),
    "no validation": ({"valid": None}, ["valid"]),
    "validation data": ({"valid": fl.batches(X, Y, batch_size=2)}, ["valid/batch_size", "6", "2"]),
    "training measures": ({"measures_train": []}, ["measures_train", "error"]),
    "validation measures": ({"measures_valid": [ERROR, fl.measure("b", max)]}, ["measures_valid", "'b'"]),
    "accumulate": ({"accumulate": 3}, ["accumulate: 2 in what was saved, 3 here"]),
    "autocast": ({"autocast": torch.bfloat16}, ["autocast", "bfloat16"]),
    "missing callback": ({"callbacks": []}, ["callbacks/counter", "missing here"]),
    "more callbacks": ({"callbacks": [counter(), counter("other")]}, ["callbacks/other", "missing in what was saved"]),
    "kind of a callback": ({"callbacks": [kind_of("Other")]}, ["callbacks/counter", "Other"]),
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_loading_into_another_loop_is_refused_by_path(what: str) -> None:
    changes, expected = DIFFERENCES[what]
    sd = fl.state_dict(middle())
    with pytest.raises(fl.StateDictError) as caught:
        fl.load_state_dict(fl.init(full_loop(**changes)), sd)
    for words in expected:
        assert words in str(caught.value)
    assert caught.value.differences
    of_callbacks = [line.split(":")[0] for line in caught.value.differences if line.startswith("callbacks/")]
    assert len(set(of_callbacks)) == len(of_callbacks)


def test_where_only_callbacks_came_or_went_the_error_says_how_to_load() -> None:
    sd = fl.state_dict(middle())
    for callbacks, helps in (([], True), ([counter(), counter("other")], True), ([kind_of("Other")], False)):
        with pytest.raises(fl.StateDictError) as caught:
            fl.load_state_dict(fl.init(full_loop(callbacks=callbacks)), sd)
        assert ("strict=False" in str(caught.value)) is helps


def test_all_differences_are_listed_at_once() -> None:
    with pytest.raises(fl.StateDictError) as caught:
        fl.load_state_dict(
            fl.init(full_loop(accumulate=1, measures_train=[], callbacks=[], network=wide())), fl.state_dict(middle())
        )
    for path in ("accumulate", "measures_train", "callbacks/counter", "network/0.weight", "network/3.weight"):
        assert any(path in line for line in caught.value.differences)


def test_content_of_the_data_counts_if_asked() -> None:
    def loop(x: Tensor) -> fl.Loop:
        return make_loop(train=fl.batches(x, Y, batch_size=4, hash_content=True))

    sd = fl.state_dict(fl.init(loop(X)))
    fl.load_state_dict(fl.init(loop(X.clone())), sd)
    with pytest.raises(fl.StateDictError, match="train/content"):
        fl.load_state_dict(fl.init(loop(X + 1)), sd)


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 9},
        {"network": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))},
        {"callbacks": [recorder([], repr), counter()]},
        {"callbacks": [counter(), fl.Callback("plain", epoch_end=lambda ctx: ctx)]},
        {"callbacks": [counter(), fl.Callback("effects", epoch_end=fl.evolve, replays=False)]},
    ],
    ids=["longer", "other values", "an observer", "one that gives back its argument", "effects alone"],
)
def test_values_epochs_and_callbacks_without_effect_on_the_result_may_differ(changes: dict[str, Any]) -> None:
    ctx = middle()
    loaded = fl.load_state_dict(fl.init(full_loop(**changes)), fl.state_dict(ctx))
    assert fl.digest(loaded) == fl.digest(ctx)
    assert loaded.optimizer_state["groups"][0]["lr"] == 0.01


def test_an_observer_may_go() -> None:
    ctx = middle(callbacks=[recorder([], repr), counter()])
    assert fl.load_state_dict(fl.init(full_loop()), fl.state_dict(ctx)).callbacks == {"counter": 4}


def test_a_callback_that_keeps_no_state_may_decide_the_result() -> None:
    plain = fl.Callback("plain", epoch_end=lambda ctx: fl.evolve(ctx))
    for before, after in (([], [plain]), ([plain], [])):
        with pytest.raises(fl.StateDictError, match=r"callbacks/plain: .*missing"):
            fl.load_state_dict(
                fl.init(full_loop(callbacks=[counter(), *after])), fl.state_dict(middle(callbacks=[counter(), *before]))
            )


def test_a_slot_may_grow() -> None:
    log = fl.Callback(
        "log",
        init=lambda ctx: {"losses": [], "best": None},
        batch_end=lambda ctx: ctx.with_callback_state(
            "log", {"losses": [*ctx.callbacks["log"]["losses"], ctx.last_loss], "best": ctx.params, "nothing": ()}
        ),
    )
    loop = full_loop(callbacks=[log])
    ctx = fl.train(fl.init(loop), steps=4)
    loaded = fl.load_state_dict(fl.init(loop), fl.state_dict(ctx))
    assert fl.tree_equal(loaded, ctx)
    assert loaded.callbacks["log"]["nothing"] == ()


def paths(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if isinstance(tree, (dict, list)):
        for key in tree if isinstance(tree, dict) else range(len(tree)):
            yield from paths(tree[key], (*path, key))


def damaged(sd: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy in which the node at ``path`` is replaced, or is taken out if there is no value."""
    tree = fl.tree_map(lambda leaf: leaf, sd)
    node = tree
    for key in path[:-1]:
        node = node[key]
    if value is KeyError:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return tree


@pytest.mark.filterwarnings("ignore:bits may differ", "ignore:the optimizer was given other hyperparameters")
@pytest.mark.parametrize("value", [KeyError, None, "nonsense", 3, []], ids=["missing", "None", "str", "int", "list"])
def test_a_damaged_state_dict_is_a_state_dict_error_or_loads(value: Any) -> None:
    sd = fl.state_dict(middle())
    fresh = fl.init(full_loop())
    for path in paths(sd):
        try:
            fl.load_state_dict(fresh, damaged(sd, path, value))
        except fl.StateDictError as error:
            assert error.differences  # noqa: PT017
        except Exception as error:
            pytest.fail(f"{path} replaced by {value!r}: {type(error).__name__}: {error}")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("version",), 99, "version: 99"),
        (("version",), KeyError, "version: missing"),
        (("epoch",), "1", "epoch: '1' in what was saved, must be of type int"),
        (("epoch",), True, "epoch: True in what was saved"),
        (("terminate",), 1, "terminate: 1 in what was saved, must be of type bool"),
        (("stage",), "batch_begin", "stage: 'batch_begin'"),
        (("stage",), "nowhere", "stage: 'nowhere'"),
        (("network", "0.weight"), torch.zeros(1), r"network/0.weight: .*float32\[1\].*float32\[4, 3\]"),
        (("network", "0.weight"), KeyError, "network/0.weight: missing"),
        (("network", "new"), torch.zeros(1), "network/new"),
        (("unknown",), 1, "unknown"),
        (("trainable",), ["0.weight", "nobody"], "trainable/nobody"),
        (("optimizer", "slots", "nobody"), {}, "optimizer/slots/nobody"),
        (("optimizer", "groups", 0, "lr"), KeyError, "optimizer/groups"),
        (("callbacks", "counter", "kind"), "Other", "callbacks/counter"),
        (("callbacks", "nobody"), {"kind": "", "state": 1}, "callbacks/nobody"),
    ],
)
def test_what_is_wrong_with_a_state_dict_is_said_by_path(path: Any, value: Any, message: str) -> None:
    sd = damaged(fl.state_dict(middle()), path, value)
    with pytest.raises(fl.StateDictError, match=message):
        fl.load_state_dict(fl.init(full_loop()), sd)


@pytest.mark.parametrize("sd", [None, 3, [], "file.pt"])
def test_only_dicts_are_loaded(sd: Any) -> None:
    with pytest.raises(TypeError, match="load_state_dict takes a state dict"):
        fl.load_state_dict(fl.init(make_loop()), sd)


def test_the_state_dict_of_a_module_is_told_from_that_of_a_context() -> None:
    loop = make_loop()
    with pytest.raises(fl.StateDictError, match=r"not a state dict of a Context: .* '0\.weight', '0\.bias'"):
        fl.load_state_dict(fl.init(loop), fl.to_module(fl.init(loop)).state_dict())


def test_the_contexts_of_exit_hooks_can_be_saved() -> None:
    saved: list[str] = []

    def save(ctx: fl.Context) -> fl.Context:
        saved.append(fl.digest(ctx))
        return ctx

    ctx = fl.train(fl.init(make_loop(callbacks=[fl.Callback("save", exit=save)])), steps=4)
    assert saved == [fl.digest(ctx)]


def test_a_slot_that_cannot_be_saved_is_refused_by_path() -> None:
    ctx = fl.init(make_loop(callbacks=[fl.Callback("bad", init=lambda ctx: 0)])).with_callback_state(
        "bad", {"seen": {1}}
    )
    with pytest.raises(TypeError, match=r"state of callback 'bad' can't be saved: \['seen'\] is of type set"):
        fl.state_dict(ctx)


@pytest.mark.parametrize("mode", [None, "exact", "vectorised"])
@pytest.mark.parametrize(
    ("stage", "at"), [("batch_end", "epoch 1, step 1"), ("batch_valid_end", "epoch 1"), ("epoch_end", "epoch 1")]
)
@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"seen": {1}}, r"\['seen'\] is of type set"),
        ([len], r"\[0\] is of type builtin"),
        ({1: 2}, r"\[1\] is under a key"),
    ],
)
def test_a_state_that_cannot_be_saved_is_refused_where_a_hook_makes_it(
    value: Any, path: str, stage: str, at: str, mode: str | None
) -> None:
    spoil: dict[str, Any] = {stage: lambda ctx: ctx.with_callback_state("bad", value)}
    loop = make_loop(
        callbacks=[fl.Callback("bad", init=lambda ctx: {}, **spoil)], valid=fl.batches(*data(3), batch_size=5)
    )
    start = fl.init(loop) if mode is None else fl.stack([fl.init(loop), fl.init(loop, 1)], mode=mode)
    with pytest.raises(TypeError, match=f"the state of callback 'bad' can't be saved: {path}") as caught:
        fl.train(start)
    assert any(f"'bad' at stage '{stage}' ({at}" in note for note in caught.value.__notes__)


def test_a_hook_can_neither_add_nor_remove_states() -> None:
    for slots in ({}, {"bad": (), "worse": 1}):
        loop = make_loop(
            callbacks=[fl.Callback("bad", epoch_end=lambda ctx, slots=slots: fl.evolve(ctx, callbacks=slots))]
        )
        with pytest.raises(ValueError, match="can't gain or lose"):
            fl.train(fl.init(loop))


def test_the_fingerprint_is_plain_and_knows_no_values() -> None:
    first = fl.fingerprint(full_loop())
    other = fl.fingerprint(full_loop(epochs=9, optimizer=fl.optimizer(torch.optim.AdamW, lr=0.7)))
    assert first == other
    assert {type(node) for node in nodes(first)} <= {dict, list, int, float, bool, str, type(None)}
