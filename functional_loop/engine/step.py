"""The tensor program of one batch: forward, loss, gradients and optimizer update, as pure functions of tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..core.outputs import tree_detach
from ..core.record import did_you_mean
from ..core.seeding import Seeding
from ..purity import probe as probing
from .network import FunctionalNetwork
from .template import with_loss

if TYPE_CHECKING:
    from ..data.sources import Batch
    from .loop import Loop

R = TypeVar("R")
Tensors = dict[str, Tensor]


Differentiated = tuple[Tensor, Any, Tensors, Sequence[Tensor | None]]
"""Loss, outputs, new buffers and gradients of a batch."""


class Gradients(NamedTuple):
    """What the forward and backward pass of a batch make."""

    loss: Tensor
    y_hats: Any
    params: Tensors
    """The parameters given, but for those that the forward call itself changes."""
    buffers: Tensors
    grads: Tensors


class StepInputs(NamedTuple):
    """What a whole step is computed from."""

    params: Tensors
    buffers: Tensors
    trainable: tuple[str, ...]
    batch: Batch
    optimizer_state: Any
    seed: int
    probe: bool


class Step:
    """The tensor program of a Loop, planned once: a private network, the loss, and the optimizer's update.

    None of its methods writes to a tensor that it was given, and the outputs have no graph. One thread uses it at a
    time.
    """

    at_once = False
    """Whether a program is to call `CompiledStep.whole` in the place of `gradients` and `update`."""
    in_place = True
    """Whether consecutive steps may be made by `differentiate` and a `Carry`."""

    def __init__(self, loop: Loop) -> None:
        whole = with_loss(loop)
        self.original = whole
        """The modules that are never called."""
        self.probed = probing.probed(loop)
        self.network = FunctionalNetwork(whole)
        self.device_type = loop.device.type
        self.autocast_dtype = loop.autocast
        self.optimizer = loop.optimizer
        self._shown: tuple[Tensors, Any, Tensors] | None = None
        self.updater = loop.optimizer.updater(whole.params())
        # A network that writes to its parameters can't be called twice on them.
        self.seeding = Seeding(everything=bool(self.network.writes))

    def anew(self) -> Step:
        """The same program by a network that was never called."""
        made = copy.copy(self)
        made.network = FunctionalNetwork(self.original)
        made.seeding = Seeding(everything=bool(self.network.writes))
        return made

    def gradients(
        self, params: Tensors, buffers: Tensors, trainable: tuple[str, ...], batch: Batch, seed: int, probe: bool
    ) -> Gradients:
        """Loss, outputs, new buffers and gradients of one batch; its randomness is a function of ``seed``."""

        leaves = self.leaves(params, trainable)
        wanted = [leaves[name] for name in trainable]
        with nullcontext() if torch.is_grad_enabled() else torch.enable_grad():
            loss, outputs, new_buffers, grads = self.differentiate(leaves, wanted, buffers, batch, seed, probe)
        if self.network.writes:
            params = {name: leaves[name].detach() if name in self.network.writes else p for name, p in params.items()}
        return Gradients(
            loss.detach(),
            tree_detach(outputs),
            params,
            new_buffers,
            {name: grad for name, grad in zip(trainable, grads, strict=True) if grad is not None},
        )

    def differentiate(
        self, leaves: Tensors, wanted: Sequence[Tensor], buffers: Tensors, batch: Batch, seed: int, probe: bool
    ) -> Differentiated:
        """Loss and outputs of a batch with their graph, the new buffers, and the gradients of the ``wanted`` leaves.

        The seed is that of both passes: hooks of gradients, functions with a backward pass of their own, and
        checkpoints draw in the second.

        Args:
            probe: look for what is wrong with the network and the loss; at the first step of a loop in a process also,
                by computing all twice, whether they depend on more than their inputs.
        """
        if probe and "training" not in self.probed.done:
            with self.probed.once("training"):
                return probing.differentiate(self, leaves, wanted, buffers, batch, seed)

        def both_passes() -> Differentiated:
            kept = {name: leaf for name, leaf in leaves.items() if name not in self.network.writes} if probe else {}
            versions = {name: leaf._version for name, leaf in kept.items()}
            loss, outputs, new_buffers = forward()
            if probe:
                self.check(loss, bool(wanted), kept, versions)
            return loss, outputs, new_buffers, backward(loss, wanted)

        forward = self._in_precision(partial(self.network.loss, leaves, buffers, batch.x, batch.y, training=True))
        return self._run(both_passes, seed)

    def update(
        self,
        params: Tensors,
        buffers: Tensors,
        grads: Tensors,
        optimizer_state: Any,
        loss: Tensor,
        again: Callable[[Tensors, Tensors], Gradients],
    ) -> tuple[Tensors, Any, Tensors]:
        """New parameters, optimizer state and buffers.

        ``again(params, buffers)`` evaluates the batch at other parameters, for optimizers that ask for it (LBFGS);
        every evaluation goes on with the buffers of the one before, as it does with a module.
        """
        if not self.optimizer.needs_closure:
            return *self.updater(grads, optimizer_state, params, None), buffers
        pending: list[tuple[Tensor, Tensors]] = [(loss, grads)]

        def closure(params: Tensors) -> tuple[Tensor, Tensors]:
            nonlocal buffers
            if pending:
                return pending.pop()
            result = again(params, buffers)
            buffers = result.buffers
            return result.loss, result.grads

        return *self.updater(grads, optimizer_state, params, closure), buffers

    def evaluate(
        self,
        params: Tensors,
        buffers: Tensors,
        trainable: tuple[str, ...],
        batch: Batch,
        seed: int,
        with_loss: bool = False,
    ) -> tuple[Any, Any]:
        """Outputs in evaluation mode, and the loss if wanted, without a graph; what becomes of buffers is dropped."""
        if "evaluation" not in self.probed.done:
            with self.probed.once("evaluation"):
                made: tuple[Any, Any] = probing.evaluate(self, params, buffers, trainable, batch, seed, with_loss)
                return made
        return self.call(params, buffers, trainable, batch, seed, with_loss)

    def call(
        self,
        params: Tensors,
        buffers: Tensors,
        trainable: tuple[str, ...],
        batch: Batch,
        seed: int,
        with_loss: bool,
        training: bool = False,
    ) -> tuple[Any, Any]:
        """Outputs, and the loss if wanted, without a graph."""

        def forward() -> tuple[Any, Any]:
            leaves = self.leaves(params, trainable)
            if not with_loss:
                return self.network.outputs(leaves, buffers, batch.x, training)[0], ()
            loss, outputs, _ = self.network.loss(leaves, buffers, batch.x, batch.y, training)
            check_scalar(loss)
            return outputs, loss.detach()

        with torch.no_grad():
            outputs, loss = self._run(self._in_precision(forward), seed)
            return tree_detach(outputs), loss

    def evaluation_params(self, params: Tensors, optimizer_state: Any) -> Tensors:
        """The parameters to evaluate with, see `Optimizer.evaluation_params`; made once for all batches."""
        if not self.optimizer.has_modes:
            return params
        if self._shown is None or self._shown[0] is not params or self._shown[1] is not optimizer_state:
            self._shown = params, optimizer_state, self.optimizer.evaluation_params(params, optimizer_state)
        return self._shown[2]

    def release(self) -> None:
        """Let go of all tensors."""
        self._shown = None
        self.network.release()
        self.updater.release()

    def leaves(self, params: Tensors, trainable: tuple[str, ...]) -> Tensors:
        """What stands for the parameters in the network.

        In evaluation too, those that are trainable require gradients: some kernels (of GRU, for one) round differently
        where none does.
        """
        leaves = {name: value.detach() for name, value in params.items()}
        for name in self.network.writes:
            leaves[name] = leaves[name].clone()
        for name in trainable:
            if name not in leaves:
                raise ValueError(f"ctx.trainable names {name!r}, which is no parameter{did_you_mean(name, leaves)}")
            leaves[name].requires_grad_()
        return leaves

    def _in_precision(self, forward: Callable[[], R]) -> Callable[[], R]:
        """``forward`` in the precision of the loop."""
        if self.autocast_dtype is None:
            return forward
        # Parameters that were written to since would be taken from the cache.
        torch.clear_autocast_cache()
        in_precision: Callable[[], R] = torch.autocast(self.device_type, self.autocast_dtype)(forward)
        return in_precision

    def _run(self, function: Callable[[], R], seed: int) -> R:
        """``function`` under its seed, whatever precision is set around the call."""
        with autocast_off(self.device_type):
            return self.seeding.call(function, seed)

    def check(self, loss: Any, trains: bool, params: Tensors, versions: dict[str, int]) -> None:
        refuse_inference_mode()
        check_scalar(loss)
        if loss.is_complex():
            raise ValueError("the loss must be a real number, not a complex one: take its abs() or real part")
        if trains and not loss.requires_grad:
            raise ValueError(
                "the loss does not depend on any trainable parameter: nothing can be learnt from it "
                "(a detach(), no_grad() or .item() between the network's outputs and the loss is a common reason)"
            )
        self.network.check_unset()
        for name, param in params.items():
            if param._version != versions[name]:
                raise ValueError(
                    f"the network writes to its parameter {name!r} in place when it is called, so that the context "
                    "that it was given has changed: make that tensor a buffer, or compute a new tensor instead"
                )


def check_scalar(loss: Any) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"the loss must return a scalar tensor, not {type(loss).__name__}")
    if loss.dim() != 0:
        raise ValueError(f"the loss must return a scalar tensor, not one of shape {list(loss.shape)}: take its mean")


def autocast_off(device_type: str) -> AbstractContextManager[Any]:
    """A region in full precision, whatever is set around it."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def refuse_inference_mode() -> None:
    if torch.is_inference_mode_enabled():
        raise RuntimeError("gradients can't be computed inside torch.inference_mode(): call train outside of it")


def backward(loss: Tensor, leaves: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """As ``torch.autograd.grad(loss, leaves, allow_unused=True)``, without the checks of its arguments.

    On a small network they cost a tenth of the step.
    """
    if not leaves:
        return ()
    if _engine_run_backward is None:
        return torch.autograd.grad(loss, leaves, allow_unused=True)
    return _engine_run_backward(  # type: ignore[no-any-return]
        (loss,), (torch.ones_like(loss),), False, False, tuple(leaves), allow_unreachable=True, accumulate_grad=False
    )


# Private API of torch.
_engine_run_backward: Any = getattr(torch.autograd.graph, "_engine_run_backward", None)
