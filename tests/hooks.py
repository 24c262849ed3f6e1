"""Pure callbacks of many kinds, for tests of what holds for all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

import functional_loop as fl


def ema(decay: float = 0.9) -> fl.Callback:
    def update(ctx: fl.Context) -> fl.Context:
        average = fl.tree_map(lambda a, p: torch.lerp(p, a, decay), ctx.callbacks["ema"], ctx.params)
        return ctx.with_callback_state("ema", average)

    return fl.Callback("ema", init=lambda ctx: ctx.params, batch_end=update)


def counter() -> fl.Callback:
    """How often each stage has run, in a slot that grows."""

    def count(stage: str, ctx: fl.Context) -> fl.Context:
        counts = ctx.callbacks["counter"]
        return ctx.with_callback_state("counter", {**counts, stage: counts.get(stage, 0) + 1})

    hooks = {stage: partial(count, stage) for stage in fl.STAGES}
    return fl.Callback("counter", init=lambda ctx: {}, **hooks)


def clipping(largest: float = 0.1) -> fl.Callback:
    """What `torch.nn.utils.clip_grad_norm_` does, without writing to the gradients."""

    def clip(ctx: fl.Context) -> fl.Context:
        norm = torch.nn.utils.get_total_norm(ctx.grads.values())
        factor = (largest / (norm + 1e-6)).clamp(max=1.0)
        return fl.evolve(ctx, grads={name: grad * factor for name, grad in ctx.grads.items()})

    return fl.Callback("clipping", after_backward=clip)


def gradient_noise() -> fl.Callback:
    """Randomness in a hook, derived as the loop derives its own."""

    def add(ctx: fl.Context) -> fl.Context:
        with fl.seeded(fl.fold_in(ctx.seed, "gradient noise", ctx.global_step)):
            return fl.evolve(ctx, grads={name: g + 0.01 * torch.randn_like(g) for name, g in ctx.grads.items()})

    return fl.Callback("gradient_noise", after_backward=add, weight=-1)


def input_noise() -> fl.Callback:
    def add(ctx: fl.Context) -> fl.Context:
        with fl.seeded(fl.fold_in(ctx.seed, "input noise", ctx.global_step)):
            noisy = ctx.batch.x + 0.01 * torch.randn_like(ctx.batch.x)
        return fl.evolve(ctx, batch=fl.evolve(ctx.batch, x=noisy))

    return fl.Callback("input_noise", batch_begin=add)


def schedule(gamma: float = 0.9) -> fl.Callback:
    """The learning rate of every group decays with every update."""

    def decay(ctx: fl.Context) -> fl.Context:
        for number, group in enumerate(ctx.optimizer_state["groups"]):
            ctx = ctx.with_hyperparameters(number, lr=group["lr"] * gamma)
        return ctx

    return fl.Callback("schedule", batch_end=fl.when(lambda ctx: not ctx.accumulated, decay))


def freezing() -> fl.Callback:
    """Odd epochs train the last two parameters only."""

    def choose(ctx: fl.Context) -> fl.Context:
        names = tuple(ctx.params)
        return fl.evolve(ctx, trainable=names[-2:] if ctx.epoch % 2 else names)

    return fl.Callback("freezing", epoch_begin=choose)


def best() -> fl.Callback:
    """The parameters of the lowest loss seen at the end of an epoch, which come back at the end."""

    def keep(ctx: fl.Context) -> fl.Context:
        slot, loss = ctx.callbacks["best"], ctx.last_loss.item()
        if slot["loss"] is not None and slot["loss"] <= loss:
            return ctx
        state = {"loss": loss, "params": ctx.params, "buffers": ctx.buffers, "history": [*slot["history"], ctx.epoch]}
        return ctx.with_callback_state("best", state)

    def restore(ctx: fl.Context) -> fl.Context:
        slot = ctx.callbacks["best"]
        return fl.evolve(ctx, params=slot["params"], buffers=slot["buffers"]) if slot["params"] != () else ctx

    start = {"loss": None, "params": (), "buffers": {}, "history": []}
    return fl.Callback("best", init=lambda ctx: start, epoch_end=keep, end=restore, weight=1000)


def history() -> fl.Callback:
    """The scores of every epoch, so that one that is lost is missed at the end."""

    def add(ctx: fl.Context) -> fl.Context:
        row = {"epoch": ctx.epoch, "train": ctx.last_scores_train, "valid": ctx.last_scores_valid}
        return ctx.with_callback_state("history", [*ctx.callbacks["history"], row])

    return fl.Callback("history", init=lambda ctx: [], epoch_end=add)


def stopping(epoch: int = 1) -> fl.Callback:
    stop = fl.when(lambda ctx: ctx.epoch == epoch, lambda ctx: fl.evolve(ctx, terminate=True))
    return fl.Callback("stopping", before_valid=stop)


def observer(look: Callable[[fl.Context], object] = repr) -> fl.Callback:
    """Looks at the context at every stage and changes nothing."""

    def observe(ctx: fl.Context) -> fl.Context:
        look(ctx)
        return ctx

    return fl.Callback("observer", **dict.fromkeys(fl.STAGES, observe))


CALLBACKS: dict[str, Callable[[], fl.Callback]] = {
    "ema": ema,
    "counter": counter,
    "clipping": clipping,
    "gradient_noise": gradient_noise,
    "input_noise": input_noise,
    "schedule": schedule,
    "freezing": freezing,
    "best": best,
    "history": history,
    "stopping": stopping,
    "observer": observer,
}
