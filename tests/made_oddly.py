"""More ways in which losses, networks and hooks hold a number, and objects that are hard to look at; ``python
tests/made_oddly.py`` prints what is known of the runs that are made with them."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import decimal
import functools
import io
import json
import logging
import operator
import random
import tempfile
import threading
import time
import types
import weakref
from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor, nn

import functional_loop as fl
import functional_loop.callbacks as cb
from tests import made_with
from tests.made_with import ce, loop, script

F = nn.functional


@dataclasses.dataclass
class Focal:
    gamma: float
    cache: dict[int, float] = dataclasses.field(default_factory=dict)

    def __call__(self, y_hat: Tensor, y: Tensor) -> Tensor:
        self.cache[len(self.cache)] = time.time()
        return self.gamma * ce(y_hat, y)


@dataclasses.dataclass(frozen=True)
class Frozen:
    gamma: float

    def __call__(self, y_hat: Tensor, y: Tensor) -> Tensor:
        object.__setattr__(self, "_last", random.random())
        return self.gamma * ce(y_hat, y)


@attrs.define
class Defined:
    gamma: float
    seen: int = attrs.field(default=0, init=False)

    def __call__(self, y_hat: Tensor, y: Tensor) -> Tensor:
        self.seen += 1
        return self.gamma * ce(y_hat, y)


class Tempered:
    """A method that writes to a setting, and is not called while training."""

    def __init__(self, temperature: float) -> None:
        self.set(temperature)

    def set(self, temperature: float) -> None:
        self.temperature = temperature

    def __call__(self, y_hat: Tensor, y: Tensor) -> Tensor:
        return self.temperature * ce(y_hat, y)


class Cached:
    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.held = [threading.Lock(), logging.getLogger("x"), np.random.default_rng()]

    @functools.cached_property
    def table(self) -> float:
        return random.random()

    def __call__(self, y_hat: Tensor, y: Tensor) -> Tensor:
        return self.factor * ce(y_hat, y) + 0 * self.table


class Refusing:
    """An object with which nothing can be done but what it is for."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def _refuse(self, *args: Any) -> Any:
        raise RuntimeError("not to be looked at")

    __eq__ = __repr__ = __hash__ = __len__ = __iter__ = __getattr__ = __bool__ = _refuse

    def __call__(self, y_hat: Tensor, y: Tensor) -> Tensor:
        return self.factor * ce(y_hat, y)


class Endless(Refusing):
    def __getattr__(self, name: str) -> Any:
        return Endless(0.0)


def used(value: Any) -> Any:
    """A loss that uses the attribute ``w`` of a value."""
    return lambda y_hat, y: value.w * ce(y_hat, y)


def held(value: Any) -> Any:
    return lambda y_hat, y: ce(y_hat, y) if str(value) else None


def beside_a_subscript(w: float) -> Any:
    config = {"w": w}

    def loss(y_hat: Tensor, y: Tensor) -> Tensor:
        parts = {}
        parts["ce"] = config["w"] * ce(y_hat, y)
        return parts["ce"]

    return loss


def recursive(w: float) -> Any:
    def down(n: int) -> float:
        return w if n == 0 else up(n - 1)

    def up(n: int) -> float:
        return w if n == 0 else down(n - 1)

    return lambda y_hat, y: down(3) * ce(y_hat, y)


def decorated(w: float) -> Any:
    def scale(function: Callable[..., Tensor]) -> Any:
        @functools.wraps(function)
        def scaled(*args: Tensor) -> Tensor:
            return w * function(*args)

        return scaled

    return scale(lambda y_hat, y: ce(y_hat, y))


def module(w: float) -> Any:
    made = types.ModuleType("helpers")
    vars(made)["SCALE"] = w
    exec("def helped(x): return x * SCALE\nclass Config: scale = SCALE", vars(made))
    return made


def whole(w: float) -> nn.Module:
    made = nn.Linear(4, 2)
    for parameter in made.parameters():
        nn.init.constant_(parameter, w)
    return made


@dataclasses.dataclass
class Config:
    w: float
    epochs: int = 3
    began: float = dataclasses.field(default_factory=time.time)

    def save(self, path: str) -> None:
        self.path = path


