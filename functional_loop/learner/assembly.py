"""From the arguments of a learner to a Loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ..callbacks.control.early_stopping import early_stopping
from ..callbacks.objects.callback_set import CallbackSet
from ..callbacks.registry.dictionary import as_torch_callback
from ..core.context import first_output
from ..data.sources import BatchSource, batches
from ..engine.loop import AsCallback, Loop
from ..optim.optimizer import Optimizer, optimizer
from .arrays import as_python, checked_integer
from .networks import network_for
from .scores import as_measures

if TYPE_CHECKING:
    from .estimator import TorchEstimator


def make_loop(learner: TorchEstimator, train: TensorDataset, valid: TensorDataset | None, epochs: int) -> Loop:
    """The loop of a fit.

    Args:
        learner: whose arguments are used; its ``input_shape_`` and ``target_`` are known.
        train, valid: ``x`` and encoded ``y``.
    """
    device = as_device(learner.device)
    n_outputs = learner.target_.n_outputs
    known = learner._measures
    measures_valid: Any = learner.measures_valid
    if measures_valid is None:
        measures_valid = learner._usual_measures if valid is not None else []
    environment = {
        "learner": learner,
        "task_train": train,
        "task_valid": valid,
        "prediction_encoder": learner.target_.decode,
    }
    return Loop(
        network_for(learner.network, learner.input_shape_, n_outputs),
        _checked_loss(_as_loss(learner.part("loss"), device), n_outputs),
        _as_optimizer(learner.optimizer),
        train=_train_source(learner, train),
        valid=None if valid is None else _valid_source(learner, valid),
        epochs=as_python(epochs),
        measures_train=as_measures("measures_train", learner.measures_train, known),
        measures_valid=as_measures("measures_valid", measures_valid, known),
        eval_freq=as_python(learner.eval_freq),
        callbacks=[*_as_callbacks(learner.callbacks, environment), *_stopping(learner)],
        device=device,
        compile=as_python(learner.compile),
    )


def as_device(device: Any) -> Any:
    """What a Loop takes as device."""
    if isinstance(device, str) and device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device


def predict_batch_size(learner: TorchEstimator) -> int:
    """Rows at a time where nothing is learned."""
    name = "batch_size" if learner.batch_size_predict is None else "batch_size_predict"
    return checked_integer(name, getattr(learner, name))


def _as_loss(loss: Any, device: torch.device) -> Callable[[Any, Tensor], Tensor]:
    made = loss() if isinstance(getattr(loss, "func", loss), type) else loss
    if isinstance(made, nn.Module):
        return copy.deepcopy(made).to(device)
    if not callable(made):
        raise TypeError(f"loss is a function (y_hats, y) -> scalar tensor, or a module or class, not {loss!r}")
    return made  # type: ignore[no-any-return]


def _checked_loss(loss: Callable[[Any, Tensor], Tensor], n_outputs: int) -> Callable[[Any, Tensor], Tensor]:
    def check(y_hats: Any, y: Tensor) -> None:
        shape, expected = list(first_output(y_hats).shape), [len(y), n_outputs]
        if shape != expected:
            raise ValueError(f"the network's output is of shape {shape}, and for this data it must be {expected}")

    def checked(y_hats: Any, y: Tensor) -> Tensor:
        check(y_hats, y)
        return loss(y_hats, y)

    if isinstance(loss, nn.Module):
        # The loop is to find its parameters.
        loss.register_forward_pre_hook(lambda module, arguments: check(*arguments))
        return loss
    return checked


def _as_optimizer(given: Any) -> Optimizer:
    return given if isinstance(given, Optimizer) else optimizer(given)


def _train_source(learner: TorchEstimator, data: TensorDataset) -> BatchSource:
    sampler = learner.sampler(data) if callable(learner.sampler) else learner.sampler
    options = {
        "batch_size": as_python(learner.batch_size),
        "shuffle": as_python(learner.shuffle) if sampler is None else False,
        "drop_last": as_python(learner.drop_last),
        "sampler": sampler,
    }
    if num_workers := as_python(learner.num_workers):
        return batches(data, num_workers=num_workers, **options)
    return batches(*data.tensors, hash_content=True, **options)


def _valid_source(learner: TorchEstimator, data: TensorDataset) -> BatchSource:
    return batches(*data.tensors, hash_content=True, batch_size=predict_batch_size(learner))


def _as_callbacks(given: Any, environment: dict[str, Any]) -> list[AsCallback]:
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"callbacks is a list of callbacks, not {given!r}")
    made = [_own_callback(each) for each in given]
    for callback in made:
        if isinstance(callback, CallbackSet):
            callback.environment = environment
    return made


def _own_callback(given: Any) -> AsCallback:
    """A callback of this fit alone: a fit does not change the arguments of a learner."""
    if isinstance(given, CallbackSet):
        return given.clone(deep=True)
    return as_torch_callback(given).generate()


def _stopping(learner: TorchEstimator) -> Sequence[AsCallback]:
    if learner.patience is None:
        return []
    if learner.validate is None:
        raise ValueError("patience: early stopping needs validation data; set validate, such as validate=0.2")
    patience, min_delta = as_python(learner.patience), as_python(learner.min_delta)
    return [early_stopping(patience, min_delta, learner.restore_best_weights)]
