"""The dictionary of callbacks: those that ship with the package, and those that others register."""

from __future__ import annotations

import importlib.metadata
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import EntryPoint
from types import MappingProxyType
from typing import Any

import attrs

from ...core.record import did_you_mean, evolve
from ..objects.callback_set import CallbackSet
from .descriptor import TorchCallback, describe

GROUP = "functional_loop.callbacks"
"""The group of entry points by which other packages register callbacks."""


@attrs.frozen
class _Reference:
    """What is imported when it is looked up; ``weight``, if known, saves making a callback to ask for it."""

    point: EntryPoint
    label: str | None = None
    packages: tuple[str, ...] = ()
    weight: float | None = None

    def load(self) -> TorchCallback:
        found = self.point.load()
        if isinstance(found, TorchCallback):
            return found
        return _described(found, self.point.name, self.label, self.packages)


class CallbackDictionary(Mapping[str, TorchCallback]):
    """Descriptors of callbacks by key.

    Every look-up gives a new `TorchCallback`, whose values can be set without a change of the dictionary. What a key
    stands for is imported when it is looked up.

    Packages register callbacks by an entry point in the group ``functional_loop.callbacks``, whose name is the key and
    whose object is a descriptor, a `CallbackSet` class or a function that makes a callback::

        [project.entry-points."functional_loop.callbacks"]
        confusion = "my_package.callbacks:CallbackSetConfusion"

    Mirrors R's ``mlr3torch_callbacks``.

    >>> dictionary = CallbackDictionary()
    >>> dictionary.add("scores", "functional_loop.callbacks.logs.history:history", label="Scores of every epoch")
    >>> dictionary["scores"].generate()
    Callback('scores', epoch_end)
    >>> print(dictionary)
    key     label                  weight  packages
    scores  Scores of every epoch  1000.0
    """

    def __init__(self, entries: Mapping[str, TorchCallback | _Reference] = MappingProxyType({})) -> None:
        self._entries = dict(entries)
        self._discovered = False

    def add(self, key: str, target: Any, *, label: str | None = None, packages: Iterable[str] = ()) -> None:
        """Register a callback.

        Args:
            key: what it is looked up by, and the id of the callback unless ``target`` is a descriptor.
            target: a `TorchCallback`, a `CallbackSet` class, a function that makes a callback, or a reference
                ``"module:attribute"`` to one of these, which is imported when it is looked up.
            label, packages: see `TorchCallback`; a descriptor has its own.

        Raises:
            ValueError: the key is in use, or a reference is not of the form ``"module:attribute"``.
            TypeError: ``target`` is something else, or a descriptor comes with another label or packages.
        """
        if key in self._known():
            raise ValueError(f"there is a callback {key!r} already; remove({key!r}) it first, or take another key")
        if isinstance(target, str):
            self._entries[key] = _Reference(_point(key, target), label, tuple(packages))
        elif not isinstance(target, TorchCallback):
            self._entries[key] = _described(target, key, label, packages)
        elif label is None and packages == ():
            self._entries[key] = target
        else:
            raise TypeError(f"callback {key!r}: a descriptor has its own label and packages")

    def remove(self, key: str) -> None:
        """Forget a callback.

        Raises:
            KeyError: there is none of that key.
        """
        self._find(key)
        del self._entries[key]

    def __getitem__(self, key: str) -> TorchCallback:
        entry = self._find(key)
        return (entry.load() if isinstance(entry, _Reference) else entry).clone(deep=True)

    def __contains__(self, key: object) -> bool:
        return key in self._known()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._known()))

    def __len__(self) -> int:
        return len(self._known())

    def table(self) -> list[dict[str, Any]]:
        """A row of ``key``, ``label``, ``weight`` and ``packages`` for every callback, for people or for a DataFrame.

        The weight is ``None`` where a function makes the callback from values that are required. What can't be imported
        is left out, with a warning.
        """
        return list(self._rows())

    def _rows(self) -> Iterator[dict[str, Any]]:
        for key in self:
            try:
                found = self[key]
                known = getattr(self._entries[key], "weight", None)
                weight = _weight_of(found) if known is None else known
            except Exception as error:
                warnings.warn(f"the callback {key!r} can't be loaded: {error!r}", stacklevel=3)
            else:
                yield {"key": key, "label": found.label, "weight": weight, "packages": list(found.packages)}

    def __str__(self) -> str:
        rows = [{**row, "packages": ", ".join(row["packages"])} for row in self.table()]
        cells = [("key", "label", "weight", "packages"), *(tuple(map(str, row.values())) for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
        return "\n".join(line.rstrip() for line in lines)

    def __repr__(self) -> str:
        return f"<CallbackDictionary: {', '.join(self)}>"

    def _find(self, key: str) -> TorchCallback | _Reference:
        if key not in self._known():
            raise KeyError(f"there is no callback {key!r}{did_you_mean(str(key), self)}")
        return self._entries[key]

    def _known(self) -> dict[str, TorchCallback | _Reference]:
        """All entries; other packages are asked for theirs once, when something is looked up first."""
        if not self._discovered:
            self._discovered = True
            for point in importlib.metadata.entry_points(group=GROUP):
                if point.name in self._entries:
                    warnings.warn(f"{point.value} registers a callback {point.name!r}, which is taken", stacklevel=3)
                else:
                    self._entries[point.name] = _Reference(point)
        return self._entries


def _point(key: str, reference: str) -> EntryPoint:
    module, colon, attribute = reference.partition(":")
    if not (module and colon and attribute):
        raise ValueError(f"callback {key!r}: a reference is of the form 'module:attribute', not {reference!r}")
    return EntryPoint(key, reference, GROUP)


def _described(target: Any, key: str, label: str | None, packages: Iterable[str]) -> TorchCallback:
    made = describe(target, key)
    return evolve(made, label=made.label if label is None else label, packages=packages)


def _weight_of(descriptor: TorchCallback) -> float | None:
    if descriptor.weight is not None:
        return descriptor.weight
    if isinstance(descriptor.generator, type) and issubclass(descriptor.generator, CallbackSet):
        return descriptor.generator.weight
    if descriptor.param_set.missing(descriptor.values):
        return None
    return descriptor.generate().weight


# Key, reference within functional_loop.callbacks, weight, label.
_SHIPPED: tuple[tuple[str, str, float, str], ...] = (
    ("checkpoint", "control.checkpoint:checkpoint", math.inf, "Saves checkpoints"),
    ("clip_grad_norm", "gradients.clipping:clip_grad_norm", 0.0, "Clips the norm of the gradients"),
    ("clip_grad_value", "gradients.clipping:clip_grad_value", 0.0, "Clips every element of the gradients"),
    ("csv_log", "logs.csv_log:csv_log", 0.0, "Writes scores to a CSV file"),
    ("digest_trace", "logs.digest_trace:digest_trace", 9e5, "Digests of the state, to compare runs by"),
    ("dp_sgd", "gradients.dp_sgd:dp_sgd", -300.0, "Makes the gradients differentially private"),
    ("early_stopping", "control.early_stopping:early_stopping", 1000.0, "Stops when a score no longer improves"),
    ("ema", "gradients.averaging:ema", 2000.0, "Exponential moving average of the weights"),
    ("grad_norm", "gradients.monitors:grad_norm", -100.0, "Norm of the gradients"),
    ("history", "logs.history:history", 1000.0, "Scores of every epoch"),
    ("json_log", "logs.json_log:json_log", 0.0, "Writes scores to a file of JSON lines"),
    ("lambda_callback", "objects.lambda_callback:lambda_callback", 0.0, "Calls functions at stages"),
    ("lr_chained", "schedules.lr_composed:lr_chained", 0.0, "Schedules that multiply"),
    ("lr_constant", "schedules.lr_schedulers:lr_constant", 0.0, "A smaller learning rate at first"),
    ("lr_cosine_annealing", "schedules.lr_schedulers:lr_cosine_annealing", 0.0, "Learning rate along a cosine"),
    ("lr_cyclic", "schedules.lr_cycles:lr_cyclic", 0.0, "Learning rate up and down in cycles"),
    ("lr_exponential", "schedules.lr_schedulers:lr_exponential", 0.0, "Learning rate times a factor at every step"),
    ("lr_lambda", "schedules.lr_custom:lr_lambda", 0.0, "Learning rate times a function of the step"),
    ("lr_linear", "schedules.lr_schedulers:lr_linear", 0.0, "Learning rate along a line: a warm-up"),
    ("lr_multi_step", "schedules.lr_schedulers:lr_multi_step", 0.0, "Learning rate times a factor at milestones"),
    ("lr_multiplicative", "schedules.lr_custom:lr_multiplicative", 0.0, "Learning rate times a function, at each step"),
    ("lr_one_cycle", "schedules.lr_cycles:lr_one_cycle", 0.0, "Learning rate up and down once"),
    ("lr_polynomial", "schedules.lr_schedulers:lr_polynomial", 0.0, "Learning rate along a polynomial"),
    ("lr_reduce_on_plateau", "schedules.lr_plateau:lr_reduce_on_plateau", 0.0, "Smaller learning rate on a plateau"),
    ("lr_sequential", "schedules.lr_composed:lr_sequential", 0.0, "One schedule after the other"),
    ("lr_step", "schedules.lr_schedulers:lr_step", 0.0, "Learning rate times a factor every few steps"),
    ("lr_warm_restarts", "schedules.lr_schedulers:lr_warm_restarts", 0.0, "Cosines with warm restarts"),
    ("param_norm", "gradients.monitors:param_norm", 0.0, "Norm of the parameters"),
    ("progress", "logs.progress:progress", 0.0, "Shows the progress of training"),
    ("stop_on_signal", "control.stop_on_signal:stop_on_signal", math.inf, "Saves and leaves when a signal comes"),
    ("rollback", "control.rollback:rollback", 1e6, "Goes back from a bad batch and passes it over"),
    ("sam", "gradients.sam:sam", -200.0, "Sharpness-aware minimisation"),
    ("swa", "gradients.averaging:swa", 2000.0, "Stochastic weight averaging"),
    ("tb", "logs.tb:tb", 0.0, "Logs for TensorBoard"),
    ("terminate_on_nan", "control.terminate_on_nan:terminate_on_nan", -50.0, "Stops when the loss is NaN or infinite"),
    ("throughput", "logs.throughput:throughput", 0.0, "Rows and batches per second"),
    ("timer", "control.timer:timer", 0.0, "Stops after a time"),
    ("unfreeze", "gradients.unfreeze:unfreeze", 0.0, "Trains some parameters from a later epoch or batch on"),
)
_PACKAGES = {"tb": ("tensorboard",)}

torch_callbacks = CallbackDictionary(
    {
        key: _Reference(_point(key, f"functional_loop.callbacks.{reference}"), label, _PACKAGES.get(key, ()), weight)
        for key, reference, weight, label in _SHIPPED
    }
)
"""The dictionary that `t_clbk` looks up keys in."""


def t_clbk(key: str, /, *, id: str | None = None, weight: float | None = None, **values: Any) -> TorchCallback:
    """A descriptor from the dictionary.

    Args:
        key: a key of `torch_callbacks`.
        id, weight: of the callbacks, instead of those of the dictionary.
        values: values of parameters.

    Raises:
        KeyError: there is no such key; the message has the likely one.
        TypeError: there is no such parameter, or a value is of another type.

    Mirrors R's ``t_clbk`` (mlr3torch).

    >>> t_clbk("history", id="scores")
    <TorchCallback 'scores': history()>
    >>> t_clbk("historry")
    Traceback (most recent call last):
    KeyError: "there is no callback 'historry'; did you mean 'history'?"
    """
    given = {name: value for name, value in (("id", id), ("weight", weight)) if value is not None}
    return evolve(torch_callbacks[key], **given).set_values(**values)


def t_clbks(keys: Iterable[str]) -> list[TorchCallback]:
    """Descriptors from the dictionary, one for every key.

    Raises:
        KeyError: there is no such key; the message has the likely one.

    Mirrors R's ``t_clbks`` (mlr3torch).

    >>> t_clbks(["history"])
    [<TorchCallback 'history': history()>]
    """
    if isinstance(keys, str):
        raise TypeError(f"t_clbks takes a list of keys; for one there is t_clbk({keys!r})")
    return [t_clbk(key) for key in keys]


def as_torch_callback(x: Any, *, id: str | None = None, clone: bool = False) -> TorchCallback:
    """The descriptor of whatever a callback is given as.

    Args:
        x: a descriptor; a `CallbackSet` class, or a function that makes a callback; a callback that is made already and
            is what its descriptor gives; or a key of `torch_callbacks`.
        id: the id of the callbacks, instead of the usual one.
        clone: whether a descriptor is copied deeply, instead of being returned as it is.

    Raises:
        TypeError: ``x`` is none of these.
        KeyError: there is no such key.
        ValueError: ``id`` is not that of a callback that is made already.

    Mirrors R's ``as_torch_callback`` (mlr3torch).

    >>> as_torch_callback("history"), as_torch_callback(CallbackSet, id="nothing")
    (<TorchCallback 'history': history()>, <TorchCallback 'nothing': CallbackSet()>)
    """
    if isinstance(x, str):
        return t_clbk(x, id=id)
    if not isinstance(x, TorchCallback):
        return describe(x, id)
    descriptor = x.clone(deep=True) if clone else x
    return descriptor if id is None else evolve(descriptor, id=id)


def as_torch_callbacks(x: Any, clone: bool = False) -> list[TorchCallback]:
    """The descriptors of a list of callbacks, of one, or of ``None``; see `as_torch_callback`.

    >>> as_torch_callbacks(["history"]) == as_torch_callbacks("history")
    True
    >>> as_torch_callbacks(None)
    []
    """
    if x is None:
        return []
    return [as_torch_callback(each, clone=clone) for each in (x if isinstance(x, (list, tuple)) else [x])]
