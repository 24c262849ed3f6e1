"""The identity of a run: what a saved state and the loop that continues it must have in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from .context import Context
from .loop import Loop
from .network import state_names
from .stages import BOUNDARIES

VERSION = 1

PLACE = {"seed": int, "epoch": int, "step": int, "step_valid": int, "global_step": int, "stage": str, "terminate": bool}
"""Fields of the context that say where in the run it is, with their types."""

TREES = ("last_loss", "last_scores_train", "last_scores_valid", "measures", "accumulated", "data")
"""Fields of the context that are saved as they are."""

_ENTRIES = {"*": {"kind": str, "state": object}}
_SCHEMA = {
    "version": int,
    "fingerprint": {"*": object},
    **PLACE,
    "network": {"*": Tensor},
    "buffers": {"*": Tensor},
    "trainable": [str],
    "optimizer": {"groups": [{"*": object}], "slots": {"*": {"*": object}}},
    "callbacks": _ENTRIES,
    "volatile": _ENTRIES,
    **dict.fromkeys(TREES, object),
}
"""The tree of a state dict: types, dicts by key or (``"*"``) of any keys, and lists."""


def fingerprint(loop: Loop) -> dict[str, Any]:
    """What a saved state must have in common with the loop that continues it, as plain values.

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


def differences(ctx: Context, sd: dict[str, Any], strict: bool) -> list[str]:
    """Everything that keeps ``sd`` from being loaded into the loop of ``ctx``, a line each."""
    if type(sd.get("version")) is int and sd["version"] != VERSION:
        return [f"version: {sd['version']} in what was saved, {VERSION} here"]
    if malformed := list(_malformed(sd, _SCHEMA, "")):
        return malformed
    saved, here = dict(sd["fingerprint"]), fingerprint(ctx.loop)
    if not strict:
        saved["callbacks"] = here["callbacks"]
    found = [*compare(saved, here)]
    if sd["stage"] not in ("", *BOUNDARIES):
        found.append(f"stage: {sd['stage']!r} in what was saved, which is not a stage to continue after")
    return [
        *found,
        *_tensor_differences(ctx, sd),
        *_optimizer_differences(ctx, sd),
        *_callback_differences(ctx, sd, strict),
    ]


def _malformed(node: Any, schema: Any, path: str) -> Iterator[str]:
    """Where a tree is not of the shape that ``schema`` says."""
    kind = schema if isinstance(schema, type) else type(schema)
    if not (isinstance(node, kind) if kind in (object, Tensor) else type(node) is kind):
        yield f"{path or 'the state dict'}: {_short(node)} in what was saved, must be of type {kind.__name__}"
    elif isinstance(schema, list):
        for i, value in enumerate(node):
            yield from _malformed(value, schema[0], f"{path}/{i}")
    elif isinstance(schema, dict):
        known = dict.fromkeys(node, schema["*"]) if "*" in schema else schema
        for key in sorted({*known, *node}, key=str):
            where = f"{path}/{key}" if path else str(key)
            if key not in node:
                yield f"{where}: missing in what was saved"
            elif key not in known:
                yield f"{where}: unknown, but in what was saved"
            else:
                yield from _malformed(node[key], known[key], where)


def _tensor_differences(ctx: Context, sd: dict[str, Any]) -> Iterator[str]:
    values, names = {**ctx.params, **ctx.buffers}, state_names(ctx.loop.template())
    expected = {
        "network": {name: values[first] for name, first in names.items()},
        "buffers": {name: buffer for name, buffer in ctx.buffers.items() if name not in names},
    }
    for part, tensors in expected.items():
        saved = {name: _kind(tensor) for name, tensor in sd[part].items()}
        yield from compare(saved, {name: _kind(tensor) for name, tensor in tensors.items()}, part)


def _optimizer_differences(ctx: Context, sd: dict[str, Any]) -> Iterator[str]:
    for part, names in (("trainable", sd["trainable"]), ("optimizer/slots", sd["optimizer"]["slots"])):
        yield from (f"{part}/{name}: in what was saved, missing here" for name in names if name not in ctx.params)
    saved = [sorted(group) for group in sd["optimizer"]["groups"]]
    yield from compare(saved, [sorted(group) for group in ctx.optimizer_state["groups"]], "optimizer/groups")


def _callback_differences(ctx: Context, sd: dict[str, Any], strict: bool) -> Iterator[str]:
    """Of the saved states, but for those of callbacks that are found to be others by the fingerprint."""
    kinds = {callback.id: callback.kind for callback in ctx.loop.callbacks}
    told = sd["fingerprint"].get("callbacks") if strict else None
    known = told if isinstance(told, dict) else {}
    for id, entry in {**sd["callbacks"], **sd["volatile"]}.items():
        if id in known and known[id] != kinds.get(id):
            continue
        if entry["kind"] != kinds.get(id, entry["kind"]):
            yield f"callbacks/{id}: of kind {entry['kind']!r} in what was saved, {kinds[id]!r} here"
        if strict and id in sd["callbacks"] and id not in kinds:
            yield f"callbacks/{id}: a state in what was saved, no such callback here"
