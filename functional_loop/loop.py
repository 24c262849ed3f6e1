"""The Loop: everything that does not change while training; and the first context of a run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor, nn

from .constants import drawn, views_of_state
from .context import Context
from .data import BatchSource
from .fast.compiled import CompiledStep
from .hook_seeds import HookSeeds
from .identity import described, hash_of_start
from .measures import Measure
from .network import Modes, WithLoss, check_module
from .optimizers import Optimizer
from .overlaps import check_separate
from .plain import check_plain
from .probe import Probed
from .proofs.purity import checked
from .record import evolve
from .repeatable import refuse_metrics
from .rng import fold_in, seeded
from .stages import STAGES, Callback, Hook
from .step import Step


class AsCallback(Protocol):
    """Anything that can be made a `Callback`: the one door through which other kinds of callbacks enter a loop."""

    def as_callback(self) -> Callback: ...


def _as_measures(measures: Iterable[Measure]) -> tuple[Measure, ...]:
    for given in measures if isinstance(measures, (list, tuple)) else ():
        if not isinstance(given, Measure):
            refuse_metrics("Loop: measures", "given", given)
    if not isinstance(measures, (list, tuple)) or not all(isinstance(m, Measure) for m in measures):
        raise TypeError(f"Loop: measures are given as a list of what measure(id, fn) makes, not {measures!r}")
    return tuple(measures)


def _as_callbacks(callbacks: Iterable[AsCallback]) -> tuple[Callback, ...]:
    if not isinstance(callbacks, (list, tuple)):
        raise TypeError(f"Loop: callbacks is a list of callbacks, not {callbacks!r}")
    for callback in callbacks:
        if isinstance(callback, type) or not callable(getattr(callback, "as_callback", None)):
            hint = "a Callback, such as Callback('name', epoch_end=hook), or an object with a method as_callback()"
            raise TypeError(f"Loop: not a callback: {callback!r}; it takes {hint}")
    return tuple(callback.as_callback() for callback in callbacks)


def _as_numbers(numbers: Iterable[int]) -> frozenset[int]:
    if isinstance(numbers, (str, bytes)) or not isinstance(numbers, Iterable):
        raise TypeError(f"Loop: skip_batches is a set of batch numbers, not {numbers!r}")
    made = list(numbers)
    if wrong := [n for n in made if type(n) is not int or n < 1]:
        raise ValueError(f"Loop: skip_batches holds numbers of batches of the run, 1, 2, ..., not {wrong[0]!r}")
    return frozenset(made)


def _as_device(device: str | torch.device) -> torch.device:
    try:
        made = torch.device(device)
        torch.empty(0, device=made)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(
            f"Loop: there is no device {device!r} on this machine ({str(error).splitlines()[0]})"
        ) from None
    return made


@attrs.frozen(eq=False)
class Loop:
    """What to train, on what, and how: the static half of a run.

    Args:
        network: any ``nn.Module``, whose values when `init` is called are the start and which is never written to; or a
            function of no arguments that makes one, called under the seed, so that seeds differ in initialisation too.
            Parts that are in evaluation mode at `init`, such as a frozen BatchNorm, stay in it while the others train.
        loss: a function ``(y_hats, y) -> scalar tensor``; ``y_hats`` is what the network returns. Parameters and
            buffers of an ``nn.Module`` are in the context beside the network's, their names prefixed with ``loss.``:
            they are trained, and saved; the module itself is never written to.
        optimizer: see `optimizer`.
        train: training data, see `batches`.
        valid: validation data, or ``None``.
        epochs: how many epochs to train.
        measures_train, measures_valid: see `measure`; training scores are those of the predictions made while training.
            Without ``valid``, ``measures_valid`` are for `validate` alone, and such a loop can't be trained.
        eval_freq: scores are made in every ``eval_freq``-th epoch and in the last.
        callbacks: a list of `Callback`, or of anything with a method ``as_callback()``.
        device: where parameters live and batches are moved to.
        accumulate: batches per update; an open window is closed at the end of an epoch. The optimizer gets the mean of
            the gradients of its window.
        autocast: ``torch.bfloat16`` for mixed precision, or ``None``.
        compile: compile the steps. Forward, backward and update become one graph (two, where a hook of
            ``after_backward`` or ``accumulate`` needs the gradients in between), once for every shape of batch and set
            of trainable parameters: seconds to a minute when it is new, that of tracing it when it is in the
            cache (that of ``torch.compile``, ``$TORCHINDUCTOR_CACHE_DIR``). Needs a C++ compiler. Kernels
            round differently when they are compiled, so a run has the same bits as other compiled runs only. The
            network and the loss are called once and their graph is reused: what they compute of Python values, rather
            than of tensors, stays what it was. Updates of SGD, Adam, AdamW and RMSprop are compiled, those of other
            optimizers are not, nor is validation. What can't be compiled is computed as without ``compile``, with a
            warning that says why.
        skip_batches: numbers of batches of the run (``ctx.global_step``) that are passed over: no stage runs, and the
            context after such a batch differs from the one before it in its place only. The others keep their numbers,
            and with these their rows and random numbers. With ``accumulate`` a window is made of the batches that are
            trained on; one that is still open when the last batch of an epoch is passed over is dropped.
        check_pure: whether the callbacks are watched while they run, and their pure hooks run twice: a `PurityError`
            says which hook wrote to what it was given, changed the form of the context, or depends on more than it and
            the seed of the hook. It costs many times the time of the hooks, and memory for a copy of the state
            and of data that are tensors. Without it nothing is looked at.

    Raises:
        TypeError, ValueError: an argument that can't work, by name.

    >>> import functional_loop as fl
    >>> x = torch.randn(64, 20)
    >>> loop = fl.Loop(
    ...     network=nn.Linear(20, 2),
    ...     loss=nn.functional.cross_entropy,
    ...     optimizer=fl.optimizer(torch.optim.AdamW, lr=1e-3),
    ...     train=fl.batches(x, (x.sum(1) > 0).long(), batch_size=32, shuffle=True),
    ...     epochs=2,
    ... )
    >>> ctx = fl.train(fl.init(loop, seed=0))
    >>> ctx.epoch, ctx.global_step, ctx.stage
    (2, 4, 'end')
    """

    network: nn.Module | Callable[[], nn.Module] = attrs.field(repr=False)
    loss: Callable[[Any, Any], Tensor]
    optimizer: Optimizer
    train: BatchSource
    valid: BatchSource | None = None
    epochs: int = attrs.field(kw_only=True)
    measures_train: Sequence[Measure] = attrs.field(default=(), converter=_as_measures, kw_only=True)
    measures_valid: Sequence[Measure] = attrs.field(default=(), converter=_as_measures, kw_only=True)
    eval_freq: int = attrs.field(default=1, kw_only=True)
    callbacks: Sequence[Callback] = attrs.field(default=(), converter=_as_callbacks, kw_only=True)
    device: torch.device = attrs.field(default=torch.device("cpu"), converter=_as_device, kw_only=True)
    accumulate: int = attrs.field(default=1, kw_only=True)
    autocast: torch.dtype | None = attrs.field(default=None, kw_only=True)
    compile: bool = attrs.field(default=False, kw_only=True)
    skip_batches: frozenset[int] = attrs.field(default=frozenset(), converter=_as_numbers, kw_only=True)
    check_pure: bool = attrs.field(default=False, kw_only=True)

    hooks: dict[str, tuple[tuple[str, Hook], ...]] = attrs.field(init=False, repr=False)
    """By stage, and for ``resume``: callback ids and hooks, in the order in which they run."""
    _skipping: list[tuple[str, Callable[[Any], Iterable[int]]]] = attrs.field(init=False, repr=False)
    _modules: list[nn.Module] = attrs.field(init=False, factory=list, repr=False)
    probed: Probed = attrs.field(init=False, factory=Probed, repr=False)
    """What has been looked at of the network and the loss, in this process."""
    _modes: list[Modes] = attrs.field(init=False, factory=list, repr=False)
    _steps: list[Step] = attrs.field(init=False, factory=list, repr=False)
    hook_seeds: HookSeeds = attrs.field(init=False, repr=False)
    _remembered: dict[str, Any] = attrs.field(init=False, factory=dict, repr=False)

    def __attrs_post_init__(self) -> None:
        self._check_types()
        self._check_values()
        ordered = sorted(self.running_callbacks(), key=lambda callback: callback.order)
        if isinstance(self.network, nn.Module):
            WithLoss(self.network, self.loss)
        hooks = {s: tuple((c.id, c.hooks[s]) for c in ordered if s in c.hooks) for s in STAGES}
        hooks["resume"] = tuple((c.id, c.resume) for c in ordered if c.resume is not None)
        object.__setattr__(self, "hooks", hooks)
        observers = frozenset(callback.id for callback in self.callbacks if not callback.replays)
        object.__setattr__(self, "hook_seeds", HookSeeds(hooks, observers, self.check_pure))
        object.__setattr__(self, "_skipping", [(c.id, c.skips) for c in self.callbacks if c.skips])

    def _check_types(self) -> None:
        if not isinstance(self.network, nn.Module) and not callable(self.network):
            raise TypeError(f"Loop: network is an nn.Module or a function that makes one, not {self.network!r}")
        if not callable(self.loss):
            raise TypeError(f"Loop: loss is a function (y_hats, y) -> scalar tensor, not {self.loss!r}")
        if not isinstance(self.optimizer, Optimizer):
            raise TypeError(
                f"Loop: optimizer is made by optimizer(torch.optim.AdamW, lr=1e-3), not {type(self.optimizer).__name__}"
            )
        for name, source in (("train", self.train), ("valid", self.valid)):
            if not isinstance(source, BatchSource) and not (name == "valid" and source is None):
                raise TypeError(f"Loop: {name} is made by batches(...), not {type(source).__name__}")
        for name in ("compile", "check_pure"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"Loop: {name} is True or False, not {getattr(self, name)!r}")

    def _check_values(self) -> None:
        for name, least in (("epochs", 0), ("eval_freq", 1), ("accumulate", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"Loop: {name} must be an integer of at least {least}, not {value!r}")
        for name in ("callbacks", "measures_train", "measures_valid"):
            ids = Counter(part.id for part in getattr(self, name))
            if twice := [id for id, n in ids.items() if n > 1]:
                raise ValueError(f"Loop: {name} has more than one of the id {twice[0]!r}; give each an id of its own")
        if self.autocast not in (None, torch.bfloat16):
            raise ValueError(
                f"Loop: autocast is torch.bfloat16 or None, not {self.autocast!r} (float16 would need loss scaling)"
            )
        if self.optimizer.needs_closure and self.accumulate > 1:
            raise ValueError(
                f"Loop: {self.optimizer.cls.__name__} evaluates the loss of a batch several times, which does not "
                "go with accumulate > 1: use larger batches"
            )

    def running_callbacks(self) -> list[Callback]:
        """The callbacks as they run: watched, if they are to be."""
        return [checked(callback) if self.check_pure else callback for callback in self.callbacks]

    def template(self, beside: nn.Module | None = None) -> nn.Module:
        """A module of the network's structure, whose values don't matter; not to be written to.

        Args:
            beside: another module that the network made, if there is one at hand.
        """
        if isinstance(self.network, nn.Module):
            return self.network
        if not self._modules:
            module = make_module(self.network, TEMPLATE_SEED)
            check_module(module)
            others = beside if beside is not None else make_module(self.network, TEMPLATE_SEED)
            _empty(module, frozenset(map(id, (*others.parameters(), *others.buffers()))))
            self._modules.append(module)
        return self._modules[0]

    def with_loss(self) -> WithLoss:
        """`template` and the loss as one module, not to be written to."""
        return WithLoss(self.template(), self.loss, self.modes())

    def modes(self) -> Modes:
        """The parts of network and loss that keep a mode of their own in training, as they were at the first `init`."""
        if not self._modes:
            self._modes.append(WithLoss(self.template(), self.loss).kept_modes())
        return self._modes[0]

    def remembered(self, what: str, make: Callable[[], Any]) -> Any:
        """What ``make()`` has returned for ``what`` when it was asked for first; not to be written to."""
        if what not in self._remembered:
            self._remembered[what] = make()
        return self._remembered[what]

    def described(self) -> dict[str, Any]:
        """What loss, measures and callbacks were made with, as it was when the first run began."""
        made: dict[str, Any] = self.remembered("described", lambda: described(self))
        return made

    def made(self, seed: int) -> str | None:
        """A hash of the values that the function given as network has made under ``seed``, if it has."""
        made: str | None = self._remembered.get(f"start {seed}")
        return made

    def evaluates(self, epoch: int) -> bool:
        """Whether scores are made in ``epoch``."""
        return epoch % self.eval_freq == 0 or epoch == self.epochs

    def skipped(self, states: dict[str, Any]) -> frozenset[int]:
        """Numbers of the batches that are passed over: ``skip_batches``, and those in the ``states`` of callbacks."""
        return self.skip_batches.union(*(skips(states[id]) for id, skips in self._skipping))

    def sharing(self, other: Loop) -> Loop:
        """This loop, for which counts what has been looked at of ``other``, with the same network and loss."""
        object.__setattr__(self, "probed", other.probed)
        object.__setattr__(self, "_modes", other._modes)
        return self

    def borrow_step(self) -> Step:
        """A planned tensor program for exclusive use; give it back to have the next run start at once."""
        try:
            return self._steps.pop()
        except IndexError:
            return CompiledStep(self) if self.compile else Step(self)

    def return_step(self, step: Step) -> None:
        step.release()
        self._steps.append(step)


TEMPLATE_SEED = -1
"""A seed under which no run trains: what a network draws besides its parameters and buffers differs from that."""


def _empty(module: nn.Module, shared: frozenset[int]) -> None:
    """Leave one element, that is NaN if there is such, of what the context has; what others ``shared`` stays."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_contiguous() and id(tensor) not in shared:
            value = math.nan if tensor.is_floating_point() or tensor.is_complex() else 0
            tensor.data = tensor.data.new_full((), value).expand(tensor.shape)


