"""A run with everything on, logs included, survives kills; `python -m tests.torture` does it a thousand times."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.torture import torture


def test_a_few_kills(tmp_path: Path) -> None:
    done = torture(tmp_path, kills=6, seed=1, epochs=6)
    assert done.kills == 6
    assert done.aimed


@pytest.mark.slow
def test_many_kills(tmp_path: Path) -> None:
    done = torture(tmp_path, kills=200, seed=random.randrange(2**32))
    assert done.kills == 200
    assert done.in_saves > 20
