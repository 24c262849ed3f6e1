"""A real module that shows a context to object callbacks, the tensors that it is made of, and what was done to them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ...core.context import Context
from ...core.copies import tree_was_written, was_written
from ...core.record import evolve
from ...engine.loop import Loop
from ...engine.network import LOSS, WithLoss, has_tensors
from ...engine.template import with_loss
from .mirrored_optimizer import MirroredOptimizer

Tensors = dict[str, Tensor]


class Mirror:
    """The ``network`` and ``optimizer`` of one object callback, and the dicts ``params``, ``buffers`` and ``grads``.

    Network and optimizer are made when they are first asked for and then stay the same objects, so that a callback may
    keep them, or an ``lr_scheduler`` built on them; `show` fills them with what a context holds, `changes` finds what
    was written. The tensors are copies, made of what has been asked for alone. They are in new memory wherever the
    context has others than before: what a callback has kept (a view, an array) stays as it is.
    """

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self._whole: WithLoss | None = None
        self._optimizer: MirroredOptimizer | None = None
        self._shown: dict[str, Tensors] = {}
        """Parameters and buffers of network and loss, by field and name."""
        self._copies: dict[str, Tensors] = {}
        """Copies of this stage, by field and name."""
        self._dicts: dict[str, Tensors] = {}
        """The same by field, in dicts that the callback has and may have changed."""
        self._sources: dict[tuple[str, str], weakref.ref[Tensor]] = {}
        """What the network's tensors are copies of."""
        self._modules: list[nn.Module] = []
        self._parts: list[nn.Module] = []
        self._containers: list[dict[str, Any]] = []
        self._noted_members: list[tuple[str, int]] = []
        self._training = True
        self._evaluation: tuple[Tensors, Any, Tensors] | None = None
        """Parameters and the optimizer's state, and the parameters for evaluation that they give."""
        self._mode: bool | None = None
        self._modes: list[bool] = []

    def network(self, ctx: Context, training: bool) -> nn.Module:
        return self._made(ctx, training).network

    def loss(self, ctx: Context, training: bool) -> Any:
        """The loss: a module, if it has parameters or buffers; any other is the loop's own."""
        return self._made(ctx, training).loss

    def _made(self, ctx: Context, training: bool) -> WithLoss:
        if self._whole is None:
            self._whole = _with_own_tensors(self.loop)
            self._shown = {"params": self._whole.params(), "buffers": self._whole.statistics()}
            self._note_members(self._whole)
            self._show_network(ctx, training)
        return self._whole

    def optimizer(self, ctx: Context, training: bool) -> torch.optim.Optimizer:
        self._made(ctx, training)
        if self._optimizer is None:
            self._optimizer = MirroredOptimizer(self.loop, self._shown["params"], ctx)
        return self._optimizer.optimizer

    def _field(self, ctx: Context, field: str) -> Tensors:
        """What is shown of ``ctx``: in validation the parameters that the outputs are made with."""
        if field == "params" and not self._training and (optimizer := self.loop.optimizer).has_modes:
            state = ctx.optimizer_state
            if self._evaluation is None or self._evaluation[0] is not ctx.params or self._evaluation[1] is not state:
                self._evaluation = ctx.params, state, optimizer.evaluation_params(ctx.params, state)
            return self._evaluation[2]
        return getattr(ctx, field) or {}

    def tensors(self, field: str, ctx: Context) -> Tensors:
        """The ``params``, ``buffers`` or ``grads`` of this stage by name: those of the network, if there is one."""
        if field not in self._dicts:
            self._dicts[field] = dict(self._copies_of(field, ctx))
        return self._dicts[field]

    def show(self, ctx: Context, training: bool) -> None:
        """Fill what has been made so far with the values of ``ctx``."""
        self._training = training
        if self._whole is not None:
            self._show_network(ctx, training)
        if self._optimizer is not None:
            self._optimizer.show(ctx)

    def release(self) -> None:
        """Let go of what is of this stage only."""
        self._evaluation = None
        self._dicts.clear()
        self._copies.clear()
        if self._optimizer is not None:
            self._optimizer.release()

    def _copies_of(self, field: str, ctx: Context) -> Tensors:
        if field not in self._copies:
            if field in self._shown:
                made = {name: tensor.detach() for name, tensor in self._shown[field].items()}
            else:
                made = {name: tensor.detach().clone() for name, tensor in self._field(ctx, field).items()}
            self._copies[field] = made
        return self._copies[field]

    def _note_members(self, whole: WithLoss) -> None:
        """Remember what network and loss consist of, to see at little cost that nothing has been replaced."""
        # Kept, so that no new module gets the id of an old one.
        self._modules, self._parts = list(whole.modules()), list(whole.network.modules())
        kinds = ("_parameters", "_buffers", "_modules")
        self._containers = [getattr(module, kind) for module in self._modules for kind in kinds]
        self._noted_members = self._members()

    def _members(self) -> list[tuple[str, int]]:
        return [(name, id(member)) for container in self._containers for name, member in container.items()]

    def _show_network(self, ctx: Context, training: bool) -> None:
        self._show_mode(training)
        for field, shown in self._shown.items():
            made = self._copies.get(field)
            for name, source in self._field(ctx, field).items():
                if made is not None:
                    # The callback has asked for them before it asked for the network.
                    shown[name].data = made[name]
                elif self._source_of(field, name) is not source or was_written(shown[name], source):
                    shown[name].data = source.detach().clone()
                    self._sources[field, name] = weakref.ref(source)
        grads = self._copies_of("grads", ctx)
        for name, parameter in self._shown["params"].items():
            parameter.requires_grad_(name in ctx.trainable)
            parameter.grad = grads.get(name)

    def _source_of(self, field: str, name: str) -> Tensor | None:
        source = self._sources.get((field, name))
        return None if source is None else source()

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
        # The network as a whole may be used in either mode: that is no change of the run.
        if now == self._modes or now[0] is not self._modes[0]:
            return
        names = (name for name, _ in self._whole.network.named_modules())
        changed = next(name for name, mode, before in zip(names, now, self._modes, strict=True) if mode is not before)
        raise ValueError(
            f"{changed!r} of ctx.network was put into {'training' if not self._mode else 'evaluation'} mode, which the "
            "loop would not do: the mode of a part is no state of a run; put it into that mode before init(), and it "
            "stays so"
        )

    def changes(self, ctx: Context) -> Context:
        """``ctx`` with what was written since it was shown."""
        found: dict[str, Any] = {}
        if self._whole is not None:
            self._take_replaced()
            self._check_modes()
            if (trainable := self.trainable(ctx)) is not ctx.trainable:
                found["trainable"] = trainable
        for field in self._copies if self._whole is None else ("params", "buffers", "grads"):
            found |= self._tensor_changes(field, ctx)
        if self._optimizer is not None:
            found |= self._optimizer.changes(ctx)
        return evolve(ctx, **found) if found else ctx

    def trainable(self, ctx: Context) -> tuple[str, ...]:
        """The names of the parameters that require gradients now.

        Raises:
            ValueError: the optimizer does not cover one.
        """
        if self._whole is None:
            return ctx.trainable
        found = tuple(name for name, parameter in self._shown["params"].items() if parameter.requires_grad)
        if set(found) == set(ctx.trainable):
            return ctx.trainable
        if outside := set(found) - set(self.loop.optimizer.covers(self._shown["params"])):
            raise ValueError(f"parameter {min(outside)!r} can't be made trainable: the optimizer does not cover it")
        return found

    def _tensor_changes(self, field: str, ctx: Context) -> dict[str, Any]:
        if field == "grads" and ctx.batch == ():
            return {}
        before, now = self._field(ctx, field), self._now(field)
        if field != "grads":
            for name in now.keys() ^ before.keys():
                raise ValueError(f"{name!r} was {'added to' if name in now else 'taken out of'} ctx.{field}")
        written = {n for n, tensor in now.items() if n not in before or tree_was_written(tensor, before[n])}
        if not written and len(now) == len(before):
            return {}
        if field == "params" and before is not ctx.params:
            raise ValueError(
                f"{min(written)!r} was written to in validation, where {self.loop.optimizer.cls.__name__} has other "
                "values of the parameters than those that are trained: write to them in on_epoch_end"
            )
        like = ctx.params if field == "grads" else before
        return {field: {n: taken(t, like.get(n), n) if n in written else before[n] for n, t in now.items()}}

    def _now(self, field: str) -> dict[str, Any]:
        """The tensors of a field as they are now, in the network and in the dict that the callback was given."""
        if field == "grads" and self._whole is not None:
            now = {name: p.grad for name, p in self._shown["params"].items() if p.grad is not None}
        else:
            now = dict(self._shown[field] if field in self._shown else self._copies[field])
        if (given := self._dicts.get(field)) is None:
            return now
        copies = self._copies[field]
        now |= {name: tensor for name, tensor in given.items() if tensor is not copies.get(name)}
        return {name: tensor for name, tensor in now.items() if name in given or name not in copies}

    def _take_replaced(self) -> None:
        """Put the known tensors back where a callback has put others, with the values of those.

        Raises:
            ValueError: the network has other parameters or buffers than before.
        """
        assert self._whole is not None
        if self._members() == self._noted_members:
            return
        whole = self._whole
        for field, found in (("params", whole.params()), ("buffers", whole.statistics())):
            known = self._shown[field]
            for name in found.keys() ^ known.keys():
                owner = "ctx.loss_fn" if name.startswith(LOSS) and has_tensors(whole.loss) else "ctx.network"
                raise ValueError(f"{name!r} was {'added to' if name in found else 'taken out of'} {owner}")
            for name, tensor in found.items():
                if tensor is not known[name]:
                    _replace(whole, tensor, known[name])
                    known[name].data = taken(tensor, known[name], name)
                    known[name].requires_grad_(tensor.requires_grad)
        self._note_members(whole)


