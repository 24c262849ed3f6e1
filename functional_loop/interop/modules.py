"""A context as ordinary PyTorch objects: trained modules, and an optimizer that carries the state."""

from __future__ import annotations

import torch
from torch import nn

from ..core.context import Context, check_context
from ..core.record import evolve
from ..engine.network import LOSS, WithLoss, has_tensors, private_copy
from ..engine.template import make_module, modes
from ..ensembles.ensemble import one_member


def to_module(ctx: Context, part: str = "network", member: int | None = None) -> nn.Module:
    """A module with its own copies of the parameters and buffers of ``ctx``, in the mode of the loop's.

    Where the optimizer has other values of the parameters for evaluation (schedule-free ones), it has these.

    Args:
        part: ``"network"``, or ``"loss"`` for the loss, if that is a module.
        member: of a stacked context, which one.

    Raises:
        IndexError, ValueError: there is no such member, or no member is named where there are several; the loss is a
            function.

    >>> from functional_loop.examples.digits import loop
    >>> import functional_loop as fl
    >>> ctx = fl.init(loop())
    >>> module = fl.to_module(ctx)
    >>> all(torch.equal(p, ctx.params[name]) for name, p in module.named_parameters())
    True
    """
    check_context(ctx, "to_module")
    if part not in ("network", "loss"):
        raise ValueError(f"to_module: the part is 'network' or 'loss', not {part!r}; a member is given as member=")
    ctx = for_evaluation(one_member(ctx, member, "to_module"))
    loss = ctx.loop.loss
    if part == "loss" and not has_tensors(loss):
        if not isinstance(loss, nn.Module):
            raise ValueError(f"to_module: the loss is no module, but {loss!r}")
        return private_copy(loss, "loss")
    whole = _private(ctx)
    module = whole.parts()[part]
    _fill(module, whole, ctx)
    return module


def for_evaluation(ctx: Context) -> Context:
    """``ctx`` with the parameters to evaluate with."""
    optimizer = ctx.loop.optimizer
    return (
        evolve(ctx, params=optimizer.evaluation_params(ctx.params, ctx.optimizer_state)) if optimizer.has_modes else ctx
    )


def to_modules(ctx: Context) -> WithLoss:
    """Network and loss, as `to_module` gives them, with the tensors that they share."""
    whole = _private(ctx)
    _fill(whole, whole, ctx)
    return whole


def _private(ctx: Context) -> WithLoss:
    network = ctx.loop.network
    module = network if isinstance(network, nn.Module) else make_module(network, ctx.seed)
    whole = WithLoss(module, ctx.loop.loss, modes(ctx.loop)).copied()
    whole.keep_modes()
    return whole


def _fill(module: nn.Module, whole: WithLoss, ctx: Context) -> None:
    """Put copies of the tensors of ``ctx`` into ``module``, which is ``whole`` or a part of it."""
    trainable = frozenset(ctx.trainable)
    names = {id(tensor): name for name, tensor in {**whole.params(), **whole.statistics()}.items()}
    made: dict[str, torch.Tensor] = {}
    for part in module.modules():
        for container in (part._parameters, part._buffers):
            for key, tensor in container.items():
                if tensor is None:
                    continue
                name = names[id(tensor)]
                if name not in made and name in ctx.params:
                    made[name] = nn.Parameter(ctx.params[name].clone(), requires_grad=name in trainable)
                elif name not in made:
                    made[name] = ctx.buffers[name].clone()
                container[key] = made[name]  # type: ignore[assignment]
        if isinstance(part, nn.RNNBase):
            part._init_flat_weights()


def to_optimizer(
    ctx: Context, module: nn.Module, loss: nn.Module | None = None, member: int | None = None
) -> torch.optim.Optimizer:
    """An ordinary torch optimizer over the parameters of ``module`` that goes on from the state of ``ctx``.

    One that has a mode for evaluation (a schedule-free one) is in it: call its ``train()`` before a step.

    Args:
        module: a module of the network's structure, such as `to_module` gives.
        loss: if the loss has parameters, a module of its structure: ``to_module(ctx, "loss")``.
        member: of a stacked context, which one.

    Raises:
        ValueError: their parameters have other names or shapes.

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
    if loss is not None:
        params = WithLoss(module, loss).params()
    for name in sorted(params.keys() ^ ctx.params.keys()):
        hint = ""
        if loss is None and name.startswith(LOSS) and has_tensors(ctx.loop.loss):
            hint = ': it is one of the loss, to be given too: to_optimizer(ctx, module, to_module(ctx, "loss"))'
        raise ValueError(f"to_optimizer: parameter {name!r} is in only one of the module and the context{hint}")
    for name, parameter in params.items():
        if parameter.shape != ctx.params[name].shape:
            raise ValueError(
                f"to_optimizer: parameter {name!r} is of shape {list(parameter.shape)} in the module and of "
                f"{list(ctx.params[name].shape)} in the context"
            )
    return _optimizer_over(ctx, params)


def _optimizer_over(ctx: Context, params: dict[str, torch.Tensor]) -> torch.optim.Optimizer:
    """In its mode for evaluation, if it has one: as the parameters are that `to_module` gives."""
    optimizer = ctx.loop.optimizer
    instance = optimizer.to_torch(params, ctx.optimizer_state)
    if optimizer.has_modes:
        values = {name: param.detach().clone() for name, param in params.items()}
        instance.eval()  # type: ignore[attr-defined]
        with torch.no_grad():
            for name, param in params.items():
                param.copy_(values[name])
    return instance
