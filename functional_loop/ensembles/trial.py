"""Compares members that are computed at once with their solo steps, once for every form of batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import attrs
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..compile.draws import Draw, Recording, StrangeDrawError
from ..core.batch import Batch, copied
from ..core.outputs import map_outputs
from ..engine.step import Gradients, Step, Tensors
from ..purity.agreement import gradients_differ, nudged, outputs_differ, tolerance
from .member_draws import check_draws
from .stacking import split

if TYPE_CHECKING:
    from ..engine.loop import Loop

R = TypeVar("R")


class NotVectorisedError(ValueError):
    """Why the members of an ensemble can't be computed at once, in words for the user."""


class OtherResultError(NotVectorisedError):
    """How members that are computed at once differ from their solo runs."""


@attrs.define(eq=False)
class Found:
    """What was found of the members of a loop in this process.

    Attributes:
        agreed: the forms of batches for which members had the results of their solo steps, up to rounding, and what is
            drawn in these.
        begun: whether a first batch was tried.
        reason: why members are not computed at once, if they are not.
        told: whether there was a warning of it, or none is due.
    """

    agreed: dict[Hashable, tuple[Draw, ...]] = attrs.field(factory=dict)
    begun: bool = False
    reason: str = ""
    told: bool = True

    def note(self, error: NotVectorisedError) -> None:
        self.reason, self.told = str(error), not isinstance(error, OtherResultError)


_found: WeakKeyDictionary[Loop, Found] = WeakKeyDictionary()


def found_of(loop: Loop) -> Found:
    return _found.setdefault(loop, Found())


class Trial:
    """A batch that is computed for all members at once, and by solo steps for the first and the last of them.

    Args:
        form: of the batch, under which `Found.agreed` notes that they agree.
        seeds: of all members.
    """

    def __init__(self, loop: Loop, form: Hashable, params: Tensors, buffers: Tensors, seeds: Sequence[int]) -> None:
        self._loop, self._form, self._seeds = loop, form, seeds
        self._tensors = params, buffers
        self._tolerance = tolerance(params.values(), loop.autocast)
        self._step = Step(loop)

    def gradients(
        self, compute: Callable[[Sequence[Draw]], Gradients], trainable: tuple[str, ...], batch: Batch
    ) -> Gradients:
        """What ``compute(draws)`` makes of the batch for all members.

        Args:
            draws: those of a solo step.

        Raises:
            NotVectorisedError: it is not what solo steps make.
        """

        def solo(params: Tensors, buffers: Tensors, rows: Batch, seed: int, probe: bool) -> Gradients:
            return self._step.gradients(params, buffers, trainable, rows, seed, probe)

        # The network may write to the batch.
        asks, original = _AsksForGradients(), copied(batch)
        right, draws = self._alone(solo, batch, "training", asks)

        def differ(made: Gradients, expected: Gradients, member: int) -> str:
            def nearby() -> Gradients:
                params, buffers, rows = self._of_member(original, member)
                return solo(nudged(params, self._loop.autocast), buffers, copied(rows), self._seeds[member], False)

            return gradients_differ(made, expected, self._tolerance, nearby)

        if asks.found:
            raise NotVectorisedError(
                f"the network or the loss {asks.found}, which can't be known while all members are computed at once"
            )
        return self._compared("a step", compute, draws, right, differ)

    def evaluation(
        self,
        compute: Callable[[Sequence[Draw]], tuple[Any, Any]],
        trainable: tuple[str, ...],
        batch: Batch,
        with_loss: bool,
    ) -> tuple[Any, Any]:
        """As `gradients`, of outputs and losses in evaluation mode."""

        def solo(params: Tensors, buffers: Tensors, rows: Batch, seed: int, probe: bool) -> tuple[Any, Any]:
            return self._step.evaluate(params, buffers, trainable, rows, seed, with_loss)

        def differ(made: tuple[Any, Any], expected: tuple[Any, Any], member: int) -> str:
            losses = [("the loss", made[1], expected[1])] if with_loss else []
            return outputs_differ(made[0], expected[0], self._tolerance, losses)

        right, draws = self._alone(solo, batch, "evaluation", nullcontext())
        return self._compared("an evaluation", compute, draws, right, differ)

    def _alone(
        self, solo: Callable[..., R], batch: Batch, what: str, watch: AbstractContextManager[Any]
    ) -> tuple[dict[int, R], tuple[Draw, ...]]:
        """What solo steps of the first and the last member make, and what the first draws."""
        made: dict[int, R] = {}
        draws: tuple[Draw, ...] = ()
        for i in sorted({0, len(self._seeds) - 1}):
            params, buffers, rows = self._of_member(batch, i)
            if what not in self._step.probed.done:
                solo(params, buffers, copied(rows), self._seeds[i], True)
            with watch, Recording(self._seeds[i]) as recording:
                made[i] = solo(params, buffers, copied(rows), self._seeds[i], False)
            if self._step.seeding.everything:
                raise NotVectorisedError("the network draws random numbers from numpy or random")
            if i == 0:
                try:
                    check_draws(draws := recording.all_draws())
                except StrangeDrawError as error:
                    raise NotVectorisedError(str(error)) from error
        return made, draws

    def _of_member(self, batch: Batch, member: int) -> tuple[Tensors, Tensors, Batch]:
        own: tuple[Tensors, Tensors, Batch] = split((*self._tensors, batch), len(self._seeds))[member]
        return own

    def _compared(
        self,
        what: str,
        compute: Callable[[Sequence[Draw]], R],
        draws: tuple[Draw, ...],
        right: dict[int, R],
        differ: Callable[[R, R, int], str],
    ) -> R:
        try:
            made = compute(draws)
        except StrangeDrawError as error:
            raise OtherResultError(f"{what} for all members is not that of a solo run: {error}") from error
        except Exception as error:
            said = str(error).splitlines() or [""]
            reason = f"torch.func.vmap can't run it ({type(error).__name__}: {said[0][:200]})"
            raise NotVectorisedError(reason) from error
        for i, expected in right.items():
            own = map_outputs(lambda leaf, i=i: leaf[i] if isinstance(leaf, Tensor) else leaf, made)
            if difference := differ(own, expected, i):
                raise OtherResultError(f"{what} of member {i} is not that of its solo run: {difference}")
        found_of(self._loop).agreed[self._form] = draws
        return made


class _AsksForGradients(TorchFunctionMode):
    """A region in which it is noted if tensors are asked whether they require gradients, or are given hooks.

    To a function that ``torch.func.vmap`` maps no tensor requires gradients.
    """

    found = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in _HOOKS:
            self.found = "registers a hook of a gradient"
        elif made is True and func == Tensor.requires_grad.__get__:  # type: ignore[attr-defined]
            self.found = "asks whether a tensor requires gradients"
        return made


_HOOKS = (Tensor.register_hook, Tensor.register_post_accumulate_grad_hook)
