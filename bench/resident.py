"""Memory of this process, in bytes."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def resident_memory() -> int:
    """What it holds now; where the system doesn't tell, the most that it has held."""
    return _status("VmRSS") or _peak()


def peak_memory() -> int:
    """The most that it has held."""
    # The other counter starts at what the parent process had.
    return _status("VmHWM") or _peak()


def _status(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), 0)


def _peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
