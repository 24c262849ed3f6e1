"""Finds what a network and its loss read from elsewhere than the context, which would not be trained or saved."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..core.batch import Batch
from ..core.errors import region
from .before import storage_of
from .bindings import Bindings
from .reachable import changed, is_cache, reachable, state_of
from .twice import refusal

if TYPE_CHECKING:
    from ..engine.step import Step


class Whole:
    """The network and the loss of a step, and all that they reach."""

    def __init__(self, step: Step) -> None:
        module = step.network.module
        self._roots = {"network": module.network, "loss": module.loss}
        self._own = frozenset(map(id, module.modules()))
        named = {**step.original.params(), **step.original.statistics()}
        self._registered = [(tensor, name) for name, tensor in named.items()]

    def state(self, modes: bool = True) -> dict[str, Any]:
        """All that may change from one call to the next, with or without the ``modes`` of modules."""
        found = state_of(self._roots, self._own)
        return found if modes else {path: value for path, value in found.items() if not path.endswith(".training")}

    def bindings(self) -> Bindings:
        return Bindings(self._roots, self._own)

    def clear_caches(self) -> None:
        """Empty what `functools.lru_cache` keeps."""
        for _, value in reachable(self._roots, self._own):
            if is_cache(value):
                value.cache_clear()

    def foreign(self, suspects: Mapping[str, str]) -> dict[int, tuple[str, Tensor]]:
        """Memory that is not to be read, and what is wrong with it: that of modules other than those that are called,
        and of constants that are not the same in every run."""
        found: dict[int | None, tuple[str, Tensor]] = {}
        paths: dict[int, str] = {}
        for path, value in reachable(self._roots, self._own):
            if isinstance(value, Tensor):
                paths.setdefault(id(value), path)
                if path in suspects:
                    layer = f". If it is to be trained, {_REGISTER}" if value.requires_grad else ""
                    found[storage_of(value)] = f"{path}, {suspects[path]}{layer}", value
        for tensor, name in self._registered:
            path = f", reached by {paths[id(tensor)]}," if id(tensor) in paths else ""
            found[storage_of(tensor)] = f"{name!r}{path} from elsewhere than the context: {_BY_MODULE}", tensor
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
            raise refusal(f"computing it failed ({error})", paths) from error


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


class Reads(TorchFunctionMode):
    """A region in which reads of ``foreign`` memory are noted.

    Args:
        foreign: by the number of the memory what it is, and a tensor that keeps it from being used for others.
    """

    def __init__(self, foreign: Mapping[int, tuple[str, Tensor]]) -> None:
        super().__init__()
        self._foreign = foreign
        self._found: dict[str, str] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _reads_form(func):
            for tensor in tensors((args, kwargs)):
                if (known := self._foreign.get(storage_of(tensor) or -1)) is not None:
                    self._found.setdefault(known[0], getattr(func, "__name__", str(func)))
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


def tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from tensors(value)
    elif isinstance(tree, Batch):
        yield from tensors((tree.x, tree.y))


def strangers(loss: Tensor, given: Iterable[Tensor]) -> list[Tensor]:
    """The leaves of the graph of a loss that are not ``given``.

    Raises:
        ValueError: a part of the graph is a checkpoint with a backward pass of its own, whose gradients are lost.
    """
    given = list(given)
    known = set(map(id, given))
    # A batch may have a graph of its own, as in meta-learning.
    todo, seen, found = [loss.grad_fn], {tensor.grad_fn for tensor in given}, {}
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            raise ValueError(
                "the network uses torch.utils.checkpoint with use_reentrant=True, by which the parameters within get "
                f"no gradient: {_OWN_BACKWARD}"
            )
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            found[id(leaf)] = leaf
        todo.extend(function for function, _ in node.next_functions)
    return list(found.values())


def refuse_own_backward(leaves: Mapping[str, Tensor]) -> None:
    """Refuse parameters to whose ``grad`` the network itself has added in the backward pass."""
    for name, leaf in leaves.items():
        if leaf.grad is not None:
            raise ValueError(
                f"a backward pass within the network or the loss has added to the grad of {name!r}, where no update "
                f"finds it: {_OWN_BACKWARD}"
            )


_OWN_BACKWARD = (
    "gradients are what torch.autograd.grad gives. Use torch.utils.checkpoint with use_reentrant=False; a function of "
    "your own takes the parameters as arguments and returns their gradients, and calls no backward()"
)
