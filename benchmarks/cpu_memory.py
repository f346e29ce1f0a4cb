"""Peak memory of a forward and backward on the CPU, beyond its inputs, in a process of its own.

python -m benchmarks.cpu_memory --planes 2 --tables 2
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import torch

from race_attention import race_attention, sample_hyperplanes


def peak() -> int:
    """Bytes, of this process alone: getrusage would count what its parent had before."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found.group(1)) * 1024


def beyond_inputs(planes: int, tables: int, tokens: int, heads: int, dim: int, dtype: torch.dtype) -> dict[str, float]:
    """The peak over a causal forward and backward, in bytes and as a multiple of output and gradients."""
    # Drawn in their own dtype: a copy in another would count as a peak of before.
    q, k, v, grad = (torch.randn(1, tokens, heads, dim, dtype=dtype) for _ in range(4))
    for x in (q, k, v):
        x.requires_grad_()
    hyperplanes = sample_hyperplanes(heads, tables, planes, dim)
    before = peak()
    out = race_attention(q, k, v, hyperplanes, 1.0, scale=dim**-0.5, causal=True, backend="cpu")
    assert isinstance(out, torch.Tensor)
    out.backward(grad)
    results = 4 * q.numel() * q.itemsize
    return {"peak MB": (peak() - before) / 1e6, "times output and gradients": (peak() - before) / results}


def measured_apart(planes: int, tables: int, tokens: int, dtype: str) -> dict[str, float]:
    """The same from a fresh process."""
    command = [sys.executable, "-m", "benchmarks.cpu_memory", "--planes", str(planes), "--tables", str(tables)]
    command += ["--tokens", str(tokens), "--dtype", dtype, "--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planes", type=int, default=2)
    parser.add_argument("--tables", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    beyond_inputs(options.planes, options.tables, 64, 4, 128, dtype)  # what the first call of a process brings along
    sys.stdout.write(json.dumps(beyond_inputs(options.planes, options.tables, options.tokens, 4, 128, dtype)) + "\n")


if __name__ == "__main__":
    main()
