"""Virtual environments for packages that must not change the one at hand, but share its torch."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

import torch

DEFAULT_ROOT = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "functional_loop" / "bench"
MARK = "installed.json"


class InstallError(Exception):
    """A package does not install beside this torch; the message is the reason in a line."""


def environment(name: str, requirements: Sequence[str], root: Path = DEFAULT_ROOT) -> Path:
    """The Python of an environment with ``requirements``, made at ``root / name`` if it isn't there.

    It sees all packages of the environment at hand, torch among them, so that it takes little space; pip may add to
    them and put other versions in front of them, but never another torch.

    Raises:
        InstallError: pip fails.
    """
    folder = root / name
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted = {"requirements": list(requirements), "torch": torch.__version__, "base": sys.prefix}
    if python.exists() and _read(folder / MARK) == wanted:
        return python
    venv.create(folder, clear=True, with_pip=not _has_pip())
    _share_packages(python)
    constraints = folder / "constraints.txt"
    constraints.write_text(f"torch=={torch.__version__}\n", encoding="utf-8")
    command = [str(python), "-m", "pip", "install", "-c", str(constraints), *requirements]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise InstallError(_reason(done.stdout + done.stderr))
    (folder / MARK).write_text(json.dumps(wanted), encoding="utf-8")
    return python


def version(python: Path, package: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def _has_pip() -> bool:
    # importlib.util.find_spec would have setuptools replace the distutils that torch's compiler needs.
    try:
        importlib.metadata.distribution("pip")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _share_packages(python: Path) -> None:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    shared = [path for path in sys.path if Path(path).name.endswith("-packages")]
    (Path(done.stdout.strip()) / "shared.pth").write_text("\n".join(shared) + "\n", encoding="utf-8")


def _read(path: Path) -> object:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _reason(errors: str) -> str:
    """The lines in which pip says why, as one."""
    lines = [line.strip() for line in errors.splitlines() if line.strip() and not line.startswith("WARNING")]
    conflicts = [line for line in lines if "depends on torch" in line or "requested (constraint) torch" in line]
    told = conflicts or [line for line in lines if line.startswith("ERROR")] or lines[-1:] or ["pip failed"]
    return "; ".join(dict.fromkeys(told[:2]))