class Box(dict[str, Any]):
    __getattr__ = dict.__getitem__


Pair = collections.namedtuple("Pair", ["w", "name"])

LOSSES: dict[str, Callable[[float], Any]] = {
    function.__name__: function
    for function in (
        Focal,
        Frozen,
        Defined,
        Tempered,
        Cached,
        Refusing,
        Endless,
        beside_a_subscript,
        recursive,
        decorated,
    )
} | {
    "nested partial": lambda w: functools.partial(functools.partial(lambda k, j, y_hat, y: k * ce(y_hat, y), w), 3),
    "global alias": lambda w: script("def loss(a, b): return ce(act(a), b)", act=torch.relu if w > 0.3 else torch.tanh),
    "global function": lambda w: script("def loss(a, b): return ce(act(a), b)", act=F.relu if w > 0.3 else F.gelu),
    "attribute of a class": lambda w: script("class C: w = w\ndef loss(a, b): return C.w * ce(a, b)", w=w),
    "module of a class": lambda w: script(
        "class C:\n    part = part\n    def __call__(self, a, b): return self.part(a, b)\nloss = C()",
        part=nn.CrossEntropyLoss(label_smoothing=w),
    ),
    "of a module": lambda w: script("def loss(a, b): return m.SCALE * ce(a, b)", m=module(w)),
    "function of a module": lambda w: script("def loss(a, b): return m.helped(ce(a, b))", m=module(w)),
    "imported function": lambda w: script("def loss(a, b): return h(ce(a, b))", h=module(w).helped),
    "class of a module": lambda w: script("def loss(a, b): return m.Config.scale * ce(a, b)", m=module(w)),
    "ufunc": lambda w: (lambda f: lambda y_hat, y: float(f(1.0, 2.0)) * ce(y_hat, y))(np.add if w > 0.3 else np.hypot),
    "decimal": lambda w: held(decimal.Decimal(str(w))),
    "timedelta": lambda w: held(datetime.timedelta(seconds=w)),
    "itemgetter": lambda w: held(operator.itemgetter(0 if w > 0.3 else 1)),
    "word": lambda w: held(type("Mode", (str,), {})(f"by {w}")),
    "long text": lambda w: held("x" * 5000 + str(w)),
    "long list": lambda w: held([1.0] * 300 + [w]),
    "bytes": lambda w: held(str(w).encode()),
    "functions in a list": lambda w: held([lambda y_hat, y: w * ce(y_hat, y), ce]),
    "strided tensor": lambda w: held((torch.ones(4, 6) * w).T[::2]),
    "network of its own": lambda w: held(whole(w)),
    "distribution": lambda w: held(torch.distributions.Normal(w, 1.0)),
    "configuration": lambda w: used(Config(w)),
    "box": lambda w: used(Box(w=w, began=time.time())),
    "user dict": lambda w: held(collections.UserDict(w=w)),
    "named tuple": lambda w: used(Pair(w, "a")),
    "object in it": lambda w: used(types.SimpleNamespace(w=Tempered(w), began=time.time())),
    "margin": lambda w: nn.MultiMarginLoss(margin=w),
}
"""Ways in which a number decides what a loss is."""

FREE: dict[str, Callable[[float], Any]] = {
    "level of a logger": lambda w: (logging.getLogger("x").setLevel(int(w * 40)), held(logging.getLogger("x")))[1],
    "file": lambda w: held(io.StringIO(str(w))),
    "generators": lambda w: held([np.random.default_rng(int(8 * w)), random.Random(w), torch.Generator()]),
    "thread": lambda w: held(threading.Thread(target=print, name=f"thread {w}")),
    "device": lambda w: held(torch.device("cpu" if w > 0.3 else "cuda:0")),
    "folder": lambda w: held(tempfile.gettempdir() + f"/{w}"),
    "weak reference": lambda w: held(weakref.ref(Tempered)),
    "iterator": lambda w: held(iter([w])),
    "second": lambda w: script(
        "def loss(a, b): return ce(a, b) + 0 * (time() - t)", time=time.time, t=int(time.time() + 9 * w)
    ),
    "what is not used of an object": lambda w: used(Config(1.0, epochs=int(8 * w))),
    "what is not used of a namespace": lambda w: used(argparse.Namespace(w=1.0, out=w)),
}
"""What changes no result."""


