"""Looks once, before anything is updated, whether a step depends on more than its inputs, and says on what.

The first step of a loop in a process is computed twice. What is read from elsewhere than the context, and what is kept
from one call to the next, would make two runs of one context differ: it is refused by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .batch import Batch, copied
from .errors import region
from .network import FunctionalNetwork, check_same_form
from .proofs.given import storage_of
from .reachable import EVERYTHING, changed, reachable, state_of, token
from .record import evolve, tree_map

if TYPE_CHECKING:
    from .step import Differentiated, Step, Tensors


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


def differentiate(
    step: Step, leaves: Tensors, wanted: Sequence[Tensor], buffers: Tensors, batch: Batch, seed: int
) -> Differentiated:
    """As `Step.differentiate`, on a batch of which the gradients are computed twice, and compared.

    Raises:
        ValueError: they depend on something outside of parameters, buffers, batch and seed.
    """
    whole = _Whole(step)
    names = {id(leaf): name for name, leaf in leaves.items()}
    trainable = tuple(names[id(leaf)] for leaf in wanted)
    before, given = whole.state(), _values(leaves, step.network.writes)
    own, own_batch, original = step.leaves(leaves, trainable), copied(batch), copied(batch)
    with _Reads(whole.foreign(step.probed.suspects)) as reads:
        first = step.differentiate(own, [own[name] for name in trainable], buffers, own_batch, seed, probe=True)
    reads.refuse()
    _refuse_writes(given, _values(leaves, step.network.writes))
    for name, buffer in buffers.items():
        check_same_form(name, buffer, first[2][name])
    expected, strangers = _bits(first, trainable), _strangers(first[0], [*own.values(), *_tensors(own_batch)])
    # No more than one set of gradients at a time.
    del first, own, own_batch
    between = whole.state()
    with whole.blaming(before, between):
        second = step.differentiate(leaves, wanted, buffers, batch, seed, probe=True)
    # One that the call itself has made is another in the second call.
    again = {id(leaf) for leaf in _strangers(second[0], [*leaves.values(), *_tensors(batch)])}
    whole.refuse_strangers([leaf for leaf in strangers if id(leaf) in again])
    if difference := _difference(expected, _bits(second, trainable)):

        def once_more() -> dict[str, Any]:
            return _computed(step, leaves, trainable, buffers, copied(original), seed)

        paths = changed(before, between)
        if paths or not _is_rounding(step.device_type, once_more):
            raise ValueError(_outside(difference, paths))
    elif paths := changed(before, between):
        _refuse_memory_of_batches(step, leaves, trainable, buffers, original, seed, expected, paths)
    return second


def _refuse_memory_of_batches(
    step: Step,
    leaves: Tensors,
    trainable: tuple[str, ...],
    buffers: Tensors,
    batch: Batch,
    seed: int,
    expected: Mapping[str, Any],
    paths: Sequence[str],
) -> None:
    """Refuse a network that keeps something of its first batch for later ones, as an initialisation by data does: after
    a resume the first batch is another."""
    fresh = step.anew()
    try:
        _computed(fresh, leaves, trainable, buffers, _another(batch), seed)
    except Exception:
        return  # such a batch it can't take
    if difference := _difference(expected, _computed(fresh, leaves, trainable, buffers, batch, seed)):
        raise ValueError(_outside(difference, paths, "after another batch"))


def _computed(
    step: Step, leaves: Tensors, trainable: tuple[str, ...], buffers: Tensors, batch: Batch, seed: int
) -> dict[str, Any]:
    """The bits of what is computed of a batch, which may be written to."""
    own = step.leaves(leaves, trainable)
    wanted = [own[name] for name in trainable]
    return _bits(step.differentiate(own, wanted, buffers, batch, seed, probe=True), trainable)


def _another(batch: Batch) -> Batch:
    """A batch of the same form with other rows."""

    def other(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or not tensor.dim():
            return tensor
        turned = tensor.flip(0)
        return 1.5 * turned + 0.5 if tensor.is_floating_point() else turned

    return evolve(batch, x=tree_map(other, batch.x), y=tree_map(other, batch.y))


def evaluate(step: Step, call: Callable[..., Any], batch: Batch) -> Any:
    """``call(step.network, batch)``, which is compared with a second call, and with one of a network that was never
    called before: so what training keeps for evaluation is found, and what evaluation keeps for either.

    Raises:
        ValueError: the outputs depend on something outside of parameters, buffers, batch and seed.
    """
    # The network may write to the batch.
    whole, fresh, original = _Whole(step), FunctionalNetwork(step.original), copied(batch)

    def bits(network: FunctionalNetwork, **options: Any) -> dict[str, Any]:
        return _output_bits(call(network, copied(original), **options))

    at_first, before = _Whole(step, fresh).state(modes=False), whole.state(modes=False)
    expected = bits(fresh)
    made = call(step.network, batch)
    between = whole.state(modes=False)
    again = bits(step.network)
    for found, paths in ((_output_bits(made), changed(at_first, before)), (again, changed(before, between))):
        difference = _difference(expected, found)
        if difference and (paths or not _is_rounding(step.device_type, lambda: bits(fresh))):
            raise ValueError(_outside(difference, paths))
    if paths := changed(before, between):
        try:
            without = bits(FunctionalNetwork(step.original), training=True)
            with_state = bits(step.network, training=True)
        except Exception:
            # Batch norm, for one, takes no single row in training mode.
            return made
        if difference := _difference(without, with_state):
            raise ValueError(_outside(difference, paths))
    return made


class _Whole:
    """The network and the loss of a step, and all that they reach."""

    def __init__(self, step: Step, network: FunctionalNetwork | None = None) -> None:
        module = (network or step.network).module
        self._roots = {"network": module.network, "loss": module.loss}
        self._own = frozenset(map(id, module.modules()))
        named = {**step.original.params(), **step.original.statistics()}
        self._registered = [(tensor, name) for name, tensor in named.items()]

    def state(self, modes: bool = True) -> dict[str, Any]:
        """All that may change from one call to the next, with or without the ``modes`` of modules."""
        found = state_of(self._roots, self._own)
        return found if modes else {path: value for path, value in found.items() if not path.endswith(".training")}

    def foreign(self, suspects: Mapping[str, str]) -> dict[int, str]:
        """Memory that is not to be read, and what is wrong with it: that of modules other than those that are called,
        and of constants that are not the same in every run."""
        found: dict[int | None, str] = {}
        paths: dict[int, str] = {}
        for path, value in reachable(self._roots, self._own):
            if isinstance(value, Tensor):
                paths.setdefault(id(value), path)
                if path in suspects:
                    layer = f". If it is to be trained, {_REGISTER}" if value.requires_grad else ""
                    found[storage_of(value)] = f"{path}, {suspects[path]}{layer}"
        for tensor, name in self._registered:
            path = f", reached by {paths[id(tensor)]}," if id(tensor) in paths else ""
            found[storage_of(tensor)] = f"{name!r}{path} from elsewhere than the context: {_BY_MODULE}"
        return {storage: what for storage, what in found.items() if storage is not None}

    def refuse_strangers(self, strangers: Sequence[Tensor]) -> None:
        if not strangers:
            return
        wanted = {id(leaf): leaf for leaf in strangers}
        named: dict[int, str] = {}
        for path, value in reachable(self._roots, self._own):
            if id(value) in wanted:
                named.setdefault(id(value), path)
        registered = {id(tensor): name for tensor, name in self._registered}
        parts = []
        for key, leaf in list(wanted.items())[:3]:
            path = named.get(key, f"a tensor of shape {list(leaf.shape)} that is in no attribute, closure or global")
            parts.append(f"the parameter {registered[key]!r}, reached by {path}" if key in registered else path)
        more = f" and {len(wanted) - 3} more" if len(wanted) > 3 else ""
        remedy = _BY_MODULE if wanted.keys() <= registered.keys() else _REGISTER
        raise ValueError(
            f"the loss depends on {', '.join(parts)}{more}, which requires gradients but is not taken from the "
            f"context, so that it would never be trained: {remedy}"
        )

    @region
    def blaming(self, before: Mapping[str, Any], between: Mapping[str, Any]) -> Generator[None]:
        """A second call: if it fails where the first did not, what the first has changed is the reason."""
        try:
            yield
        except Exception as error:
            if not (paths := changed(before, between)):
                raise
            raise ValueError(_outside(f"computing it failed ({error})", paths)) from error


_REGISTER = (
    "register it. Layers are attributes of their own or in an nn.ModuleList or nn.ModuleDict, not in a list or dict; "
    "tensors are nn.Parameter(...) or in an nn.ParameterList; what is not to be trained is a buffer, "
    "self.register_buffer(...)"
)
_BY_MODULE = (
    "what is called is a copy of the network with the tensors of the context. Read it in forward(), or in a hook that "
    "is a method (register_forward_hook(self.hook)) and not a lambda or inner function, which keeps the original. A "
    "penalty on weights is computed in forward() and returned, or is the optimizer's weight_decay"
)


class _Reads(TorchFunctionMode):
    """A region in which reads of ``foreign`` memory are noted."""

    def __init__(self, foreign: Mapping[int, str]) -> None:
        super().__init__()
        self._foreign = foreign
        self._found: dict[str, str] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _reads_form(func):
            for tensor in _tensors((args, kwargs)):
                if (what := self._foreign.get(storage_of(tensor) or -1)) is not None:
                    self._found.setdefault(what, getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))

    def refuse(self) -> None:
        for what, by in self._found.items():
            raise ValueError(f"the network or the loss reads ({by}) {what}")


_VALUES = ("data", "T", "mT", "H", "mH", "real", "imag", "grad")
"""Properties of a tensor that give its values."""

# fmt: off
_FORM = frozenset({
    "size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "is_floating_point",
    "is_complex", "is_signed", "element_size", "get_device", "storage_offset", "data_ptr", "__len__", "__hash__",
    "requires_grad_", "register_hook", "untyped_storage", "new_zeros", "new_ones", "new_empty", "new_full",
    "new_tensor", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like",
    "is_pinned", "is_shared", "is_inference", "is_same_size", "is_conj", "is_neg", "result_type", "can_cast",
    "__set__", "__delete__",
})
# fmt: on
"""Functions of a tensor that look at its form."""


def _reads_form(func: Any) -> bool:
    """Whether a function of torch looks at the form of a tensor only, and not at its values."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(func.__self__, "__name__", "") not in _VALUES
    return name in _FORM


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _tensors(value)
    elif isinstance(tree, Batch):
        yield from _tensors((tree.x, tree.y))


