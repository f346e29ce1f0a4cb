"""What `race-attention stream` and the benchmarks measure of a layer's core over a stream."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

from .adjoint import StreamGradients
from .attention import stream_attention
from .backward import stream_attention_backward
from .generated import Checksum, GeneratedStream

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h


def measure(
    source: GeneratedStream,
    parameters: tuple[torch.Tensor, torch.Tensor],
    options: dict[str, Any],
    backward: bool,
    keep_every: int = 1,
    keep_on: str | None = None,
    journal: Path | None = None,
) -> tuple[dict[str, float], dict[str, dict[str, float]], StreamGradients | None]:
    """Seconds of both passes, checksums of the outputs and of the tokens' gradients, the parameters' gradients."""
    hyperplanes, beta = parameters
    out, grads = Checksum(), Checksum()
    folders = (None, None) if journal is None else (journal / "forward", journal / "backward")
    start = time.perf_counter()
    forward = stream_attention(
        source,
        hyperplanes,
        beta,
        sink=out,
        keep_every=keep_every if backward else None,
        keep_on=keep_on,
        journal=folders[0],
        **options,
    )
    _wait(source.device)
    seconds = {"forward": time.perf_counter() - start}
    if not backward:
        return seconds, out.numbers(), None
    start = time.perf_counter()
    gradients = stream_attention_backward(
        source,
        source.gradients(),
        hyperplanes,
        beta,
        forward=forward,
        grad_sink=grads,
        journal=folders[1],
        **options,
    )
    _wait(source.device)
    seconds["backward"] = time.perf_counter() - start
    return seconds, out.numbers() | {f"gradient of {name}": x for name, x in grads.numbers().items()}, gradients


def checksums(gradients: StreamGradients) -> dict[str, dict[str, float]]:
    """Of the parameters' gradients, the two numbers that :class:`Checksum` has for arrays of tokens."""
    made = {}
    for name in ("hyperplanes", "beta"):
        flat = getattr(gradients, name).double().cpu().reshape(-1)
        weights = torch.randn(flat.numel(), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        made[f"gradient of {name}"] = {"sum": float(flat @ weights), "norm": float(flat.norm())}
    return made


def keep_freed_memory() -> None:
    """Has glibc hand a freed segment to the next one, where it otherwise maps, and clears, new pages each time.

    It does so below 32 MB, the most that it allows: 8192 tokens of 4 heads of 128 in float32. Measured there on
    two cores: 32 ms instead of 49 for a segment forward and backward.
    """
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library
        return
    for option, value in ((_M_MMAP_THRESHOLD, 2**25), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_ARENA_MAX, 1)):
        mallopt(option, value)


def peak_memory(device: torch.device) -> dict[str, int]:
    """The most memory that this process has had in bytes: resident, and of the GPU as torch allocates it."""
    peak = {"resident": _peak_resident()}
    if device.type == "cuda":
        peak["cuda_allocated"] = torch.cuda.max_memory_allocated(device)
        peak["cuda_reserved"] = torch.cuda.max_memory_reserved(device)
    return peak


def _peak_resident() -> int:
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource  # not on every system

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
