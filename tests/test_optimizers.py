"""The pure update and ordinary use of `torch.optim` have the same bits, and nothing that is given is written to."""

from __future__ import annotations

import gc
import re
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from functional_loop.core.errors import StateDictError
from functional_loop.core.record import leaves_with_paths, tree_equal
from functional_loop.optim import optimizer as optimizers
from functional_loop.optim.fast_update import fast_update
from functional_loop.optim.torch_update import TorchUpdate, copied

SHAPES = {"0.weight": (5, 3), "0.bias": (5,), "2.weight": (2, 5), "2.bias": (2,), "scale": ()}
MATRICES = {"0.weight": (5, 3), "2.weight": (2, 5)}
STEPS = 7

ARITHMETIC = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01, "maximize": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("Adam", {"lr": 0.1}),
    ("Adam", {"lr": 0.1, "weight_decay": 0.01, "amsgrad": True, "maximize": True}),
    ("Adam", {"lr": 0.1, "weight_decay": 0.01, "decoupled_weight_decay": True}),
    ("AdamW", {"lr": 0.1}),
    ("AdamW", {"lr": 0.1, "betas": (0.5, 0.75), "eps": 1e-3, "weight_decay": 0, "amsgrad": True}),
    ("AdamW", {"lr": 0.1, "maximize": True}),
    ("RMSprop", {"lr": 0.1, "centered": True, "momentum": 0.9, "weight_decay": 0.01}),
    ("RMSprop", {"lr": 0.1, "maximize": True}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.01, "initial_accumulator_value": 0.1}),
    ("Adagrad", {"lr": 0.1, "maximize": True}),
    ("Adadelta", {"lr": 0.1, "weight_decay": 0.01}),
    ("Adamax", {"lr": 0.1, "weight_decay": 0.01}),
    ("NAdam", {"lr": 0.1, "weight_decay": 0.01, "decoupled_weight_decay": True}),
    ("RAdam", {"lr": 0.1, "weight_decay": 0.01}),
    ("Rprop", {"lr": 0.1}),
    ("ASGD", {"lr": 0.1, "t0": 2, "weight_decay": 0.01}),
    ("Adafactor", {"lr": 0.1, "weight_decay": 0.01}),
    ("Adafactor", {"lr": 0.1, "maximize": True}),
]
FORMS = [{}, {"foreach": False}, {"foreach": True}, {"fused": True}]
FUSED = {"SGD", "Adam", "AdamW", "Adagrad"}
CONFIGURATIONS = [
    pytest.param(getattr(torch.optim, name), {**values, **form}, id=f"{name}-{i}-{form}")
    for i, (name, values) in enumerate(ARITHMETIC)
    for form in FORMS
    if "fused" not in form or name in FUSED
]


