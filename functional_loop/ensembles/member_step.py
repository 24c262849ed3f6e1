"""The tensor program of one batch for all members of an ensemble at once, by ``torch.func.vmap``."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import optree
import torch
from torch import Tensor

from ..core.outputs import is_of_objects, tree_detach
from ..engine.network import FunctionalNetwork
from ..engine.step import Gradients, Tensors, autocast_off, backward
from ..engine.template import with_loss
from .member_draws import OwnDraws
from .member_optimizers import MembersUpdate
from .trial import Trial, found_of
from .vmap_rules import over_members

if TYPE_CHECKING:
    from ..compile.draws import Draw
    from ..data.sources import Batch
    from ..engine.loop import Loop

R = TypeVar("R")
Seeds = Callable[[], Sequence[int]]
"""The seeds of all members for one use; a function, since most networks need none."""


class MembersStep:
    """As `Step`, of tensors with a leading member axis.

    Every member draws its random numbers from a generator of its own, so that its dropout is that of its solo run. The
    first batch of every form is compared with solo steps, see `Trial`.
    """

    def __init__(self, loop: Loop) -> None:
        self.network = FunctionalNetwork(with_loss(loop))
        self._optimizer = loop.optimizer
        self._updates: dict[int, MembersUpdate] = {}
        self._autocast = (loop.device.type, loop.autocast)
        self._device = loop.device
        self._generators: list[torch.Generator] = []
        self._loop = loop
        self._agreed = found_of(loop).agreed

    def gradients(
        self, params: Tensors, buffers: Tensors, trainable: tuple[str, ...], batch: Batch, seeds: Seeds
    ) -> Gradients:
        """Losses of shape ``(members,)``, outputs, new buffers and gradients of one batch of every member.

        Raises:
            NotVectorisedError: they are not those of solo steps.
        """
        form = _training_form(trainable, batch)

        def compute(draws: Sequence[Draw]) -> Gradients:
            return self.differentiate(params, buffers, trainable, batch, seeds, draws)

        if (draws := self._agreed.get(form)) is None:
            return Trial(self._loop, form, params, buffers, seeds()).gradients(compute, trainable, batch)
        return compute(draws)

    def draws(self, trainable: tuple[str, ...], batch: Batch) -> tuple[Draw, ...]:
        """What a solo step draws with a batch of this form, of which there were gradients."""
        return self._agreed[_training_form(trainable, batch)]

    def differentiate(
        self,
        params: Tensors,
        buffers: Tensors,
        trainable: tuple[str, ...],
        batch: Batch,
        seeds: Seeds,
        draws: Sequence[Draw],
    ) -> Gradients:
        """As `gradients`, of a batch with which a solo step makes these ``draws``."""
        leaves = {name: value.detach() for name, value in params.items()}
        wanted = [leaves[name].requires_grad_() for name in trainable]
        with torch.enable_grad(), self._drawing(draws, seeds):
            arguments = (leaves, buffers, batch.x, batch.y)
            losses, outputs, new_buffers = self.map(self.forward, arguments, draws)
            grads = backward(losses.sum(), tuple(wanted)) if wanted else ()
        found = {name: grad.contiguous() for name, grad in zip(trainable, grads, strict=True) if grad is not None}
        return Gradients(losses.detach(), tree_detach(outputs), params, tree_detach(new_buffers), found)

    def forward(self, leaves: Tensors, buffers: Tensors, x: Any, y: Any) -> tuple[Tensor, Any, Tensors]:
        loss, outputs, new_buffers = self.network.loss(leaves, buffers, x, y, training=True)
        return loss, _mapped(outputs), new_buffers

    def update(self, grads: Tensors, state: Any, params: Tensors) -> tuple[Tensors, Any]:
        """New parameters and optimizer state of all members."""
        members = len(next(iter(params.values())))
        if members not in self._updates:
            self._updates = {members: MembersUpdate(self._optimizer, params)}
        return self._updates[members](grads, state, params)

    def evaluate(
        self,
        params: Tensors,
        buffers: Tensors,
        trainable: tuple[str, ...],
        batch: Batch,
        seeds: Seeds,
        with_loss: bool = False,
    ) -> tuple[Any, Any]:
        """Outputs of all members in evaluation mode, and their losses if wanted, without a graph.

        Raises:
            NotVectorisedError: they are not those of solo calls.
        """

        def forward(params: Tensors, buffers: Tensors, x: Any, y: Any) -> tuple[Any, Any]:
            if not with_loss:
                return _mapped(self.network.outputs(params, buffers, x, training=False)[0]), ()
            loss, outputs, _ = self.network.loss(params, buffers, x, y, training=False)
            return _mapped(outputs), loss

        def compute(draws: Sequence[Draw]) -> tuple[Any, Any]:
            with torch.no_grad(), self._drawing(draws, seeds):
                outputs, losses = self.map(forward, (params, buffers, batch.x, batch.y), draws)
                return tree_detach(outputs), losses

        form = ("evaluation", with_loss, form_of(batch))
        if (draws := self._agreed.get(form)) is None:
            return Trial(self._loop, form, params, buffers, seeds()).evaluation(compute, trainable, batch, with_loss)
        return compute(draws)

    def release(self) -> None:
        """Let go of all tensors."""
        self.network.release()

    def map(self, function: Callable[..., Any], arguments: tuple[Any, ...], draws: Sequence[Draw]) -> Any:
        """``function`` of the ``arguments`` of all members, in the precision of the loop."""
        device_type, dtype = self._autocast
        if dtype is not None:
            # Its cache would keep tensors of a trace.
            function = torch.autocast(device_type, dtype, cache_enabled=False)(function)
        with autocast_off(device_type):
            members = len(next(iter(arguments[0].values())))
            return over_members(function, arguments, members, "different" if draws else "error")

    def _drawing(self, draws: Sequence[Draw], seeds: Seeds) -> AbstractContextManager[Any]:
        """A region in which members draw their own random numbers."""
        return OwnDraws(draws, self.seeded(seeds())) if draws else nullcontext()

    def seeded(self, seeds: Sequence[int]) -> list[torch.Generator]:
        """Generators of the members, at these seeds."""
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


def _training_form(trainable: tuple[str, ...], batch: Batch) -> Hashable:
    return "training", trainable, form_of(batch)


def form_of(batch: Batch) -> Hashable:
    """What of a batch of all members decides how its steps are computed: all but values."""
    tree: Any = (batch.x, batch.y)
    leaves, structure = optree.tree_flatten(tree, none_is_leaf=True)
    return structure, *[(t.shape, t.stride()[1:], t.dtype) if isinstance(t, Tensor) else type(t) for t in leaves]
