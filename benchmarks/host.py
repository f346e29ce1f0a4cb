"""Host time of short calls of the Triton backend without a GPU: all but the kernels, microseconds a call.

    TRITON_INTERPRET=1 python -m benchmarks.host [--tokens 64] [--output /tmp/host.json]

Kernels are neither compiled nor started: the library that starts a recorded pass calls a function of the C library in
the place of the driver's. What is left is what a call of any length costs the calling thread but for the driver and
the device's allocator: checks, autograd, allocations, the recording. Autograd has no thread of its own for CPU tensors.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import platform
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from experiments.report import commit
from race_attention import attention, race_attention
from race_attention.backends.triton import batch, start

HEADS, DIM = 4, 128


def leave_kernels_out() -> None:
    """In this process: launches are written down and not done; values are not looked at, as on a GPU."""
    # isascii(x) is 0, and so no error, for all that does not fit seven bits: functions and addresses.
    nothing = ctypes.cast(ctypes.CDLL(None).isascii, ctypes.c_void_p).value or 0
    batch.driver = lambda: (nothing, nothing)  # type: ignore[assignment]
    start._start = _left_out
    attention.values_wanted = lambda device: False  # type: ignore[attr-defined]


def _left_out(key: Any, kernel: Any, grid: Any, args: tuple[Any, ...], options: Any) -> None:
    if key not in start._compiled:
        types = ["*bf16" if isinstance(x, torch.Tensor) else "i64" if isinstance(x, int) else "fp32" for x in args]
        metadata = SimpleNamespace(num_warps=4, num_ctas=1, shared=0, target=SimpleNamespace(warp_size=32))
        source = SimpleNamespace(signature=dict(enumerate(types)))
        start._compiled[key] = SimpleNamespace(function=1 << 20, metadata=metadata, src=source), ()


class Call:
    """A call at (2, 2), forward alone or with its backward pass.

    ``typical`` has a number for beta, hyperplanes of one head for all and a scale; otherwise nothing is converted.
    """

    def __init__(self, tokens: int, causal: bool, backward: bool, decay: bool = False, typical: bool = False) -> None:
        shape = 1, tokens, HEADS, DIM
        self.inputs = [torch.randn(shape, dtype=torch.bfloat16).requires_grad_(backward) for _ in range(3)]
        self.planes = torch.randn(1 if typical else HEADS, 2, 2, DIM)
        self.beta: Any = 4.0 if typical else torch.full((HEADS,), 4.0, requires_grad=backward)
        self.decay = (-0.01 * torch.rand(shape[:3])).requires_grad_(backward) if decay else None
        self.causal, self.backward, self.scale = causal, backward, 0.5 if typical else 1.0
        self.grad = torch.randn(shape, dtype=torch.bfloat16)
        given = self.inputs, [] if typical else [self.beta], [] if self.decay is None else [self.decay]
        self.wanted = [x for some in given for x in some]

    def __call__(self) -> Any:
        out = race_attention(
            *self.inputs, self.planes, self.beta, log_decay=self.decay, causal=self.causal, scale=self.scale,
            backend="triton",
        )  # fmt: skip
        return torch.autograd.grad(out, self.wanted, self.grad) if self.backward else out


def microseconds(step: Any, calls: int, groups: int = 15) -> tuple[float, float]:
    """The least and the median of groups of calls."""
    for _ in range(8):
        step()
    times = []
    for _ in range(groups):
        begin = time.perf_counter()
        for _ in range(calls):
            step()
        times.append((time.perf_counter() - begin) / calls * 1e6)
    return min(times), statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64, help="few, so that no time goes into fresh memory")
    parser.add_argument("--calls", type=int, default=300, help="of a group")
    parser.add_argument("--output", type=Path, default=None)
    given = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") != "1":
        parser.exit(2, "error: TRITON_INTERPRET=1 lets the backend take CPU tensors\n")
    if batch.library() is None:
        parser.exit(2, "error: the library that starts kernels was not built\n")
    torch.set_num_threads(1)
    leave_kernels_out()
    rows = []
    for causal, decay, typical in (
        (True, False, False),
        (True, True, False),
        (False, False, False),
        (True, False, True),
    ):
        for backward in (False, True):
            what = {"causal": causal, "decay": decay, "typical": typical, "backward": backward}
            least, median = microseconds(Call(given.tokens, causal, backward, decay, typical), given.calls)
            rows.append({**what, "least_us": round(least, 1), "median_us": round(median, 1)})
            print(rows[-1], flush=True)
    if given.output:
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        about = {"commit": commit(), "date": date, "torch": torch.__version__, "machine": platform.processor()}
        given.output.write_text(
            json.dumps({**about, "python": platform.python_version(), "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
