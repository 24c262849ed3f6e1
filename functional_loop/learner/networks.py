"""Networks made for the shape of the data."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..core.record import did_you_mean

SHAPE = ("n_features", "n_outputs", "input_shape")
"""What a function that makes a network may ask for."""


def mlp(
    input_shape: tuple[int, ...],
    n_outputs: int,
    hidden: int | Sequence[int] = (100,),
    activation: Callable[[], nn.Module] = nn.ReLU,
    dropout: float = 0.0,
) -> nn.Sequential:
    """A multilayer perceptron: the network of a learner that is given none.

    Args:
        input_shape: the shape of a row; rows of more than one dimension are flattened.
        n_outputs: outputs per row.
        hidden: the width of every hidden layer; an integer for one layer, ``()`` for a linear model.
        activation: makes the module after every hidden layer.
        dropout: the probability with which hidden units are dropped while training.

    >>> mlp((4,), 3, hidden=8)
    Sequential(
      (0): Linear(in_features=4, out_features=8, bias=True)
      (1): ReLU()
      (2): Linear(in_features=8, out_features=3, bias=True)
    )
    """
    layers: list[nn.Module] = [nn.Flatten()] if len(input_shape) > 1 else []
    width = math.prod(input_shape)
    for units in [hidden] if isinstance(hidden, int) else hidden:
        layers += [nn.Linear(width, units), activation()]
        if dropout:
            layers.append(nn.Dropout(dropout))
        width = units
    return nn.Sequential(*layers, nn.Linear(width, n_outputs))


def network_for(network: Any, input_shape: tuple[int, ...], n_outputs: int) -> nn.Module | Callable[[], nn.Module]:
    """What a Loop takes as network: a module as it is, a function of the shape as a function of no arguments.

    Args:
        network: a module, or a class or function with any of the arguments ``n_features`` (the size of the first
            dimension of a row), ``n_outputs`` and ``input_shape``.

    Raises:
        TypeError: ``network`` is something else, or needs other arguments.

    >>> make = network_for(lambda n_features, n_outputs: nn.Linear(n_features, n_outputs), (4,), 3)
    >>> make()
    Linear(in_features=4, out_features=3, bias=True)
    """
    if isinstance(network, nn.Module):
        return network
    if not callable(network):
        raise TypeError(
            f"network is an nn.Module, or a class or function of {', '.join(SHAPE)} that makes one, not {network!r}"
        )
    parameters = inspect.signature(network).parameters.values()
    for parameter in parameters:
        required = parameter.default is parameter.empty and parameter.kind not in _COLLECTING
        if required and parameter.name not in SHAPE:
            raise TypeError(
                f"network: nothing says what its argument {parameter.name!r} is{did_you_mean(parameter.name, SHAPE)}; "
                f"set_params(network__{parameter.name}=...) gives it a value"
            )
    given = {"n_features": input_shape[0], "n_outputs": n_outputs, "input_shape": input_shape}
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    names = {parameter.name for parameter in parameters}
    arguments = {name: value for name, value in given.items() if takes_all or name in names}
    return lambda: network(**arguments)


_COLLECTING = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
