"""How the GPU benchmark measures a step: with events, as a captured graph, and as a row of the result file."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu_peers import HEADS, Step

MILLION = 1 << 20
Report = Callable[..., None]


def timed(step: Step, repeats: int) -> list[float]:
    """Milliseconds of each call, host time where it is the longer: no call waits for the one before to end."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def measure(step: Step, repeats: int = 7, warm: int = 2) -> float:
    """Median milliseconds."""
    for _ in range(warm):
        step()
    torch.cuda.synchronize()
    return statistics.median(timed(step, repeats))


def graphed(step: Step) -> float:
    """Median milliseconds of a captured graph's replay."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replays() -> None:
        for _ in range(20):
            graph.replay()

    return measure(replays, 11) / 20


def bandwidth() -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.empty(1 << 30, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    return 2 * source.numel() * 2 / measure(lambda: target.copy_(source), 11) * 1e3


def freed() -> None:
    gc.collect()
    torch.cuda.empty_cache()


#: When no more rows are begun, by time.monotonic.
deadline = float("inf")


def row(report: Report, part: str, make: Callable[[], Step], repeats: int = 7, warm: int = 2, **what: Any) -> None:
    """Measures one step and reports it: milliseconds and peak memory, or None and why, where it fails.

    An error that leaves the device unusable is raised.
    """
    if time.monotonic() > deadline:
        return
    if what.get("tokens", 0) * what.get("heads", HEADS) >= MILLION:
        freed()
    torch.cuda.reset_peak_memory_stats()
    try:
        ms = graphed(make()) if what.get("graph") else measure(make(), repeats, warm if repeats > 3 else 1)
        report(part, **what, ms=ms, peak_gib=torch.cuda.max_memory_allocated() / 2**30)
    except Exception as error:
        report(part, **what, ms=None, error=f"{type(error).__name__}: {error}"[:200])
        torch.cuda.synchronize()
        freed()
