"""Where compiled graphs are kept for the next process."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..optim.layouts import Layout, layout

Flat: TypeAlias = Callable[[list[Tensor]], Sequence[Tensor]]


class Code(NamedTuple):
    """Compiled code: whether it draws from torch's generator, and the layouts of what it makes."""

    run: Flat
    draws: bool
    layouts: list[Layout]


def cache_folder() -> Path:
    """Where compiled graphs are kept, beside those of ``torch.compile``: see ``$TORCHINDUCTOR_CACHE_DIR``."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "functional_loop"


def key_of(text: str, inputs: Sequence[Tensor]) -> str:
    """A hash of all that compiled code depends on: ``text`` says what it computes, of tensors like ``inputs``."""
    from torch._inductor import config

    parts = [
        text,
        str(list(map(layout, inputs))),
        torch.__version__,
        str(config.get_hash()),
        # The number of threads is written into the code.
        str(torch.get_num_threads()),
        str(torch.are_deterministic_algorithms_enabled()),
        torch.get_float32_matmul_precision(),
        _processor(),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]


def find(key: str) -> Code | None:
    """What was kept under ``key``, or ``None``; with a warning if it is damaged, so that it is compiled again."""
    folder = cache_folder() / key
    try:
        return _read(folder)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:
        _warn(f"the compiled graph in {folder} can't be read ({error}), and is compiled again")
        return None


def _read(folder: Path) -> Code:
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    return Code(load(folder / "graph.so"), about["draws"], [_layout(*parts) for parts in about["layouts"]])


def load(library: Path) -> Flat:
    run: Flat = torch._C._aoti.AOTIModelContainerRunnerCpu(str(library), 1).run
    return run


def keep(key: str, library: Path, draws: bool, attempt: Callable[[Flat], Sequence[Tensor]]) -> Code:
    """Put a compiled library into the cache, if an attempt to run it succeeds.

    Of two processes that keep the same at once, the first wins. What can't be put there is run from where it is, with a
    warning.

    Args:
        attempt: runs it, and returns what came out.
    """
    folder = cache_folder() / key
    try:
        return _put(folder, library, draws, attempt)
    except OSError as error:
        _warn(f"a compiled graph can't be kept in {folder} ({error}): it is compiled again in every process")
    run = load(library)
    return Code(run, draws, list(map(layout, attempt(run))))


def _put(folder: Path, library: Path, draws: bool, attempt: Callable[[Flat], Sequence[Tensor]]) -> Code:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        made = Path(temporary) / "graph"
        made.mkdir()
        # Beside the library may be a description of the operators that it calls through Python's side of torch.
        for suffix in (".so", ".json"):
            if library.with_suffix(suffix).exists():
                shutil.copyfile(library.with_suffix(suffix), made / f"graph{suffix}")
        run = load(made / "graph.so")
        code = Code(run, draws, list(map(layout, attempt(run))))
        layouts = [(str(dtype).removeprefix("torch."), shape, stride) for dtype, shape, stride in code.layouts]
        (made / "about.json").write_text(json.dumps({"draws": draws, "layouts": layouts}), encoding="utf-8")
        try:
            made.rename(folder)
        except OSError:
            try:
                _read(folder)
            except Exception:
                # What is there is damaged.
                shutil.rmtree(folder)
                made.rename(folder)
    return code


def _warn(what: str) -> None:
    warnings.warn(f"compile=True: {what}", UserWarning, stacklevel=2)


def _layout(dtype: str, shape: list[int], stride: list[int]) -> Layout:
    return getattr(torch, dtype), torch.Size(shape), tuple(stride)


def _processor() -> str:
    """What the processor can do: the cache may be in a folder that several machines share."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{torch.backends.cpu.get_cpu_capability()} {flags}"
