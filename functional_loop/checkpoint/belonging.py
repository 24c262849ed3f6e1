"""Whether a state dict belongs to a loop."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..core.context import Context
from ..core.patterns import Patterns
from ..core.place import misplaced
from ..engine.network import LOSS
from ..engine.template import with_loss
from .comparing import Difference, compare, compare_runs, is_same_class, short
from .going_on import too_few_epochs
from .settings import CODE
from .values import kind_of

PLACE = {"seed": int, "epoch": int, "step": int, "step_valid": int, "global_step": int, "stage": str, "terminate": bool}
"""Fields of the context that say where in the run it is, with their types."""

TREES = ("last_loss", "last_scores_train", "last_scores_valid", "measures", "accumulated", "data")
"""Fields of the context that are saved as they are."""

_ENTRIES = {"*": {"kind": str, "state": object}}
_SCHEMA = {
    "version": int,
    "fingerprint": {"*": object},
    "environment": {"*": object},
    "hyperparameters": [{"*": object}],
    **PLACE,
    "network": {"*": Tensor},
    "loss": {"*": Tensor},
    "buffers": {"*": Tensor},
    "trainable": [str],
    "optimizer": {"groups": [{"*": object}], "slots": {"*": {"*": object}}},
    "callbacks": _ENTRIES,
    "volatile": _ENTRIES,
    **dict.fromkeys(TREES, object),
}
"""The tree of a state dict: types, dicts by key or (``"*"``) of any keys, and lists."""


def malformed(sd: Any) -> list[str]:
    """Where a tree is not a state dict of a single run, of this version, a line each."""
    # A loss without parameters and buffers has no entry, and no loss had one in the first version.
    return list(_malformed({"loss": {}, **sd} if isinstance(sd, dict) else sd, _SCHEMA, ""))


def differences(
    here: dict[str, Any], ctx: Context, sd: dict[str, Any], strict: bool = True, allow: Patterns = ()
) -> list[str]:
    """Everything that keeps ``sd`` from being loaded into the loop of ``ctx``, a line each.

    Args:
        here: the identity of that loop.
    """
    saved, own = _compared(sd["fingerprint"], here["fingerprint"], strict)
    same_bits = not [*compare(sd["environment"], here["environment"])]
    found: list[str] = [*compare_runs(saved, own, allow, rounded=same_bits)]
    found += misplaced(sd, ctx.loop)
    if sd["epoch"] > ctx.loop.epochs:
        found.append(too_few_epochs(sd["epoch"], ctx.loop))
    return [
        *found,
        *map(str, _tensor_differences(ctx, sd)),
        *map(str, _optimizer_differences(here["fingerprint"], ctx, sd)),
        *(line for line in _callback_differences(ctx, sd, strict) if not line.is_allowed(allow)),
    ]


def _compared(saved: dict[str, Any], here: dict[str, Any], strict: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two fingerprints, in which only callbacks that both have count, if it is not ``strict``."""
    callbacks = saved.get("callbacks")
    if strict or not isinstance(callbacks, dict):
        return saved, here
    both = callbacks.keys() & here["callbacks"].keys()
    return (
        {**saved, "callbacks": {id: entry for id, entry in callbacks.items() if id in both}},
        {**here, "callbacks": {id: entry for id, entry in here["callbacks"].items() if id in both}},
    )


def _malformed(node: Any, schema: Any, path: str) -> Iterator[str]:
    """Where a tree is not of the shape that ``schema`` says."""
    kind = schema if isinstance(schema, type) else type(schema)
    if not (isinstance(node, kind) if kind in (object, Tensor) else type(node) is kind):
        yield f"{path or 'the state dict'}: {short(node)} in what was saved, must be of type {kind.__name__}"
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
    here = tensors_of(ctx)
    for part in ("network", "loss", "buffers"):
        if part in sd:
            saved = {name: kind_of(tensor) for name, tensor in sd[part].items()}
            yield from compare(saved, {name: kind_of(tensor) for name, tensor in here.get(part, {}).items()}, part)


def tensors_of(ctx: Context) -> dict[str, dict[str, Tensor]]:
    """Parameters and buffers as they are in a state dict: those of the network, and of the loss if it has any, that are
    in the ``state_dict()`` of the module, and other ``buffers``."""
    values, names = {**ctx.params, **ctx.buffers}, with_loss(ctx.loop).state_names()
    known = {*names["network"], *(LOSS + name for name in names.get("loss", ()))}
    return {
        **{role: {name: values[first] for name, first in own.items()} for role, own in names.items()},
        "buffers": {name: buffer for name, buffer in ctx.buffers.items() if name not in known},
    }


def _optimizer_differences(here: dict[str, Any], ctx: Context, sd: dict[str, Any]) -> Iterator[str]:
    for part, names in (("trainable", sd["trainable"]), ("optimizer/slots", sd["optimizer"]["slots"])):
        yield from (f"{part}/{name}: in what was saved, missing here" for name in names if name not in ctx.params)
    known = [group["hyperparameters"] for group in here["optimizer"]["groups"]]
    # Steps of some classes add to the groups, or make numbers of what is none to begin with.
    saved = [sorted(group) for group in sd["optimizer"]["groups"]]
    if len(saved) == len(known):
        saved = [[key for key in group if key in own] for group, own in zip(saved, known, strict=True)]
    yield from compare(saved, known, "optimizer/groups")
    yield from compare([sorted(group) for group in sd["hyperparameters"]], known, "hyperparameters")


def _callback_differences(ctx: Context, sd: dict[str, Any], strict: bool) -> Iterator[Difference]:
    """Of the saved states, but for those of callbacks that are found to be others by the fingerprint."""
    kinds = {callback.id: callback.kind for callback in ctx.loop.callbacks}
    told = sd["fingerprint"].get("callbacks")
    told = told if isinstance(told, dict) else {}
    known = {id: entry.get("kind") if isinstance(entry, dict) else entry for id, entry in told.items()}
    for id, entry in {**sd["callbacks"], **sd["volatile"]}.items():
        if id in known and not is_same_class(known[id], kinds.get(id, "")):
            continue
        if not is_same_class(entry["kind"], kinds.get(id, entry["kind"])):
            yield Difference(f"callbacks/{id}", f"of kind {entry['kind']!r} in what was saved, {kinds[id]!r} here")
        if strict and id in sd["callbacks"] and id not in {**kinds, **known}:
            yield Difference(f"callbacks/{id}", "a state in what was saved, no such callback here")


def warn_of_code(found: list[Difference]) -> None:
    if found:
        paths = list(dict.fromkeys(line.path[: line.path.index(CODE)].rstrip("/") for line in found))
        warnings.warn(
            "bits may differ from here on from those of an uninterrupted run: the code of functions is not what it was "
            f"when the run was saved: {', '.join(paths)} (allow={paths} silences this)",
            UserWarning,
            stacklevel=3,
        )


def warn_of_environment(found: list[Difference], allow: Patterns) -> None:
    if left := [line for line in found if not line.is_allowed(allow)]:
        warnings.warn(
            "bits may differ from here on from those of an uninterrupted run: the environment is another: "
            + "; ".join(left)
            + f" (allow={[line.path for line in left]} silences this)",
            UserWarning,
            stacklevel=3,
        )