def _values(leaves: Tensors, written: frozenset[str]) -> dict[str, Any]:
    return {name: token(leaf, EVERYTHING) for name, leaf in leaves.items() if name not in written}


def _refuse_writes(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    for name in changed(before, after):
        raise ValueError(
            f"the network writes to its parameter {name!r} in place when it is called, so that the context that it was "
            "given has changed: make that tensor a buffer, or compute a new tensor instead"
        )


def _strangers(loss: Tensor, given: Iterable[Tensor]) -> list[Tensor]:
    """The leaves of the graph of a loss that are not ``given``."""
    given = list(given)
    known = set(map(id, given))
    # A batch may have a graph of its own, as in meta-learning.
    todo, seen, found = [loss.grad_fn], {tensor.grad_fn for tensor in given}, {}
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            found[id(leaf)] = leaf
        todo.extend(function for function, _ in node.next_functions)
    return list(found.values())


def _bits(found: Differentiated, trainable: Sequence[str]) -> dict[str, Any]:
    loss, outputs, buffers, grads = found
    named = {
        **{f"the new buffer {name!r}": buffer for name, buffer in buffers.items()},
        **{f"the gradient of {name!r}": grad for name, grad in zip(trainable, grads, strict=False)},
    }
    return _output_bits((outputs, loss)) | {what: token(value, EVERYTHING) for what, value in named.items()}


def _output_bits(found: tuple[Any, Any]) -> dict[str, Any]:
    """The bits of outputs, and of the loss."""
    return {
        path: token(value, EVERYTHING)
        for path, value in reachable({"the output": found[0], "the loss": found[1]})
        if isinstance(value, (Tensor, int, float))
    }


def _difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What differs between two computations, the loss first."""
    found = changed(one, other)
    return "" if not found else "the loss differs" if "the loss" in found else f"{found[0]} differs"


def _outside(difference: str, paths: Sequence[str], when: str = "a second time") -> str:
    said = (
        f"{difference} when a batch is computed {when} from the same parameters, buffers and seed: a run could "
        "neither be repeated nor resumed. "
    )
    if not paths:
        return said + (
            "Nothing has changed that attributes, closures and globals of network and loss reach: it depends on "
            "something further outside, such as a file, a clock, or a generator of another library. Pass it in with "
            "the batch"
        )
    name = paths[0].rpartition(".")[2].rpartition(" ")[2].partition("[")[0]
    more = " and more" if len(paths) > 5 else ""
    return said + (
        f"The first call has changed {', '.join(paths[:5])}{more}, outside of the context. What is to be kept is a "
        f"buffer: self.register_buffer({name!r}, torch.zeros(...)) in __init__, assigned in forward(). What draws does "
        "it from the global generators (torch.randn(...)), which are seeded for every step, and from none of its own"
    )


def _is_rounding(device_type: str, compute: Any) -> bool:
    """Whether what differs is the order in which kernels add, of which there is a warning."""
    if device_type == "cpu":
        if torch.get_num_threads() == 1:
            return False
        threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
        warns = torch.is_deterministic_algorithms_warn_only_enabled()
        try:
            torch.set_num_threads(1)
            torch.use_deterministic_algorithms(True, warn_only=True)
            if compute() != compute():
                return False
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(strict, warn_only=warns)
    warnings.warn(
        "a batch that is computed twice gives other bits, though nothing that network and loss keep has changed: some "
        "kernel adds in no fixed order, and a run will not repeat bit for bit. "
        "torch.use_deterministic_algorithms(True) finds it, or takes another",
        UserWarning,
        stacklevel=2,
    )
    return True
