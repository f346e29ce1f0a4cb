"""The parts of the GPU benchmark: each takes ``report(part, **row)`` and calls it as rows are measured."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_peers import DIM, EXACT, HEADS, Exact, Linear, Race, Step, has_linear
from race_attention.backends.triton.decode import decode_

MILLION = 1 << 20
CONFIGURATIONS = ((2, 2), (3, 3), (4, 4))  # (P, L)
WIDE = ((6, 2), (8, 1))
STATES = (torch.float64, torch.float32)
Report = Callable[..., None]


def measure(step: Step, repeats: int = 7, warm: int = 2) -> float:
    """Median milliseconds."""
    for _ in range(warm):
        step()
    torch.cuda.synchronize()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:  # one after the other without waiting: host time shows where it is the longer
        begin.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


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


def _million(report: Report, part: str, planes: int, tables: int, repeats: int = 7, **how: Any) -> None:
    freed()
    torch.cuda.reset_peak_memory_stats()
    ms = measure(Race(planes, tables, MILLION, **how), repeats)
    peak = torch.cuda.max_memory_allocated() / 2**30
    report(part, P=planes, L=tables, tokens=MILLION, **how, ms=ms, peak_gib=peak)


def table(report: Report) -> None:
    """The rows of the targets at 1,048,576 tokens."""
    for planes, tables in CONFIGURATIONS:
        for backward in (False, True):
            for causal in (True, False):
                _million(report, "table", planes, tables, causal=causal, backward=backward)
            _million(report, "table", planes, tables, causal=True, backward=backward, decay=True)


def wide(report: Report) -> None:
    """More buckets than one tile holds."""
    for planes, tables in WIDE:
        for causal in (True, False):
            for backward in (False, True):
                _million(report, "wide", planes, tables, 3, causal=causal, backward=backward)


def linear(report: Report) -> None:
    """Beside flash-linear-attention of as many features as (4,4) has buckets, forward, and with its backward pass."""
    planes, tables = CONFIGURATIONS[-1]
    for tokens in (1 << 16, MILLION):
        for backward in (False, True):
            row: dict[str, Any] = {"tokens": tokens, "causal": True, "backward": backward}
            for decay in (False, True):
                freed()
                ms = measure(Race(planes, tables, tokens, True, backward, decay=decay))
                report("linear", P=planes, L=tables, **row, decay=decay, ms=ms)
            for kind in Linear.KINDS if has_linear() else ():
                freed()
                _peer(report, "linear", kind, row, partial(Linear, kind, tables << planes, tokens, backward))


def _peer(report: Report, part: str, name: str, row: dict[str, Any], make: Callable[[], Step]) -> None:
    """A peer's row; one that fails there is a row without a time."""
    try:
        report(part, peer=name, **row, ms=measure(make()))
    except Exception as error:
        report(part, peer=name, **row, ms=None, error=f"{type(error).__name__}: {error}"[:200])


def lengths(report: Report) -> None:
    """From 1K tokens on, forward and backward, against exact attention and plain torch; short ones also as graphs."""
    for heads, longest, exact_longest in ((4, 20, 16), (64, 16, 14)):
        for power in range(10, longest + 1):
            tokens = 1 << power
            row: dict[str, Any] = {"heads": heads, "tokens": tokens, "causal": True, "backward": True}
            steps: list[tuple[dict[str, Any], Callable[[], Step]]] = [
                ({"P": p, "L": t} | row, partial(Race, p, t, tokens, True, True, heads=heads))
                for p, t in (CONFIGURATIONS[0], CONFIGURATIONS[-1])
            ]
            if power <= exact_longest:
                steps += [(row | {"peer": name}, partial(Exact, name, tokens, True, True, heads)) for name in EXACT]
            for own, make in steps:
                freed()
                step = make()
                report("lengths", **own, ms=measure(step, 11))
                if power < 16:
                    report("lengths", **own, graph=True, ms=graphed(step))
                del step
            if heads == 4 and power % 4 == 2:
                freed()
                step = Race(2, 2, tokens, True, True, backend="reference")
                report("lengths", **row, peer="plain torch (2,2)", ms=measure(step, 3, 1))


