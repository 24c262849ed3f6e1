"""State dicts: the durable half of a context as a tree of plain types, and back; digests and fingerprints of it."""

from __future__ import annotations

import hashlib
import struct
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .context import STEP_SCOPED, Context
from .errors import StateDictError
from .loop import Loop
from .network import state_names
from .plain import check_plain, decode, encode
from .record import evolve, tensor_bytes
from .stages import BOUNDARIES

VERSION = 1

_PLACE = {
    "seed": int,
    "epoch": int,
    "step": int,
    "step_valid": int,
    "global_step": int,
    "stage": str,
    "terminate": bool,
}
_TREES = ("last_loss", "last_scores_train", "last_scores_valid", "measures", "accumulated", "data")

StateDict = dict[str, Any]


def state_dict(ctx: Context) -> StateDict:
    """The durable state of ``ctx`` as nested dict, list, tensor, int, float, bool, str and None.

    ``sd["network"]`` loads into a plain module with ``load_state_dict(strict=True)``, ``torch.save(sd)`` loads with
    ``weights_only=True``. The tensors are those of the context: clone them before you write to them.

    Raises:
        ValueError: ``ctx`` was taken by a hook in the middle of a batch, which is not a place to continue from.
        TypeError: the state of a callback holds something that can't be saved, by its path.

    >>> from functional_loop.examples.digits import loop
    >>> import functional_loop as fl
    >>> sd = fl.state_dict(fl.train(fl.init(loop()), steps=3))
    >>> sd["stage"], sd["global_step"], sd["optimizer"]["groups"][0]["lr"]
    ('batch_end', 3, 0.003)
    """
    if any(getattr(ctx, name) != () for name in STEP_SCOPED):
        raise ValueError(
            f"state_dict: the context was taken in the middle of batch {ctx.step} of epoch {ctx.epoch}, where training "
            "can't be continued from; a hook that saves passes boundary(ctx, stage) as the last hook of its stage"
        )
    for id, slot in ctx.callbacks.items():
        check_plain(slot, f"the state of callback {id!r}")
    names = state_names(ctx.loop.template())
    values = {**ctx.params, **ctx.buffers}
    return {
        "version": VERSION,
        "fingerprint": fingerprint(ctx.loop),
        **{name: getattr(ctx, name) for name in _PLACE},
        "network": {name: values[first] for name, first in names.items()},
        "buffers": {name: buffer for name, buffer in ctx.buffers.items() if name not in names},
        "trainable": list(ctx.trainable),
        "optimizer": encode(ctx.optimizer_state),
        "callbacks": _slots(ctx, volatile=False),
        "volatile": _slots(ctx, volatile=True),
        **{name: encode(getattr(ctx, name)) for name in _TREES},
    }


def _slots(ctx: Context, volatile: bool) -> dict[str, Any]:
    return {
        c.id: {"kind": c.kind, "state": encode(slot)}
        for c in ctx.loop.callbacks
        if c.volatile is volatile and not (type(slot := ctx.callbacks[c.id]) is tuple and not slot)
    }


def load_state_dict(ctx: Context, sd: StateDict, *, strict: bool = True) -> Context:
    """The context that ``sd`` was taken from, in the loop of ``ctx`` (a fresh ``init(loop)``); the seed is the saved
    one.

    Neither argument is written to, and the tensors are copies.

    Args:
        strict: with ``False`` callbacks may have come and gone: a state that no callback takes is dropped with a warning,
            a callback without a saved state starts afresh.

    Raises:
        StateDictError: the state dict belongs to another network, optimizer, data, measures or callbacks; every path
        that
            differs is listed. Only values, and a longer ``epochs``, may differ.

    >>> from functional_loop.examples.digits import loop
    >>> import functional_loop as fl
    >>> ctx = fl.train(fl.init(loop(), seed=7), steps=3)
    >>> fl.digest(fl.load_state_dict(fl.init(loop()), fl.state_dict(ctx))) == fl.digest(ctx)
    True
    """
    if not isinstance(sd, dict):
        raise TypeError(f"load_state_dict takes a state dict, not {type(sd).__name__}")
    differences = list(_differences(ctx, sd, strict))
    if differences:
        raise StateDictError("the state dict does not belong to this loop:", differences)
    device = ctx.loop.device
    names = {first: name for name, first in reversed(state_names(ctx.loop.template()).items())}
    saved = {**sd["buffers"], **{first: sd["network"][name] for first, name in names.items()}}
    entries = {**sd["callbacks"], **sd["volatile"]}
    for id in sd["callbacks"].keys() - ctx.callbacks.keys():
        warnings.warn(f"the saved state of callback {id!r} is dropped: the loop has no such callback", stacklevel=2)
    slots = {id: decode(entry["state"]) for id, entry in entries.items() if id in ctx.callbacks}
    groups, by_name = decode(sd["optimizer"]["groups"]), decode(sd["optimizer"]["slots"])
    return evolve(
        ctx,
        **{name: sd[name] for name in _PLACE},
        params={name: _like(param, saved[name]) for name, param in ctx.params.items()},
        buffers={name: _like(buffer, saved[name]) for name, buffer in ctx.buffers.items()},
        trainable=tuple(sd["trainable"]),
        optimizer_state={
            "groups": _clone(groups, torch.device("cpu")),
            "slots": {name: _clone_slot(slot, ctx.params[name]) for name, slot in by_name.items()},
        },
        callbacks={**ctx.callbacks, **_clone(slots, device)},
        **{name: _clone(decode(sd[name]), device) for name in _TREES},
    )


