"""The README tells the truth: its code runs, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from functional_loop.callbacks import torch_callbacks

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # The README registers a callback of its own.
    monkeypatch.setattr(torch_callbacks, "_entries", dict(torch_callbacks._entries))
    names: dict[str, object] = {"__name__": "readme"}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, names)


def test_every_shipped_callback_is_named() -> None:
    assert [key for key in torch_callbacks if f"`{key}`" not in README] == []


def test_links_within_the_page_lead_somewhere() -> None:
    headings = {re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in README.splitlines()}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= headings
