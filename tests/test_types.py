"""The packages are typed: mypy --strict finds nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_mypy_finds_nothing(tmp_path: Path) -> None:
    # mypy reads folders, and does not know that callbacks/ ships as functional_loop.callbacks.
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "functional_loop", tmp_path / "functional_loop", ignore=skip)
    shutil.copytree(ROOT / "callbacks", tmp_path / "functional_loop" / "callbacks", ignore=skip)
    shutil.copytree(ROOT / "bench", tmp_path / "bench", ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    result = subprocess.run([sys.executable, "-m", "mypy"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
