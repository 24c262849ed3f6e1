"""Every example in a public docstring runs and gives what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import bench
import functional_loop
import functional_loop.callbacks

OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def modules() -> list[str]:
    packages = (functional_loop, functional_loop.callbacks, bench)
    found = {
        module.name
        for package in packages
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        # The peers are in environments of their own.
        if not module.name.endswith("__main__") and not module.name.startswith("bench.peers.")
    }
    return sorted(found | {package.__name__ for package in packages})


@pytest.mark.parametrize("name", modules())
def test_examples_run(name: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # type: ignore[arg-type]
    result = doctest.testmod(importlib.import_module(name), optionflags=OPTIONS)
    assert result.failed == 0
