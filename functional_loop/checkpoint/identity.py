"""The identity of a run: what a saved state and the loop that continues it must have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
from torch import Tensor, nn

from ..compat import without_modes
from ..core.batch import BatchSource
from ..core.beside import beside, found_beside
from ..core.callback import Callback
from ..core.hashes import hash_of
from ..core.measures import Measure
from ..core.mentions import hash_of_code, methods_of
from ..core.record import leaves_with_paths
from ..engine.template import template, with_loss
from ..optim.torch_update import numbers_of
from .environment import KERNELS, environment
from .settings import CODE, settings_of, settings_of_all, structure_of
from .values import kind_of

if TYPE_CHECKING:
    from ..core.context import Context
    from ..engine.loop import Loop


def identity(loop: Loop) -> dict[str, Any]:
    """What a state dict tells of the loop that made it, in three parts of plain values.

    ``fingerprint``: what decides the result; see `fingerprint`. ``environment``: what may change its last bits; see
    `environment`, and the kernels of the optimizer. ``hyperparameters``: those given to the optimizer,
    a dict per group; those in force are in the state, where schedules change them.
    """
    # A dry run asks for it among tensors without values.
    with without_modes():
        known = beside(loop, "identity", lambda: _identity(loop))
    kernels: Any = _copied(known["kernels"])
    return {
        "fingerprint": _copied(known["fingerprint"]),
        "environment": {**environment(loop), "kernels": kernels},
        "hyperparameters": _copied(known["hyperparameters"]),
    }


def _identity(loop: Loop) -> dict[str, Any]:
    module = template(loop)
    params = with_loss(loop).params()
    groups = loop.optimizer.hyperparameters_of(params)
    numbers = [numbers_of(group) for group in groups]
    flags = [{k: _plain(group[k]) for k in group if k not in own} for group, own in zip(groups, numbers, strict=True)]
    told = described(loop)
    made = {
        "network": {
            "params": {name: kind_of(p) for name, p in module.named_parameters()},
            "buffers": {name: kind_of(b) for name, b in module.named_buffers()},
            "modules": structure_of(module),
        },
        "loss": told["loss"],
        "optimizer": {
            "class": f"{loop.optimizer.cls.__module__}.{loop.optimizer.cls.__qualname__}",
            "groups": [
                {
                    "params": list(names),
                    "hyperparameters": sorted(own),
                    "flags": {k: value for k, value in rest.items() if k not in KERNELS},
                }
                for names, own, rest in zip(loop.optimizer.group_names(params), numbers, flags, strict=True)
            ],
        },
        "train": _of_source(loop.train),
        "valid": _of_source(loop.valid) if loop.valid is not None else None,
        "measures_train": [m.id for m in loop.measures_train],
        "measures_valid": [m.id for m in loop.measures_valid],
        "scores": told["scores"],
        "callbacks": told["callbacks"],
        "order": told["order"],
        "accumulate": loop.accumulate,
        "eval_freq": loop.eval_freq,
        "autocast": str(loop.autocast) if loop.autocast is not None else None,
    }
    if methods := sorted(methods_of(loop.optimizer.cls).items()):
        made["optimizer"][CODE] = hash_of_code(method for _, method in methods)
    return {
        "fingerprint": made,
        "kernels": [{k: value for k, value in rest.items() if k in KERNELS} for rest in flags],
        "hyperparameters": [{k: _plain(value) for k, value in own.items()} for own in numbers],
    }


def described(loop: Loop) -> dict[str, Any]:
    """What loss, measures and callbacks were made with, and the order of the callbacks that decide the result.

    It is as it was when the first run began.
    """
    return beside(loop, "described", lambda: _described(loop))


def _described(loop: Loop) -> dict[str, Any]:
    return {
        "loss": _of_loss(loop.loss),
        "scores": {name: _of_measures(getattr(loop, name)) for name in ("measures_train", "measures_valid")},
        "callbacks": {c.id: _of_callback(c, loop) for c in loop.callbacks},
        "order": [c.id for c in sorted(loop.callbacks, key=lambda c: c.order) if c.decides],
    }


def _of_loss(loss: Callable[..., Any]) -> dict[str, Any]:
    """Of a loss that is a module, buffers count (weights of classes), and parameters do not: they are trained."""
    if isinstance(loss, nn.Module):
        return structure_of(loss) | {"buffers": hash_of(*loss.buffers())[:16]}
    made = settings_of(loss)
    return made if isinstance(made, dict) else {"class": made}


def _of_measures(measures: Sequence[Measure]) -> dict[str, Any]:
    """The settings of measures by id."""
    fields = [field.name for field in attrs.fields(Measure) if field.name != "id"]
    given = {m.id: {name: getattr(m, name) for name in fields} for m in measures}
    return {id: {name: settings_of(v) for name, v in values.items() if v is not None} for id, values in given.items()}


def _of_callback(callback: Callback, loop: Loop) -> dict[str, Any]:
    """Kind, weight, and what the hooks were made with, or the object whose methods they call; of a callback without a
    part in the result, that it has none."""
    if not callback.decides:
        return {"kind": callback.kind, "decides": False}
    made: dict[str, Any] = {
        "kind": callback.kind,
        "state": callback.keeps_state,
        "weight": settings_of(callback.weight),
    }
    if callback.settings is not None:
        given: Mapping[str, Any] = callback.settings
    elif callback.source is not None and any(isinstance(hook, functools.partial) for hook in callback.hooks.values()):
        told = settings_of(callback.source, known=[loop.network])
        # Of an object that was made without arguments there is the class alone.
        own = told if isinstance(told, dict) else {}
        return {**{name: value for name, value in own.items() if name not in ("class", "id")}, **made}
    else:
        functions = {"init": callback.init, "skips": callback.skips, **callback.hooks}
        given = {name: function for name, function in functions.items() if function is not None}
    return {**settings_of_all(given, known=[loop.network]), **made}


def _of_source(source: BatchSource) -> dict[str, Any]:
    return {**source.fingerprint(), **source.sample()}


def fingerprint(loop: Loop) -> dict[str, Any]:
    """What a saved state must have in common with the loop that continues it, as plain values.

    The network: names, shapes and dtypes, classes and arguments of its modules. The optimizer's class, groups and
    flags. The data: lengths, how they are read, and a hash of some rows that are spread over them. Loss, measures and
    callbacks: names, and the values of the variables and arguments that they were made with; of callbacks those with a
    part in the result, their weights and their order. How a batch is computed. A hash of the code of functions is there
    too; what it means that it differs is not known, so that it is a warning.

    Values of parameters and of hyperparameters, the number of epochs, the patience of early stopping, and what is
    merely around a run (versions, threads, machine) are not in it. It is made once for a Loop.
    """
    made: dict[str, Any] = identity(loop)["fingerprint"]
    return made


def _copied(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    return [_copied(value) for value in tree] if isinstance(tree, list) else tree


def _plain(value: Any) -> Any:
    """A hyperparameter as JSON has it, the same in every process: of functions and objects the name."""
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, Tensor):
        return value.tolist()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)


def remember_start(ctx: Context) -> None:
    """Keep the hash of a context that `init` has made by a function given as network, beside its loop."""
    beside(ctx.loop, f"start {ctx.seed}", lambda: hash_of_start(ctx))


def remembered_start(ctx: Context) -> str | None:
    """The hash of the start of this seed that the function given as network has made, if it has."""
    made: str | None = found_beside(ctx.loop, f"start {ctx.seed}")
    return made


def hash_of_start(ctx: Context) -> str:
    """A hash of a sample of the values that a run starts from."""
    slots = [leaf for _, leaf in leaves_with_paths(ctx.optimizer_state["slots"]) if isinstance(leaf, Tensor)]
    return hash_of(*ctx.params.values(), *ctx.buffers.values(), *slots)[:16]
