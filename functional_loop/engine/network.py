"""A network and its loss as a pure function of their parameters, buffers and inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..core.errors import add_note

Tensors = dict[str, Tensor]
Loss = Callable[[Any, Any], Any]

Slot = tuple[Any, Any, str]
"""A place in a module (container, key) that holds the tensor of a name."""

Modes = tuple[tuple[str, bool], ...]
"""Names of modules, and whether each is in training mode."""

LOSS = "loss."
"""How names of parameters and buffers of the loss begin, beside those of the network."""


class WithLoss(nn.Module):
    """A network and its loss as one module, from inputs and targets to the loss and the outputs.

    A loss that is a module with parameters or buffers is a part of it; any other is called and left alone. Tensors that
    the two share are one tensor under the name that the network has for it.

    Args:
        modes: the parts that keep a mode of their own while the others are in training mode, see `kept_modes`.

    Raises:
        ValueError: the network has a child ``loss``, and the loss has parameters or buffers, whose names begin so.
    """

    network: nn.Module
    loss: Any

    def __init__(self, network: nn.Module, loss: Loss, modes: Modes = ()) -> None:
        super().__init__()
        self.network = network
        self.modes = modes
        if has_tensors(loss):
            _check_apart(network, loss)
            self.loss = loss
        else:
            # Not as a child, whose mode would be set.
            object.__setattr__(self, "loss", loss)

    def forward(self, x: Any, y: Any) -> tuple[Any, Any]:
        outputs = call(self.network, x)
        return self.loss(outputs, y), outputs

    def train(self, mode: bool = True) -> Self:
        """Set the mode, but in training that of the parts which keep their own."""
        super().train(mode)
        if mode:
            self.keep_modes()
        return self

    def keep_modes(self) -> None:
        # A part comes after those that it is in, which set its mode too.
        for name, own in self.modes:
            if (part := self.get_submodule(name)).training is not own:
                part.train(own)

    def kept_modes(self) -> Modes:
        """The parts that are in evaluation mode while the network, or the loss, as a whole is in training mode; with
        all that is in them. A pretrained network is often in evaluation mode as a whole, and is trained all the same.
        """
        kept: dict[str, bool] = {}
        for role, whole in self.parts().items():
            for name, part in whole.named_modules(prefix=role):
                if whole.training and (not part.training or name.rpartition(".")[0] in kept):
                    kept[name] = part.training
        return tuple(kept.items())

    def params(self) -> Tensors:
        """All parameters, by the names that they have in a context."""
        return {outer_name(name): parameter for name, parameter in self.named_parameters()}

    def statistics(self) -> Tensors:
        """All buffers, by the names that they have in a context."""
        return {outer_name(name): buffer for name, buffer in self.named_buffers()}

    def parts(self) -> dict[str, nn.Module]:
        """The modules that have a state of their own in a state dict."""
        return {"network": self.network, "loss": self.loss} if has_tensors(self.loss) else {"network": self.network}

    def state_names(self) -> dict[str, dict[str, str]]:
        """Of every part the names of its ``state_dict()``, each with the name that its tensor has in a context."""
        first = {id(tensor): name for name, tensor in {**self.params(), **self.statistics()}.items()}
        return {role: state_names(part, first) for role, part in self.parts().items()}

    def copied(self) -> WithLoss:
        """A copy that shares its tensors and nothing else, but for a loss without tensors."""
        memo: dict[int, Any] = {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())}
        copies = {name: private_copy(part, name, memo) for name, part in self.parts().items()}
        return WithLoss(copies["network"], copies.get("loss", self.loss), self.modes)


def has_tensors(loss: object) -> bool:
    """Whether a loss is a module with parameters or buffers."""
    return isinstance(loss, nn.Module) and next(chain(loss.parameters(), loss.buffers()), None) is not None


def outer_name(name: str) -> str:
    """The name that a tensor of a `WithLoss` has in a context."""
    return name.removeprefix("network.")


def call(module: nn.Module, x: Any) -> Any:
    """The outputs of a network for an input, or for several in a tuple or dict."""
    if isinstance(x, dict):
        return module(**x)
    return module(*x) if isinstance(x, (tuple, list)) else module(x)


class FunctionalNetwork:
    """Private copies of a network and its loss whose tensors are swapped in for each call, as
    ``torch.func.functional_call`` does.

    The copies share no container with the user's modules, which are never written to; where every tensor goes is
    planned once, which makes a call some 25 µs cheaper than ``functional_call``. Tied tensors are one tensor under
    their first name. Not thread-safe: one thread calls it at a time.

    Raises:
        ValueError: one of the modules has parameters that are not materialised, or a state outside of parameters and
            buffers.
        TypeError: one of them can't be copied.
    """

    def __init__(self, whole: WithLoss) -> None:
        for name, part in whole.parts().items():
            check_module(part, name)
        self.module = whole.copied()
        self._network = self.module.network
        self._losses: dict[bool, Loss] = {True: self.module.loss}
        self._params = list(_slots(self.module, self.module.named_parameters(), "_parameters"))
        self._buffers = list(_slots(self.module, self.module.named_buffers(), "_buffers"))
        self._unset = list(_unset_buffers(self.module))
        self._training: bool | None = None
        self._shown: Tensors = {}
        self.writes = frozenset(_renormalised(self.module))
        """Parameters that the forward call itself writes to (``nn.Embedding(max_norm=...)``)."""

    def outputs(self, params: Tensors, buffers: Tensors, x: Any, training: bool) -> tuple[Any, Tensors]:
        """The outputs and the new buffers; ``buffers`` are cloned, since BatchNorm and others write to theirs."""
        cloned = self._show(params, buffers, training)
        outputs = call(self._network, x)
        return outputs, self._written(cloned, training)

    def loss(self, params: Tensors, buffers: Tensors, x: Any, y: Any, training: bool) -> tuple[Any, Any, Tensors]:
        """The loss, the outputs and the new buffers."""
        cloned = self._show(params, buffers, training)
        outputs = call(self._network, x)
        loss = self._loss(training)(outputs, y)
        return loss, outputs, self._written(cloned, training)

    def _show(self, params: Tensors, buffers: Tensors, training: bool) -> Tensors:
        """Put parameters and clones of the buffers, which are returned, in their places."""
        if training is not self._training:
            self.module.train(training)
            self._training = training
        if params is not self._shown:
            for container, key, name in self._params:
                container[key] = params[name]
            self._shown = params
        if not buffers:
            return buffers
        cloned = {name: buffer.clone() for name, buffer in buffers.items()}
        for container, key, name in self._buffers:
            container[key] = cloned[name]
        return cloned

    def _written(self, cloned: Tensors, training: bool) -> Tensors:
        """The buffers after a call. Read from the module and not from the clones: it may assign a new tensor."""
        written = dict(cloned) if cloned else cloned
        for container, key, name in reversed(self._buffers):
            given, buffer = cloned[name], container[key]
            if buffer is not given:
                if training:
                    check_same_form(name, given, buffer)
                # What it assigned may be a view of a parameter.
                buffer = buffer.clone()
            written[name] = buffer.detach()
        return written

    def _loss(self, training: bool) -> Loss:
        if training not in self._losses:
            loss = self.module.loss
            if isinstance(loss, nn.Module) and not has_tensors(loss):
                # The user's own, whose mode is not ours to set.
                loss = private_copy(loss, "loss").eval()
            self._losses[training] = loss
        return self._losses[training]

    def check_unset(self) -> None:
        """Refuse a network that has filled a buffer that was ``None``.

        Raises:
            ValueError: it has.
        """
        for container, key, name in self._unset:
            if container[key] is not None:
                raise ValueError(
                    f"{_owner(name)} fills its buffer {outer_name(name)!r}, which was None when training began, so "
                    "that it is not part of the context: register it as a tensor of its final shape"
                )

    def release(self) -> None:
        """Let go of the tensors of the last call."""
        for container, key, _ in (*self._params, *self._buffers):
            container[key] = None
        self._shown = {}


def check_same_form(name: str, before: Tensor, after: Any) -> None:
    """Refuse what has become of the buffer ``name`` if it could not be saved and loaded in its place.

    Raises:
        TypeError: it is no tensor any more.
        ValueError: it is of another shape, dtype or device.
    """
    if not isinstance(after, Tensor):
        raise TypeError(f"the buffer {name!r} was set to {after!r} while training, but has to stay a tensor")
    for what in ("shape", "dtype", "device"):
        was, now = getattr(before, what), getattr(after, what)
        if was != now:
            was, now = (list(was), list(now)) if what == "shape" else (was, now)
            raise ValueError(
                f"the buffer {name!r} has changed its {what} while training, from {was} to {now}, so that the context "
                "could not be saved and loaded: register it in its final form, such as a tensor of the largest size "
                "and a second buffer that counts how much of it is in use"
            )


def _owner(name: str) -> str:
    return "the network" if name.startswith("network.") else "the loss"


def _check_apart(network: nn.Module, loss: Any) -> None:
    names = (name for name, _ in (*network.named_parameters(), *network.named_buffers()) if name.startswith(LOSS))
    taken = next(names, "loss" if "loss" in dict(network.named_children()) else None)
    if taken is not None:
        raise ValueError(
            f"the network has a child 'loss' ({taken!r}), and the loss ({type(loss).__name__}) has parameters or "
            f"buffers, whose names in the context begin with {LOSS!r}: give that child of the network another name"
        )


def check_module(module: nn.Module, role: str = "network") -> None:
    """Refuse a module that can't be called as a pure function; ``role`` says in messages what it is.

    Raises:
        TypeError: it is a TorchScript module.
        ValueError: it has parameters without a shape, or a state outside of parameters and buffers.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(f"the {role} is a TorchScript module, whose tensors can't be swapped: give the original module")
    lazy = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if is_lazy(tensor)]
    if lazy:
        raise ValueError(
            f"the {role} has lazy parameters or buffers without a shape ({', '.join(lazy)}): call it once on a batch "
            "before you make the Loop, or use modules of known sizes"
        )
    for name, part in module.named_modules():
        if type(part).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(
                f"{type(part).__name__} at {name or 'the root'!r} keeps state in get_extra_state(), outside of "
                "parameters and buffers, where a pure function can't follow it: register that state as buffers"
            )