def _replace(module: nn.Module, old: Tensor, new: Tensor) -> None:
    """Put ``new`` in all places of ``old``."""
    for part in module.modules():
        for container in (part._parameters, part._buffers):
            for key, tensor in container.items():
                if tensor is old:
                    container[key] = new  # type: ignore[assignment]


def taken(written: Any, before: Tensor | None, name: str) -> Tensor:
    """A copy of a tensor that a callback wrote, for the next context; the callback may have aliases of its own.

    Raises:
        TypeError: it is no tensor.
        ValueError: it has another shape, dtype or device than before.
    """
    if not isinstance(written, Tensor):
        raise TypeError(f"{name!r} was set to {written!r}, which is no tensor")
    for what in ("shape", "dtype", "device") if before is not None else ():
        if getattr(written, what) != getattr(before, what):
            raise ValueError(f"{name!r} has {what} {getattr(before, what)}, but was set to {getattr(written, what)}")
    return written.detach().clone()


def _with_own_tensors(loop: Loop) -> WithLoss:
    """Modules of the structure of network and loss whose parameters and buffers are their own objects; the values come
    later."""
    module = with_loss(loop).copied()
    own: dict[int, Tensor] = {}
    for part in module.modules():
        for container in (part._parameters, part._buffers):
            for key, tensor in container.items():
                if tensor is not None:
                    make = nn.Parameter if container is part._parameters else Tensor.clone
                    container[key] = own.setdefault(id(tensor), make(tensor.detach()))  # type: ignore[assignment]
    return module.to(loop.device)
