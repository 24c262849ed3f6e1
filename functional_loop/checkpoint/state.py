"""State dicts: the durable half of a context as a tree of plain types, and back."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from ..core.context import Context, check_boundary, check_context
from ..core.errors import StateDictError, noting, region
from ..core.patterns import Patterns
from ..core.place import check_place
from ..core.plain import check_plain, decode, encode
from ..core.record import evolve
from ..data.reader import as_places, without_hashes, without_validation
from ..engine.init import init
from ..engine.loop import Loop
from ..engine.template import with_loss
from ..ensembles.ensemble import BATCH_HOOKS, MODES, split_context, stack, unstack
from ..optim.torch_update import numbers_of
from .belonging import PLACE, TREES, differences, malformed, tensors_of, warn_of_code, warn_of_environment
from .comparing import Difference, check_allowed, compare, compare_runs, refusal, unknown_differences
from .going_on import fitted, misfits
from .identity import identity
from .migrations import VERSION, migrate

StateDict = dict[str, Any]


def state_dict(ctx: Context) -> StateDict:
    """The durable state of ``ctx`` as nested dict, list, tensor, int, float, bool, str and None.

    ``sd["network"]`` loads into a plain module with ``load_state_dict(strict=True)``, and so does ``sd["loss"]``, which
    is there if the loss has parameters or buffers; ``torch.save(sd)`` loads with ``weights_only=True``. The tensors are
    those of the context: clone them before you write to them. A stacked context has a state dict for every member under
    ``sd["members"]``.

    Raises:
        ValueError: ``ctx`` was taken by a hook inside a stage, which is not a place to continue from.
        TypeError: the state of a callback holds something that can't be saved, by its path.

    >>> from functional_loop.examples.digits import loop
    >>> import functional_loop as fl
    >>> sd = fl.state_dict(fl.train(fl.init(loop()), steps=3))
    >>> sd["stage"], sd["global_step"], sd["optimizer"]["groups"][0]["lr"]
    ('batch_end', 3, 0.003)
    """
    check_place(ctx, "state_dict")
    durable = saved_fields(ctx, "state_dict")
    return {"version": VERSION, **identity(ctx.loop), **durable}


def saved_fields(ctx: Context, function: str) -> StateDict:
    """The durable state of ``ctx``, as a state dict has it."""
    check_boundary(ctx, function)
    if ctx.ensemble is not None:
        how = {"mode": ctx.ensemble.mode, "batch_hooks": ctx.ensemble.batch_hooks}
        return {"ensemble": how, "members": [saved_fields(member, function) for member in split_context(ctx)]}
    for id, slot in ctx.callbacks.items():
        check_plain(slot, f"the state of callback {id!r}")
    return {
        **{name: getattr(ctx, name) for name in PLACE},
        **tensors_of(ctx),
        "trainable": list(ctx.trainable),
        "optimizer": encode(ctx.optimizer_state),
        "callbacks": _slots(ctx, volatile=False),
        "volatile": _slots(ctx, volatile=True),
        **{name: encode(getattr(ctx, name)) for name in TREES},
    }


def _slots(ctx: Context, volatile: bool) -> dict[str, Any]:
    return {
        c.id: {"kind": c.kind, "state": encode(slot)}
        for c in ctx.loop.callbacks
        if c.volatile is volatile and not (type(slot := ctx.callbacks[c.id]) is tuple and not slot)
    }


def load_state_dict(ctx: Context, sd: StateDict, *, strict: bool = True, allow: Patterns = ()) -> Context:
    """The context that ``sd`` was taken from, in the loop of ``ctx``, such as a fresh ``init(loop)``.

    The seed is the saved one. Neither argument is written to, and the tensors are copies. State dicts of earlier
    versions are migrated.

    What was saved counts, hyperparameters included: where the optimizer was given others, a ``UserWarning`` lists the
    old and new ones. Another lists what may change bits from here on: versions, threads, machine, device, deterministic
    flags, compilation, kernels. A third names functions and classes of which the code is another.

    Args:
        strict: with ``False`` callbacks may have come and gone: a state that no callback takes is dropped with a
            warning, a callback without a saved state starts afresh.
        allow: differences to continue in spite of, without error or warning: their paths as they are listed, parts of
            these (``"train"``, ``"batch_size"``) or shell globs. The loop then counts and not what was saved: data go
            on at the same number of batches, an allowed hyperparameter (``"lr"``) takes effect, and an epoch begun
            with other measures has no scores of them. Network and optimizer must be the same; see `from_checkpoint`.

    Raises:
        StateDictError: the state dict belongs to another network, optimizer, data, measures or callbacks; every path
            that differs is listed. Only values, and a longer ``epochs``, may differ. Or a name in ``allow`` is that of
            nothing that can differ.

    >>> from functional_loop.examples.digits import loop
    >>> import functional_loop as fl
    >>> ctx = fl.train(fl.init(loop(), seed=7), steps=3)
    >>> fl.digest(fl.load_state_dict(fl.init(loop()), fl.state_dict(ctx))) == fl.digest(ctx)
    True
    """
    check_context(ctx, "load_state_dict")
    if not isinstance(sd, dict):
        raise TypeError(f"load_state_dict takes a state dict, not {type(sd).__name__}")
    if ctx.ensemble is not None or "members" in sd:
        return _load_members(ctx, sd, strict, allow)
    if sd and sd.keys().isdisjoint(PLACE):
        raise StateDictError(
            f"not a state dict of a Context: it has the keys {', '.join(map(repr, list(sd)[:3]))}. That of a module is "
            "for the module with which the Loop is made"
        )
    sd, here = check_fits(ctx, sd, strict, allow), identity(ctx.loop)
    warn_of_code(unknown_differences(sd["fingerprint"], here["fingerprint"], allow))
    for id in sd["callbacks"].keys() - ctx.callbacks.keys():
        if not Difference(f"callbacks/{id}", "").is_allowed(allow):
            warnings.warn(f"the saved state of callback {id!r} is dropped: the loop has no such callback", stacklevel=2)
    warn_of_environment([*compare(sd["environment"], here["environment"])], allow)
    given = [*compare(sd["hyperparameters"], here["hyperparameters"], "hyperparameters")]
    allowed = compare_runs(sd["fingerprint"], here["fingerprint"])
    changed = {name for line in allowed for name in line.path.split("/")[:2]}
    with _malformed_refused():
        loaded = _loaded(ctx, sd)
    return fitted(_adapted(_with_given(loaded, given, allow), changed), allow)


def check_fits(ctx: Context, sd: StateDict, strict: bool, allow: Patterns) -> StateDict:
    """``sd`` as one of this version, of a single run that belongs to the loop of ``ctx``.

    Raises:
        StateDictError: it does not, or it is malformed; or a name in ``allow`` is that of nothing that can differ.
    """
    with _malformed_refused():
        sd, here = migrate(sd), identity(ctx.loop)
        if found := malformed(sd):
            raise StateDictError("the state dict does not belong to this loop:", found)
        check_allowed(allow, sd, here)
        found = differences(here, ctx, sd, strict, allow)
        if not found or _is_left_to_callbacks(found, ctx, sd):
            return sd
    unless = differences(here, ctx, sd, strict=False, allow=allow)
    advice = "" if unless else " (strict=False lets callbacks come and go)"
    raise refusal(f"the state dict does not belong to this loop{advice}:", found)


def _is_left_to_callbacks(found: list[str], ctx: Context, sd: StateDict) -> bool:
    """Whether all that was found is of callbacks that refuse it themselves where the run is entered."""
    paths = [line.path for line in found if isinstance(line, Difference) and line.path.startswith("callbacks/")]
    of = {path.split("/")[1] for path in paths}
    can = {callback.id for callback in ctx.loop.callbacks if callback.fits is not None}
    return sd["stage"] != "" and len(paths) == len(found) and of <= can and of <= misfits(_loaded(ctx, sd)).keys()


@region
def _malformed_refused() -> Generator[None]:
    """What no `state_dict` has made is a `StateDictError`, whatever fails over it."""
    try:
        yield
    except StateDictError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise StateDictError("the state dict is malformed:", [f"{type(error).__name__}: {error}"]) from error


def _with_given(ctx: Context, found: list[Difference], allow: Patterns) -> Context:
    """``ctx`` with the hyperparameters that are allowed to differ from those that the run began with."""
    given = [numbers_of(group) for group in ctx.loop.optimizer.hyperparameters_of(ctx.params)] if found else []
    for line in found:
        if line.is_allowed(allow):
            _, group, name, *_ = line.path.split("/")
            ctx = ctx.with_hyperparameters(int(group), **{name: given[int(group)][name]})
    if left := [line for line in found if not line.is_allowed(allow)]:
        warnings.warn(
            "the optimizer was given other hyperparameters, but those in what was saved stay in force: "
            + "; ".join(left)
            + f" (allow={[line.path for line in left]} lets them take effect)",
            UserWarning,
            stacklevel=3,
        )
    return ctx


def _adapted(ctx: Context, changed: set[str]) -> Context:
    """``ctx`` without what was begun on other validation data or with other measures: its end would have no meaning."""
    if "measures_train" in changed:
        ctx = evolve(ctx, measures={**ctx.measures, "train": ()})
    if changed & {"valid", "measures_valid"} and ctx.stage == "batch_valid_end":
        running = {**ctx.measures, "valid": ()}
        ctx = evolve(ctx, stage="before_valid", step_valid=0, measures=running, data=without_validation(ctx.data))
    if "train" in changed:
        ctx = evolve(ctx, data=without_hashes(ctx.data))
    return ctx


def _loaded(ctx: Context, sd: StateDict) -> Context:
    device = ctx.loop.device
    saved = dict(sd["buffers"])
    for role, names in reversed(with_loss(ctx.loop).state_names().items()):
        if role in sd:
            saved |= {first: sd[role][name] for name, first in reversed(names.items())}
    entries = {**sd["callbacks"], **sd["volatile"]}
    slots = {id: decode(entry["state"]) for id, entry in entries.items() if id in ctx.callbacks}
    groups, by_name = decode(sd["optimizer"]["groups"]), decode(sd["optimizer"]["slots"])
    return evolve(
        ctx,
        **{name: sd[name] for name in PLACE},
        params={name: _like(param, saved.get(name, param)) for name, param in ctx.params.items()},
        buffers={name: _like(buffer, saved.get(name, buffer)) for name, buffer in ctx.buffers.items()},
        trainable=tuple(sd["trainable"]),
        optimizer_state={
            "groups": _clone(groups, torch.device("cpu")),
            "slots": {name: _clone_slot(slot, ctx.params[name]) for name, slot in by_name.items()},
        },
        callbacks={**ctx.callbacks, **_clone(slots, device)},
        **{name: _clone(decode(sd[name]), device) for name in TREES if name != "data"},
        data=as_places(_clone(decode(sd["data"]), device), sd["epoch"], sd["step"]),
    )


def _load_members(ctx: Context, sd: StateDict, strict: bool, allow: Patterns) -> Context:
    members, saved = unstack(ctx) if ctx.ensemble is not None else [], sd.get("members", ())
    if ctx.ensemble is None or not isinstance(saved, list) or len(saved) != len(members):
        found = len(saved) if isinstance(saved, (list, tuple)) else f"{saved!r:.100}"
        line = f"members: {found or 'none'} in what was saved, {len(members) or 'none'} here"
        raise StateDictError("the state dict does not belong to this context:", [line])
    mode, batch_hooks = _ensemble_of(sd)
    with _malformed_refused():
        states = member_states(sd)
    loaded = []
    for i, (member, own) in enumerate(zip(members, states, strict=True)):
        with noting(lambda i=i: f"in member {i} of an ensemble"):  # type: ignore[misc]
            loaded.append(load_state_dict(member, own, strict=strict, allow=allow))
    return stack(loaded, mode, batch_hooks)


def _ensemble_of(sd: StateDict) -> tuple[str, str]:
    """How the members of an ensemble are trained: `stack`'s ``mode`` and ``batch_hooks``."""
    how = sd.get("ensemble")
    if not isinstance(how, dict) or how.get("mode") not in MODES or how.get("batch_hooks") not in BATCH_HOOKS:
        raise StateDictError("the state dict is malformed:", [f"ensemble: {how!r:.100} in what was saved"])
    return how["mode"], how["batch_hooks"]


