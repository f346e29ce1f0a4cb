"""Launching the causal kernels of heads whose buckets fill several tiles.

What tokens are compared by and the states between sub-runs lie in scratch memory, of as many runs at a time as
SCRATCH_BYTES hold. Where that is all of them, the second pass of a call finds there what the first one left.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import plan
from .launch import ParameterSums, Problem, at_the_end
from .launch_causal import room_for_states
from .launch_states import scan
from .wide_configs import column_tiles, halves_of, tiles_of
from .wide_segments import Segment

State = tuple[Tensor | None, Tensor | None]
#: Scratch memory of a call at most, as far as one run fits.
SCRATCH_BYTES = 6 << 30


class Segments:
    """The runs of a call, as many at a time as fit; iterate once for each pass.

    Attributes:
        ranges: (first run, number of runs) of each segment.
        lines: tokens of the longest.
    """

    def __init__(self, p: Problem, runs: plan.Runs, totals: Tensor) -> None:
        self.p, self.runs, self.totals = p, runs, totals
        item = 2 if p.shape.precision == "bf16" else 4
        passes = 1 if p.grad_out is None else 2
        state = 4 * p.shape.state_size * p.groups * passes
        tiles = tiles_of(p.shape)
        halves = halves_of(p.shape, tiles.width)
        stored = p.heads + p.groups  # heads' features of a token
        if not halves.used:
            stored = 2 * stored if passes == 2 else p.heads * column_tiles(p.shape, tiles.readout) + p.groups
        line = stored * halves.stored * item + state // plan.SUB_RUN
        tokens = p.batch * p.queries
        each = runs.count
        if tokens * line + runs.count * state > SCRATCH_BYTES:
            each = max(SCRATCH_BYTES // (runs.length * line + state), 1)
        self.lines = min(tokens, each * runs.length)
        self.ranges = [(a, min(each, runs.count - a)) for a in range(0, runs.count, max(each, 1))] if tokens else []
        self._only: Segment | None = None

    def __iter__(self) -> Iterator[Segment]:
        for first, count in self.ranges:
            segment = self._only or Segment(self.p, self.runs, self.totals, first, count, self.lines)
            if len(self.ranges) == 1:
                self._only = segment
            yield segment


def _totals(p: Problem, runs: plan.Runs) -> Tensor:
    """Room for each run's total log decay, [runs, G]."""
    return p.beta if p.log_decay is None else p.new(max(runs.count, 1), p.groups, dtype=torch.float64)


def _of_query(p: Problem) -> Tensor:
    """Room for the parts of each query's sum of weights times their gradients, [B, H, T, parts].

    By halves one program writes all of it; else zeros, since of a sub-run's blocks not every one has every part.
    """
    if p.log_decay is None:
        return p.beta
    tiles = tiles_of(p.shape)
    if halves_of(p.shape, tiles.width).used:
        return p.new(p.batch, p.heads, p.queries, 1)
    blocks = -(-plan.SUB_RUN // tiles.value_gradient[0])  # by columns, and what is before the sub-run, by buckets
    parts = blocks * column_tiles(p.shape, tiles.value_gradient) + tiles.width // tiles.buckets_gradient[2]
    return p.new(p.batch, p.heads, p.queries, parts).zero_()


def forward(p: Problem, initial: State) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, final mass, final value_sum, the state before each run); fills ``p.inverses``."""
    runs = p.runs(of_keys=False)
    parts, totals = p.new(max(runs.count, 1), p.groups, p.shape.state_size), _totals(p, runs)
    segments = Segments(p, runs, totals)
    for segment in segments:
        segment.between_keys(parts)
    before = room_for_states(p, runs)
    mass, value_sum = scan(p, runs, parts, totals, before, initial)
    out = p.query.new_empty(p.batch, p.queries, p.heads, p.shape.value_dim)
    for segment in segments:
        segment.readout(before, segment.between_keys(parts), out)
    return out, mass, value_sum, before


def backward(
    p: Problem, kept: Tensor, grad_final: State, final: State, sums: ParameterSums
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """(dq, dk, dv, the gradient of log_decay, that of the initial state); adds to ``sums``.

    From the queries first, dq and the gradient of the state before each run; after the scan over those from the keys.
    """
    runs = p.runs(of_keys=False)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (p.query, p.key, p.value))
    decay = p.new(*p.key.shape[:3]) if p.log_decay is not None else p.new(0)
    parts, adjoints = (p.new(max(runs.count, 1), p.groups, p.shape.state_size) for _ in range(2))
    deltas = p.new(p.batch, p.heads, p.queries)
    totals = _totals(p, runs)
    segments = Segments(p, runs, totals)
    of_query = _of_query(p)
    query_parts, key_parts = sums.parts(runs, p.heads), sums.parts(runs, p.groups)
    for segment in segments:
        if segment.halves.used:
            between = segment.between_keys(parts)
            segment.query_gradients(kept, between, deltas, of_query, dq, query_parts, sums.need_planes)
        else:
            grad_phi = segment.query_buckets_gradient(kept, segment.between_keys(parts), deltas, of_query)
            segment.feature_gradients(False, grad_phi, dq, query_parts, sums.need_planes)
        segment.between_queries(adjoints, deltas)
    after = p.new(max(runs.count, 1), p.groups, p.shape.state_size)
    initial = scan(p, runs, adjoints, totals, after, grad_final, reverse=True)
    end = at_the_end(p, final, grad_final)
    for segment in segments:
        between = segment.between_queries(adjoints, deltas)
        if segment.halves.used:
            of_key = segment.key_gradients(after, between, deltas, dk, dv, key_parts, sums.need_planes)
        else:
            segment.between_keys(parts)  # the keys' buckets
            of_key = segment.value_gradient(after, between, deltas, of_query, dv)
            grad_phi = segment.key_buckets_gradient(after, between, deltas)
            segment.feature_gradients(True, grad_phi, dk, key_parts, sums.need_planes)
        if p.log_decay is not None:
            segment.decay_gradient(kept, after, end, of_key, of_query, decay)
    return dq, dk, dv, decay, initial