def make_module(network: Callable[[], nn.Module], seed: int) -> nn.Module:
    with seeded(fold_in(seed, "initialisation")):
        module = network()
    if not isinstance(module, nn.Module):
        raise TypeError(f"Loop: the function given as network must return an nn.Module, not {type(module).__name__}")
    return module


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
    template = loop.template(beside=module)
    loop.modes()
    loop.probed.suspects.update(views_of_state(module))
    if template is not module:
        loop.probed.suspects.update(drawn(module, template, lambda: make_module(loop.network, TEMPLATE_SEED)))
    whole = WithLoss(module, loop.loss)
    for role, part in whole.parts().items():
        check_module(part, role)
    # Before training: hooks may write to what they were made with.
    loop.described()
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
        loop.remembered(f"start {seed}", lambda: hash_of_start(ctx))
    inits = {c.id: c.init for c in loop.running_callbacks() if c.init is not None}
    slots = {id: loop.hook_seeds.call("init", id, make, ctx, seeds=True) for id, make in inits.items()}
    for id, slot in slots.items():
        check_plain(slot, f"the initial state of callback {id!r}")
    return evolve(ctx, callbacks={**ctx.callbacks, **slots})


def own(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the same values with memory of its own."""
    return tensor.detach().to(device, copy=True)
