"""The environment of a run: what does not change its results, but may change their last bits."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ..engine.loop import Loop

KERNELS = ("capturable", "foreach", "fused")
"""Flags of optimizers that choose among kernels of the same arithmetic."""


def environment(loop: Loop) -> dict[str, Any]:
    """What ``loop`` is computed with here and now, as plain values: two runs of one environment have the same bits.

    >>> from functional_loop.examples.digits import loop
    >>> sorted(environment(loop()))
    ['compile', 'cpu', 'deterministic', 'device', 'functional_loop', 'matmul_precision', 'mkldnn', 'numpy', 'threads',
     'torch']
    """
    made = {
        "functional_loop": _version("functional-loop"),
        "torch": str(torch.__version__),
        "numpy": _version("numpy"),
        "threads": torch.get_num_threads(),
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "device": loop.device.type,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul_precision": _precision(torch.backends.mkldnn.matmul),  # type: ignore[attr-defined]
        "mkldnn": bool(torch.backends.mkldnn.enabled),
        "compile": loop.compile,
    }
    return made | (_cuda(loop.device) if loop.device.type == "cuda" else {})


def _cuda(device: torch.device) -> dict[str, Any]:
    cudnn: Any = torch.backends.cudnn
    return {
        "device": f"cuda ({torch.cuda.get_device_name(device)})",
        "matmul_precision": _precision(torch.backends.cuda.matmul),
        "cuda": str(torch.version.cuda),
        "cudnn": {
            "version": cudnn.version(),
            "benchmark": bool(cudnn.benchmark),
            "deterministic": bool(cudnn.deterministic),
            "precision": _precision(cudnn.conv),
        },
    }


def _precision(operation: Any) -> str:
    # Not torch.get_float32_matmul_precision(), which raises where precisions are set by backend.
    precision = str(operation.fp32_precision)
    return "ieee" if precision == "none" else precision


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
