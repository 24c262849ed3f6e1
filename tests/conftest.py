"""Settings of all tests: one thread (``TEST_THREADS``), and the number of examples that laws are tried on.

``pytest -m slow`` runs the long suites, ``pytest --hypothesis-profile=long tests/laws`` the laws on many more examples.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))

# A training run is slow and large by Hypothesis's standards; on a busy machine no time is a bug.
settings.register_profile(
    "short",
    max_examples=60,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("long", settings.get_profile("short"), max_examples=2000)
settings.register_profile("few", settings.get_profile("short"), max_examples=5)
settings.load_profile("short")


def pytest_configure(config: pytest.Config) -> None:
    # torchdata 0.11 calls it whenever a loader is made.
    config.addinivalue_line("filterwarnings", "ignore:'set_vital' is deprecated")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is slow, unless marks are chosen by hand."""
    if config.option.markexpr:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
