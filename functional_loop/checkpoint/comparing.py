"""Comparing what two runs say of themselves, and what of that may differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any

from torch import Tensor

from ..core.errors import StateDictError, add_note
from ..core.patterns import Patterns, listed, matches
from ..core.record import did_you_mean
from .settings import CODE

FIXED = ("network/", "optimizer/", "seed")
FREE = ("network/modules/", f"optimizer/{CODE}")
"""Where a run can't be told to go on in spite of a difference, because tensors of the state would have no place; and
what of that it can."""


class Difference(str):
    """A line that says how two values differ, the ``path`` at which they do, and who alone has one there: ``"saved"``,
    ``"here"`` or ``""``."""

    path: str
    only: str

    def __new__(cls, path: str, how: str, only: str = "") -> Difference:
        made = super().__new__(cls, f"{path}: {how}")
        made.path = path
        made.only = only
        return made

    @property
    def is_fixed(self) -> bool:
        """Whether a run can't be told to go on in spite of it."""
        return self.path.startswith(FIXED) and not self.path.startswith(FREE)

    @property
    def is_unknown(self) -> bool:
        """Whether it is of code, of which it is not known what it means for the result."""
        return CODE in self.path.split("/")

    @property
    def is_rounded(self) -> bool:
        """Whether it is of numbers that another machine or version may round in another way."""
        return self.path.endswith(("/samples", "start"))

    def is_allowed(self, allow: Patterns) -> bool:
        """Whether a pattern matches the path, the beginning of it, or a name in it.

        >>> line = Difference("train/batch_size", "32 in what was saved, 64 here")
        >>> [line.is_allowed([pattern]) for pattern in ("train", "train/*", "batch_size", "valid/*")]
        [True, True, True, False]
        """
        names = self.path.split("/")
        leading = ("/".join(names[:i]) for i in range(1, len(names) + 1))
        return any(matches(allow, name) for name in (*leading, *names))


def compare(saved: Any, here: Any, path: str = "") -> Iterator[Difference]:
    """A line for every path at which two plain trees differ."""
    if isinstance(saved, dict) and isinstance(here, dict):
        for key in {**here, **saved}:
            where = f"{path}/{key}" if path else str(key)
            if key not in saved:
                yield Difference(where, f"missing in what was saved, {short(here[key])} here", "here")
            elif key not in here:
                yield Difference(where, f"{short(saved[key])} in what was saved, missing here", "saved")
            else:
                yield from compare(saved[key], here[key], where)
    elif isinstance(saved, list) and isinstance(here, list) and len(saved) == len(here):
        for i, (a, b) in enumerate(zip(saved, here, strict=True)):
            yield from compare(a, b, f"{path}/{i}")
    elif type(saved) is not type(here) or (saved is not here if isinstance(saved, Tensor) else saved != here):
        yield Difference(path, f"{short(saved)} in what was saved, {short(here)} here")


EARLIER = "earlier"
"""In a fingerprint that was saved by an earlier version: that not all was saved that is compared now."""


def compare_runs(
    saved: dict[str, Any], here: dict[str, Any], allow: Patterns = (), *, rounded: bool = False
) -> list[Difference]:
    """The differences of two fingerprints but for those that are allowed; what is `FIXED` can't be.

    What code differs in is none, see `unknown_differences`. What an earlier version did not save is none either.

    Args:
        rounded: whether numbers count that are computed, and so may be rounded in another way elsewhere.
    """
    found = (line for line in _compare_fingerprints(saved, here) if not line.is_unknown)
    found = (line for line in found if rounded or not line.is_rounded)
    return [line for line in found if line.is_fixed or not line.is_allowed(allow)]


def unknown_differences(saved: dict[str, Any], here: dict[str, Any], allow: Patterns = ()) -> list[Difference]:
    """The differences of two fingerprints in the code of functions, but for those that are allowed."""
    found = (line for line in _compare_fingerprints(saved, here) if line.is_unknown)
    return [line for line in found if not line.is_allowed(allow)]


def _compare_fingerprints(saved: dict[str, Any], here: dict[str, Any]) -> Iterator[Difference]:
    apart = ("callbacks", "order", EARLIER)
    rest = [{key: part for key, part in each.items() if key not in apart} for each in (saved, here)]
    found = compare(rest[0], rest[1])
    lines = [*found, *_compare_callbacks(saved.get("callbacks"), here["callbacks"])]
    if isinstance(order := saved.get("order"), list):
        both = [[id for id in one if id in other] for one, other in ((order, here["order"]), (here["order"], order))]
        lines += compare(", ".join(both[0]), ", ".join(both[1]), "order")
    # What something else was made with, is not what this was made with.
    others = {line.path.rpartition("/")[0] for line in lines if line.path.endswith(("/class", "/def"))} - {"optimizer"}
    others_inside = tuple(f"{path}/" for path in others)
    others_data = {line.path.rpartition("/")[0] for line in lines if line.path.endswith(("/kind", "/length"))}
    for line in lines:
        whole, _, name = line.path.rpartition("/")
        if whole in others_data and name in ("rows", "samples"):
            continue
        inside = whole if name in ("class", "def") else f"{whole}/"
        if not inside.startswith(others_inside) and not _is_silent(line, saved, here):
            yield line


