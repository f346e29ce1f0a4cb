"""The parts of the GPU benchmark: each takes ``report(part, **row)`` and calls it as rows are measured."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_measure import MILLION, Report, freed, row
from benchmarks.gpu_peers import CONFIGURATIONS, DIM, EXACT, HEADS, Candidates, Exact, Linear, Race, Step, has_linear
from benchmarks.gpu_short import NOT_CAUSAL, PACKED, crossover, host, packed
from race_attention.backends.triton.decode import decode_

WIDE = ((6, 2), (8, 1))
STATES = (torch.float64, torch.float32)


def table(report: Report) -> None:
    """The rows of the targets at 1,048,576 tokens."""
    for planes, tables in CONFIGURATIONS:
        for backward in (False, True):
            for how in ({"causal": True}, {"causal": False}, {"causal": True, "decay": True}):
                given: dict[str, Any] = {"tokens": MILLION, "backward": backward, **how}
                row(report, "table", partial(Race, planes, tables, **given), P=planes, L=tables, **given)


def wide(report: Report) -> None:
    """More buckets than one tile holds."""
    for planes, tables in WIDE:
        for how in ({"causal": True}, {"causal": False}, {"causal": True, "decay": True}):
            for backward in (False, True):
                given: dict[str, Any] = {"tokens": MILLION, "backward": backward, **how}
                row(report, "wide", partial(Race, planes, tables, **given), P=planes, L=tables, **given)


def beside_linear(part: str, kinds: tuple[str, ...], decay: bool, report: Report) -> None:
    """Beside flash-linear-attention of as many features as (4,4) has buckets, forward, and with its backward pass."""
    planes, tables = CONFIGURATIONS[-1]
    for tokens in (1 << 16, MILLION):
        for backward in (False, True):
            what: dict[str, Any] = {"tokens": tokens, "causal": True, "backward": backward}
            make = partial(Race, planes, tables, tokens, True, backward, decay=decay)
            row(report, part, make, 11, 6, P=planes, L=tables, **what, decay=decay)
            for kind in kinds if has_linear() else ():
                row(report, part, partial(Linear, kind, tables << planes, tokens, backward), 11, peer=kind, **what)


def lengths(heads: int, longest: int, exact_longest: int, report: Report) -> None:
    """From 1K tokens on, against exact attention and plain torch; short ones also as graphs."""
    for causal, backward in ((True, True), (False, True), (True, False), (False, False)):
        for power in range(10, longest + 1):
            if power > exact_longest and not (causal and backward):
                continue
            what: dict[str, Any] = {"heads": heads, "tokens": 1 << power, "causal": causal, "backward": backward}
            _length(report, what, power <= exact_longest)


def _length(report: Report, what: dict[str, Any], exact: bool) -> None:
    tokens, heads, how = what["tokens"], what["heads"], (what["causal"], what["backward"])
    # A layout is written down by its second call, what its backward pass reads by its third.
    repeats, warm = (31, 6) if tokens * heads < MILLION else (5, 6) if tokens * heads < 1 << 24 else (3, 2)
    for planes, tables in CONFIGURATIONS:
        make = partial(Race, planes, tables, tokens, *how, heads=heads)
        row(report, "lengths", make, repeats, warm, P=planes, L=tables, **what)
        if tokens < 1 << 15 and all(how):
            row(report, "lengths", make, P=planes, L=tables, **what, graph=True)
    for name in EXACT if exact else ():
        row(report, "lengths", partial(Exact, name, tokens, *how, heads), repeats, warm, peer=name, **what)
    if heads == HEADS and all(how) and tokens in (1 << 10, 1 << 14, 1 << 18):
        make = partial(Race, 2, 2, tokens, *how, backend="reference")
        row(report, "lengths", make, 3, peer="plain torch (2,2)", **what)


def resident(report: Report) -> None:
    """12,000,000 tokens forward and backward, resident, and about the longest that fits."""
    found: list[dict[str, Any]] = []

    def kept(part: str, **what: Any) -> None:
        found.append(what)
        report(part, **what)

    what: dict[str, Any] = {"causal": True, "backward": True}
    for planes, tables in CONFIGURATIONS:
        make = partial(Race, planes, tables, 12_000_000, True, True)
        row(kept, "resident", make, 3, P=planes, L=tables, **what, tokens=12_000_000)
    if not found or found[0]["ms"] is None:
        return
    whole = torch.cuda.get_device_properties(0).total_memory / 2**30
    for share in (0.98, 0.95, 0.92):
        tokens = int(12 * share * whole / found[0]["peak_gib"] * 10) * 100_000
        row(kept, "resident", partial(Race, 2, 2, tokens, True, True), 3, P=2, L=2, **what, tokens=tokens, longest=True)
        if found[-1]["ms"] is not None:
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
                what = {"P": planes, "L": tables, "batch": batch, "state": str(dtype).removeprefix("torch.")}
                row(report, "decode", partial(_token, batch, planes, tables, dtype), **what, graph=True)


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
    "resident": resident,
    "decode": decode,
    "host": host,
    "crossover": crossover,
    "lengths-4": partial(lengths, 4, 24, 16),
    "lengths-64": partial(lengths, 64, 20, 14),
    "wide": wide,
    "packed": packed,
    "linear": partial(beside_linear, "linear", Linear.KINDS, False),
    "gated": partial(beside_linear, "gated", Linear.GATED, True),
    "repeats": repeats,
}


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def compiled(job: tuple[Any, ...]) -> None:
    """Calls what a job names once. One that fails here fails again where it is measured, and is reported there."""
    kind, *arguments = job
    makers: dict[str, Callable[..., Step]] = {"race": Race, "token": _token, "linear": Candidates}
    with contextlib.suppress(Exception):
        makers[kind](*arguments)()
        torch.cuda.synchronize()


def jobs_of(only: list[str]) -> list[tuple[Any, ...]]:
    """What to compile before the parts are timed; what takes longest comes first.

    A call forward alone has a readout of its own, and a scan goes by how many runs there are, few for short calls.
    """
    jobs: list[tuple[Any, ...]] = []
    if "wide" in only:
        ways = ((True, False), (True, True), (False, False))
        jobs += [("race", *pair, 1 << 15, causal, True, HEADS, decay) for pair in WIDE for causal, decay in ways]
        jobs += [("race", *pair, 1 << 15, causal, False, HEADS, decay) for pair in WIDE for causal, decay in ways]
    if set(only) - {"wide", "decode", "gated"}:
        ways = ((True, True), (True, False), (False, False))
        jobs += [
            ("race", *pair, 1 << 15, causal, backward, HEADS, decay)
            for backward in (True, False)
            for causal, decay in ways
            for pair in reversed(CONFIGURATIONS)
        ]
    for part, kinds in (("linear", Linear.KINDS[:1]), ("gated", Linear.GATED)):  # the first has the others' kernels
        if part in only and has_linear():
            shares = cores()
            jobs += [("linear", share, shares, kind, 64, 1 << 16, True) for kind in kinds for share in range(shares)]
    if "decode" in only:
        jobs += [("token", 1, *pair, dtype) for pair in (*CONFIGURATIONS, *WIDE) for dtype in STATES]
    if set(only) & {"lengths-4", "lengths-64", "host", "crossover"}:
        shorter = [
            (pair, causal, tokens) for pair in CONFIGURATIONS for causal in (True, False) for tokens in (512, 4096)
        ]
        jobs += [("race", *pair, tokens, causal, True) for pair, causal, tokens in shorter]
    if "packed" in only:
        jobs += [
            ("race", *pair, sum(PACKED[name]), causal, backward, HEADS, False, "triton", PACKED[name])
            for causal, names in ((False, NOT_CAUSAL), (True, PACKED))
            for name in names
            for backward in (True, False)
            for pair in CONFIGURATIONS
        ]
    return jobs
