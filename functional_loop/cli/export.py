"""``export``: the network of a checkpoint for other tools, without the code that trained it."""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path

import torch

from ..checkpoint.atomic import replacing_by_name
from ..checkpoint.state import StateDict
from ..core.errors import FunctionalLoopError
from ..interop.files import plain_checkpoint, write_safetensors
from ..replay.replay import read_state
from .usage import UsageError, in_one_line


def run(options: argparse.Namespace, command: str) -> int:
    """Write what ``options.file`` holds to the new file ``options.out``."""
    return export(options.file, options.out)


def export(file: Path, out: Path) -> int:
    """Write what ``file`` holds to the new file ``out``; the exit code, 0.

    Raises:
        UsageError: ``file`` is no intact checkpoint, ``out`` exists or is of another kind.
    """
    if out.suffix not in (".safetensors", ".pt"):
        raise UsageError(f"OUT must end in .safetensors or .pt, not {out.name!r}")
    if os.path.lexists(out):
        raise UsageError(f"{out} exists")
    if out.suffix == ".safetensors" and importlib.util.find_spec("safetensors") is None:
        raise UsageError("safetensors files need the package: pip install functional-loop[safetensors]")
    try:
        state, _ = read_state(file)
        if "members" in state:
            raise UsageError(f"{file} is of an ensemble: in Python, save to_module(ctx, member=...).state_dict()")
        groups = state["fingerprint"]["optimizer"]["groups"]
        if out.suffix == ".safetensors" and any("train_mode" in group["flags"] for group in groups):
            raise UsageError(
                f"{file} holds the parameters that are trained, and its optimizer evaluates with others: in Python, "
                "to_safetensors(ctx, path) writes these"
            )
    except (FunctionalLoopError, OSError) as error:
        raise UsageError(in_one_line(error)) from None
    except (LookupError, TypeError) as error:
        raise UsageError(f"{file} is no checkpoint of a run: {type(error).__name__}: {error}") from None
    _write(state, out)
    print(f"{out}: {len(state['network'])} tensors, after step {state['global_step']}")
    return 0


def _write(state: StateDict, out: Path) -> None:
    try:
        with replacing_by_name(out) as temporary:
            if out.suffix == ".pt":
                torch.save(plain_checkpoint(state), temporary)
            else:
                write_safetensors(state["network"], temporary)
    except Exception as error:  # each library has errors of its own for a disk that is full
        raise UsageError(f"{out} could not be written: {error}") from None
