"""What training leaves behind: the trained network, and the state of its run."""

from __future__ import annotations

import copy
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..checkpoint.comparing import compare
from ..checkpoint.state import StateDict, load_state_dict, state_dict
from ..core.context import Context, first_output
from ..core.errors import StateDictError
from ..core.plain import decode
from ..core.rng import fold_in, seeded
from ..engine.init import init
from ..engine.loop import Loop
from ..engine.network import LOSS
from ..engine.template import make_module
from ..interop.modules import for_evaluation, to_module


@attrs.frozen(eq=False, repr=False)
class TrainedModel:
    """A trained network, and all of its run that is not in the data and the parameters of the learner.

    Args:
        network: the module with the trained values, in evaluation mode.
        final: the state dict of the finished run.
        last_epoch: the state dict at the end of the last epoch, from which a continuation starts: what callbacks do in
            ``end``, such as to restore the best weights, is not in it.

    >>> from functional_loop.learner import TorchRegressor
    >>> x = torch.linspace(0, 1, 20).unsqueeze(1)
    >>> model = TorchRegressor(epochs=3, seed=7, validate=0.5, callbacks=["history"]).fit(x, x).model_
    >>> model
    TrainedModel(epochs=3, seed=7, callbacks=['history'])
    >>> model.callbacks["history"][-1]["valid.mse"] == model.scores_valid["mse"]
    True
    """

    network: nn.Module
    final: StateDict
    last_epoch: StateDict

    @classmethod
    def of(cls, end: Context, last: Context) -> TrainedModel:
        """The model of a finished run and the boundary before its end."""
        return cls(to_module(end).eval(), state_dict(for_evaluation(end)), state_dict(last))

    @property
    def epochs(self) -> int:
        """How many epochs it was trained."""
        return int(self.final["epoch"])

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return int(self.final["seed"])

    @property
    def callbacks(self) -> dict[str, Any]:
        """The states of the callbacks that keep one, by id."""
        entries = {**self.final["callbacks"], **self.final["volatile"]}
        return {id: decode(entry["state"]) for id, entry in entries.items()}

    @property
    def scores_train(self) -> dict[str, float]:
        """The training scores of the last epoch."""
        return dict(decode(self.final["last_scores_train"]))

    @property
    def scores_valid(self) -> dict[str, float]:
        """The validation scores of the last epoch."""
        return dict(decode(self.final["last_scores_valid"]))

    def continued(self, loop: Loop) -> Context:
        """The end of the last epoch as a context of ``loop``, which may have other data and more epochs.

        Hyperparameters of its optimizer that differ from those that the run began with take effect.

        Raises:
            StateDictError: its network, optimizer, measures or callbacks are others.
        """
        saved = {**self.last_epoch, "terminate": False}
        # Without validation data, there used to be measures for it nevertheless.
        allow = ["train", "valid", "hyperparameters", *(["measures_valid"] if loop.valid is None else [])]
        return load_state_dict(init(loop, self.seed), saved, allow=allow)

    def outputs(self, x: Tensor, batch_size: int) -> Tensor:
        """The (first) outputs of the network for the rows of ``x``, on the CPU; nothing is written to.

        What is random in a network that is being evaluated is a function of the seed.
        """
        self.network.eval()
        tensors = (*self.network.parameters(), *self.network.buffers(), torch.empty(0))
        device = tensors[0].device
        with torch.inference_mode(), seeded(fold_in(self.seed, "prediction")):
            return torch.cat([self._outputs(rows.to(device)).cpu() for rows in torch.split(x, batch_size)])

    def _outputs(self, x: Tensor) -> Tensor:
        # A network may write to its buffers and its input.
        buffers = {name: buffer.clone() for name, buffer in self.network.named_buffers()}
        outputs: Tensor = first_output(functional_call(self.network, buffers, (x.clone(),)))
        return outputs

    def __repr__(self) -> str:
        return f"TrainedModel(epochs={self.epochs}, seed={self.seed}, callbacks={list(self.callbacks)})"

    def plain(self) -> dict[str, Any]:
        """What a file keeps of it: the same tensors, in plain containers."""
        return {"final": self.final, "last_epoch": self.last_epoch}

    @classmethod
    def from_plain(cls, saved: dict[str, Any], network: Any, device: torch.device) -> TrainedModel:
        """The model that was saved, in a network of the same structure.

        Raises:
            StateDictError: the structure is another.
        """
        final = saved["final"]
        module = copy.deepcopy(network) if isinstance(network, nn.Module) else make_module(network, final["seed"])
        _fill(module, final)
        return cls(module.to(device).eval(), **saved)


def _fill(module: nn.Module, final: StateDict) -> None:
    """Put the trained values into a module."""
    buffers = dict(module.named_buffers())
    places = {**module.state_dict(), **{name: buffers[name] for name in final["buffers"] if name in buffers}}
    own = {name: buffer for name, buffer in final["buffers"].items() if name in buffers or not name.startswith(LOSS)}
    values = {**final["network"], **own}
    if differences := list(compare(_kinds(values), _kinds(places))):
        raise StateDictError("what was saved does not fit the network:", differences)
    for name, place in places.items():
        place.copy_(values[name])
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in final["trainable"])


def _kinds(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items()}
