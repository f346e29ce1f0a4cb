"""bfloat16 against float32 on the CPU, in turns, and what bounds it: `python -m benchmarks.cpu_turns`.

On a host that others share a time is worth little by itself. Here the calls that are compared take turns, and those
beside which other processes ran are left out. Each is measured twice: as it is, and on tokens that all lie in one place
(stride 0), so that reading them costs nothing and arithmetic is left, with the writing of results. What bfloat16 takes
without reading, over what float32 takes with it, is the least ratio that faster reading could reach.

Causal, D = Dv = 128, four heads; the file has medians, quantiles, machine, versions, date.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import cpu

DTYPES = (torch.float32, torch.bfloat16)


def prepared(
    dtype: torch.dtype, planes: int, tables: int, tokens: int, backward: bool, in_place: bool
) -> Callable[[], Any]:
    """A call on random tokens; with ``in_place`` every token is the first."""
    attention = cpu.race("cpu", planes, tables, cpu.HEADS, causal=True)
    q, k, v, grad = (cpu.tokens_of(tokens, cpu.HEADS, dtype) for _ in range(4))
    if in_place:
        q, k, v, grad = (x[:, :1].expand_as(x) for x in (q, k, v, grad))
    if not backward:
        return lambda: attention(q, k, v)
    inputs: list[Tensor] = [x.requires_grad_() for x in (q, k, v)]
    return lambda: torch.autograd.grad(attention(*inputs), inputs, grad)


def in_turns(calls: dict[str, Callable[[], Any]], seconds: float, least: int = 5) -> dict[str, float]:
    """Median and quantiles of each call in milliseconds, without the rounds that others disturbed."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    disturbed, begin = 0, time.perf_counter()
    while (gone := time.perf_counter() - begin) < seconds or (
        min(map(len, times.values())) < least and gone < 5 * seconds
    ):
        for name, call in calls.items():
            noise, start = cpu.others(), time.perf_counter()
            call()
            took = time.perf_counter() - start
            if cpu.others() - noise > 0.1 * took + 0.011:  # the system counts in hundredths
                disturbed += 1
            else:
                times[name].append(took)
    if not all(times.values()):
        raise RuntimeError("no call ran undisturbed: the machine is too busy to measure on")
    at = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    result: dict[str, float] = {}
    for name, taken in times.items():
        low, median, high = (torch.tensor(taken, dtype=torch.float64).quantile(at) * 1e3).tolist()
        result |= {f"{name} ms": median, f"{name} q10 ms": low, f"{name} q90 ms": high}
    return result | {"runs each": min(map(len, times.values())), "disturbed runs": disturbed}


def row(planes: int, tables: int, tokens: int, backward: bool, seconds: float) -> dict[str, Any]:
    """float32 and bfloat16, with reading and without."""
    names = {
        (dtype, alone): f"{str(dtype)[6:]}{', nothing to read' * alone}" for dtype in DTYPES for alone in (False, True)
    }
    calls = {name: prepared(d, planes, tables, tokens, backward, alone) for (d, alone), name in names.items()}
    times = in_turns(calls, seconds)
    whole = times["float32 ms"]
    return {
        "pass": cpu.PASSES[backward],
        "P": planes,
        "L": tables,
        "bfloat16 / float32": times["bfloat16 ms"] / whole,
        "bfloat16 without reading / float32": times["bfloat16, nothing to read ms"] / whole,
        **times,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--seconds", type=float, default=8.0, help="for each row")
    parser.add_argument("--into", type=Path, default=cpu.RESULTS)
    options = parser.parse_args()
    torch.manual_seed(0)
    about = cpu.machine()
    rows = []
    for backward in (False, True):
        for planes, tables in cpu.CONFIGURATIONS:
            rows.append(row(planes, tables, options.tokens, backward, options.seconds))
            print(json.dumps(rows[-1]), flush=True)
    title = f"CPU, bfloat16 against float32 in turns, T = {options.tokens}"
    path = options.into / f"cpu-{about['instruction set']}-turns.json"
    path.write_text(json.dumps({"title": title, "context": about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
