"""The scan over the states of runs of tokens: the second of the three verbs.

A state is ``S * V`` value sums and then ``S`` masses, float32, at ``(run * G + head) * S * (V + 1)``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import FORGOTTEN, load_decay, run_bounds


@triton.jit
def _then(kept_a, sum_a, kept_b, sum_b):
    """Run a followed by run b: kept_b * (kept_a * x + sum_a) + sum_b."""
    return kept_a * kept_b, sum_a * kept_b + sum_b


@triton.jit(do_not_specialize=["G", "NC", "scale"])
def scan_kernel(
    states, before, totals, first_run, mass_in, value_sum_in, mass_out, value_sum_out,
    scale, G: tl.int64, NC: tl.int64, SHARE: tl.constexpr,
    S: tl.constexpr, V: tl.constexpr, RT: tl.constexpr, E: tl.constexpr,
    CAUSAL: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr, HAS_DECAY: tl.constexpr,
    HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr,
):  # fmt: skip
    """The state before each run and after the last, in float64 (programs: rows * G, parts of a state).

    ``states`` has SHARE states for each of ``before``, added first. The two are different buffers.
    CAUSAL writes the state before each run, else the sum of all runs of a row. REVERSE runs from the last run to the
    first: the adjoints. ``scale`` multiplies what comes in and divides what goes out.
    """
    row = tl.program_id(0) // G
    head = tl.program_id(0) - row * G
    e = tl.program_id(1) * E + tl.arange(0, E)
    size: tl.constexpr = S * (V + 1)
    here = e < size
    is_sum = e < S * V
    at = (row.to(tl.int64) * G + head) * (S * V) + e
    at_mass = (row.to(tl.int64) * G + head) * S + (e - S * V)
    if PACKED:
        first = tl.load(first_run + row)
        count = tl.load(first_run + row + 1) - first
    else:
        first = row.to(tl.int64) * NC
        count = NC
    carry = tl.zeros([E], tl.float64)
    if HAS_IN:
        carry += tl.load(value_sum_in + at, mask=is_sum, other=0.0).to(tl.float64) * scale
        carry += tl.load(mass_in + at_mass, mask=here & (e >= S * V), other=0.0).to(tl.float64) * scale
    i = tl.arange(0, RT)
    if CAUSAL:
        very_first = first + (count - 1 if REVERSE else 0)
        tl.store(before + (very_first * G + head) * size + e, carry.to(tl.float32), mask=here & (e * 0 < count))
    if count == 1:  # as most packed sequences have: in a tile the other RT - 1 would be worked out for nothing
        x = tl.zeros([E], tl.float64)
        for share in range(SHARE):
            source = states + ((first * G + head) * SHARE + share) * size + e
            x += tl.load(source, mask=here, other=0.0).to(tl.float64)
        if HAS_DECAY:
            carry *= tl.exp(tl.load(totals + first * G + head))
        carry += x
    else:
        for r in range(0, count, RT):
            run = first + (count - 1 - r - i if REVERSE else r + i)
            inside = (r + i < count)[:, None] & here[None, :]
            x = tl.zeros([RT, E], tl.float64)
            for share in range(SHARE):
                source = states + ((run * G + head) * SHARE + share)[:, None] * size + e[None, :]
                x += tl.load(source, mask=inside, other=0.0).to(tl.float64)
            if HAS_DECAY:
                log_kept = tl.load(totals + run * G + head, mask=r + i < count, other=0.0)
                kept = tl.zeros([RT, E], tl.float64) + tl.exp(log_kept)[:, None]
                all_kept, all_sum = tl.associative_scan((kept, x), 0, _then)
                after = all_kept * carry[None, :] + all_sum
            else:
                after = carry[None, :] + tl.cumsum(x, 0)
            if CAUSAL:  # the state after a run is the state before the next: written one run further on
                next_run = run + (-1 if REVERSE else 1)
                target = before + (next_run * G + head)[:, None] * size + e[None, :]
                tl.store(target, after.to(tl.float32), mask=inside & (r + i + 1 < count)[:, None])
            carry = tl.sum(tl.where((i == RT - 1)[:, None], after, 0.0), 0)
    if not CAUSAL:
        tl.store(before + (row.to(tl.int64) * G + head) * size + e, carry.to(tl.float32), mask=here)
    if HAS_OUT:
        tl.store(value_sum_out + at, carry / scale, mask=is_sum)
        tl.store(mass_out + at_mass, carry / scale, mask=here & (e >= S * V))


@triton.jit(do_not_specialize=["gb", "gt", "gh", "T", "RUN", "NC", "G"])
def total_decay_kernel(
    log_decay, table, totals,
    gb: tl.int64, gt: tl.int64, gh: tl.int64, T: tl.int64, RUN: tl.int64, NC: tl.int64, G: tl.int64,
    C: tl.constexpr, PACKED: tl.constexpr, JOINED: tl.constexpr, HAS_DECAY: tl.constexpr,
):  # fmt: skip
    """The total log decay of each run in float64, [runs, G] (programs: runs * G).

    JOINED, where it is not of one sequence that began before it, what is left is nothing.
    """
    run = tl.program_id(0) // G
    head = tl.program_id(0) - run * G
    batch, row, start, end, last = run_bounds(run, table, T, RUN, NC, PACKED)
    log_decay += batch * gb + head * gh
    total = tl.zeros([], tl.float64)
    if HAS_DECAY:
        for t in range(start, end, C):
            whole, part, all_whole, all_part = load_decay(log_decay, gt, t, end, C)
            total += all_whole.to(tl.float64) + all_part.to(tl.float64)
    if JOINED:
        total = tl.where(tl.load(table + end - 1) >= end - start, total, FORGOTTEN)
    tl.store(totals + run.to(tl.int64) * G + head, total)
