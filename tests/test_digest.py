"""Digests: equal bits, equal digest; and any other durable bit, another one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor

import functional_loop as fl
from tests.sample_loops import counter, middle, recorder


def flipped(ctx: fl.Context, name: str, change: Callable[[Tensor], Tensor], field: str = "params") -> fl.Context:
    tensors = getattr(ctx, field)
    return fl.evolve(ctx, **{field: {**tensors, name: change(tensors[name])}})


def one_bit(tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    changed.view(torch.uint8).flatten()[0] ^= 1
    return changed


def other_slot(ctx: fl.Context) -> fl.Context:
    slots = ctx.optimizer_state["slots"]
    slot = {**slots["0.weight"], "exp_avg": one_bit(slots["0.weight"]["exp_avg"])}
    return fl.evolve(ctx, optimizer_state={**ctx.optimizer_state, "slots": {**slots, "0.weight": slot}})


def other_measures(ctx: fl.Context) -> fl.Context:
    running = ctx.measures["train"]
    (chunk,) = running["predictions"]
    changed = {**running, "predictions": [{**chunk, "y": one_bit(chunk["y"])}]}
    return fl.evolve(ctx, measures={**ctx.measures, "train": changed})


CHANGES: dict[str, Callable[[fl.Context], fl.Context]] = {
    "a bit of a parameter": lambda ctx: flipped(ctx, "0.weight", one_bit),
    "a bit of a buffer": lambda ctx: flipped(ctx, "1.running_mean", one_bit, "buffers"),
    "the sign of a zero": lambda ctx: flipped(flipped(ctx, "0.bias", torch.zeros_like), "0.bias", torch.neg),
    "dtype": lambda ctx: flipped(ctx, "0.weight", lambda tensor: tensor.view(torch.int32)),
    "shape": lambda ctx: flipped(ctx, "0.weight", lambda tensor: tensor.reshape(3, 4)),
    "a slot of the optimizer": other_slot,
    "learning rate": lambda ctx: ctx.with_hyperparameters(lr=0.02),
    "type of the learning rate": lambda ctx: ctx.with_hyperparameters(weight_decay=torch.tensor(0.01)),
    "state of a callback": lambda ctx: ctx.with_callback_state("counter", 5),
    "bool for int": lambda ctx: ctx.with_callback_state("counter", True),
    "float for int": lambda ctx: ctx.with_callback_state("counter", 4.0),
    "list for number": lambda ctx: ctx.with_callback_state("counter", [4]),
    "tuple for list": lambda ctx: ctx.with_callback_state("counter", [()]),
    "running measures": other_measures,
    "scores": lambda ctx: fl.evolve(ctx, last_scores_train={"error": 0.0}),
    "validation scores": lambda ctx: fl.evolve(ctx, last_scores_valid=()),
    "seed": lambda ctx: fl.evolve(ctx, seed=4),
    "epoch": lambda ctx: fl.evolve(ctx, epoch=3),
    "step": lambda ctx: fl.evolve(ctx, step=2),
    "step_valid": lambda ctx: fl.evolve(ctx, step_valid=1),
    "global_step": lambda ctx: fl.evolve(ctx, global_step=5),
    "stage": lambda ctx: fl.evolve(ctx, stage="epoch_begin"),
    "terminate": lambda ctx: fl.evolve(ctx, terminate=True),
    "trainable": lambda ctx: fl.evolve(ctx, trainable=ctx.trainable[1:]),
    "last loss": lambda ctx: fl.evolve(ctx, last_loss=()),
    "open window": lambda ctx: flipped(ctx, "0.weight", one_bit, "accumulated"),
    "no window": lambda ctx: fl.evolve(ctx, accumulated=()),
    "state of the data": lambda ctx: fl.evolve(ctx, data={"position": 1}),
}


def test_every_durable_field_is_in_the_digest() -> None:
    ctx = middle()
    digests = {"unchanged": fl.digest(ctx)} | {name: fl.digest(change(ctx)) for name, change in CHANGES.items()}
    zero = fl.digest(flipped(ctx, "0.bias", torch.zeros_like))
    assert len({zero, *digests.values()}) == len(digests) + 1
    assert all(len(digest) == 64 for digest in digests.values())


def test_numbers_of_a_slot_are_told_apart_by_their_bits() -> None:
    ctx = middle()
    values = [0, 0.0, -0.0, False, None, "", "0", [], {}, (), [0], {"0": 0}, torch.tensor(0), torch.tensor(0.0)]
    digests = {fl.digest(ctx.with_callback_state("counter", value)) for value in values}
    assert len(digests) == len(values)


def test_the_digest_does_not_depend_on_observers_order_or_memory() -> None:
    ctx = middle()
    same = [
        middle(callbacks=[counter(), recorder([], repr)]),
        middle(callbacks=[recorder([], repr), counter()]),
        middle(epochs=5),
        fl.evolve(ctx, params=dict(reversed(ctx.params.items()))),
        fl.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, ctx),
        fl.evolve(ctx, params={name: param.t().contiguous().t() for name, param in ctx.params.items()}),
    ]
    assert {fl.digest(each) for each in same} == {fl.digest(ctx)}


def test_the_digest_is_the_same_in_a_fresh_process() -> None:
    program = (
        "import torch; torch.set_num_threads(1)\n"
        "import functional_loop as fl; from tests.sample_loops import middle; print(fl.digest(middle()))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == fl.digest(middle())