def _like(template: Tensor, saved: Tensor) -> Tensor:
    """A copy of ``saved`` with the memory layout of ``template``: kernels round differently by layout."""
    return torch.empty_like(template).copy_(saved)


def _clone_slot(slot: Any, param: Tensor) -> Any:
    """A copy of the optimizer's state of a parameter, laid out as torch made it; step counters stay on the CPU."""
    if isinstance(slot, Tensor):
        if slot.shape == param.shape and slot.dim():
            return torch.empty_like(param, dtype=slot.dtype).copy_(slot)
        return slot.detach().to(param.device if slot.dim() else slot.device, copy=True)
    if isinstance(slot, dict):
        return {key: _clone_slot(value, param) for key, value in slot.items()}
    return [_clone_slot(value, param) for value in slot] if isinstance(slot, list) else slot


def _clone(tree: Any, device: torch.device) -> Any:
    if isinstance(tree, Tensor):
        return tree.detach().to(device, copy=True)
    if isinstance(tree, dict):
        return {key: _clone(value, device) for key, value in tree.items()}
    return type(tree)(_clone(value, device) for value in tree) if isinstance(tree, (list, tuple)) else tree


def digest(ctx: Context) -> str:
    """SHA-256 of the durable state as 64 hexadecimal digits: equal bits, equal digest.

    Callbacks without a state leave no trace in it.

    >>> from functional_loop.examples.digits import loop
    >>> import functional_loop as fl
    >>> a, b = fl.init(loop(), seed=1), fl.init(loop(), seed=1)
    >>> fl.digest(fl.train(a, steps=2)) == fl.digest(fl.train(b, steps=2))
    True
    """
    sd = state_dict(ctx)
    del sd["version"], sd["fingerprint"], sd["volatile"]
    hasher = hashlib.sha256()
    for piece in _canonical(sd):
        hasher.update(piece)
    return hasher.hexdigest()


def _canonical(node: Any) -> Iterator[bytes | memoryview]:
    """Bytes that determine a plain tree, and are determined by it: every part is preceded by its type and size."""
    match node:
        case Tensor():
            yield f"T{node.dtype}{list(node.shape)}".encode()
            yield tensor_bytes(node)
        case dict():
            yield f"D{len(node)}".encode()
            for key in sorted(node):
                yield from _canonical(key)
                yield from _canonical(node[key])
        case list():
            yield f"L{len(node)}".encode()
            for value in node:
                yield from _canonical(value)
        case str():
            text = node.encode("utf-8", "surrogatepass")
            yield b"S%d:" % len(text)
            yield text
        case float():
            yield b"F" + struct.pack("<d", node)
        case _:
            yield f"{type(node).__name__}:{node};".encode()