def _resident(planes: int, tables: int, tokens: int) -> tuple[float, float] | None:
    """(milliseconds, peak GiB) of a forward and backward pass, or None where it does not fit."""
    freed()
    torch.cuda.reset_peak_memory_stats()
    try:
        ms = measure(Race(planes, tables, tokens, True, True), 3, 1)
    except torch.OutOfMemoryError:
        return None
    return ms, torch.cuda.max_memory_allocated() / 2**30


def resident(report: Report) -> None:
    """12,000,000 tokens forward and backward, resident, and about the longest that fits."""
    whole = torch.cuda.get_device_properties(0).total_memory / 2**30
    for planes, tables in CONFIGURATIONS:
        row: dict[str, Any] = {"P": planes, "L": tables, "causal": True, "backward": True}
        found = _resident(planes, tables, 12_000_000)
        report("resident", **row, tokens=12_000_000, ms=found and found[0], peak_gib=found and found[1])
        if found is None or (planes, tables) != CONFIGURATIONS[0]:
            continue
        for share in (0.98, 0.95, 0.92):
            tokens = int(12 * share * whole / found[1] * 10) * 100_000
            longest = _resident(planes, tables, tokens)
            if longest is not None:
                report("resident", **row, tokens=tokens, ms=longest[0], peak_gib=longest[1], longest=True)
                break
    freed()


def _token(batch: int, planes: int, tables: int, dtype: torch.dtype) -> Step:
    q, k, v = (torch.randn(batch, HEADS, DIM, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    hyperplanes = torch.randn(HEADS, tables, planes, DIM, device="cuda") * DIM**-0.5
    beta = torch.full((HEADS,), 4.0, device="cuda")
    mass = torch.ones(batch, HEADS, tables, 1 << planes, dtype=dtype, device="cuda")
    value_sum = torch.zeros(*mass.shape, DIM, dtype=dtype, device="cuda")
    return partial(decode_, q, k, v, hyperplanes, beta, None, mass, value_sum)


def decode(report: Report) -> None:
    """One token, one layer, in place, captured."""
    for batch in (1, 64):
        for planes, tables in (*CONFIGURATIONS, *WIDE):
            for dtype in STATES:
                ms = graphed(_token(batch, planes, tables, dtype))
                report("decode", P=planes, L=tables, batch=batch, state=str(dtype).removeprefix("torch."), ms=ms)


def repeats(report: Report) -> None:
    """Whether repeats are equal to the bit."""
    for planes, tables in CONFIGURATIONS:
        for causal in (True, False):
            step = Race(planes, tables, 1 << 17, causal, True, decay=causal)
            first, second = step(), step()
            equal = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
            report("repeats", P=planes, L=tables, causal=causal, equal=equal)


PARTS: dict[str, Callable[[Report], None]] = {
    "table": table,
    "lengths": lengths,
    "decode": decode,
    "resident": resident,
    "wide": wide,
    "repeats": repeats,
    "linear": linear,
}


def compiled(job: tuple[Any, ...]) -> None:
    """Calls what a job names once: a call of Race, or one token."""
    kind, *arguments = job
    (Race(*arguments) if kind == "race" else _token(*arguments))()
    torch.cuda.synchronize()


def jobs_of(only: list[str]) -> list[tuple[Any, ...]]:
    """What to compile before the parts are timed."""
    jobs: list[tuple[Any, ...]] = []
    for pair in CONFIGURATIONS if set(only) - {"wide", "decode"} else ():
        jobs += [("race", *pair, 4096, causal, True) for causal in (True, False)]
        jobs.append(("race", *pair, 4096, True, True, HEADS, True))
    if "wide" in only:
        jobs += [("race", *pair, 4096, causal, True) for pair in WIDE for causal in (True, False)]
    if "decode" in only:
        jobs += [("token", 1, *pair, dtype) for pair in (*CONFIGURATIONS, *WIDE) for dtype in STATES]
    return jobs
