"""A real module and a real optimizer that show a context to object callbacks, and what was done to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..borrowed import numbers_of
from ..context import Context
from ..lending import clone_tree, lend, lend_tree, tree_was_written, was_written
from ..loop import Loop
from ..network import LOSS, WithLoss, has_tensors
from ..record import evolve


class Mirror:
    """The ``network`` and ``optimizer`` of one object callback.

    Both are made when they are first asked for and then stay the same objects, so that a callback may keep them, or an
    ``lr_scheduler`` built on them; `show` fills them with what a context holds, `changes` finds what was written.
    """

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self._whole: WithLoss | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._params: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}
        self._modules: list[nn.Module] = []
        self._parts: list[nn.Module] = []
        self._containers: list[dict[str, Any]] = []
        self._noted_members: list[tuple[str, int]] = []
        self._mode: bool | None = None
        self._modes: list[bool] = []
        self._unshown: dict[str, Any] | None = None
        self._groups: list[dict[str, Any]] = []

    def network(self, ctx: Context, training: bool) -> nn.Module:
        return self._shown(ctx, training).network

    def loss(self, ctx: Context, training: bool) -> Any:
        """The loss: a module, if it has parameters or buffers; any other is the loop's own."""
        return self._shown(ctx, training).loss

    def _shown(self, ctx: Context, training: bool) -> WithLoss:
        if self._whole is None:
            self._whole = _with_own_tensors(self.loop)
            self._params = self._whole.params()
            self._buffers = self._whole.statistics()
            self._note_members(self._whole)
            self._show_network(ctx, training)
        return self._whole

    def optimizer(self, ctx: Context, training: bool) -> torch.optim.Optimizer:
        self._shown(ctx, training)
        if self._optimizer is None:
            self._optimizer = self.loop.optimizer.to_torch(dict(self._params), ctx.optimizer_state)
            # Schedulers warn if they step before the optimizer does; this one is stepped by the loop.
            self._optimizer._opt_called = True  # type: ignore[attr-defined]
            self._note_groups(self._optimizer)
            _make_lazy(self._optimizer, self._show_slots)
            self._unshown = ctx.optimizer_state["slots"]
        return self._optimizer

    def show(self, ctx: Context, training: bool) -> None:
        """Fill what has been made so far with the values of ``ctx``."""
        if self._whole is not None:
            self._show_network(ctx, training)
        if self._optimizer is not None:
            self._unshown = ctx.optimizer_state["slots"]
            for group, values in zip(self._optimizer.param_groups, ctx.optimizer_state["groups"], strict=True):
                for key, value in values.items():
                    group[key] = tuple(value) if isinstance(group[key], tuple) else lend_tree(value)
            self._note_groups(self._optimizer)

    def release(self) -> None:
        """Let go of the state of the optimizer that nobody has looked at."""
        self._unshown = None

    def _note_members(self, whole: WithLoss) -> None:
        """Remember what network and loss consist of, to see at little cost that nothing has been replaced."""
        # Kept, so that no new module gets the id of an old one.
        self._modules, self._parts = list(whole.modules()), list(whole.network.modules())
        kinds = ("_parameters", "_buffers", "_modules")
        self._containers = [getattr(module, kind) for module in self._modules for kind in kinds]
        self._noted_members = self._members()

    def _members(self) -> list[tuple[str, int]]:
        return [(name, id(member)) for container in self._containers for name, member in container.items()]

    def _note_groups(self, optimizer: torch.optim.Optimizer) -> None:
        self._groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]

    def _show_network(self, ctx: Context, training: bool) -> None:
        self._show_mode(training)
        grads = ctx.grads or {}
        for name, parameter in self._params.items():
            parameter.data = lend(ctx.params[name])
            parameter.requires_grad_(name in ctx.trainable)
            parameter.grad = lend(grads[name]) if name in grads else None
        for name, buffer in self._buffers.items():
            buffer.data = lend(ctx.buffers[name])

    def _show_mode(self, training: bool) -> None:
        assert self._whole is not None
        if self._mode is not training or self._modes_now() != self._modes:
            self._whole.train(training)
            self._mode, self._modes = training, self._modes_now()

    def _modes_now(self) -> list[bool]:
        return [part.training for part in self._parts]

    def _check_modes(self) -> None:
        """Raises a ValueError where a part was put into another mode than the network, which would have no effect."""
        assert self._whole is not None
        now = self._modes_now()
        # The network as a whole may be used in either mode: nobody would take that for a change of the run.
        if now == self._modes or now[0] is not self._modes[0]:
            return
        names = (name for name, _ in self._whole.network.named_modules())
        changed = next(name for name, mode, before in zip(names, now, self._modes, strict=True) if mode is not before)
        raise ValueError(
            f"{changed!r} of ctx.network was put into {'training' if not self._mode else 'evaluation'} mode, which the "
            "loop would not do: the mode of a part is no state of a run; a network that keeps a part in evaluation "
            "mode does so in its method train()"
        )

    def _show_slots(self, state: dict[Any, Any]) -> None:
        """Fill ``state`` when somebody looks at it: most callbacks want the hyperparameters alone."""
        slots, self._unshown = self._unshown, None
        if slots is not None:
            state.clear()
            state.update((self._params[name], lend_tree(slot)) for name, slot in slots.items())

    def changes(self, ctx: Context) -> Context:
        """``ctx`` with what was written to the network and the optimizer since it was shown."""
        found: dict[str, Any] = {}
        if self._whole is not None:
            found |= self._network_changes(ctx)
        if self._optimizer is not None:
            found |= self._optimizer_changes(self._optimizer, ctx)
        return evolve(ctx, **found) if found else ctx

    def _network_changes(self, ctx: Context) -> dict[str, Any]:
        self._take_replaced()
        self._check_modes()
        found: dict[str, Any] = {}
        for field, shown in (("params", self._params), ("buffers", self._buffers)):
            before = getattr(ctx, field)
            if written := {n: taken(t, before[n], n) for n, t in shown.items() if was_written(t, before[n])}:
                found[field] = {**before, **written}
        trainable = tuple(name for name, parameter in self._params.items() if parameter.requires_grad)
        if set(trainable) != set(ctx.trainable):
            if outside := set(trainable) - set(self.loop.optimizer.covers(self._params)):
                raise ValueError(f"parameter {min(outside)!r} can't be made trainable: the optimizer does not cover it")
            found["trainable"] = trainable
        grads = {name: p.grad for name, p in self._params.items() if p.grad is not None}
        before = ctx.grads or {}
        if ctx.batch != () and (grads.keys() != before.keys() or any(was_written(grads[n], before[n]) for n in grads)):
            found["grads"] = {name: grad.detach().clone() for name, grad in grads.items()}
        return found

    def _optimizer_changes(self, optimizer: torch.optim.Optimizer, ctx: Context) -> dict[str, Any]:
        state = ctx.optimizer_state
        groups = self._checked_groups(optimizer, state["groups"])
        slots = state["slots"]
        if self._unshown is None:
            shown = {name: optimizer.state[p] for name, p in self._params.items() if p in optimizer.state}
            if tree_was_written(shown, slots):
                slots = {name: clone_tree(dict(slot)) for name, slot in shown.items()}
        if slots is state["slots"] and not tree_was_written(groups, state["groups"]):
            return {}
        return {"optimizer_state": {"groups": groups, "slots": slots}}

    def _take_replaced(self) -> None:
        """Put the known tensors back where a callback has put others, with the values of those.

        Raises:
            ValueError: the network has other parameters or buffers than before.
        """
        assert self._whole is not None
        if self._members() == self._noted_members:
            return
        whole = self._whole
        for known, found in ((self._params, whole.params()), (self._buffers, whole.statistics())):
            for name in found.keys() ^ known.keys():
                owner = "ctx.loss_fn" if name.startswith(LOSS) and has_tensors(whole.loss) else "ctx.network"
                raise ValueError(f"{name!r} was {'added to' if name in found else 'taken out of'} {owner}")
            for name, tensor in found.items():
                if tensor is not known[name]:
                    _replace(whole, tensor, known[name])
                    known[name].data = taken(tensor, known[name], name)
                    known[name].requires_grad_(tensor.requires_grad)
        self._note_members(whole)

    def _checked_groups(self, optimizer: torch.optim.Optimizer, before: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The hyperparameters of the groups.

        Raises:
            ValueError: there are other groups than before, or a flag was changed.
            TypeError: a hyperparameter is no number.
        """
        if len(optimizer.param_groups) != len(before):
            raise ValueError("the parameter groups of ctx.optimizer are those of the loop's optimizer: give it groups=")
        groups = []
        for i, (group, shown, numbers) in enumerate(zip(optimizer.param_groups, self._groups, before, strict=True)):
            found = numbers_of(group)
            for key, value in shown.items():
                if key in numbers and key not in found:
                    raise TypeError(
                        f"ctx.optimizer.param_groups[{i}][{key!r}] must be a number, not {group.get(key)!r}"
                    )
                if key not in numbers and key not in found and group.get(key) != value:
                    raise ValueError(
                        f"ctx.optimizer.param_groups[{i}][{key!r}] belongs to the loop and can't be changed"
                    )
            groups.append({key: found[key] for key in numbers})
        return groups


def _make_lazy(optimizer: torch.optim.Optimizer, fill: Callable[[dict[Any, Any]], None]) -> None:
    """Have ``fill(optimizer.state)`` be called before anybody gets ``optimizer.state``; copies are ordinary ones."""
    cls = type(optimizer)

    def state(self: torch.optim.Optimizer) -> dict[Any, Any]:
        found: dict[Any, Any] = vars(self)["state"]
        fill(found)
        return found

    def replace(self: torch.optim.Optimizer, values: dict[str, Any]) -> None:
        fill(vars(self)["state"])
        cls.__setstate__(self, values)

    def reduce(self: torch.optim.Optimizer, protocol: Any) -> Any:
        return _new, (cls,), self.__getstate__()

    members = {
        "__module__": cls.__module__,
        "__setstate__": replace,
        "__reduce_ex__": reduce,
        "state": property(state, lambda self, value: replace(self, {"state": value})),
    }
    optimizer.__class__ = type(cls.__name__, (cls,), members)


def _new(cls: type[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    return cls.__new__(cls)


def _replace(module: nn.Module, old: Tensor, new: Tensor) -> None:
    """Put ``new`` in all places of ``old``."""
    for part in module.modules():
        for container in (part._parameters, part._buffers):
            for key, tensor in container.items():
                if tensor is old:
                    container[key] = new  # type: ignore[assignment]


def taken(written: Tensor, before: Tensor, name: str) -> Tensor:
    """A tensor that a callback wrote, for the next context.

    Raises:
        ValueError: it has another shape, dtype or device than before.
    """
    for what in ("shape", "dtype", "device"):
        if getattr(written, what) != getattr(before, what):
            raise ValueError(f"{name!r} has {what} {getattr(before, what)}, but was set to {getattr(written, what)}")
    # A copy at once: the callback may have an alias of it outside of torch, where copy-on-write sees no write.
    return written.detach().clone()


def _with_own_tensors(loop: Loop) -> WithLoss:
    """Modules of the structure of network and loss whose parameters and buffers are their own objects; the values come
    later."""
    module = loop.with_loss().copied()
    own: dict[int, Tensor] = {}
    for part in module.modules():
        for container in (part._parameters, part._buffers):
            for key, tensor in container.items():
                if tensor is not None:
                    make = nn.Parameter if container is part._parameters else Tensor.clone
                    container[key] = own.setdefault(id(tensor), make(tensor.detach()))  # type: ignore[assignment]
    return module.to(loop.device)
