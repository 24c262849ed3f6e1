"""The tensor program of one batch for all members of an ensemble at once, by ``torch.func.vmap``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..network import FunctionalNetwork
from ..outputs import is_of_objects, tree_detach
from ..step import Gradients, Tensors, autocast_off, backward
from .member_draws import Draw, OwnDraws
from .member_optimizers import MembersUpdate
from .vmap_rules import over_members

if TYPE_CHECKING:
    from ..data import Batch
    from ..loop import Loop

R = TypeVar("R")
Seeds = Callable[[], Sequence[int]]
"""The seeds of all members for one use; a function, since most networks need none."""


class MembersStep:
    """As `Step`, of tensors with a leading member axis.

    Every member draws its random numbers from a generator of its own, so that its dropout is that of its solo run.
    """

    def __init__(self, loop: Loop) -> None:
        self.network = FunctionalNetwork(loop.with_loss())
        self._optimizer = loop.optimizer
        self._updates: dict[int, MembersUpdate] = {}
        self._autocast = (loop.device.type, loop.autocast)
        self._device = loop.device
        self._draws = {True: False, False: False}
        self._generators: list[torch.Generator] = []
        self._record: list[Draw | None] | None = None

    def gradients(
        self, params: Tensors, buffers: Tensors, trainable: tuple[str, ...], batch: Batch, seeds: Seeds
    ) -> Gradients:
        """Losses of shape ``(members,)``, outputs, new buffers and gradients of one batch of every member."""
        leaves = {name: value.detach() for name, value in params.items()}
        wanted = [leaves[name].requires_grad_() for name in trainable]
        with torch.enable_grad():
            losses, outputs, new_buffers = self._call(True, seeds, self._forward, leaves, buffers, batch.x, batch.y)
            grads = backward(losses.sum(), tuple(wanted)) if wanted else ()
        found = {name: grad.contiguous() for name, grad in zip(trainable, grads, strict=True) if grad is not None}
        return Gradients(losses.detach(), tree_detach(outputs), params, tree_detach(new_buffers), found)

    def _forward(self, leaves: Tensors, buffers: Tensors, x: Any, y: Any) -> tuple[Tensor, Any, Tensors]:
        loss, outputs, new_buffers = self.network.loss(leaves, buffers, x, y, training=True)
        return loss, _mapped(outputs), new_buffers

    def update(self, grads: Tensors, state: Any, params: Tensors) -> tuple[Tensors, Any]:
        """New parameters and optimizer state of all members."""
        members = len(next(iter(params.values())))
        if members not in self._updates:
            self._updates = {members: MembersUpdate(self._optimizer, params)}
        return self._updates[members](grads, state, params)

    def evaluate(
        self, params: Tensors, buffers: Tensors, batch: Batch, seeds: Seeds, with_loss: bool = False
    ) -> tuple[Any, Any]:
        """Outputs of all members in evaluation mode, and their losses if wanted, without a graph."""

        def forward(params: Tensors, buffers: Tensors, x: Any, y: Any) -> tuple[Any, Any]:
            if not with_loss:
                return _mapped(self.network.outputs(params, buffers, x, training=False)[0]), ()
            loss, outputs, _ = self.network.loss(params, buffers, x, y, training=False)
            return _mapped(outputs), loss

        with torch.no_grad():
            outputs, losses = self._call(False, seeds, forward, params, buffers, batch.x, batch.y)
            return tree_detach(outputs), losses

    def release(self) -> None:
        """Let go of all tensors."""
        self.network.release()

    def _call(self, training: bool, seeds: Seeds, function: Callable[..., Any], *arguments: Any) -> Any:
        if not self._draws[training]:
            try:
                return self._map(function, arguments, "error", nullcontext())
            except RuntimeError as error:
                if "randomness" not in str(error):
                    raise
            self._draws[training] = True
        return self._map(function, arguments, "different", OwnDraws(self._seeded(seeds()), self._record))

    def _map(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        randomness: str,
        draws: AbstractContextManager[Any],
    ) -> Any:
        device_type, dtype = self._autocast
        if dtype is not None:
            # Its cache would keep tensors of a trace.
            function = torch.autocast(device_type, dtype, cache_enabled=False)(function)
        with autocast_off(device_type), draws:
            return over_members(function, arguments, len(next(iter(arguments[0].values()))), randomness)

    def _seeded(self, seeds: Sequence[int]) -> list[torch.Generator]:
        while len(self._generators) < len(seeds):
            self._generators.append(torch.Generator(self._device))
        for generator, seed in zip(self._generators, seeds, strict=False):
            generator.manual_seed(seed)
        return self._generators[: len(seeds)]


def _mapped(outputs: Any) -> Any:
    """Outputs that ``torch.func.vmap`` maps over members; of others, which it would take for one value, a TypeError."""
    if is_of_objects(outputs):
        raise TypeError(f"the network returns a {type(outputs).__name__} and not tensors, or tuples or dicts of these")
    return outputs