def _is_silent(line: Difference, saved: dict[str, Any], here: dict[str, Any]) -> bool:
    """Whether a line is no difference of the runs."""
    names = line.path.split("/")
    if line.path == "optimizer/class" and not line.only:
        return is_same_class(saved["optimizer"]["class"], here["optimizer"]["class"])
    if EARLIER in saved and line.only == "here" and names[0] != "members":
        entry = here["callbacks"].get(names[1], {}) if names[0] == "callbacks" and len(names) == 2 else {}
        return not entry.get("state")
    if not line.only:
        return False
    # A sample is made of what can be read, and data may have been mended; the length of an order was not always told.
    if names[0] in ("train", "valid") and (
        names[-1] in ("rows", "samples") or (line.only, names[-1]) == ("here", "sampled")
    ):
        return True
    # Another version of Python has another form of code; and which measures there are, is told apart from what they do.
    return line.is_unknown or (names[0] == "scores" and len(names) == 3)


def _compare_callbacks(saved: Any, here: dict[str, Any]) -> Iterator[Difference]:
    if not (isinstance(saved, dict) and all(isinstance(entry, dict) for entry in saved.values())):
        yield from compare(saved, here, "callbacks")
        return
    for id in {**here, **saved}:
        where = f"callbacks/{id}"
        part, part_here = (each.get(id, {"decides": False}).get("decides", True) for each in (saved, here))
        if not (part or part_here) or ("weight" not in saved.get(id, {"weight": 0}) and not part_here):
            continue  # or it is not known what an earlier version saved
        if id in saved and id in here and part is not part_here:
            looks_on = "it only looks on"
            how = f"{looks_on} in what was saved, not here" if part_here else f"{looks_on} here, not in what was saved"
            yield Difference(where, how)
        elif id not in saved:
            yield Difference(where, f"missing in what was saved, {_kind(here[id])} here", "here")
        elif id not in here:
            yield Difference(where, f"{_kind(saved[id])} in what was saved, missing here", "saved")
        elif not is_same_class(saved[id].get("kind"), here[id]["kind"]):
            yield from compare(saved[id].get("kind"), here[id]["kind"], f"{where}/kind")
        else:
            yield from compare({**saved[id], "kind": here[id]["kind"]}, here[id], where)


def is_same_class(saved: Any, here: str) -> bool:
    """Whether two dotted names are of one class, which is of ``__main__`` where its file is run and not imported.

    >>> is_same_class("__main__.Clip", "train.Clip"), is_same_class("a.Clip", "b.Clip")
    (True, False)
    """
    names = [str(name).removeprefix("__main__.") for name in (saved, here)]
    return any(f".{one}".endswith(f".{other}") for one, other in (names, reversed(names)))


def _kind(entry: dict[str, Any]) -> str:
    return f"a callback of kind {entry['kind']!r}" if entry.get("kind") else "a callback"


def refusal(message: str, found: Sequence[str]) -> StateDictError:
    """The error that lists what was found, and says how to continue in spite of it where that is possible."""
    error = StateDictError(message, found)
    paths = [line.path for line in found if isinstance(line, Difference) and not line.is_fixed]
    if len(paths) == len(found):
        add_note(error, f"to continue in spite of that: allow={list(dict.fromkeys(paths))}")
    return error


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 160 else text[:157] + "..."


def check_allowed(allow: Patterns, *told: dict[str, Any]) -> None:
    """Refuse a name in ``allow`` that is of nothing that can differ.

    Args:
        told: what runs say of themselves: state dicts, the metadata of checkpoints, or what `identity` gives.

    Raises:
        StateDictError: a name matches nothing; the nearest is named.

    >>> check_allowed(["trian/batch_size"], {"fingerprint": {"train": {"batch_size": 32}}})
    Traceback (most recent call last):
    functional_loop.core.errors.StateDictError: allow='trian/batch_size' matches nothing that can differ; did you mean
    'train/batch_size'?
    """
    patterns = [pattern for pattern in listed(allow) if isinstance(pattern, str)]
    if not patterns:
        return
    names = dict.fromkeys(_ELSEWHERE)
    for run in told:
        for tree in (run.get("fingerprint"), run.get("environment"), {"hyperparameters": run.get("hyperparameters")}):
            for path in _paths(tree):
                names |= dict.fromkeys((path, *path.split("/")))
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            # A callback that has gone and is in no file any more was not misspelt.
            if pattern.startswith("callbacks/") and not get_close_matches(pattern, names, n=1, cutoff=0.8):
                continue
            raise StateDictError(f"allow={pattern!r} matches nothing that can differ{did_you_mean(pattern, names)}")


_ELSEWHERE = ("seed", "start", "epochs", "members", "bootstrap", "order_seed", "cuda", "cudnn", "samples", "rows", CODE)


def _paths(tree: Any, path: str = "") -> Iterator[str]:
    if path:
        yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from _paths(value, f"{path}/{key}" if path else str(key))
