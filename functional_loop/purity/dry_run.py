"""A dry run: a loop on tensors without memory, for the shapes, sizes and counts of the real run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import attrs
import torch
from torch import Tensor

from ..checkpoint import file as checkpoint_file
from ..checkpoint.state import state_dict
from ..checkpoint.writer import describe
from ..compat import fake_mode, without_modes
from ..core.batch import Batch, BatchSource
from ..core.callback import Callback, Hook
from ..core.context import Context
from ..core.errors import keeping_stop_iteration, noting
from ..core.plain import encode
from ..core.record import evolve, leaves_with_paths, tree_map
from ..core.stages import STAGES
from ..data.chosen_batches import GivenBatches
from ..engine.init import init
from ..engine.loop import Loop
from ..engine.template import template
from ..engine.train import iterate, train
from .check import object_of
from .fake_values import Allocations, Copies, Ones
from .probe import probed

_LOOKING = "dry run"

Forms = dict[str, str]
"""What every leaf of a context is, by its path: ``float32[64, 3]`` for a tensor, else a type."""


@attrs.frozen
class DryRun:
    """What a run will be, made by `dry_run`; ``str`` tells it to a person.

    ``stages`` has the leaves of the context that the hooks of a stage are given, first ``init``; sizes are in bytes.
    ``peak_bytes`` is an estimate of the most memory that tensors take at once, predictions that measures keep included;
    a run that steps in place takes less. Not in it: torch itself, data in memory, a network that the Loop has as a
    module, earlier contexts that are kept, and what kernels take for their work.
    """

    stages: dict[str, Forms] = attrs.field(repr=False)
    batches_per_epoch: int | None
    valid_batches: int | None
    epochs: int
    parameters: int
    memory: dict[str, int]
    peak_bytes: int
    checkpoint_bytes: int
    left_out: tuple[str, ...] = ()
    real: dict[str, float] = attrs.field(factory=dict)

    @property
    def steps(self) -> int | None:
        """Batches of the whole run, if that is known."""
        return None if self.batches_per_epoch is None else self.epochs * self.batches_per_epoch

    def __str__(self) -> str:
        return "\n".join(_lines(self))


@keeping_stop_iteration()
def dry_run(loop: Loop, seed: int = 0, *, real_batch: bool = False) -> DryRun:
    """Walk through all stages of ``loop`` on fake tensors, which have shapes and no values, and say what they are.

    A network of billions of parameters takes seconds and none of its memory, if the Loop has it as a function. The
    first batch of each source is read, for its shapes. Hooks run too, but for those of objects, which touch the
    world; what a hook or network reads from a tensor (``loss.item()``) is 1, or False.

    Args:
        loop: what to try out.
        seed: of the run.
        real_batch: whether to train on one batch, and to validate on one, for real too: on tensors with values and
            with their memory, again without objects. As in every first step, a network or loss that depends on more
            than the context is refused then.

    Raises:
        TypeError: ``loop`` is not a Loop.

    Errors of the network, the loss or a hook are raised as in training, and say where they come from.

    >>> import functional_loop as fl
    >>> from functional_loop.examples.digits import loop
    >>> found = dry_run(loop(epochs=10))
    >>> found.steps, found.parameters
    (230, 98026)
    >>> found.stages["batch_begin"]["batch.x"], found.stages["after_backward"]["y_hats"]
    ('float32[64, 1, 8, 8]', 'float32[64, 10]')
    """
    if not isinstance(loop, Loop):
        raise TypeError(f"dry_run takes a Loop, not {type(loop).__name__}")
    train_batch, valid_batch = _first(loop.train, seed), None if loop.valid is None else _first(loop.valid, seed)
    stages: dict[str, Forms] = {}
    kept: dict[str, int] = {}
    with fake_mode() as mode, Allocations() as allocated, Ones(), Copies():  # type: ignore[no-untyped-call]
        # Some states share their tensors with the parameters in the first epoch, and have their own in the second.
        batches = (_faked(train_batch, mode), None if valid_batch is None else _faked(valid_batch, mode))
        fake = _short(loop, *batches, epochs=2)
        looking = _look(stages, allocated)
        watched = evolve(fake, callbacks=[*fake.callbacks, looking])
        # Whether the bits of two calls are the same is seen with values only.
        probed(watched).done.update(("training", "evaluation"))
        start = init(watched, seed)
        stages["init"] = _forms(start)
        for ctx in iterate(start):
            if ctx.stage == "batch_end":
                trained = ctx
            kept[ctx.stage] = _bytes({name: m["predictions"] for name, m in ctx.measures.items() if m != ()})
        # As it will be saved: with the identity of the loop itself, but the network without memory.
        saved = evolve(loop, network=template(fake))
        end = evolve(ctx, loop=saved, callbacks={c.id: ctx.callbacks[c.id] for c in loop.callbacks})
        checkpoint_bytes = _checkpoint_size(end)
        memory = _memory(trained, train_batch, allocated)
        memory["predictions"] = max(
            kept["batch_end"] * _length(loop.train), kept.get("batch_valid_end", 0) * _length(loop.valid)
        )
    return DryRun(
        stages=stages,
        batches_per_epoch=loop.train.expected_length,
        valid_batches=None if loop.valid is None else loop.valid.expected_length,
        epochs=loop.epochs,
        parameters=sum(p.numel() for p in end.params.values()),
        memory=memory,
        peak_bytes=allocated.most + memory["predictions"],
        checkpoint_bytes=checkpoint_bytes,
        left_out=tuple(c.id for c in loop.callbacks if object_of(c) is not None),
        real=_for_real(_short(loop, train_batch, valid_batch, epochs=1), seed) if real_batch else {},
    )


def _length(source: BatchSource | None) -> int:
    return 1 if source is None or source.expected_length is None else source.expected_length


def _first(source: BatchSource, seed: int) -> Batch:
    batches: Any = source.fetch(seed, 1, 0, ())
    with closing(batches), noting(lambda: "while reading the first batch for a dry run"):
        batch: Batch
        for batch, _ in batches:
            return batch
    raise ValueError("the data gave no batch")


def _faked(batch: Batch, mode: Any) -> Batch:
    made: Batch = tree_map(lambda leaf: mode.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf, batch)
    return made


def _short(loop: Loop, train_batch: Batch, valid_batch: Batch | None, epochs: int) -> Loop:
    """Epochs of one batch that are validated on one batch, without the hooks of objects."""
    return evolve(
        loop,
        train=GivenBatches((train_batch,)),
        valid=None if valid_batch is None else GivenBatches((valid_batch,)),
        epochs=epochs,
        eval_freq=1,
        check_pure=False,
        compile=False,
        callbacks=[_without_effects(callback) for callback in loop.callbacks],
    )


def _without_effects(callback: Callback) -> Callback:
    if object_of(callback) is None:
        return callback
    named = {name: getattr(callback, name) for name in ("init", "weight", "kind", "volatile", "replays", "source")}
    return Callback(callback.id, **named)


def _look(stages: dict[str, Forms], allocated: Allocations) -> Callback:
    """A callback that notes the context of every stage, and the memory of a forward and backward pass."""

    def look(stage: str) -> Hook:
        def note(ctx: Context) -> Context:
            if stage == "batch_begin":
                allocated.begin()
            if stage == "after_backward":
                allocated.end()
            stages.setdefault(stage, _forms(ctx))
            return ctx

        return note

    hooks: Any = {stage: look(stage) for stage in STAGES}
    return Callback(_LOOKING, weight=float("inf"), **hooks)


def _forms(ctx: Context) -> Forms:
    leaves = leaves_with_paths(ctx)
    return {path.removeprefix("."): _form(leaf) for path, leaf in leaves if path != f".callbacks[{_LOOKING!r}]"}


def _form(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
    return repr(leaf) if leaf in ((), None) else type(leaf).__name__


def _bytes(tree: Any) -> int:
    """The memory of the tensors in a tree, of every one once."""
    tensors = {id(leaf): leaf for _, leaf in leaves_with_paths(tree) if isinstance(leaf, Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _memory(ctx: Context, batch: Batch, allocated: Allocations) -> dict[str, int]:
    own = {id(tensor) for tensor in (*ctx.params.values(), *ctx.buffers.values())}
    slots = [leaf for _, leaf in leaves_with_paths(ctx.callbacks) if id(leaf) not in own]
    return {
        "parameters": _bytes(ctx.params),
        "buffers": _bytes(ctx.buffers),
        "optimizer": _bytes(ctx.optimizer_state),
        "callbacks": _bytes(slots),
        "batch": _bytes(batch),
        "gradients": sum(ctx.params[name].numel() * ctx.params[name].element_size() for name in ctx.trainable),
        "forward and backward": allocated.peak,
    }


def _checkpoint_size(ctx: Context) -> int:
    """The size of a checkpoint file, of tensors that have a shape and the memory of one element."""
    state, known = state_dict(ctx), {}

    def stand_in(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            known[id(tensor)] = torch.empty((), dtype=tensor.dtype, device="cpu").expand(tensor.shape)
        return known[id(tensor)]

    def real(node: Any) -> Any:
        if isinstance(node, Tensor):
            return stand_in(node)
        if isinstance(node, dict):
            return {key: real(value) for key, value in node.items()}
        return [real(value) for value in node] if isinstance(node, list) else node

    with without_modes():
        return checkpoint_file.size(real(encode(state)), describe(ctx, state))


def _for_real(loop: Loop, seed: int) -> dict[str, float]:
    start = init(loop, seed)
    begin = time.perf_counter()
    ctx = train(start, steps=1)
    seconds = time.perf_counter() - begin
    assert isinstance(ctx.last_loss, Tensor)
    end = train(ctx)
    scores = {f"valid.{id}": score for id, score in dict(end.last_scores_valid).items()}
    return {"loss": ctx.last_loss.item(), "seconds": seconds, **scores}


def _lines(found: DryRun) -> Iterator[str]:
    """What a person wants to know: counts, sizes, and what every stage brings."""
    epochs = _count(found.epochs, "epoch", "epochs")
    if found.steps is None:
        yield f"steps        unknown: the data has no length; {epochs}"
    else:
        yield f"steps        {found.steps:,}: {epochs} of {_count(found.batches_per_epoch or 0, 'batch', 'batches')}"
    if found.valid_batches is not None:
        yield f"validation   {_count(found.valid_batches, 'batch', 'batches')}"
    yield f"parameters   {found.parameters:,}"
    parts = "  ".join(f"{name} {size_text(size)}" for name, size in found.memory.items() if size)
    yield f"peak memory  about {size_text(found.peak_bytes)}: {parts}"
    yield f"checkpoint   {size_text(found.checkpoint_bytes)}"
    if found.left_out:
        yield f"left out     {', '.join(found.left_out)}: objects, whose methods touch the world"
    if found.real:
        shown = "  ".join(f"{name} {value:.4g}" for name, value in found.real.items())
        yield f"real batch   {shown}"
    before: Forms = {}
    for stage, forms in found.stages.items():
        tensors = {path: form for path, form in forms.items() if form.endswith("]")}
        changes = [f"  {path}  {form}" for path, form in tensors.items() if before.get(path) != form]
        changes += [f"  {path}  gone" for path in before if path not in tensors]
        yield f"{stage}:{'' if changes else ' as before'}"
        yield from changes
        before = tensors


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def size_text(size: int) -> str:
    """A number of bytes for people.

    >>> size_text(999), size_text(4_300_000), size_text(12 * 10**9)
    ('999 B', '4.3 MB', '12.0 GB')
    """
    amount, units = float(size), ["B", "kB", "MB", "GB", "TB"]
    while amount >= 1000 and len(units) > 1:
        amount, units = amount / 1000, units[1:]
    return f"{amount:.1f} {units[0]}" if units[0] != "B" else f"{size} B"
