"""Looks once, before anything is updated, whether a step depends on more than its inputs, and says on what.

The first step of a loop in a process is computed twice. What is read from elsewhere than the context, and what is kept
from one call to the next, would make two runs of one context differ: it is refused by name.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
from torch import Tensor

from ..core.batch import Batch, copied
from ..core.beside import beside
from ..core.errors import region
from ..engine.network import check_same_form
from .earlier_batches import Inputs, difference_after_others
from .outside import Reads, Whole, refuse_own_backward, strangers, tensors
from .reachable import EVERYTHING, changed, token
from .twice import Bits, bits_of, difference, is_rounding, output_bits, refusal

if TYPE_CHECKING:
    from ..engine.loop import Loop
    from ..engine.step import Differentiated, Step, Tensors


@attrs.frozen(eq=False)
class Probed:
    """What has been looked at of a loop, and what to look for.

    Attributes:
        done: ``"training"`` and ``"evaluation"``, once they have been found to depend on their inputs alone.
        suspects: by path, tensors that are no parameters or buffers and must not be read, and why.
    """

    done: set[str] = attrs.field(factory=set)
    suspects: dict[str, str] = attrs.field(factory=dict)

    @region
    def once(self, what: str) -> Generator[None]:
        """A region in which ``what`` is looked at; it counts as done if nothing is found."""
        self.done.add(what)
        try:
            yield
        except BaseException:
            self.done.discard(what)
            raise


def probed(loop: Loop) -> Probed:
    return beside(loop, "probed", Probed)


def differentiate(
    step: Step, leaves: Tensors, wanted: Sequence[Tensor], buffers: Tensors, batch: Batch, seed: int
) -> Differentiated:
    """As `Step.differentiate`, on a batch of which the gradients are computed twice, and compared.

    Raises:
        ValueError: they depend on something outside of parameters, buffers, batch and seed.
    """
    whole = Whole(step)
    names = {id(leaf): name for name, leaf in leaves.items()}
    trainable = tuple(names[id(leaf)] for leaf in wanted)

    def compute(step: Step, given: Inputs) -> Bits:
        own = step.leaves(given.params, trainable)
        own_wanted = [own[name] for name in trainable]
        found = step.differentiate(own, own_wanted, given.buffers, copied(given.batch), given.seed, probe=True)
        return bits_of(found, trainable)

    whole.clear_caches()
    before, values, bindings = whole.state(), _values(leaves, step.network.writes), whole.bindings()
    own, own_batch, original = step.leaves(leaves, trainable), copied(batch), copied(batch)
    with Reads(whole.foreign(step.probed.suspects)) as reads:
        first = step.differentiate(own, [own[name] for name in trainable], buffers, own_batch, seed, probe=True)
    reads.refuse()
    refuse_own_backward(own)
    _refuse_writes(values, _values(leaves, step.network.writes))
    for name, buffer in buffers.items():
        check_same_form(name, buffer, first[2][name])
    expected, unknown = bits_of(first, trainable), strangers(first[0], [*own.values(), *tensors(own_batch)])
    # No more than one set of gradients at a time.
    del first, own, own_batch
    between = whole.state()
    with whole.blaming(before, between):
        second = step.differentiate(leaves, wanted, buffers, batch, seed, probe=True)
    # One that the call itself has made is another in the second call.
    again = {id(leaf) for leaf in strangers(second[0], [*leaves.values(), *tensors(batch)])}
    whole.refuse_strangers([leaf for leaf in unknown if id(leaf) in again])
    paths, given = changed(before, between), Inputs(leaves, buffers, original, seed)
    if what := difference(expected, bits_of(second, trainable)):
        if paths or not is_rounding(step.device_type, lambda: compute(step, given)):
            raise refusal(what, paths)
    elif paths:
        with bindings.put_back_meanwhile():
            what = difference_after_others(step.anew(), compute, given, expected)
        if what:
            # Or the next run would find what this one has left.
            bindings.put_back()
            raise refusal(what, paths, "after another batch")
    return second


def evaluate(
    step: Step, params: Tensors, buffers: Tensors, trainable: tuple[str, ...], batch: Batch, seed: int, with_loss: bool
) -> Any:
    """As `Step.evaluate`, on a batch of which the outputs are compared with those of a second call, and of a network
    that was never called before: so what training keeps for evaluation is found, and what evaluation keeps for either.

    Raises:
        ValueError: the outputs depend on something outside of parameters, buffers, batch and seed.
    """
    # The network may write to the batch.
    whole, fresh, given = Whole(step), step.anew(), Inputs(params, buffers, copied(batch), seed)

    def compute(step: Step, given: Inputs, training: bool = False) -> Bits:
        batch = copied(given.batch)
        return output_bits(
            step.call(given.params, given.buffers, trainable, batch, given.seed, with_loss, training=training)
        )

    whole.clear_caches()
    at_first, before, bindings = Whole(fresh).state(modes=False), whole.state(modes=False), whole.bindings()
    expected = compute(fresh, given)
    made = step.call(params, buffers, trainable, batch, seed, with_loss)
    between = whole.state(modes=False)
    again = compute(step, given)
    for found, paths in ((output_bits(made), changed(at_first, before)), (again, changed(before, between))):
        what = difference(expected, found)
        if what and (paths or not is_rounding(step.device_type, lambda: compute(fresh, given))):
            raise refusal(what, paths)
    if paths := changed(before, between):
        with bindings.put_back_meanwhile():
            what = difference_after_others(step.anew(), compute, given, expected)
        if what:
            # Or the next run would find what this one has left.
            bindings.put_back()
            raise refusal(what, paths, "after another batch")
        try:
            without = compute(step.anew(), given, training=True)
            with_state = compute(step, given, training=True)
        except Exception:
            # Batch norm, for one, takes no single row in training mode.
            return made
        if what := difference(without, with_state):
            raise refusal(what, paths)
    return made


def _values(leaves: Tensors, written: frozenset[str]) -> dict[str, Any]:
    return {name: token(leaf, EVERYTHING) for name, leaf in leaves.items() if name not in written}


def _refuse_writes(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    for name in changed(before, after):
        raise ValueError(
            f"the network writes to its parameter {name!r} in place when it is called, so that the context that it was "
            "given has changed: make that tensor a buffer, or compute a new tensor instead"
        )
