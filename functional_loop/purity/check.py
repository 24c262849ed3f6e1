"""The purity check: callbacks whose functions are watched, and run twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..core.callback import Callback
from ..core.context import Context
from ..core.errors import PurityError, noting
from ..core.record import did_you_mean, tree_equal
from ..core.rng import seeded
from ..data.tensors import TensorSource
from ..engine.template import with_loss
from .before import Given, nodes
from .watch import GlobalGenerators, Watch

if TYPE_CHECKING:
    from ..engine.loop import Loop

# Any seed that is not the one at hand.
_ANOTHER_SEED = 0x5EED


def checked(callback: Callback) -> Callback:
    """A callback that does the same, and whose functions raise a `PurityError` where they are not pure.

    A function that writes to what it was given, leaves a setting of torch changed, or returns a context of another form
    is found out in one run. To find what depends on more than the context and the seed of the hook, every hook is run a
    second time from the same context and must return the same bits without writing to what it returned before: under
    the same seed if it draws, else under another. Not run again are the hooks of objects, of volatile callbacks, and
    those of ``exit`` and ``resume``: they are for effects.
    """
    named: dict[str, Any] = {"init": callback.init, "resume": callback.resume, **callback.hooks}
    functions: dict[str, Any] = {stage: _checked(callback, stage, f) for stage, f in named.items() if f is not None}
    return callback.remade(**functions)


def object_of(callback: Callback) -> Any:
    """The object with a state that a callback was made from, if it was."""
    methods = ("state_dict", "load_state_dict")
    return callback.source if all(hasattr(callback.source, name) for name in methods) else None


def _checked(callback: Callback, stage: str, function: Callable[[Context], Any]) -> Callable[[Context], Any]:
    who = f"{'init' if stage == 'init' else f'the hook of {stage!r}'} of callback {callback.id!r}"
    repeats = stage not in ("exit", "resume") and not callback.volatile and object_of(callback) is None

    def run(ctx: Context) -> Any:
        given = Given({"ctx": ctx, **_of_the_loop(ctx.loop)})
        watch, generators = Watch(who, given, "make a new value instead"), GlobalGenerators()
        result = watch.run(function, ctx)
        if isinstance(result, Context):
            watch.findings += (f"returned {line}" for line in _differences_of_form(ctx, result))
        _complain(who, watch.findings)
        if repeats:
            after = GlobalGenerators()
            if watch.draws:
                generators.put_back()
            with nullcontext() if watch.draws else seeded(_ANOTHER_SEED):
                _repeat(who, function, ctx, result)
            after.put_back()
        return result

    return run


def _repeat(who: str, function: Callable[[Context], Any], ctx: Context, first: Any) -> None:
    """Run ``function`` again, and compare."""
    name = "ctx, as it was returned before" if isinstance(first, Context) else "the state"
    watch = Watch(who, Given({name: first}), "it keeps a tensor that it has given away: return a copy")
    with noting(lambda: "when check_pure ran it a second time from the same context"):
        second = watch.run(function, ctx)
    _complain(who, watch.findings)
    if difference := _first_difference(first, second):
        _complain(who, [f"depends on more than the context: from the same one it returned two, {difference}"])


def _complain(who: str, findings: list[str]) -> None:
    if findings:
        raise PurityError(who, findings)


def _of_the_loop(loop: Loop) -> dict[str, Any]:
    """What can be reached through ``ctx.loop`` and written to."""
    parts = with_loss(loop).parts().items()
    found: dict[str, Any] = {
        f"ctx.loop.{role}": {**dict(part.named_parameters()), **dict(part.named_buffers())} for role, part in parts
    }
    for name, source in (("train", loop.train), ("valid", loop.valid)):
        if isinstance(source, TensorSource):
            found |= {f"ctx.loop.{name}.x": source.x, f"ctx.loop.{name}.y": source.y}
    return found


def _first_difference(one: Any, other: Any) -> str:
    left, right = dict(nodes(one, "")), dict(nodes(other, ""))
    for path in {**left, **right}:
        if path not in left or path not in right:
            return f"of which one has {path}"
        a, b = left[path], right[path]
        same_kind = type(a) is type(b)
        if a is b or (same_kind and isinstance(a, (dict, list, tuple, Context)) and (a or not isinstance(a, tuple))):
            continue
        if not (comparison := tree_equal(a, b)):
            return f"with {path.removeprefix('.') or 'a value that'} {comparison.reason}"
    return ""


def _differences_of_form(before: Context, after: Context) -> Iterator[str]:
    """How the form of ``after`` is not what the loop goes on from; contents of slots and batches are free."""
    if after.loop is not before.loop:
        yield "a context of another Loop"
    yield from _named("ctx.params", before.params, after.params)
    yield from _named("ctx.buffers", before.buffers, after.buffers)
    for field in ("grads", "accumulated"):
        if isinstance(values := getattr(after, field), dict):
            for name, value in values.items():
                if name not in before.params:
                    yield f"ctx.{field}[{name!r}]{did_you_mean(name, before.params)}"
                else:
                    yield from _tensor(f"ctx.{field}[{name!r}]", before.params[name], value)
        elif values != ():
            yield f"ctx.{field} as {type(values).__name__}, which is a dict by name"
    yield from _groups(before.optimizer_state.get("groups", []), after.optimizer_state.get("groups", []))
    yield from _slots(before, after)
    if after.callbacks.keys() != before.callbacks.keys():
        yield f"ctx.callbacks with the ids {', '.join(after.callbacks)}, which were {', '.join(before.callbacks)}"
    for field in ("seed", "epoch", "step", "step_valid", "global_step", "stage", "terminate", "trainable", "running"):
        was, now = getattr(before, field), getattr(after, field)
        if type(was) is not type(now):
            yield f"ctx.{field} as {type(now).__name__}, which was {type(was).__name__}"
    if isinstance(before.last_loss, Tensor):
        yield from _tensor("ctx.last_loss", before.last_loss, after.last_loss)
    yield from _graphs_and_devices(before, after)


def _named(path: str, before: dict[str, Tensor], after: Any) -> Iterator[str]:
    if not isinstance(after, dict):
        yield f"{path} as {type(after).__name__}, which was a dict by name"
        return
    for name in {**before, **after}:
        if name not in after or name not in before:
            yield f"{path} {'without' if name in before else 'with a new'} {name!r}"
        else:
            yield from _tensor(f"{path}[{name!r}]", before[name], after[name])


def _tensor(path: str, before: Tensor, after: Any) -> Iterator[str]:
    if not isinstance(after, Tensor):
        yield f"{path} as {type(after).__name__}, which was a tensor"
        return
    for what in ("dtype", "shape", "device"):
        was, now = getattr(before, what), getattr(after, what)
        if was != now:
            yield f"{path} with {what} {list(now) if what == 'shape' else now}, which was " + str(
                list(was) if what == "shape" else was
            )


def _groups(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> Iterator[str]:
    if len(before) != len(after):
        yield f"{len(after)} groups of hyperparameters, which were {len(before)}"
        return
    for i, (was, now) in enumerate(zip(before, after, strict=True)):
        if was.keys() != now.keys():
            yield f"ctx.optimizer_state['groups'][{i}] with {', '.join(now)}, which was {', '.join(was)}"


def _slots(before: Context, after: Context) -> Iterator[str]:
    was, now = (ctx.optimizer_state.get("slots", {}) for ctx in (before, after))
    for name, slot in now.items():
        path = f"ctx.optimizer_state['slots'][{name!r}]"
        if name not in before.params:
            yield f"{path}{did_you_mean(name, before.params)}"
        elif name in was and slot is not was[name]:
            if slot.keys() != was[name].keys():
                yield f"{path} with {', '.join(slot)}, which was {', '.join(was[name])}"
                continue
            for key, value in slot.items():
                if isinstance(was[name][key], Tensor):
                    yield from _tensor(f"{path}[{key!r}]", was[name][key], value)


def _graphs_and_devices(before: Context, after: Context) -> Iterator[str]:
    known = {id(node) for _, node in nodes(before, "")}
    for path, node in nodes(after, "ctx"):
        if isinstance(node, Tensor) and id(node) not in known and node.requires_grad:
            yield f"{path} with a graph of autograd, which would keep what it was computed from alive: detach() it"
    for field in ("batch", "y_hats"):
        devices = {node.device for _, node in nodes(getattr(before, field), "") if isinstance(node, Tensor)}
        for path, node in nodes(getattr(after, field), f"ctx.{field}"):
            if devices and isinstance(node, Tensor) and node.device not in devices | {before.loop.device}:
                yield f"{path} on device {node.device}"
