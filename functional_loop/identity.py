"""The identity of a run: what a saved state and the loop that continues it must have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from .borrowed import numbers_of
from .context import Context
from .environment import KERNELS, environment
from .errors import StateDictError, add_note
from .loop import Loop
from .network import LOSS
from .patterns import Patterns, matches
from .place import misplaced

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


def identity(loop: Loop) -> dict[str, Any]:
    """What a state dict tells of the loop that made it, in three parts of plain values.

    ``fingerprint``: what decides the result; see `fingerprint`. ``environment``: what may change its last bits; see
    `functional_loop.environment`, and the kernels of the optimizer. ``hyperparameters``: those given to the optimizer,
    a dict per group; those in force are in the state, where schedules change them.
    """
    module = loop.template()
    params = loop.with_loss().params()
    groups = loop.optimizer.hyperparameters_of(params)
    numbers = [numbers_of(group) for group in groups]
    flags = [{k: _plain(group[k]) for k in group if k not in own} for group, own in zip(groups, numbers, strict=True)]
    return {
        "fingerprint": {
            "network": {
                "params": {name: kind_of(p) for name, p in module.named_parameters()},
                "buffers": {name: kind_of(b) for name, b in module.named_buffers()},
            },
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
            "train": loop.train.fingerprint(),
            "valid": loop.valid.fingerprint() if loop.valid is not None else None,
            "measures_train": [m.id for m in loop.measures_train],
            "measures_valid": [m.id for m in loop.measures_valid],
            "callbacks": {c.id: c.kind for c in loop.callbacks if c.keeps_state},
            "accumulate": loop.accumulate,
            "autocast": str(loop.autocast) if loop.autocast is not None else None,
        },
        "environment": {
            **environment(loop),
            "kernels": [{k: value for k, value in rest.items() if k in KERNELS} for rest in flags],
        },
        "hyperparameters": [{k: _plain(value) for k, value in own.items()} for own in numbers],
    }


def fingerprint(loop: Loop) -> dict[str, Any]:
    """What a saved state must have in common with the loop that continues it, as plain values.

    Names, shapes and dtypes of the network, the optimizer's class, groups and flags, the data, the measures, the
    callbacks that keep a state, and how a batch is computed. Values of parameters and of hyperparameters, the number of
    epochs, and what is merely around a run (versions, threads, machine) are not in it.
    """
    made: dict[str, Any] = identity(loop)["fingerprint"]
    return made


def _plain(value: Any) -> Any:
    """A hyperparameter as JSON has it, the same in every process: of functions and objects the name."""
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, Tensor):
        return value.tolist()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)


def kind_of(tensor: Tensor) -> str:
    """Dtype and shape of a tensor, such as ``float32[4, 3]``."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


_LATER = frozenset({"sampled"})
"""Keys of fingerprints that were added within a version of the state dict."""


class Difference(str):
    """A line that says how two values differ, and the ``path`` at which they do."""

    path: str

    def __new__(cls, path: str, how: str) -> Difference:
        made = super().__new__(cls, f"{path}: {how}")
        made.path = path
        return made

    @property
    def is_of_earlier_version(self) -> bool:
        """Whether it is no more than that earlier versions did not save this."""
        return self.path.rpartition("/")[2] in _LATER and ": missing in what was saved" in self

    def is_allowed(self, allow: Patterns) -> bool:
        """Whether a pattern matches the path, the beginning of it, or a name in it.

        >>> line = Difference("train/batch_size", "32 in what was saved, 64 here")
        >>> [line.is_allowed([pattern]) for pattern in ("train", "train/*", "batch_size", "valid/*")]
        [True, True, True, False]
        """
        names = self.path.split("/")
        leading = ("/".join(names[:i]) for i in range(1, len(names) + 1))
        return any(matches(allow, name) for name in (*leading, *names))


