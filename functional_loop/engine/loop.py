"""The Loop: everything that does not change while training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor, nn

from ..core.batch import BatchSource
from ..core.callback import Callback, Hook
from ..core.measures import Measure
from ..core.stages import STAGES
from ..optim.optimizer import Optimizer
from ..purity.repeatable import refuse_metrics
from .network import WithLoss


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
    kept: dict[str, Any] = attrs.field(init=False, factory=dict, repr=False)
    """What others made of this loop, see `beside`."""
    _skipping: list[tuple[str, Callable[[Any], Iterable[int]]]] = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._check_types()
        self._check_values()
        ordered = sorted(self.callbacks, key=lambda callback: callback.order)
        if isinstance(self.network, nn.Module):
            WithLoss(self.network, self.loss)
        hooks = {s: tuple((c.id, c.hooks[s]) for c in ordered if s in c.hooks) for s in STAGES}
        hooks["resume"] = tuple((c.id, c.resume) for c in ordered if c.resume is not None)
        object.__setattr__(self, "hooks", hooks)
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

    def evaluates(self, epoch: int) -> bool:
        """Whether scores are made in ``epoch``."""
        return epoch % self.eval_freq == 0 or epoch == self.epochs

    def skipped(self, states: dict[str, Any]) -> frozenset[int]:
        """Numbers of the batches that are passed over: ``skip_batches``, and those in the ``states`` of callbacks."""
        return self.skip_batches.union(*(skips(states[id]) for id, skips in self._skipping))
