"""Packages that some callbacks need and the others don't."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re


def require(package: str, owner: str) -> None:
    """Refuse to go on without a package, which is not imported; ``owner`` tells in the message who needs it.

    Raises:
        ImportError: it is not installed; the message says what to install.

    >>> require("torch", "callback 'mine'")
    >>> require("rihc", "callback 'progress'")
    Traceback (most recent call last):
    ImportError: callback 'progress' needs rihc, which is not installed: pip install rihc
    """
    if not _is_installed(package):
        raise ImportError(f"{owner} needs {package}, which is not installed: pip install {what_installs(package)}")


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of a package within a package, when the outer one is missing
        return False


def what_installs(package: str) -> str:
    """What pip takes: the extra of functional-loop that has ``package``, or the package itself.

    >>> what_installs("rich"), what_installs("lightgbm")
    ("'functional-loop[cli]'", 'lightgbm')
    """
    for requirement in _requirements():
        if found := re.match(rf"{re.escape(package)}\b[^;]*;.*\bextra == ['\"]([\w-]+)['\"]", requirement):
            return f"'functional-loop[{found[1]}]'"
    return package


def _requirements() -> list[str]:
    try:
        return importlib.metadata.requires("functional-loop") or []
    except importlib.metadata.PackageNotFoundError:  # run from a copy of the sources
        return []