def compare(saved: Any, here: Any, path: str = "") -> Iterator[Difference]:
    """A line for every path at which two plain trees differ."""
    if isinstance(saved, dict) and isinstance(here, dict):
        for key in {**here, **saved}:
            where = f"{path}/{key}" if path else str(key)
            if key not in saved:
                yield Difference(where, f"missing in what was saved, {_short(here[key])} here")
            elif key not in here:
                yield Difference(where, f"{_short(saved[key])} in what was saved, missing here")
            else:
                yield from compare(saved[key], here[key], where)
    elif isinstance(saved, list) and isinstance(here, list) and len(saved) == len(here):
        for i, (a, b) in enumerate(zip(saved, here, strict=True)):
            yield from compare(a, b, f"{path}/{i}")
    elif type(saved) is not type(here) or (saved is not here if isinstance(saved, Tensor) else saved != here):
        yield Difference(path, f"{_short(saved)} in what was saved, {_short(here)} here")


FIXED = ("network/", "optimizer/", "seed")
"""Where a run can't be told to go on in spite of a difference: tensors of the state would have no place."""


def compare_runs(saved: dict[str, Any], here: dict[str, Any], allow: Patterns = ()) -> list[Difference]:
    """The differences of two fingerprints but for those that are allowed; what is `FIXED` can't be."""
    found = (line for line in compare(saved, here) if not line.is_of_earlier_version)
    return [line for line in found if line.path.startswith(FIXED) or not line.is_allowed(allow)]


def refusal(message: str, found: Sequence[str]) -> StateDictError:
    """The error that lists what was found, and says how to continue in spite of it where that is possible."""
    error = StateDictError(message, found)
    paths = [line.path for line in found if isinstance(line, Difference) and not line.path.startswith(FIXED)]
    if len(paths) == len(found):
        add_note(error, f"to continue in spite of that: allow={list(dict.fromkeys(paths))}")
    return error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 160 else text[:157] + "..."


def differences(
    here: dict[str, Any], ctx: Context, sd: dict[str, Any], strict: bool = True, allow: Patterns = ()
) -> list[str]:
    """Everything that keeps ``sd`` from being loaded into the loop of ``ctx``, a line each.

    Args:
        here: the fingerprint of that loop.
    """
    if malformed := malformed_at(sd):
        return malformed
    saved = dict(sd["fingerprint"])
    if not strict:
        saved["callbacks"] = here["callbacks"]
    found: list[str] = [*compare_runs(saved, here, allow)]
    found += misplaced(sd, ctx.loop)
    return [
        *found,
        *map(str, _tensor_differences(ctx, sd)),
        *map(str, _optimizer_differences(here, ctx, sd)),
        *(line for line in _callback_differences(ctx, sd, strict) if not line.is_allowed(allow)),
    ]


def malformed_at(sd: Any) -> list[str]:
    """Where a tree is not a state dict of a single run, of this version."""
    # A loss without parameters and buffers has no entry, and no loss had one in the first version.
    return list(_malformed({"loss": {}, **sd} if isinstance(sd, dict) else sd, _SCHEMA, ""))


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
    here = tensors_of(ctx)
    for part in ("network", "loss", "buffers"):
        if part in sd:
            saved = {name: kind_of(tensor) for name, tensor in sd[part].items()}
            yield from compare(saved, {name: kind_of(tensor) for name, tensor in here.get(part, {}).items()}, part)


def tensors_of(ctx: Context) -> dict[str, dict[str, Tensor]]:
    """Parameters and buffers as they are in a state dict: those of the network, and of the loss if it has any, that are
    in the ``state_dict()`` of the module, and other ``buffers``."""
    values, names = {**ctx.params, **ctx.buffers}, ctx.loop.with_loss().state_names()
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
    told = sd["fingerprint"].get("callbacks") if strict else None
    known = told if isinstance(told, dict) else {}
    for id, entry in {**sd["callbacks"], **sd["volatile"]}.items():
        if id in known and known[id] != kinds.get(id):
            continue
        if entry["kind"] != kinds.get(id, entry["kind"]):
            yield Difference(f"callbacks/{id}", f"of kind {entry['kind']!r} in what was saved, {kinds[id]!r} here")
        if strict and id in sd["callbacks"] and id not in kinds:
            yield Difference(f"callbacks/{id}", "a state in what was saved, no such callback here")
