"""The parts of the GPU benchmark about calls whose time is the host's, and about many short sequences in one call.

A host's speed changes from second to second, where others share it: what is compared here is called in turns.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import gpu_measure
from benchmarks.gpu_measure import MILLION, Report, row, timed
from benchmarks.gpu_peers import CONFIGURATIONS, EXACT, Exact, Nothing, Race, Step

#: Heads and tokens on either side of where RACE is to overtake exact attention.
CROSSOVERS = ((4, 8192), (64, 2048), (4, 4096), (64, 1024))
#: Lengths of packed sequences, by their name in the result file.
PACKED: dict[str, tuple[int, ...]] = {
    "4,000 of 100": (100,) * 4000,
    "16,384 of 64": (64,) * 16384,
    "one of 1,048,576 and 4,000 of 10": (MILLION, *(10,) * 4000),
    "one of 1,048,576 and 4,000 of 100": (MILLION, *(100,) * 4000),
    "40,000 of 10": (10,) * 40000,
    "one of 400,000": (400_000,),
}
NOT_CAUSAL = ("4,000 of 100", "40,000 of 10", "one of 1,048,576 and 4,000 of 10", "one of 400,000")


def crossover(report: Report, rounds: int = 61, calls: int = 5) -> None:
    """Forward and backward beside exact attention, from Python, in turns: medians and quartiles of all calls.

    ``ahead`` says in how many rounds the median of RACE's calls was below cuDNN's.
    """
    for threads in (True, False):
        with torch.autograd.set_multithreading_enabled(threads):
            for heads, tokens in CROSSOVERS:
                if time.monotonic() < gpu_measure.deadline:
                    _crossover(report, rounds, calls, heads, tokens, backward_on_the_calling_thread=not threads)


def _crossover(report: Report, rounds: int, calls: int, heads: int, tokens: int, **how: bool) -> None:
    race = {pair: Race(*pair, tokens, True, True, heads) for pair in CONFIGURATIONS}
    steps: dict[Any, Step] = {**race, **{name: Exact(name, tokens, True, True, heads) for name in EXACT}}
    for step in steps.values():
        timed(step, 6)
    found: dict[Any, list[list[float]]] = {name: [] for name in steps}
    order, chance = list(steps), random.Random(0)
    for _ in range(rounds):
        chance.shuffle(order)  # what a call leaves behind on the host slows the one after it
        for name in order:
            found[name].append(timed(steps[name], calls))
    medians = {name: [statistics.median(times) for times in rows] for name, rows in found.items()}
    for name, times in found.items():
        quartiles = statistics.quantiles([x for some in times for x in some], n=4)
        what: dict[str, Any] = {"peer": name} if name in EXACT else {"P": name[0], "L": name[1]}
        if name not in EXACT:
            ahead = sum(ours < theirs for ours, theirs in zip(medians[name], medians["cudnn"], strict=True))
            what["ahead"] = f"{ahead} of {rounds}"
        what |= {"heads": heads, "tokens": tokens, "causal": True, "backward": True, **how}
        report("crossover", **what, ms=quartiles[1], quartiles_ms=[quartiles[0], quartiles[2]])


def host(report: Report, groups: int = 15) -> None:
    """What a call of 1,024 tokens takes of the host, whatever the GPU does: of groups of calls in turns."""
    makers: dict[str, Callable[[], Step]] = {"an autograd function with nothing in it": Nothing}
    for backward in (False, True):
        name = "forward and backward" if backward else "forward"
        for causal in (True, False):
            how = "causal" if causal else "not causal"
            makers[f"(2,2) {how}, {name}"] = partial(Race, 2, 2, 1024, causal, backward)
        makers[f"(2,2) causal, decay, {name}"] = partial(Race, 2, 2, 1024, True, backward, decay=True)
        for peer in EXACT:
            makers[f"{peer} causal, {name}"] = partial(Exact, peer, 1024, True, backward)
    steps = {name: make() for name, make in makers.items()}
    for threads in (True, False):
        if time.monotonic() > gpu_measure.deadline:
            return
        with torch.autograd.set_multithreading_enabled(threads):
            names = [name for name in steps if threads or "backward" in name or "nothing" in name]
            found: dict[str, list[float]] = {name: [] for name in names}
            for _ in range(groups + 1):
                for name in names:
                    found[name].append(_host_us(steps[name]))
        for name, times in found.items():
            median, least = statistics.median(times[1:]), min(times[1:])
            report("host", call=name, backward_on_the_calling_thread=not threads, host_us=median, least_us=least)


def _host_us(step: Step, calls: int = 60) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        step()
    took = (time.perf_counter() - begin) / calls * 1e6
    torch.cuda.synchronize()
    return took


def packed(report: Report) -> None:
    """Many short sequences in one call, alone and beside a long one; and as many tokens in one sequence."""
    kinds = [(False, name) for name in NOT_CAUSAL] + [(True, name) for name in PACKED]
    for causal, name in kinds:
        for backward in (True, False):
            for planes, tables in CONFIGURATIONS:
                lengths = PACKED[name]
                given: dict[str, Any] = {"tokens": sum(lengths), "causal": causal, "backward": backward}
                make = partial(Race, planes, tables, **given, lengths=lengths)
                row(report, "packed", make, 7, 6, P=planes, L=tables, **given, sequences=name)
