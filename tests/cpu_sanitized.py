"""The CPU kernels under sanitizers: every case, dtype and instruction set, on one thread and several.

    cmake -S . -B build/asan -DRACE_CPU_SANITIZE=ON && cmake --build build/asan
    export RACE_ATTENTION_CPU_LIBRARY=$(find build/asan -name libracecpu.so)
    ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" \\
        PYTHONPATH=src:. python tests/cpu_sanitized.py

For the thread sanitizer: -DRACE_CPU_SANITIZE_THREADS=ON and libtsan.so. The process ends with an error at the first
finding. RACE_ATTENTION_CPU_ISA chooses the instruction set.
"""

from __future__ import annotations

import sys

import torch

from race_attention.backends import cpu
from race_attention.testing import make_inputs
from tests.helpers import BACKENDS, CASES, LONG_CASES, check, evaluate, whole
from tests.test_cpu import LARGE, THREADED, large_inputs


def main() -> None:
    backend = next(b for b in BACKENDS if b.name == "cpu")
    served = [n for n, options in {**CASES, **LONG_CASES}.items() if options.get("readout") != "bucket"]
    count = 0
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for dtype in backend.dtypes:
            for case in served:
                check(backend, dtype, case, whole)
                count += 1
        for options in THREADED.values():
            evaluate(whole, make_inputs(**options, dim=16, planes=3, requires_grad=True), backend="cpu")
            count += 1
        for name in LARGE:
            for dtype in (torch.float32, torch.bfloat16):
                evaluate(whole, large_inputs(name, dtype), backend="cpu")
                count += 1
    sys.stdout.write(f"{cpu.instruction_set()}: {count} cases, nothing found\n")


if __name__ == "__main__":
    main()
