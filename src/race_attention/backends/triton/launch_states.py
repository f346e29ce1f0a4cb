"""Launching the kernels of states' scan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import plan, states
from .launch import Problem, pointer_or
from .start import start

#: Runs and elements of a state that one program of the scan takes at a time.
SCAN_RUNS, SCAN_ELEMENTS = 64, 32
#: Where a row has no more runs than this, as most packed sequences have: likewise.
FEW_RUNS, FEW_RUNS_ELEMENTS = 8, 256
#: And where rows are many and most have one: packed sequences, and batches of short ones.
ROW_RUNS, ROW_ELEMENTS = 4, 512


def _tile(runs: plan.Runs) -> tuple[int, int]:
    """Runs and elements that a program takes at a time."""
    if runs.table is not None or runs.per_row == 1:
        return ROW_RUNS, ROW_ELEMENTS
    if runs.per_row <= FEW_RUNS < SCAN_RUNS:
        return FEW_RUNS, FEW_RUNS_ELEMENTS
    return SCAN_RUNS, SCAN_ELEMENTS


def scan(
    problem: Problem,
    runs: plan.Runs,
    parts: Tensor,
    totals: Tensor,
    before: Tensor,
    initial: tuple[Any, Any],
    *,
    share: int = 1,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Fills ``before`` with the state before each run (causal) or of each row, and returns the final (mass, value_sum).

    Without ``problem.final`` those are empty. ``reverse`` mirrors it for adjoints. States inside are lifted; those of
    the interface are not.
    """  # fmt: skip
    p, shape = problem, problem.shape
    lift = 2.0 ** (shape.lift * shape.planes)
    size = p.rows, p.groups, shape.tables, 1 << shape.planes
    sizes = size, (*size, shape.value_dim)
    mass, value_sum = (p.new(*(x if p.final else (0,)), dtype=torch.float64) for x in sizes)
    given = [None if x is None else x.contiguous() for x in initial]
    if (given[0] is None) != (given[1] is None):
        given = [
            p.new(*made, dtype=torch.float64).zero_() if x is None else x for x, made in zip(given, sizes, strict=True)
        ]
    if p.rows * p.groups:
        tile, elements = _tile(runs)
        start(
            states.scan_kernel, (p.rows * p.groups, -(-shape.state_size // elements)),
            parts, before, totals, pointer_or(runs.first, p.beta), pointer_or(given[0], mass),
            pointer_or(given[1], value_sum), mass, value_sum, 1.0 / lift if reverse else lift, p.groups, runs.per_row,
            SHARE=share, S=shape.buckets, V=shape.value_dim, RT=tile, E=elements,
            CAUSAL=p.causal, REVERSE=reverse, PACKED=p.bounds is not None,
            HAS_DECAY=p.log_decay is not None or p.ages is not None, HAS_IN=given[0] is not None, HAS_OUT=p.final,
            num_warps=4,
        )  # fmt: skip
    return mass, value_sum


def run_totals(p: Problem, runs: plan.Runs) -> Tensor:
    """Each run's total log decay again, [runs, G] float64."""
    if p.log_decay is None and p.ages is None:
        return p.beta
    totals = p.new(max(runs.count, 1), p.groups, dtype=torch.float64)
    if runs.count * p.groups:
        start(
            states.total_decay_kernel, (runs.count * p.groups,),
            pointer_or(p.log_decay, p.beta), p.rows_of(runs), totals, *p.decay_strides, p.keys, runs.length,
            runs.per_row, p.groups, C=128, **p.joined, HAS_DECAY=p.log_decay is not None, num_warps=4,
        )  # fmt: skip
    return totals
