"""The manual tells the truth: the code of every page runs from top to bottom, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from functional_loop.callbacks import torch_callbacks

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    *(page for top in ("functional_loop", "callbacks", "bench") for page in ROOT.glob(f"{top}/**/README.md")),
]
_CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if _CODE.search(page.read_text(encoding="utf-8"))], ids=name)
def test_the_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # A page registers a callback of its own.
    monkeypatch.setattr(torch_callbacks, "_entries", dict(torch_callbacks._entries))
    names: dict[str, object] = {"__name__": "readme"}
    for block in _CODE.findall(page.read_text(encoding="utf-8")):
        exec(block, names)


def test_every_shipped_callback_is_named() -> None:
    page = (ROOT / "callbacks" / "README.md").read_text(encoding="utf-8")
    assert [key for key in torch_callbacks if f"`{key}`" not in page] == []


def anchors(page: Path) -> set[str]:
    headings = (line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    return {re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", re.sub(_CODE, "", page.read_text(encoding="utf-8"))):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.is_file(), link
            assert not anchor or anchor in anchors(target), link


def test_the_front_page_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 8192
