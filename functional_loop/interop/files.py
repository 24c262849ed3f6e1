"""Exchange with plain PyTorch on disk: checkpoints as most people have them, and safetensors; out of a context and
into one."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.comparing import compare
from ..checkpoint.environment import KERNELS
from ..checkpoint.state import StateDict, state_dict
from ..checkpoint.values import kind_of
from ..core.context import Context
from ..core.errors import StateDictError, loading
from ..core.plain import decode
from ..core.record import did_you_mean, evolve
from ..engine.init import init
from ..engine.loop import Loop
from ..engine.network import has_tensors, state_names
from ..ensembles.ensemble import of_one_run
from ..optim.torch_update import copied
from .modules import for_evaluation, to_modules

PlainCheckpoint = dict[str, Any]


def to_checkpoint(ctx: Context) -> PlainCheckpoint:
    """``ctx`` as a plain torch checkpoint, ``{"network": ..., "optimizer": ...}``: copies, for ``torch.save``.

    ``network`` is the ``state_dict()`` of a module, as is ``loss`` if the loss has parameters or buffers, ``optimizer``
    that of a torch optimizer with the same groups; both
    load with ``strict=True`` and ``torch.load(weights_only=True)``. The place in the run is not in it: to continue a
    run exactly, save it with a `CheckpointStore`.

    Raises:
        ValueError: ``ctx`` was taken by a hook inside a stage, or is a stacked one.

    >>> from functional_loop.examples.digits import loop
    >>> import functional_loop as fl
    >>> ctx = fl.train(fl.init(loop()), steps=3)
    >>> checkpoint = to_checkpoint(ctx)
    >>> module = fl.to_module(fl.init(loop(), seed=1))
    >>> module.load_state_dict(checkpoint["network"])
    <All keys matched successfully>
    >>> optimizer = torch.optim.AdamW(module.parameters())
    >>> optimizer.load_state_dict(checkpoint["optimizer"])
    >>> optimizer.param_groups[0]["lr"]
    0.003
    """
    return plain_checkpoint(state_dict(of_one_run(ctx, "to_checkpoint")))


def plain_checkpoint(sd: StateDict) -> PlainCheckpoint:
    """`to_checkpoint`, of a state dict."""
    described = sd["fingerprint"]["optimizer"]["groups"]
    numbers = {name: i for i, name in enumerate(name for group in described for name in group["params"])}
    groups = [
        {
            **{key: _tuples(value) for key, value in {**group["flags"], **kernels, **values}.items()},
            "params": [numbers[name] for name in group["params"]],
        }
        for group, kernels, values in zip(
            described, sd["environment"]["kernels"], decode(sd["optimizer"]["groups"]), strict=True
        )
    ]
    slots = decode(sd["optimizer"]["slots"])
    state = {number: copied(slots[name]) for name, number in numbers.items() if name in slots}
    modules: PlainCheckpoint = {role: copied(sd[role]) for role in ("network", "loss") if role in sd}
    return {**modules, "optimizer": {"state": state, "param_groups": groups}}


def _tuples(value: Any) -> Any:
    """A hyperparameter as torch has it, whose sequences are tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else copied(value)


def from_checkpoint(loop: Loop, checkpoint: PlainCheckpoint, seed: int = 0) -> Context:
    """The start of a run of ``loop`` with the values of a plain torch checkpoint in place of those of its network.

    Args:
        loop: what to train.
        checkpoint: ``{"network": ..., "optimizer": ...}``: the ``state_dict()`` of a module with the names of the
            network, and, if wanted, that of an optimizer of the loop's class with the same groups in the same order,
            whose state and hyperparameters are adopted, and that of the ``loss``. Of a file with other keys take what
            is needed: ``{"network": torch.load(path, weights_only=True)["model"]}``.
        seed: as for `init`.

    Returns:
        A context before ``begin``, with copies. Buffers that are not in a ``state_dict()`` are as after `init`.

    Raises:
        StateDictError: names, shapes or dtypes of the network differ, or the optimizer does not fit; all differences
            are listed.
        TypeError, ValueError: the checkpoint is something else.

    >>> from functional_loop.examples.digits import loop
    >>> import functional_loop as fl
    >>> trained = fl.train(fl.init(loop(), seed=0), steps=3)
    >>> ctx = from_checkpoint(loop(), to_checkpoint(trained), seed=1)
    >>> ctx.global_step, bool(fl.tree_equal(ctx.params, trained.params))
    (0, True)
    """
    _check_keys(checkpoint, loop)
    template = init(loop, seed)
    whole = to_modules(template)
    for role, part in whole.parts().items():
        if role in checkpoint:
            _fill_module(part, checkpoint[role], role)
    optimizer = None
    if "optimizer" in checkpoint:
        optimizer = loop.optimizer.to_torch(whole.params(), template.optimizer_state)
        _fill_optimizer(optimizer, checkpoint["optimizer"])
    # By way of a loop of these very modules, so that callbacks see their values when their states begin.
    adopted = init(evolve(loop, network=whole.network, loss=whole.loss), seed, optimizer_state_from=optimizer)
    if optimizer is not None:
        _check_slots(adopted)
    return evolve(adopted, loop=loop)


