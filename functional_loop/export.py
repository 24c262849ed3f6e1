"""A context as ordinary PyTorch objects: a trained module, and an optimizer that carries the state."""

from __future__ import annotations

import torch
from torch import nn

from .context import Context, check_context
from .ensembles.ensemble import one_member
from .loop import make_module
from .network import private_copy


def to_module(ctx: Context, member: int | None = None) -> nn.Module:
    """A module with its own copies of the parameters and buffers of ``ctx``, in the mode of the loop's network.

    Args:
        member: of a stacked context, which one.

    Raises:
        IndexError, ValueError: there is no such member, or no member is named where there are several.

    >>> from functional_loop.examples.digits import loop
    >>> import functional_loop as fl
    >>> ctx = fl.init(loop())
    >>> module = fl.to_module(ctx)
    >>> all(torch.equal(p, ctx.params[name]) for name, p in module.named_parameters())
    True
    """
    check_context(ctx, "to_module")
    ctx = one_member(ctx, member, "to_module")
    network = ctx.loop.network
    module = private_copy(network) if isinstance(network, nn.Module) else make_module(network, ctx.seed)
    trainable = frozenset(ctx.trainable)
    made: dict[int, torch.Tensor] = {}
    for name, parameter in module.named_parameters():
        made[id(parameter)] = nn.Parameter(ctx.params[name].clone(), requires_grad=name in trainable)
    for name, buffer in module.named_buffers():
        made[id(buffer)] = ctx.buffers[name].clone()
    for part in module.modules():
        for container in (part._parameters, part._buffers):
            for key, tensor in container.items():
                if tensor is not None:
                    container[key] = made[id(tensor)]  # type: ignore[assignment]
        if isinstance(part, nn.RNNBase):
            part._init_flat_weights()
    return module


def to_optimizer(ctx: Context, module: nn.Module, member: int | None = None) -> torch.optim.Optimizer:
    """An ordinary torch optimizer over the parameters of ``module`` that goes on from the state of ``ctx``.

    Args:
        module: a module of the network's structure, such as `to_module` gives.
        member: of a stacked context, which one.

    Raises:
        ValueError: its parameters have other names or shapes.

    >>> from functional_loop.examples.digits import loop
    >>> import functional_loop as fl
    >>> ctx = fl.train(fl.init(loop()), steps=3)
    >>> optimizer = fl.to_optimizer(ctx, fl.to_module(ctx))
    >>> type(optimizer).__name__, optimizer.param_groups[0]["lr"]
    ('AdamW', 0.003)
    """
    check_context(ctx, "to_optimizer")
    ctx = one_member(ctx, member, "to_optimizer")
    params: dict[str, torch.Tensor] = dict(module.named_parameters())
    for name in params.keys() ^ ctx.params.keys():
        raise ValueError(f"to_optimizer: parameter {name!r} is in only one of the module and the context")
    for name, parameter in params.items():
        if parameter.shape != ctx.params[name].shape:
            raise ValueError(
                f"to_optimizer: parameter {name!r} is of shape {list(parameter.shape)} in the module and of "
                f"{list(ctx.params[name].shape)} in the context"
            )
    return ctx.loop.optimizer.to_torch(params, ctx.optimizer_state)