def fingerprint(loop: Loop) -> dict[str, Any]:
    """What makes two loops the same run: plain values that a saved state must have in common with the loop it
    continues.

    Names, shapes and dtypes of the network, the optimizer's class and groups, the data, the measures, the callbacks
    that keep a state, and how a batch is computed. Values of parameters and hyperparameters and the number of epochs
    are not in it.
    """
    module = loop.template()
    params: dict[str, Tensor] = dict(module.named_parameters())
    groups = loop.optimizer.group_names(params)
    hyperparameters = loop.optimizer.init(params)["groups"]
    return {
        "network": {
            "params": {name: _kind(p) for name, p in params.items()},
            "buffers": {name: _kind(b) for name, b in module.named_buffers()},
        },
        "optimizer": {
            "class": f"{loop.optimizer.cls.__module__}.{loop.optimizer.cls.__qualname__}",
            "groups": [
                {"params": list(names), "hyperparameters": sorted(values)}
                for names, values in zip(groups, hyperparameters, strict=True)
            ],
        },
        "train": loop.train.fingerprint(),
        "valid": loop.valid.fingerprint() if loop.valid is not None else None,
        "measures_train": [m.id for m in loop.measures_train],
        "measures_valid": [m.id for m in loop.measures_valid],
        "callbacks": {c.id: c.kind for c in loop.callbacks if c.keeps_state},
        "accumulate": loop.accumulate,
        "autocast": str(loop.autocast) if loop.autocast is not None else None,
    }


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def compare(saved: Any, here: Any, path: str = "") -> Iterator[str]:
    """A line for every path at which two plain trees differ."""
    if isinstance(saved, dict) and isinstance(here, dict):
        for key in {**here, **saved}:
            where = f"{path}/{key}" if path else str(key)
            if key not in saved:
                yield f"{where}: missing in what was saved, {_short(here[key])} here"
            elif key not in here:
                yield f"{where}: {_short(saved[key])} in what was saved, missing here"
            else:
                yield from compare(saved[key], here[key], where)
    elif isinstance(saved, list) and isinstance(here, list) and len(saved) == len(here):
        for i, (a, b) in enumerate(zip(saved, here, strict=True)):
            yield from compare(a, b, f"{path}/{i}")
    elif saved != here or type(saved) is not type(here):
        yield f"{path}: {_short(saved)} in what was saved, {_short(here)} here"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _differences(ctx: Context, sd: StateDict, strict: bool) -> Iterator[str]:
    """Everything that keeps ``sd`` from being loaded into the loop of ``ctx``."""
    expected = {
        "version",
        "fingerprint",
        *_PLACE,
        "network",
        "buffers",
        "trainable",
        "optimizer",
        "callbacks",
        "volatile",
        *_TREES,
    }
    if odd := expected ^ sd.keys():
        yield from (
            f"{key}: {'missing in' if key in expected else 'unknown, but in'} what was saved" for key in sorted(odd)
        )
        return
    if sd["version"] != VERSION:
        yield f"version: {sd['version']} in what was saved, {VERSION} here"
        return
    saved, here = dict(sd["fingerprint"]), fingerprint(ctx.loop)
    if not strict:
        saved["callbacks"] = here["callbacks"]
    yield from compare(saved, here)
    for name, kind in _PLACE.items():
        if type(sd[name]) is not kind:
            yield f"{name}: {_short(sd[name])} in what was saved, must be of type {kind.__name__}"
    if sd["stage"] not in ("", *BOUNDARIES):
        yield f"stage: {sd['stage']!r} in what was saved, which is not a stage to continue after"
    values, names = {**ctx.params, **ctx.buffers}, state_names(ctx.loop.template())
    tensors = {"network": {n: values[f] for n, f in names.items()}}
    tensors["buffers"] = {n: b for n, b in ctx.buffers.items() if n not in names}
    for part, here in tensors.items():
        saved = {n: _kind(t) if isinstance(t, Tensor) else _short(t) for n, t in sd[part].items()}
        yield from compare(saved, {n: _kind(t) for n, t in here.items()}, part)
    for part, node in (("trainable", sd["trainable"]), ("optimizer/slots", sd["optimizer"]["slots"])):
        yield from (f"{part}/{name}: in what was saved, missing here" for name in node if name not in ctx.params)
    shape = [sorted(group) for group in ctx.optimizer_state["groups"]]
    yield from compare([sorted(group) for group in sd["optimizer"]["groups"]], shape, "optimizer/groups")
    kinds = {c.id: c.kind for c in ctx.loop.callbacks}
    for id, entry in {**sd["callbacks"], **sd["volatile"]}.items():
        if entry["kind"] != kinds.get(id, entry["kind"]):
            yield f"callbacks/{id}: of kind {entry['kind']!r} in what was saved, {kinds[id]!r} here"
        if strict and id in sd["callbacks"] and id not in kinds:
            yield f"callbacks/{id}: a state in what was saved, no such callback here"