def tensors(shapes, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def gradients(shapes=SHAPES, steps=STEPS, dtype=torch.float32):
    return [tensors(shapes, 100 + step, dtype) for step in range(steps)]


class Ordinary:
    """Ordinary use of a torch optimizer, by name."""

    def __init__(self, cls, params, groups=None, **hyperparameters):
        self.params = {name: nn.Parameter(p.clone()) for name, p in params.items()}
        members = groups(self.params) if groups else list(self.params.values())
        self.optimizer = cls(members, **hyperparameters)

    def step(self, grads, closure=None):
        for name, p in self.params.items():
            p.grad = grads[name].clone() if name in grads else None
        self.optimizer.step(*([] if closure is None else [closure]))

    def slots(self):
        names = {id(p): name for name, p in self.params.items()}
        return {names[id(p)]: dict(slot) for p, slot in self.optimizer.state.items()}

    def values(self):
        return {name: p.detach() for name, p in self.params.items()}


def storages(tree):
    return {x.untyped_storage().data_ptr() for _, x in leaves_with_paths(tree) if isinstance(x, torch.Tensor)} - {0}


def checked(update, grads, state, params, *closure):
    """The result of `update`, which must leave alone what it is given, and share no memory with what it replaces."""
    given_to_it = (grads, state, params)
    before = copied(given_to_it)
    versions = [x._version for _, x in leaves_with_paths(given_to_it) if isinstance(x, torch.Tensor)]
    new_params, new_state = update(*given_to_it, *closure)
    assert tree_equal(given_to_it, before)
    assert versions == [x._version for _, x in leaves_with_paths(given_to_it) if isinstance(x, torch.Tensor)]
    moved = {n: p for n, p in new_params.items() if p is not params[n]}
    slots = {n: s for n, s in new_state["slots"].items() if s is not state["slots"].get(n)}
    assert not storages((moved, slots)) & storages(given_to_it)
    assert not any(p.requires_grad or p.grad is not None for p in moved.values())
    assert list(new_params) == list(params)
    return new_params, new_state


def assert_as_torch(opt, ordinary, params, batches):
    """Every step of `opt` and of `ordinary` gives the same parameters and slots."""
    update, state = opt.updater(params), opt.init(params)
    assert tree_equal(state["slots"], ordinary.slots())
    for grads in batches:
        params, state = checked(update, grads, state, params)
        ordinary.step(grads)
        assert tree_equal(params, ordinary.values())
        assert tree_equal(state["slots"], ordinary.slots())
    return params, state


@pytest.mark.parametrize(("cls", "hyperparameters"), CONFIGURATIONS)
def test_every_class_and_form_has_the_bits_of_torch(cls, hyperparameters):
    params = tensors(SHAPES, 0)
    opt = optimizers.optimizer(cls, **hyperparameters)
    assert_as_torch(opt, Ordinary(cls, params, **hyperparameters), params, gradients())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_other_dtypes_have_the_bits_of_torch(cls, form, dtype):
    params, hyperparameters = tensors(SHAPES, 0, dtype), {"lr": 0.1, "weight_decay": 0.01, **form}
    if cls is torch.optim.SGD:
        hyperparameters["momentum"] = 0.9
    opt = optimizers.optimizer(cls, **hyperparameters)
    assert_as_torch(opt, Ordinary(cls, params, **hyperparameters), params, gradients(dtype=dtype))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_parameters_of_several_dtypes_have_the_bits_of_torch(cls, form):
    params = {"a": torch.randn(3), "b": torch.randn(3, dtype=torch.float64)}
    for extra in [{}] if "fused" in form else [{}, {"c": torch.randn(3, dtype=torch.cfloat)}]:
        every, own = params | extra, {"lr": 0.1, "weight_decay": 0.1, **form}
        assert_as_torch(optimizers.optimizer(cls, **own), Ordinary(cls, every, **own), every, [every] * 4)


class WithoutForeach(torch.Tensor):
    """A kind of tensor for which torch has no foreach operators."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if "foreach" in func.__name__:
            raise NotImplementedError(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_tensor_subclasses_take_the_operators_that_torch_would_take():
    params = {"w": torch.randn(3).as_subclass(WithoutForeach)}
    plain = {"w": params["w"].as_subclass(torch.Tensor)}
    opt, ordinary = optimizers.optimizer(torch.optim.AdamW, lr=0.1), Ordinary(torch.optim.AdamW, plain, lr=0.1)
    grads, update, state = params, opt.updater(params), opt.init(params)
    for _ in range(3):
        params, state = update(grads, state, params, None)
        ordinary.step(plain)
        assert type(params["w"]) is WithoutForeach
        assert torch.equal(params["w"].as_subclass(torch.Tensor), ordinary.values()["w"])


def test_global_hooks_of_torch_optimizers_run():
    seen = []
    handle = register_optimizer_step_post_hook(lambda opt, *_: seen.append(type(opt).__name__))
    try:
        opt, params = optimizers.optimizer(torch.optim.AdamW), {"w": torch.ones(2)}
        update, state = opt.updater(params), opt.init(params)
        for _ in range(3):
            params, state = update(params, state, params, None)
    finally:
        handle.remove()
    assert seen == ["AdamW"] * 3


@pytest.mark.parametrize("adjust", [None, "match_rms_adamw"])
def test_muon_updates_matrices(adjust):
    params = tensors(SHAPES, 0)
    hyperparameters = {"lr": 0.1, "adjust_lr_fn": adjust}
    opt = optimizers.optimizer(
        torch.optim.Muon,
        params="*.weight",
        groups=[{"params": "2.*", "weight_decay": 0.5, "ns_steps": 3}],
        **hyperparameters,
    )
    ordinary = Ordinary(
        torch.optim.Muon,
        params,
        lambda p: [
            {"params": [p["2.weight"]], "weight_decay": 0.5, "ns_steps": 3},
            {"params": [p["0.weight"]]},
        ],
        **hyperparameters,
    )
    after, _ = assert_as_torch(opt, ordinary, params, gradients())
    assert opt.covers(params) == ("0.weight", "2.weight")
    assert after["0.bias"] is params["0.bias"]


@pytest.mark.parametrize("hyperparameters", [{"lr": 0.1}, {"line_search_fn": "strong_wolfe", "history_size": 3}])
def test_lbfgs_evaluates_the_network_through_the_closure(hyperparameters):
    x, y, kept = torch.randn(16, 3), torch.randn(16, 2), []
    params = {"weight": torch.randn(2, 3), "bias": torch.randn(2)}

    def evaluate(params):
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        loss = nn.functional.mse_loss(torch.tanh(nn.functional.linear(x, leaves["weight"], leaves["bias"])), y)
        return loss, dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    ordinary = Ordinary(torch.optim.LBFGS, params, **hyperparameters)

    def closure():
        loss, grads = evaluate(ordinary.params)
        for name, grad in grads.items():
            ordinary.params[name].grad = grad
        return loss

    def keep(params):
        kept.append((params, copied(params)))
        return evaluate(params)

    opt = optimizers.optimizer(torch.optim.LBFGS, **hyperparameters)
    assert opt.needs_closure
    update, state, old = opt.updater(params), opt.init(params), []
    for _ in range(4):
        old.append((params, state, copied(state)))
        params, state = checked(update, {}, state, params, keep)
        ordinary.optimizer.step(closure)
        assert tree_equal(params, ordinary.values())
        assert tree_equal(state["slots"], ordinary.slots())
    assert all(tree_equal(params, copy) for params, copy in kept)
    assert all(tree_equal(state, copy) for _, state, copy in old)
    again, _ = update({}, old[2][1], old[2][0], evaluate)
    assert tree_equal(again, old[3][0])
    with pytest.raises(TypeError, match="LBFGS evaluates the network itself"):
        update({}, state, params, None)


def test_an_error_in_the_closure_leaves_the_updater_usable():
    opt, params = optimizers.optimizer(torch.optim.LBFGS), {"w": torch.ones(2)}
    update, state = opt.updater(params), opt.init(params)

    def square(params):
        return (params["w"] ** 2).sum(), {"w": 2 * params["w"]}

    def broken(params):
        raise ZeroDivisionError

    expected = update({}, state, params, square)
    with pytest.raises(ZeroDivisionError):
        update({}, state, params, broken)
    assert tree_equal(update({}, state, params, square), expected)


def test_groups_have_their_own_hyperparameters():
    params = tensors(SHAPES, 0)
    own = {"weight_decay": 0.0, "betas": (0.5, 0.6), "amsgrad": True}
    opt = optimizers.optimizer(
        torch.optim.AdamW,
        lr=0.1,
        groups=[{"params": ["*.bias", "scale"], **own}, {"params": lambda n: n.startswith("0."), "lr": 0.01}],
    )
    assert opt.group_names(params) == [["0.bias", "2.bias", "scale"], ["0.weight"], ["2.weight"]]
    ordinary = Ordinary(
        torch.optim.AdamW,
        params,
        lambda p: [
            {"params": [p["0.bias"], p["2.bias"], p["scale"]], **own},
            {"params": [p["0.weight"]], "lr": 0.01},
            {"params": [p["2.weight"]]},
        ],
        lr=0.1,
    )
    _, state = assert_as_torch(opt, ordinary, params, gradients())
    assert [group["lr"] for group in state["groups"]] == [0.1, 0.01, 0.1]
    assert state["groups"][0]["betas"] == [0.5, 0.6]


def test_no_last_group_if_all_parameters_are_in_groups():
    opt = optimizers.optimizer(torch.optim.SGD, groups=[{"params": "*.bias"}, {"params": "*", "lr": 1.0}])
    assert opt.group_names(["0.weight", "0.bias"]) == [["0.bias"], ["0.weight"]]
    assert len(opt.init(tensors(SHAPES, 0))["groups"]) == 2


@pytest.mark.parametrize(
    "hyperparameters", [{"momentum": 0.9}, {"momentum": 0.9, "foreach": True}, {"momentum": 0.9, "fused": True}]
)
def test_parameters_without_a_gradient_stay_the_same_objects(hyperparameters):
    params = tensors(SHAPES, 0)
    opt = optimizers.optimizer(torch.optim.SGD, **hyperparameters)
    update, state = opt.updater(params), opt.init(params)
    for grads in gradients():
        params, state = update(grads, state, params, None)
    some = {"0.bias": torch.ones(5)}
    new_params, new_state = update(some, state, params, None)
    assert [n for n in params if new_params[n] is params[n]] == ["0.weight", "2.weight", "2.bias", "scale"]
    assert all(new_state["slots"][n] is state["slots"][n] for n in params if n not in some)
    same_params, same_state = update({}, state, params, None)
    assert all(same_params[n] is params[n] for n in params)
    assert tree_equal(same_state, state)


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Rprop])
def test_hyperparameters_in_the_state_are_the_ones_that_count(cls):
    params, grads = tensors(SHAPES, 0), gradients()
    opt, ordinary = optimizers.optimizer(cls, lr=0.1), Ordinary(cls, params, lr=0.1)
    update, state = opt.updater(params), opt.init(params)
    for step, batch in enumerate(grads):
        lr = torch.tensor(0.3) if step == 4 else 0.1 / (step + 1)
        changes = {"lr": lr, **({"betas": [0.1 * step, 0.9]} if cls is torch.optim.AdamW else {})}
        state = {**state, "groups": [{**state["groups"][0], **changes}]}
        ordinary.optimizer.param_groups[0].update(copied(changes))
        params, state = checked(update, batch, state, params)
        ordinary.step(batch)
        assert tree_equal(params, ordinary.values())
        assert tree_equal(state["groups"][0]["lr"], lr)
        assert set(state["groups"][0]) == set(opt.init(params)["groups"][0])


def test_a_hyperparameter_of_one_update_does_not_reach_the_next():
    opt, params = optimizers.optimizer(torch.optim.RMSprop, lr=0.1), tensors(SHAPES, 0)
    update, state = opt.updater(params), opt.init(params)
    expected = update(params, state, params, None)
    other = {**state, "groups": [{**state["groups"][0], "lr": 5.0, "initial_lr": 5.0}]}
    update(params, other, params, None)
    assert tree_equal(update(params, state, params, None), expected)


def test_the_state_has_the_numbers_and_not_the_flags():
    state = optimizers.optimizer(torch.optim.AdamW, lr=torch.tensor(0.5), fused=True).init(tensors(SHAPES, 0))
    assert set(state["groups"][0]) == {"lr", "betas", "eps", "weight_decay"}
    assert set(optimizers.optimizer(torch.optim.Adafactor).init(tensors(SHAPES, 0))["groups"][0]) == {
        "lr",
        "beta2_decay",
        "d",
        "weight_decay",
    }
    assert type(state["groups"][0]["betas"]) is list


def test_a_tensor_learning_rate_is_copied():
    lr, params = torch.tensor(0.5), {"w": torch.ones(2)}
    opt = optimizers.optimizer(torch.optim.SGD, lr=lr)
    lr.fill_(7.0)
    state = opt.init(params)
    assert state["groups"][0]["lr"] == 0.5
    assert torch.equal(opt.update(params, state, params)[0]["w"], torch.full((2,), 0.5))


@pytest.mark.parametrize("form", FORMS)
def test_strides_of_gradients_do_not_matter(form):
    params = {"w": torch.randn(4, 4), "image": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)}
    opt = optimizers.optimizer(torch.optim.AdamW, lr=0.1, **form)
    update, plain, strided = opt.updater(params), (params, opt.init(params)), (params, opt.init(params))
    for step in range(4):
        grads = tensors({"w": (4, 4), "image": (2, 3, 4, 4)}, step)
        turned = {"w": grads["w"].t().contiguous().t(), "image": grads["image"]}
        expanded = torch.full((), 0.5).expand(4, 4)
        even = grads if step % 2 else {**grads, "w": expanded.contiguous()}
        odd = turned if step % 2 else {**turned, "w": expanded}
        plain, strided = update(even, plain[1], plain[0], None), update(odd, strided[1], strided[0], None)
        assert tree_equal(plain, strided)
    assert plain[0]["image"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("form", FORMS)
def test_slots_of_other_strides_than_their_parameter_are_read_right(form):
    params = {"image": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)}
    opt = optimizers.optimizer(torch.optim.AdamW, lr=0.1, foreach=form.get("foreach"), fused=form.get("fused"))
    update = opt.updater(params)
    params, state = update(params, opt.init(params), params, None)
    contiguous = {
        **state,
        "slots": {n: {k: v.contiguous() for k, v in slot.items()} for n, slot in state["slots"].items()},
    }
    assert tree_equal(update(params, contiguous, params, None), update(params, state, params, None))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.ones(3, 5), "'0.weight' has shape"),
        (torch.ones(1, 3), "'0.weight' has shape"),
        (torch.ones(5, 3, dtype=torch.float64), "'0.weight' has dtype"),
    ],
)
def test_a_gradient_that_does_not_fit_is_an_error(form, wrong, message):
    params = tensors(SHAPES, 0)
    opt = optimizers.optimizer(torch.optim.AdamW, **form)
    params, state = opt.update(params, opt.init(params), params)
    with pytest.raises(ValueError, match=message):
        opt.update({**params, "0.weight": wrong}, state, params)


def test_parameters_and_gradients_with_a_graph_are_values():
    leaf = torch.randn(3, requires_grad=True)
    params = {"w": leaf * 2}
    opt = optimizers.optimizer(torch.optim.AdamW, lr=0.1)
    state = opt.init(params)
    for _ in range(3):
        params, state = opt.update({"w": leaf * 3}, state, {"w": params["w"] + 0 * leaf})
        assert not params["w"].requires_grad


def test_sparse_gradients():
    params = {"embedding": torch.randn(5, 2)}
    rows = torch.tensor([[1, 3]])
    grads = {"embedding": torch.sparse_coo_tensor(rows, torch.ones(2, 2), (5, 2), check_invariants=True).coalesce()}
    for cls in (torch.optim.SparseAdam, torch.optim.SGD):
        opt, ordinary = optimizers.optimizer(cls, lr=0.1), Ordinary(cls, params, lr=0.1)
        state, new = opt.init(params), params
        for _ in range(3):
            new, state = opt.update(grads, state, new)
            ordinary.step(grads)
            assert tree_equal(new, ordinary.values())


def test_the_arithmetic_of_a_subclass_is_its_own():
    class Halved(torch.optim.SGD):
        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(0.5)

    opt, params = optimizers.optimizer(Halved, lr=0.1), {"w": torch.ones(2)}
    assert torch.equal(opt.update(params, opt.init(params), params)[0]["w"], torch.full((2,), 0.5))
    assert not opt.needs_closure


def test_numbers_that_a_class_keeps_in_its_groups_are_state():
    class Counting(torch.optim.SGD):
        def __init__(self, params, lr=0.1):
            super().__init__(params, lr)
            self.param_groups[0]["count"] = 0

        def step(self, closure=None):
            self.param_groups[0]["count"] += 1
            return super().step(closure)

    opt, params = optimizers.optimizer(Counting, lr=0.1), {"w": torch.ones(2)}
    update, state = opt.updater(params), opt.init(params)
    for count in (1, 2, 3):
        params, state = update(params, state, params, None)
        assert state["groups"][0]["count"] == count


def with_slot(state, name, **changes):
    return {**state, "slots": {**state["slots"], name: {**state["slots"][name], **changes}}}


def with_values(state, **changes):
    return {**state, "groups": [{**state["groups"][0], **changes}]}


def turned(matrix):
    """The same values, column by column in memory."""
    return matrix.t().contiguous().t()


def assign(tree, *path, value):
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = value
    return True


W, SLOT = "0.weight", {"SGD": "momentum_buffer", "Adam": "exp_avg", "AdamW": "exp_avg_sq"}
CHANGES = {
    "nothing": lambda g, s, p, slot: (g, s, p),
    "the same tensors": lambda g, s, p, slot: (dict(g), with_slot(s, W), dict(p)),
    "another parameter": lambda g, s, p, slot: (g, s, {**p, W: p[W] + 1}),
    "a turned parameter": lambda g, s, p, slot: (g, s, {**p, W: turned(p[W])}),
    "a parameter with a graph": lambda g, s, p, slot: (g, s, {**p, W: p[W].clone().requires_grad_() * 2}),
    "a leaf": lambda g, s, p, slot: p[W].requires_grad_() is not None and (g, s, p),
    "a parameter of another dtype": lambda g, s, p, slot: (g, s, {**p, W: p[W].double()}),
    "a smaller parameter": lambda g, s, p, slot: (g, s, {**p, W: p[W][:2].clone()}),
    "a smaller parameter and gradient": lambda g, s, p, slot: ({**g, W: g[W][:2]}, s, {**p, W: p[W][:2].clone()}),
    "another slot": lambda g, s, p, slot: (g, with_slot(s, W, **{slot: p[W].square()}), p),
    "a turned slot": lambda g, s, p, slot: (g, with_slot(s, W, **{slot: turned(p[W].square())}), p),
    "a smaller slot": lambda g, s, p, slot: (g, with_slot(s, W, **{slot: torch.zeros(1, 2)}), p),
    "a slot of another dtype": lambda g, s, p, slot: (g, with_slot(s, W, **{slot: p[W].double().square()}), p),
    "a slot that torch does not know": lambda g, s, p, slot: (g, with_slot(s, W, other=torch.zeros(5, 3)), p),
    "None as a slot": lambda g, s, p, slot: (g, with_slot(s, W, **{slot: None}), p),
    "no slots": lambda g, s, p, slot: (g, {**s, "slots": {}}, p),
    "no slots of a parameter": lambda g, s, p, slot: (
        g,
        {**s, "slots": {n: v for n, v in s["slots"].items() if n != W}},
        p,
    ),
    "another lr": lambda g, s, p, slot: (g, with_values(s, lr=0.7), p),
    "a tensor as lr": lambda g, s, p, slot: (g, with_values(s, lr=torch.tensor(0.7)), p),
    "a turned gradient": lambda g, s, p, slot: ({**g, W: turned(g[W])}, s, p),
    "an expanded gradient": lambda g, s, p, slot: ({**g, W: torch.ones(3).expand(5, 3)}, s, p),
    "a smaller gradient": lambda g, s, p, slot: ({**g, W: torch.ones(1, 3)}, s, p),
    "a gradient of another class": lambda g, s, p, slot: ({**g, W: g[W].as_subclass(WithoutForeach)}, s, p),
    "a missing gradient": lambda g, s, p, slot: ({n: v for n, v in g.items() if n != W}, s, p),
    "no gradients": lambda g, s, p, slot: ({}, s, p),
    "a parameter assigned": lambda g, s, p, slot: assign(p, W, value=p[W] + 1) and (g, s, p),
    "a slot assigned": lambda g, s, p, slot: assign(s, "slots", W, slot, value=p[W].square()) and (g, s, p),
    "an lr assigned": lambda g, s, p, slot: assign(s, "groups", 0, "lr", value=0.7) and (g, s, p),
}
REFUSED = {
    "a parameter of another dtype",
    "a smaller parameter",
    "a smaller parameter and gradient",
    "a smaller slot",
    "a smaller gradient",
}


@pytest.mark.parametrize("form", [{}, {"fused": True}])
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("change", CHANGES)
def test_whatever_a_hook_replaces_is_used_or_refused(change, cls, form):
    params, hyperparameters = tensors(SHAPES, 0), {"lr": 0.1, "weight_decay": 0.01, **form}
    if cls is torch.optim.SGD:
        hyperparameters["momentum"] = 0.9
    opt = optimizers.optimizer(cls, **hyperparameters)
    update, state = opt.updater(params), opt.init(params)
    generic = TorchUpdate(opt.to_torch(copied(params), state), [list(params)], False)
    for step, grads in enumerate(gradients(steps=8)):
        if step == 5:
            grads, state, params = CHANGES[change](grads, state, params, SLOT[cls.__name__])
        try:
            expected = generic(grads, state, params)
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            assert step == 5
            with pytest.raises(type(error), match=f"^{re.escape(str(error))}$"):
                update(grads, state, params)
            return
        assert step != 5 or change not in REFUSED
        params, state = update(grads, state, params)
        assert tree_equal((params, state), expected)
        assert not any(x.requires_grad for _, x in leaves_with_paths(state["slots"]))
        assert not any(params[name].requires_grad for name in grads)


@pytest.mark.parametrize("form", [{}, {"fused": True}])
def test_the_tensors_of_one_parameter_are_not_taken_for_those_of_another(form):
    params = tensors({"a": (2, 3), "b": (3, 2)}, 0)
    opt = optimizers.optimizer(torch.optim.AdamW, lr=0.1, **form)
    update, state = opt.updater(params), opt.init(params)
    for _ in range(3):
        params, state = update({"a": torch.ones(2, 3)}, state, params)
    state = {**state, "slots": {"b": state["slots"]["a"]}}
    with pytest.raises(ValueError, match="the gradient of 'b' has shape"):
        update({"b": torch.ones(3, 2)}, state, {**params, "b": params["a"]})


@pytest.mark.parametrize("form", [{}, {"fused": True}])
def test_slots_that_come_back_into_use_are_looked_at(form):
    params, grads = {"w": torch.randn(4, 3)}, {"w": torch.randn(4, 3)}
    opt = optimizers.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9, **form)
    update, state = opt.updater(params), opt.init(params)
    for momentum in (0.9, 0.9, 0.0):
        params, state = update(grads, with_values(state, momentum=momentum), params)
    state = with_slot(
        with_values(state, momentum=0.9), "w", momentum_buffer=turned(state["slots"]["w"]["momentum_buffer"])
    )
    assert tree_equal(update(grads, state, params), opt.update(grads, state, params))


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.RMSprop])
@pytest.mark.parametrize("release", [False, True])
def test_runs_that_share_an_updater_do_not_mix(cls, release):
    opt = optimizers.optimizer(cls, lr=0.1, groups=[{"params": "*.bias", "lr": 0.3}], momentum=0.9)
    starts = [tensors(SHAPES, seed) for seed in (0, 1)]
    shared, own = opt.updater(starts[0]), [opt.updater(params) for params in starts]
    runs = [(params, opt.init(params)) for params in starts]
    for step, grads in enumerate(gradients()):
        for i in (0, 1):
            # The second run has gradients for one group alone, now and then.
            some = {n: g for n, g in grads.items() if i == 0 or step % 3 or n.endswith("bias")}
            expected = own[i](some, runs[i][1], runs[i][0])
            runs[i] = shared(some, runs[i][1], runs[i][0])
            assert tree_equal(runs[i], expected)
            if release:
                shared.release()


def test_a_released_updater_keeps_no_tensor_alive():
    for cls in (torch.optim.AdamW, torch.optim.RMSprop):
        opt, params = optimizers.optimizer(cls), tensors(SHAPES, 0)
        update = opt.updater(params)
        result = update(params, opt.init(params), params, None)
        result = update(params, result[1], result[0], None)
        seen = [weakref.ref(x) for _, x in leaves_with_paths((params, result)) if isinstance(x, torch.Tensor)]
        update.release()
        del params, result
        gc.collect()
        assert not any(ref() is not None for ref in seen)


@pytest.mark.parametrize(("cls", "hyperparameters"), CONFIGURATIONS)
def test_torch_goes_on_from_our_state_and_we_from_that_of_torch(cls, hyperparameters):
    params, grads = tensors(SHAPES, 0), gradients()
    opt = optimizers.optimizer(cls, **hyperparameters)
    whole, state = params, opt.init(params)
    for batch in grads:
        whole, state = opt.update(batch, state, whole)

    here, state = params, opt.init(params)
    for batch in grads[:2]:
        here, state = opt.update(batch, state, here)
    kept = copied((here, state))
    ordinary = Ordinary(cls, here, **hyperparameters)
    ordinary.optimizer = opt.to_torch(ordinary.params, state)
    for batch in grads[2:5]:
        ordinary.step(batch)
    assert tree_equal((here, state), kept)
    back = opt.from_torch(ordinary.optimizer, ordinary.params)
    here, before = {n: p.clone() for n, p in ordinary.values().items()}, copied(back)
    ordinary.step(grads[5])
    assert tree_equal(back, before)
    for batch in grads[5:]:
        here, back = opt.update(batch, back, here)
    assert tree_equal(here, whole)


def test_from_torch_takes_groups_in_any_order_and_drops_what_schedulers_add():
    params = {n: nn.Parameter(p) for n, p in tensors(MATRICES | {"0.bias": (5,)}, 0).items()}
    opt = optimizers.optimizer(torch.optim.SGD, lr=0.1, groups=[{"params": "*.bias", "momentum": 0.9}])
    theirs = torch.optim.SGD(
        [
            {"params": [params["0.weight"], params["2.weight"]], "lr": 0.2},
            {"params": [params["0.bias"]], "momentum": 0.9},
        ]
    )
    torch.optim.lr_scheduler.StepLR(theirs, 1)
    state = opt.from_torch(theirs, params)
    assert [(g["lr"], g["momentum"]) for g in state["groups"]] == [(0.001, 0.9), (0.2, 0)]
    assert all("initial_lr" not in group for group in state["groups"])
    continued = opt.to_torch(params, state)
    assert [len(group["params"]) for group in continued.param_groups] == [1, 2]


def test_from_torch_lists_what_does_not_match():
    params = {n: nn.Parameter(p) for n, p in tensors(MATRICES | {"0.bias": (5,)}, 0).items()}
    opt = optimizers.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)
    with pytest.raises(StateDictError, match="state of Adam can't be continued by SGD"):
        opt.from_torch(torch.optim.Adam(params.values()), params)
    with pytest.raises(StateDictError, match="nesterov is False, and here True"):
        opt.from_torch(torch.optim.SGD(params.values(), momentum=0.9), params)
    grouped = torch.optim.SGD([{"params": [params["0.bias"]]}, {"params": [nn.Parameter(torch.ones(3))]}])
    with pytest.raises(StateDictError) as error:
        opt.from_torch(grouped, params)
    assert error.value.differences == (
        "no group of the torch optimizer has the parameters ['0.weight', '2.weight', '0.bias'], in this order",
        "only the torch optimizer has the group ['0.bias']",
        "only the torch optimizer has the group ['unknown of shape (3,)']",
    )


@pytest.mark.parametrize(
    ("arguments", "hyperparameters", "kind", "message"),
    [
        ([torch.optim.SGD([torch.ones(1)])], {}, TypeError, r"takes the class, not an instance: optimizer\(SGD, lr="),
        ([nn.Linear], {}, TypeError, "takes a subclass of torch.optim.Optimizer"),
        (["SGD"], {}, TypeError, "takes a subclass of torch.optim.Optimizer"),
        ([torch.optim.AdamW], {"weight_dcay": 0.1}, TypeError, "did you mean 'weight_decay'"),
        ([torch.optim.RMSprop], {"fused": True}, TypeError, "RMSprop has no hyperparameter 'fused'"),
        ([torch.optim.AdamW], {"lr": -1.0}, ValueError, "Invalid learning rate"),
        ([torch.optim.SGD], {"lr": float("nan")}, ValueError, "lr is NaN"),
        ([torch.optim.SGD], {"lr": torch.tensor(float("nan"))}, ValueError, "lr is NaN"),
        ([torch.optim.Adafactor], {"eps": (None, float("nan"))}, ValueError, "eps is NaN"),
        ([torch.optim.AdamW], {"differentiable": True}, ValueError, "differentiable=True can't work"),
        ([torch.optim.AdamW], {"fused": True, "foreach": True}, RuntimeError, "cannot be `True` together"),
        ([torch.optim.SGD], {"params": 3}, TypeError, "params must be a pattern"),
        ([torch.optim.SGD], {"groups": [{"lr": 0.1}]}, ValueError, "a group is a dict such as"),
        ([torch.optim.SGD], {"groups": ["*.bias"]}, ValueError, "a group is a dict such as"),
        ([torch.optim.SGD], {"groups": [{"params": 3}]}, TypeError, "of a group must be a pattern"),
        ([torch.optim.SGD], {"groups": [{"params": "*", "lr": -1.0}]}, ValueError, "Invalid learning rate"),
        ([torch.optim.SGD], {"groups": [{"params": "*", "lr": float("nan")}]}, ValueError, "lr is NaN"),
        ([torch.optim.SGD], {"groups": [{"params": "*", "momentun": 0.9}]}, TypeError, "mean 'momentum'"),
        ([torch.optim.LBFGS], {"groups": [{"params": "*.bias"}, {"params": "*"}]}, ValueError, "parameter groups"),
    ],
)
def test_what_can_not_work_is_refused_at_once(arguments, hyperparameters, kind, message):
    with pytest.raises(kind, match=message):
        optimizers.optimizer(*arguments, **hyperparameters)


def test_what_does_not_go_with_the_parameters_is_refused_before_training():
    params = tensors(SHAPES, 0)
    for opt, message in [
        (optimizers.optimizer(torch.optim.SGD, params="0.wieght"), "did you mean '0.weight'"),
        (optimizers.optimizer(torch.optim.SGD, groups=[{"params": "1.*"}]), "pattern of group 0 '1.*' matches no"),
        (
            optimizers.optimizer(torch.optim.SGD, groups=[{"params": "0.*"}, {"params": "0.bias"}]),
            "group 1 is empty",
        ),
        (optimizers.optimizer(torch.optim.AdamW, capturable=True), "capturable=True is for accelerators"),
        (optimizers.optimizer(torch.optim.Muon), "Muon only supports 2D parameters"),
    ]:
        for refuse in (opt.init, opt.updater):
            with pytest.raises(ValueError, match=message.replace("*", r"\*")):
                refuse(params)


@st.composite
def runs(draw):
    """Any run of an optimizer that has kernels; a step has gradients for any subset of the parameters."""
    unit = st.floats(0, 1, exclude_max=True)
    cls = draw(st.sampled_from([torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW]))
    hyperparameters = {
        "lr": draw(st.floats(0, 2)),
        "weight_decay": draw(st.sampled_from([0, 0.0, 0.1])),
        "maximize": draw(st.booleans()),
        **draw(st.sampled_from(FORMS)),
    }
    if cls is torch.optim.SGD:
        nesterov = draw(st.booleans())
        hyperparameters |= {
            "nesterov": nesterov,
            "momentum": draw(st.floats(0.1, 1) if nesterov else st.sampled_from([0, 0.5, 0.9])),
            "dampening": 0 if nesterov else draw(unit),
        }
    else:
        hyperparameters |= {
            "betas": (draw(unit), draw(unit)),
            "eps": draw(st.sampled_from([1e-8, 0.1])),
            "amsgrad": draw(st.booleans()),
        }
    dims = st.lists(st.integers(0, 4), max_size=3).map(tuple)
    shapes = {f"p{i}": shape for i, shape in enumerate(draw(st.lists(dims, min_size=1, max_size=4)))}
    # torch's own fused SGD reads uninitialised memory for a parameter whose gradient comes later than others'.
    late = cls is not torch.optim.SGD or "fused" not in hyperparameters
    subset = st.sets(st.sampled_from(list(shapes))) if late else st.just(set(shapes))
    subsets = draw(st.lists(subset, min_size=2, max_size=5))
    return cls, hyperparameters, shapes, subsets, draw(st.integers(0, 10**6))


@settings(max_examples=60, deadline=None)
@given(runs())
def test_any_run_has_the_bits_of_torch(run):
    cls, hyperparameters, shapes, subsets, seed = run
    params = tensors(shapes, seed)
    batches = [
        {n: g for n, g in tensors(shapes, seed + 1 + i).items() if n in names} for i, names in enumerate(subsets)
    ]
    opt = optimizers.optimizer(cls, **hyperparameters)
    assert_as_torch(opt, Ordinary(cls, params, **hyperparameters), params, batches)


@settings(max_examples=60, deadline=None)
@given(runs())
def test_kernels_have_the_bits_of_the_generic_update(run):
    cls, hyperparameters, shapes, _, seed = run
    params = tensors(shapes, seed)
    opt, names = optimizers.optimizer(cls, **hyperparameters), [list(shapes)]
    instance = opt.to_torch(copied(params), opt.init(params))
    groups = [{k: v for k, v in instance.param_groups[0].items() if k != "params"}]
    fast = fast_update(cls, names, groups, params, generic=None)
    generic = TorchUpdate(instance, names, False)
    params, state = generic(tensors(shapes, seed + 1), opt.init(params), params)
    for i in range(2, 5):
        grads = tensors(shapes, seed + i)
        quick = fast(grads, state, params)
        params, state = generic(grads, state, params)
        assert tree_equal(quick, (params, state))