def private_copy(module: nn.Module, role: str = "network", memo: dict[int, Any] | None = None) -> nn.Module:
    """A copy of ``module`` that shares its tensors and nothing else."""
    if memo is None:
        memo = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        add_note(
            error,
            f"the {role} ({type(module).__name__}) can't be copied, which the loop needs in order not to write to "
            "yours. A tensor that is an attribute but neither parameter nor buffer is a common reason: the old "
            "torch.nn.utils.weight_norm makes one, torch.nn.utils.parametrizations.weight_norm does not",
        )
        raise


def _slots(module: nn.Module, named: Iterator[tuple[str, Tensor]], attribute: str) -> Iterator[Slot]:
    names = {id(tensor): outer_name(name) for name, tensor in named}
    for part in module.modules():
        container = getattr(part, attribute)
        for key, tensor in container.items():
            if tensor is not None:
                yield container, key, names[id(tensor)]


def _unset_buffers(module: nn.Module) -> Iterator[Slot]:
    for prefix, part in module.named_modules():
        for key, buffer in part._buffers.items():
            if buffer is None:
                yield part._buffers, key, f"{prefix}.{key}" if prefix else key


def _renormalised(module: nn.Module) -> Iterator[str]:
    names = {id(parameter): outer_name(name) for name, parameter in module.named_parameters()}
    for part in module.modules():
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.max_norm is not None:
            yield names[id(part.weight)]


def state_names(module: nn.Module, first: dict[int, str] | None = None) -> dict[str, str]:
    """The names of ``module.state_dict()``, each with the first name of its tensor, another one where it is tied.

    Args:
        first: first names by the identity of the tensor, if they are others than those in ``module``.
    """
    if first is None:
        first = {id(tensor): name for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    return {name: first[id(tensor)] for name, tensor in module.state_dict(keep_vars=True).items()}