class Helped(cb.CallbackSet):
    def __init__(self, norm: float) -> None:
        self.norm = norm
        self.began = time.time()

    def on_after_backward(self) -> None:
        clip(self.ctx, self.norm)


def clip(ctx: Any, norm: float) -> None:
    nn.utils.clip_grad_norm_(ctx.network.parameters(), norm)


class Hooks:
    def __init__(self, lr: float) -> None:
        self.lr = lr
        self.calls = random.randrange(1000)

    def run(self, ctx: fl.Context) -> fl.Context:
        self.calls += 1
        return ctx.with_hyperparameters(lr=self.lr)


def remembering(w: float) -> fl.Callback:
    """A hook that writes to what is around it by subscript and to attributes, and another one that reads it."""
    array, tensor, counts = np.array([random.random()]), torch.rand(1), {"n": random.randrange(1000)}
    space, n = types.SimpleNamespace(last=random.random(), lr=w), random.randrange(1000)

    def write(ctx: fl.Context) -> fl.Context:
        nonlocal n
        n += 1
        array[0] += n
        tensor[0] = n
        counts["n"] += 1
        space.last = n
        return ctx.with_hyperparameters(lr=space.lr)

    def read(ctx: fl.Context) -> fl.Context:
        return ctx.with_hyperparameters(lr=0.1 if n else 0.2)

    return fl.Callback("hook", batch_end=write, epoch_end=read)


CALLBACKS: dict[str, Callable[[float], Any]] = {
    "what calls a function": lambda w: [Helped(w)],
    "method": lambda w: [fl.Callback("hook", batch_end=Hooks(w).run)],
    "partial": lambda w: [
        fl.Callback("hook", batch_end=functools.partial(lambda k, ctx: ctx.with_hyperparameters(lr=k), w))
    ],
    "memory": lambda w: [remembering(w)],
}


class Scaled(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.scale = scale
        self.calls = 0

    def set_scale(self, scale: float) -> None:
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen = x.detach()
        return self.layer(x) * self.scale  # type: ignore[no-any-return]


class Around(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.part = Scaled(scale)

    def forward(self, x: Tensor) -> Tensor:
        self.part.note = x.shape
        return self.part(x)  # type: ignore[no-any-return]


class Shown(Scaled):
    """A module that shows what is trained."""

    def extra_repr(self) -> str:
        return f"first={self.layer.bias[0].item()}"


@dataclasses.dataclass
class Activated:
    act: Callable[[Tensor], Tensor] = F.relu

    @functools.lru_cache  # noqa: B019
    def factor(self) -> float:
        return 1.0

    def __call__(self, y_hat: Tensor, y: Tensor) -> Tensor:
        return ce(self.act(y_hat), y)


def hooked(w: float) -> nn.Module:
    made = nn.Linear(4, 2)
    made.register_forward_hook(functools.partial(lambda k, layer, inputs, output: output * k, w))
    return made


LOSSES["function as a default"] = lambda w: Activated(F.relu if w > 0.3 else F.gelu)

NETWORKS: dict[str, Callable[[float], nn.Module]] = {
    "module": Scaled,
    "in another": Around,
    "shown": Shown,
    "hook": hooked,
    "activation": lambda w: nn.Sequential(nn.Linear(4, 2), made_with.NETWORKS["function"](w)[1]),  # type: ignore[index]
}


def runs(w: float) -> dict[str, fl.Loop]:
    made = {f"loss: {name}": loop(loss=make(w)) for name, make in (LOSSES | FREE).items()}
    made |= {f"callback: {name}": loop(callbacks=make(w)) for name, make in CALLBACKS.items()}
    return made | {f"network: {name}": loop(network=functools.partial(make, w)) for name, make in NETWORKS.items()}


def told(w: float = 0.5) -> dict[str, Any]:
    """What is known of every one of these runs."""
    return {name: fl.fingerprint(each) for name, each in runs(w).items()}


if __name__ == "__main__":
    print(json.dumps(told()))
