"""Migrations: state dicts of earlier versions become state dicts of this one, step by step, by pure functions.

To change the tree of a state dict, raise `VERSION` by one, add the `Migration` from the version before here, and keep a
file of every released version in ``tests/data``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

from ..core.errors import StateDictError
from .comparing import EARLIER

VERSION = 2
"""The version of the state dicts that are made."""

Tree = dict[str, Any]


def _unchanged(tree: Tree) -> Tree:
    return tree


@attrs.frozen
class Migration:
    """From one version to the next, by functions that leave their argument as it is.

    Args:
        state: of a state dict; its fingerprint and its version number are taken care of.
        fingerprint: of a fingerprint, which a checkpoint file also holds outside of its state.
    """

    state: Callable[[Tree], Tree] = _unchanged
    fingerprint: Callable[[Tree], Tree] = _unchanged


def _with_less(fingerprint: Tree) -> Tree:
    """Of callbacks only the kind was known, and of what they and others were made with nothing."""
    callbacks = {id: {"kind": kind} for id, kind in fingerprint["callbacks"].items()}
    return {**fingerprint, "callbacks": callbacks, EARLIER: 1}


MIGRATIONS: dict[int, Migration] = {1: Migration(fingerprint=_with_less)}
"""By the version that they start from."""


def migrate(sd: Tree) -> Tree:
    """``sd`` as a state dict of this version; what is not a state dict stays as it is.

    Raises:
        StateDictError: a newer functional_loop made it, or one from before the first release.
    """
    version = sd.get("version")
    for migration in migrations_from(version) if type(version) is int else ():
        fingerprint = migration.fingerprint(sd["fingerprint"])
        sd = {**migration.state(sd), "fingerprint": fingerprint, "version": sd["version"] + 1}
    return sd


def migrate_fingerprint(fingerprint: Tree, version: int) -> Tree:
    """``fingerprint``, of a state dict of ``version``, as one of this version.

    Raises:
        StateDictError: as for `migrate`.
    """
    for migration in migrations_from(version):
        fingerprint = migration.fingerprint(fingerprint)
    return fingerprint


def migrations_from(version: int) -> list[Migration]:
    """The steps from ``version`` to this one.

    >>> migrations_from(VERSION)
    []
    >>> migrations_from(99)
    Traceback (most recent call last):
    functional_loop.core.errors.StateDictError: the state dict was made by a newer functional_loop; install that one:
      - version: 99 in what was saved, 2 here
    """
    if version > VERSION:
        raise StateDictError(
            "the state dict was made by a newer functional_loop; install that one:",
            [f"version: {version} in what was saved, {VERSION} here"],
        )
    steps: list[Migration] = []
    for step in range(version, VERSION):
        if step not in MIGRATIONS:
            raise StateDictError(
                f"no migration leads from version {step} of a state dict to {VERSION}:",
                [f"version: {version} in what was saved, {VERSION} here"],
            )
        steps.append(MIGRATIONS[step])
    return steps
