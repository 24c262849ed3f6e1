"""From ``module:name`` or ``file.py:name`` to a Loop."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from ..callbacks import history
from ..core.record import did_you_mean, evolve
from ..data.chosen_batches import overfit
from ..engine.loop import Loop
from .usage import UsageError


def load_loop(target: str, epochs: int | None = None, overfit_batches: int | None = None) -> Loop:
    """The Loop that ``target`` names, or that the function of that name returns.

    Args:
        target: ``module:name`` or ``file.py:name``; modules are found in the current folder too.
        epochs: in place of the loop's own number.
        overfit_batches: how many batches to train on over and over; see `overfit`.

    Raises:
        UsageError: there is no such thing, or it is not a Loop; or the person's own code raised the error that is its
            cause.

    >>> load_loop("functional_loop.examples.digits:loop", epochs=3).epochs
    3
    """
    place, separator, name = target.rpartition(":")
    if not (separator and place and name):
        raise UsageError(f"a target is module:name or file.py:name, not {target!r}")
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    if not hasattr(module, name):
        public = [known for known in vars(module) if not known.startswith("_")]
        raise UsageError(f"{place} has no {name!r}{did_you_mean(name, public)}")
    loop = _as_loop(target, getattr(module, name))
    loop = loop if epochs is None else evolve(loop, epochs=epochs)
    if overfit_batches is None:
        return loop
    try:
        return overfit(loop, overfit_batches)
    except ValueError as error:
        raise UsageError(f"--{error}") from None


def with_history(loop: Loop) -> Loop:
    """``loop`` with a `history`, which the command line adds to every loop that has none."""
    if any(callback.id == "history" for callback in loop.callbacks):
        return loop
    return evolve(loop, callbacks=[*loop.callbacks, history()])


def _import_module(place: str) -> ModuleType:
    sys.path.insert(0, os.getcwd())
    try:
        with _own_code(f"importing {place}"):
            return importlib.import_module(place)
    except UsageError as error:
        missing = getattr(error.__cause__, "name", None)
        if isinstance(error.__cause__, ModuleNotFoundError) and f"{place}.".startswith(f"{missing}."):
            raise UsageError(f"there is no module {missing!r}, in {os.getcwd()} or installed") from None
        raise


def _import_file(path: Path) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    if getattr(sys.modules.get(path.stem), "__file__", str(path)) != str(path):
        raise UsageError(f"{path} has the name of a module that is in use, {path.stem!r}: rename it")
    # As `python file.py` does, so that the file can import its neighbours, and worker processes can import the file.
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    with _own_code(f"importing {path}"):
        spec.loader.exec_module(module)
    return module


def _as_loop(target: str, found: Any) -> Loop:
    if isinstance(found, Loop):
        return found
    if not callable(found):
        raise UsageError(f"{target} is neither a Loop nor a function that makes one, but {type(found).__name__}")
    with _own_code(f"calling {target}"):
        if required := [name for name, p in inspect.signature(found).parameters.items() if _is_required(p)]:
            raise UsageError(f"{target} must be a function of no arguments, but needs {', '.join(required)}")
        made = found()
    if not isinstance(made, Loop):
        raise UsageError(f"{target} must return a Loop, not {type(made).__name__}")
    return made


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind not in (
        parameter.VAR_POSITIONAL,
        parameter.VAR_KEYWORD,
    )


@contextmanager
def _own_code(doing: str) -> Iterator[None]:
    """A region that runs code of the person's own, whose errors need their traceback."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{doing} failed: {type(error).__name__}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")
