"""The first context of a run."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checkpoint.identity import described, remember_start
from ..core.context import Context
from ..core.plain import check_plain
from ..core.record import evolve
from ..purity.constants import drawn, views_of_state
from ..purity.overlaps import check_separate
from ..purity.probe import probed
from .hooks import hooks_of
from .loop import Loop
from .network import WithLoss, check_module
from .template import TEMPLATE_SEED, make_module, modes, template


def init(loop: Loop, seed: int = 0, *, optimizer_state_from: torch.optim.Optimizer | None = None) -> Context:
    """The context before ``begin``: parameters and buffers of network and loss, fresh state for all else.

    Args:
        loop: what to train.
        seed: any integer; everything random in the run is a function of it.
        optimizer_state_from: an ordinary torch optimizer over the parameters of ``loop.network``, and of ``loop.loss``
            if that has any, in mid-flight: its state and hyperparameters are copied, so that training goes on where a
            hand-written loop left off.

    Raises:
        ValueError: a lazy network, an optimizer that does not fit the network, a loss with parameters beside a network
            with a child ``loss``, parameters or buffers that share memory, a number in an attribute of the network
            that is drawn anew for every seed.
        TypeError: a seed that is not an integer, a callback's initial state that can't be saved.

    >>> import functional_loop as fl
    >>> net = nn.Linear(2, 1)
    >>> loop = fl.Loop(net, nn.functional.mse_loss, fl.optimizer(torch.optim.SGD, lr=0.1),
    ...                train=fl.batches(torch.ones(4, 2), torch.ones(4, 1), batch_size=2), epochs=1)
    >>> ctx = fl.init(loop, seed=0)
    >>> sorted(ctx.params)
    ['bias', 'weight']
    """
    if not isinstance(loop, Loop):
        raise TypeError(f"init takes a Loop, not {type(loop).__name__}")
    if type(seed) is not int:
        raise TypeError(f"the seed is an integer, not {seed!r}")
    module = loop.network if isinstance(loop.network, nn.Module) else make_module(loop.network, seed)
    empty = template(loop, module)
    modes(loop)
    suspects = probed(loop).suspects
    suspects.update(views_of_state(module))
    if empty is not module:
        suspects.update(drawn(module, empty, lambda: make_module(loop.network, TEMPLATE_SEED)))
    whole = WithLoss(module, loop.loss)
    for role, part in whole.parts().items():
        check_module(part, role)
    # Before training: hooks may write to what they were made with.
    described(loop)
    check_separate([*whole.params().items(), *whole.statistics().items()])
    params = {name: own(p, loop.device) for name, p in whole.params().items()}
    buffers = {name: own(b, loop.device) for name, b in whole.statistics().items()}
    requires_grad = [name for name, p in whole.params().items() if p.requires_grad]
    if optimizer_state_from is None:
        optimizer_state = loop.optimizer.init(params)
    elif isinstance(loop.network, nn.Module):
        optimizer_state = loop.optimizer.from_torch(optimizer_state_from, whole.params())
    else:
        raise ValueError("optimizer_state_from needs a Loop whose network is the module that the optimizer is over")
    ctx = Context(
        loop,
        params,
        buffers,
        optimizer_state,
        callbacks=dict.fromkeys((c.id for c in loop.callbacks), ()),
        seed=seed,
        trainable=loop.optimizer.covers(requires_grad),
        measures={"train": (), "valid": ()},
    )
    if not isinstance(loop.network, nn.Module):
        remember_start(ctx)
    slots = hooks_of(loop).initial(ctx)
    for id, slot in slots.items():
        check_plain(slot, f"the initial state of callback {id!r}")
    return evolve(ctx, callbacks={**ctx.callbacks, **slots})


def own(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the same values with memory of its own."""
    return tensor.detach().to(device, copy=True)