def _check_keys(checkpoint: object, loop: Loop) -> None:
    if not isinstance(checkpoint, dict):
        raise TypeError(
            f'from_checkpoint takes a dict {{"network": ..., "optimizer": ...}}, not {type(checkpoint).__name__}'
        )
    known = ("network", "loss", "optimizer") if has_tensors(loop.loss) else ("network", "optimizer")
    if unknown := [key for key in checkpoint if key not in known]:
        raise ValueError(
            f"a plain checkpoint of this loop has the keys {' and '.join(known)}, not {unknown[0]!r}"
            f"{did_you_mean(str(unknown[0]), known)}; "
            'make it of what your file holds, such as {"network": file["model"], "optimizer": file["optim"]}'
        )
    if "network" not in checkpoint:
        raise ValueError("the plain checkpoint has no network")


def _fill_module(module: torch.nn.Module, saved: Any, role: str) -> None:
    """Put the values of ``saved`` into ``module``; of tied tensors one name is enough, as in many safetensors files."""
    if not isinstance(saved, dict):
        raise TypeError(f"the {role} of a checkpoint is the state_dict() of a module, not {type(saved).__name__}")
    names = state_names(module)
    by_first_name = {names[name]: value for name, value in saved.items() if name in names}
    whole = {name: by_first_name[first] for name, first in names.items() if first in by_first_name} | saved
    if found := [*compare(_kinds(whole), _kinds(module.state_dict()), role)]:
        raise StateDictError(f"the checkpoint does not fit the {role}:", found)
    module.load_state_dict(whole, strict=True)


def _kinds(tensors: dict[str, Any]) -> dict[str, str]:
    return {name: kind_of(t) if isinstance(t, Tensor) else type(t).__name__ for name, t in tensors.items()}


def _fill_optimizer(optimizer: torch.optim.Optimizer, saved: Any) -> None:
    kernels = [{key: group[key] for key in KERNELS if key in group} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(saved)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        kind = type(optimizer).__name__
        raise StateDictError(
            f"the optimizer of the checkpoint does not fit this {kind} ({type(error).__name__}: {error})"
        ) from error
    for group, own in zip(optimizer.param_groups, kernels, strict=True):
        group.update(own)


def _check_slots(ctx: Context) -> None:
    """Refuse what torch does not look at: slots of other names or shapes than those that an update makes.

    Parameters have numbers and no names in the state of a torch optimizer, so that another order can go unnoticed.
    """
    optimizer, slots = ctx.loop.optimizer, ctx.optimizer_state["slots"]
    if optimizer.needs_closure:
        return
    zeros = {name: torch.zeros_like(param) for name, param in ctx.params.items()}
    _, made = optimizer.update(zeros, optimizer.init(zeros), zeros)
    expected = {name: slot for name, slot in made["slots"].items() if name in slots}
    if found := [*compare(_shapes(slots), _shapes(expected), "optimizer/slots")]:
        raise StateDictError("the state of the optimizer does not fit the parameters:", found)


def _shapes(slots: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {key: list(value.shape) if isinstance(value, Tensor) else "a number" for key, value in slot.items()}
        for name, slot in slots.items()
    }


def to_safetensors(ctx: Context, path: str | os.PathLike[str]) -> None:
    """Write the network of ``ctx`` to a safetensors file that other tools read (extra ``safetensors``).

    The names are those of ``module.state_dict()``; tied tensors are there under each of their names.

    Raises:
        ModuleNotFoundError: the package safetensors is not installed.
        OSError, safetensors.SafetensorError: the file could not be written.
    """
    write_safetensors(state_dict(for_evaluation(of_one_run(ctx, "to_safetensors")))["network"], path)


def write_safetensors(network: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write tensors by name to a safetensors file."""
    from safetensors.torch import save_file

    # Some readers ask for this entry.
    save_file({name: tensor.contiguous().clone() for name, tensor in network.items()}, path, {"format": "pt"})


def from_safetensors(loop: Loop, path: str | os.PathLike[str], seed: int = 0) -> Context:
    """The start of a run of ``loop`` with the values of a safetensors file in place of those of its network.

    Args:
        loop: what to train.
        path: a file that holds the ``state_dict()`` of the network (extra ``safetensors``).
        seed: as for `init`.

    Raises:
        StateDictError: names, shapes or dtypes differ; all differences are listed.
        ModuleNotFoundError: the package safetensors is not installed.
        OSError, safetensors.SafetensorError: the file could not be read.

    >>> import tempfile
    >>> from functional_loop.examples.digits import loop
    >>> import functional_loop as fl
    >>> path = tempfile.mkdtemp() + "/digits.safetensors"
    >>> trained = fl.train(fl.init(loop(), seed=0), steps=3)
    >>> to_safetensors(trained, path)
    >>> bool(fl.tree_equal(from_safetensors(loop(), path).params, trained.params))
    True
    """
    from safetensors.torch import load_file

    with loading(path):
        return from_checkpoint(loop, {"network": load_file(path)}, seed)
