"""The tests as they run on other processors: ``python -m tests.processors [arguments of pytest]``.

Torch chooses its kernels by what the processor can do, and splits sums between threads. The suite runs with the kernels
of old processors, those of AVX2 and those of this processor, each with one thread and with two, and stops at the first
failure.
"""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product

CAPABILITIES = ("default", "avx2", "")
THREADS = (1, 2)


def main(arguments: list[str]) -> int:
    for capability, threads in product(CAPABILITIES, THREADS):
        print(f"== kernels: {capability or 'of this processor'}, threads: {threads}", flush=True)
        kernels = {"ATEN_CPU_CAPABILITY": capability} if capability else {}
        environment = {**os.environ, **kernels, "TEST_THREADS": str(threads)}
        done = subprocess.run([sys.executable, "-m", "pytest", *arguments], env=environment, check=False)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