def start_of(loop: Loop, sd: StateDict, strict: bool = True, allow: Patterns = ()) -> Context:
    """The start of the run that ``sd`` is of; of an ensemble, one whose members differ in their seeds alone.

    Raises:
        StateDictError: it is malformed, or of an ensemble that belongs to another loop; the differences are listed.
    """
    with _malformed_refused():
        if "members" not in sd:
            return init(loop, sd["seed"])
        mode, batch_hooks = _ensemble_of(sd)
        states = member_states(sd)
        first = init(loop, states[0]["seed"])
    # Of a forged list no members are made: all have all tensors of their own.
    known: set[int] = set()
    for i, own in enumerate(states):
        check_fits(first, own, strict, allow)
        tensors = {id(tensor) for tensor in own["network"].values()}
        if tensors & known:
            raise StateDictError("the state dict is malformed:", [f"members/{i}/network: shares tensors with others"])
        known |= tensors
    return stack([first, *(init(loop, own["seed"]) for own in states[1:])], mode, batch_hooks)


def member_states(sd: StateDict) -> list[StateDict]:
    """Of the state dict of an ensemble, that of every member: what all have in common, and its own."""
    common = {key: value for key, value in sd.items() if key not in ("ensemble", "members")}
    return [{**common, **own} for own in sd["members"]]


def _like(template: Tensor, saved: Tensor) -> Tensor:
    """A copy of ``saved`` with the memory layout of ``template``: kernels round differently by layout."""
    return torch.empty_like(template).copy_(saved)


def _clone_slot(slot: Any, param: Tensor) -> Any:
    """A copy of the optimizer's state of a parameter, laid out as torch made it; step counters stay on the CPU."""
    if isinstance(slot, Tensor):
        if slot.shape == param.shape and slot.dim() and not slot.is_sparse:
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
