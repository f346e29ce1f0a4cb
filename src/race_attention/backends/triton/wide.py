"""Causal kernels for heads whose buckets fill several tiles: linear attention, buckets computed where they are used.

Three lengths cut the tokens: *runs* carry a state in registers and are scanned over as in
:mod:`race_attention.backends.triton.causal`; a run consists of *sub-runs* of SUB tokens, and the state between two of
them, of the run alone, is left in memory (``local``); *blocks* of C tokens are what one program of the other kernels
owns. Inside a sub-run a block compares its tokens with those of the other blocks, so that no program ever holds a
state, and all of them run at once.

A program computes the buckets of its own tokens. What tokens are compared by lies in memory, one *line* a token of the
runs from ``first`` on: with HALVES the buckets of the halves of each table's planes, see
:mod:`race_attention.backends.triton.wide_features`, else all buckets padded with zeros to SW: ``features``
[lines, heads, FW]. The state before a sub-run that begins at token ``t`` lies in slot ``line of t // SUB + runs before
t's``, which no other has. Gradients use the same tensors mirrored. Shape letters are those of
:mod:`race_attention.backends.triton.device`; SB buckets and VB of the Dv columns make a tile, GB buckets a group.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .device import (
    LOG2_E,
    add_dot,
    keys_inside,
    load_decay,
    load_rows,
    operand,
    reciprocal,
    run_bounds,
    whole_rows,
)
from .narrow import hashed, load_hash
from .wide_features import buckets_at, halves_of, kernel_of, side_logs, store_halves

NEVER_SPECIALIZED = ["first", "lines", "T", "RUN", "SUB", "NC", "G", "BLOCKS"]
NEVER_SPECIALIZED += [of + along for of in "xqkvomg" for along in "bth"]


def kernel(function: Any) -> Any:
    """``triton.jit``, with no length, count or stride a part of what is compiled."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in names if name in NEVER_SPECIALIZED])


# ------------------------------------------------------------------------------------------------ parts


@triton.jit
def place(run, first, table, T, RUN, NC, PACKED: tl.constexpr):
    """(batch, row, first token, end, last run of its row?, line of the first token) of a run."""
    batch, row, start, end, last = run_bounds(run, table, T, RUN, NC, PACKED)
    if PACKED:
        line = start - tl.load(table + first * 4 + 1)
    else:
        origin = first // NC
        line = (batch - origin) * T + start - (first - origin * NC) * RUN
    return batch, row, start, end, last, line


@triton.jit
def block_of(program, heads, first, table, T, RUN, NC, BLOCKS, C: tl.constexpr, PACKED: tl.constexpr):
    """(head, run, batch, row, first token of the run, its end, its line, first token) of a program's block of tokens.

    Programs are runs * BLOCKS * heads. The block of a short run may begin at its end or past it.
    """
    head = program % heads
    block = program // heads % BLOCKS
    run = first + program // heads // BLOCKS
    batch, row, start, end, last, line = place(run, first, table, T, RUN, NC, PACKED)
    return head, run, batch, row, start, end, line, start + block * C


@triton.jit
def before_sub_run(t, start, line, run, first, SUB, G, group):
    """(first token of t's sub-run, the slot of the state before it)."""
    sub = start + (t - start) // SUB * SUB
    return sub, ((line + sub - start) // SUB + run - first) * G + group


@triton.jit
def after_sub_run(t, start, end, line, run, first, SUB, G, group):
    """(end of t's sub-run, the slot of the state after it, whether the run goes on)."""
    sub_end = start + ((t - start) // SUB + 1) * SUB
    slot = ((line + sub_end - start) // SUB + run - first) * G + group
    goes_on = sub_end < end
    return tl.minimum(sub_end, end), slot, goes_on


@triton.jit
def kept_before(boundaries, slot, has_local, HAS_DECAY: tl.constexpr):
    """What the state before the run keeps up to a sub-run; ``has_local``: not its first."""
    if HAS_DECAY:
        return tl.exp(tl.load(boundaries + slot, mask=has_local, other=0.0)).to(tl.float32)
    else:
        return tl.full([], 1.0, tl.float32)


@triton.jit
def kept_after(boundaries, total, slot, has_local, HAS_DECAY: tl.constexpr):
    """The same from a sub-run's end to the run's, of whose log decay ``total`` is the place."""
    if HAS_DECAY:
        until = tl.load(boundaries + slot, mask=has_local, other=0.0)
        return tl.where(has_local, tl.exp(tl.load(total) - until).to(tl.float32), 1.0)
    else:
        return tl.full([], 1.0, tl.float32)


@triton.jit
def load_columns(
    base, stride, start, inside, at, W: tl.constexpr, C: tl.constexpr, X: tl.constexpr, ALIGNED: tl.constexpr
):
    """[C, X] elements from ``at`` on of the W of tokens start .. start + C - 1; zeros where not ``inside``, past W."""
    c = tl.arange(0, C)
    d = at + tl.arange(0, X)
    step = whole_rows(stride.to(tl.int32), ALIGNED)
    pointer = (base + start * whole_rows(stride, ALIGNED)) + ((c * step)[:, None] + d[None, :])
    mask = inside[:, None]
    if W % X != 0:
        mask = mask & (d < W)[None, :]
    return tl.load(pointer, mask=mask, other=0.0)


@triton.jit
def load_between(
    state, local, local_mass, kept, has_local, s, v, S: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """(value_sum [s, v], mass [s]) between two sub-runs: the run's own part and what came into the run."""
    at = s[:, None] * V + v[None, :]
    mask = (s < S)[:, None] & (v < V)[None, :]
    value_sum = tl.load(state + at, mask=mask, other=0.0) * kept
    local_mask = s < tl.where(has_local, S, 0)
    value_sum += tl.load(local + at, mask=local_mask[:, None] & mask, other=0.0).to(tl.float32)
    mass = tl.load(state + S * V + s, mask=s < S, other=0.0) * kept
    mass += tl.load(local_mass + s, mask=local_mask, other=0.0)
    return value_sum, mass


@triton.jit
def load_ages(ages, lines, G, group, line, inside, C: tl.constexpr, PRECISION: tl.constexpr):
    """Sums of log_decay from the beginning of the sub-run to each token, [C] twice: whole parts, and the rest.

    In bfloat16 one sum does, of powers of two, and is given twice: see :func:`decay_kernel`.
    """
    at = (ages + group * lines + line) + tl.arange(0, C)
    whole = tl.load(at, mask=inside, other=0.0)
    if PRECISION == "bf16":
        return whole, whole
    else:
        return whole, tl.load(at + lines * G, mask=inside, other=0.0)


@triton.jit
def load_age(ages, lines, G, group, line, inside, PRECISION: tl.constexpr):
    """The same of one token, and 0 where it is not ``inside``."""
    at = ages + group * lines + line
    whole = tl.load(at, mask=inside, other=0.0)
    if PRECISION == "bf16":
        return whole, whole
    else:
        return whole, tl.load(at + lines * G, mask=inside, other=0.0)


@triton.jit
def kept_in_block(
    ages, lines, G, group, line, start, t, end, whole, part, C: tl.constexpr, CA: tl.constexpr, PRECISION: tl.constexpr
):
    """What is left of each key of a block at the last token of its CA, [C], and that token's ages, [C] twice.

    :func:`accumulate_kernel` rounds a bucket times the former. Where keys and queries are worth the same to each other,
    that number has to appear on both sides: what two roundings leave of a pair is in all sums before the two.
    """
    at = t - start + tl.arange(0, C)
    last = tl.minimum(at // CA * CA + CA, end - start) - 1
    last_whole, last_part = load_age(ages, lines, G, group, line + last, at < end - start, PRECISION)
    return kept_between(last_whole, last_part, whole, part, at < end - start, PRECISION), last_whole, last_part


@triton.jit
def kept_of_block(
    ages, lines, G, group, line, start, t, end, SUB, whole, part, C: tl.constexpr, CA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Likewise of queries: what is left at each of what was there before its CA, and there of the sub-run's beginning.

    Both [C].
    """
    at = t - start + tl.arange(0, C)
    first = at // CA * CA
    goes_on = (first % SUB != 0) & (at < end - start)
    first_whole, first_part = load_age(ages, lines, G, group, line + first - 1, goes_on, PRECISION)
    kept = kept_between(whole, part, first_whole, first_part, at < end - start, PRECISION)
    return kept, kept_since(first_whole, first_part, PRECISION)


@triton.jit
def kept_since(whole, part, PRECISION: tl.constexpr):
    """What is left at a token of what was there at the beginning of its sub-run."""
    if PRECISION == "bf16":
        return tl.exp2(whole)
    else:
        return tl.exp(whole + part)


@triton.jit
def kept_between(later_whole, later_part, whole, part, here, PRECISION: tl.constexpr):
    """What is left at a later token of an earlier one, and 1 where not ``here``."""
    if PRECISION == "bf16":
        return tl.exp2(tl.where(here, later_whole - whole, 0.0))
    else:
        return tl.exp(tl.where(here, (later_whole - whole) + (later_part - part), 0.0))


@triton.jit
def weights(past, later_whole, later_part, whole, part, PRECISION: tl.constexpr):
    """What is left at a later token of an earlier one where ``past``, else 0."""
    if PRECISION == "bf16":
        return tl.exp2(tl.where(past, later_whole - whole, -1000.0))
    else:
        age = (later_whole - whole) + (later_part - part)
        return tl.where(past, tl.exp(tl.where(past, age, 0.0)), 0.0)


# ------------------------------------------------------------------------------------------------- decay


@kernel
def decay_kernel(
    log_decay, table, ages, boundaries, totals, gb: tl.int64, gt: tl.int64, gh: tl.int64,
    first: tl.int64, lines: tl.int64, T: tl.int64, RUN: tl.int64, SUB: tl.int64, NC: tl.int64, G: tl.int64,
    C: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Sums of log_decay of a run (programs: runs * G).

    To each token from the beginning of its sub-run, as :func:`load_ages` reads them; to each slot from that of the
    run, [slots, G] float64; of all, [runs, G] float64. In bfloat16 the first are plain sums, in powers of two: a token
    that forgets more than a float32 can tell counts as 88, so that they stay below 2**15 and their differences good to
    2**-9 at the very worst.
    """
    run = first + tl.program_id(0) // G
    group = tl.program_id(0) % G
    batch, row, start, end, last, line = place(run, first, table, T, RUN, NC, PACKED)
    log_decay += batch * gb + group * gh
    c = tl.arange(0, C)
    so_far = tl.zeros([], tl.float64)
    whole_before = tl.zeros([], tl.float32)
    part_before = tl.zeros([], tl.float32)
    for t in range(start, end, C):
        if (t - start) % SUB == 0:
            whole_before = tl.zeros([], tl.float32)
            part_before = tl.zeros([], tl.float32)
            if t > start:
                tl.store(boundaries + ((line + t - start) // SUB + run - first) * G + group, so_far)
        whole, part, all_whole, all_part = load_decay(log_decay, gt, t, end, C)
        at = (ages + group * lines + line + t - start) + c
        if PRECISION == "bf16":
            x = tl.load(log_decay + (t + c) * gt, mask=t + c < end, other=0.0).to(tl.float32)
            x = tl.maximum(x, -88.0) * LOG2_E
            tl.store(at, whole_before + tl.cumsum(x, 0), mask=t + c < end)
            whole_before += tl.sum(x, 0)
        else:
            tl.store(at, whole_before + whole, mask=t + c < end)
            tl.store(at + lines * G, part_before + part, mask=t + c < end)
            carried = tl.floor(part_before + all_part + 0.5)
            whole_before += all_whole + carried
            part_before += all_part - carried
        so_far += all_whole.to(tl.float64) + all_part.to(tl.float64)
    tl.store(totals + run * G + group, so_far)


# ------------------------------------------------------------------------------------------------ states


@kernel
def accumulate_kernel(
    x, rows, key_mask, planes, beta, deltas, inverses, ages, table, features, states, local, local_mass,
    xb: tl.int64, xt: tl.int64, xh: tl.int64, vb: tl.int64, vt: tl.int64, vh: tl.int64,
    mb: tl.int64, mt: tl.int64, mh: tl.int64,
    first: tl.int64, lines: tl.int64, T: tl.int64, RUN: tl.int64, SUB: tl.int64, NC: tl.int64, G: tl.int64,
    SHARE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr,
    LIFT: tl.constexpr, V: tl.constexpr, VB: tl.constexpr, S: tl.constexpr, SW: tl.constexpr, SB: tl.constexpr,
    PL: tl.constexpr, HW: tl.constexpr, FW: tl.constexpr, HALVES: tl.constexpr,
    C: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_DECAY: tl.constexpr, MIRRORED: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """The state that each run leaves, those between its sub-runs, and ``features`` (programs: runs * G * tiles).

    x and rows are keys and values; MIRRORED, queries and grad_out, from the last block to the first: the gradient of
    the state before each run. Where not CAUSAL only the runs' states are left.
    """
    NV: tl.constexpr = (V + VB - 1) // VB
    NT: tl.constexpr = SW // SB
    H = G * SHARE
    tile = tl.program_id(0) % (NT * NV)
    group = tl.program_id(0) // (NT * NV) % G
    run = first + tl.program_id(0) // (NT * NV) // G
    batch, row, start, end, last, line = place(run, first, table, T, RUN, NC, PACKED)
    s = tile // NV * SB + tl.arange(0, SB)
    v = tile % NV * VB + tl.arange(0, VB)
    key_mask += batch * mb + group * mh
    b = tl.load(beta + group)
    of_table = tile // NV * SB >> P
    w = load_hash(planes, group, of_table, L, P, D, DP, N, PRECISION)
    c = tl.arange(0, C)
    state_at = s[:, None] * V + v[None, :]
    fits = (s < S)[:, None] & (v < V)[None, :]
    fits_mass = s + tile % NV * S < S  # once, by the first columns
    value_sum = tl.zeros([SB, VB], tl.float32)
    masses = tl.zeros([SB, 16], tl.float32)  # in one or two columns of a product: no sum over warps in the loop
    column = tl.arange(0, 16)[None, :]
    ones = operand(tl.where((c[:, None] >= 0) & (column == 0), 1.0, 0.0), PRECISION)
    blocks = (end - start + C - 1) // C
    for i in range(0, blocks * SHARE):
        t = start + (blocks - 1 - i // SHARE if MIRRORED else i) * C
        head = group * SHARE + i % SHARE
        slot = (((line + t - start) // SUB + run - first) * G + group) * S
        between = ((t - start) % SUB == 0) & (t > start)
        if CAUSAL and not MIRRORED:
            if between:
                tl.store(local + slot * V + state_at, value_sum.to(local.dtype.element_ty), mask=fits)
                tl.store(local_mass + slot + s, tl.sum(masses, 1), mask=fits_mass)
        inside = keys_inside(key_mask, mt, t, end, C, HAS_MASK)
        of_x = load_rows(x + whole_rows(batch * xb + head * xh, ALIGNED), xt, t, inside, C, D, DP, ALIGNED)
        of_rows = load_columns(rows + whole_rows(batch * vb + head * vh, ALIGNED), vt, t, inside, tile % NV * VB,
                               V, C, VB, ALIGNED)  # fmt: skip
        logs = side_logs(hashed(of_x, w, C, N, PRECISION), b, C, N, PRECISION)
        phi = buckets_at(logs, tile // NV * SB, of_table, C, SB, S, P, N, LIFT, PRECISION)
        if HAS_MASK or not MIRRORED:
            phi = tl.where(inside[:, None], phi, 0.0)
        to = features + (line + t - start) * (H * FW) + head * FW
        if not CAUSAL:
            pass
        elif HALVES:
            if (tile % NV == 0) & (tile // NV * SB % (1 << P) == 0):
                store_halves(to, H * FW, logs, of_table, inside, t + c < end, C, L, SB, P, PL, N, HW, LIFT, PRECISION)
        else:
            if tile % NV == 0:
                tl.store(to + ((c * (H * FW).to(tl.int32))[:, None] + s[None, :]), operand(phi, PRECISION),
                         mask=(t + c < end)[:, None])  # fmt: skip
        if HAS_DECAY:
            whole, part = load_ages(ages, lines, G, group, line + t - start, t + c < end, C, PRECISION)
            last_line, goes_on = line + tl.minimum(t + C, end) - 1 - start, (t - start) % SUB != 0
            end_whole, end_part = load_age(ages, lines, G, group, last_line, True, PRECISION)
            new_whole, new_part = load_age(ages, lines, G, group, line + t - 1 - start, goes_on, PRECISION)
            kept = kept_between(end_whole, end_part, new_whole, new_part, True, PRECISION)
            if SHARE > 1:
                kept = tl.where(i % SHARE == 0, kept, 1.0)
            value_sum *= kept
            masses *= kept
        if MIRRORED:
            at = (batch * H + head) * T + t + c
            delta = tl.load(deltas + at, mask=t + c < end, other=0.0)
            weight = tl.load(inverses + at, mask=t + c < end, other=0.0)
            if HAS_DECAY:
                # past the end it would grow
                weight *= kept_between(whole, part, new_whole, new_part, t + c < end, PRECISION)
            phi = operand(phi * weight[:, None], PRECISION)
            high = operand(-delta, PRECISION).to(tl.float32)
            of_mass = tl.where(column == 0, high[:, None], tl.where(column == 1, (-delta - high)[:, None], 0.0))
            masses = add_dot(masses, tl.trans(phi), operand(of_mass, PRECISION), PRECISION)
        else:
            if HAS_DECAY:
                if not HALVES:  # of what is stored
                    phi = operand(phi, PRECISION).to(tl.float32)
                phi *= kept_between(end_whole, end_part, whole, part, True, PRECISION)[:, None]
            phi = operand(phi, PRECISION)
            masses = add_dot(masses, tl.trans(phi), ones, PRECISION)
        value_sum = add_dot(value_sum, tl.trans(phi), operand(of_rows, PRECISION), PRECISION)
        if CAUSAL and MIRRORED:
            if between & (i % SHARE == SHARE - 1):
                tl.store(local + slot * V + state_at, value_sum.to(local.dtype.element_ty), mask=fits)
                tl.store(local_mass + slot + s, tl.sum(masses, 1), mask=fits_mass)
    state = states + (run * G + group) * (S * (V + 1))
    tl.store(state + state_at, value_sum, mask=fits)
    tl.store(state + S * V + s, tl.sum(masses, 1), mask=fits_mass)


# ----------------------------------------------------------------------------------------------- readout


@kernel
def merge_kernel(
    boundaries, table, before, local, local_mass,
    first: tl.int64, T: tl.int64, RUN: tl.int64, SUB: tl.int64, NC: tl.int64, G: tl.int64, BLOCKS: tl.int64,
    V: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, E: tl.constexpr, PACKED: tl.constexpr, HAS_DECAY: tl.constexpr,
):  # fmt: skip
    """Adds what came into the run to the states between its sub-runs (programs: runs * BLOCKS * G, parts of E).

    The first sub-run of each run gets one too. In memory once, and not each time that a block of queries reads it.
    """
    group = tl.program_id(0) % G
    block = tl.program_id(0) // G % BLOCKS
    run = first + tl.program_id(0) // G // BLOCKS
    batch, row, start, end, last, line = place(run, first, table, T, RUN, NC, PACKED)
    sub = start + block * SUB
    if sub >= end:
        return
    slot = ((line + sub - start) // SUB + run - first) * G + group
    kept = kept_before(boundaries, slot, block > 0, HAS_DECAY)
    state = before + (run * G + group) * (S * (V + 1))
    e = tl.program_id(1) * E + tl.arange(0, E)
    local += slot * (S * V)
    own = tl.load(local + e, mask=e < tl.where(block > 0, S * V, 0), other=0.0).to(tl.float32)
    own += tl.load(state + e, mask=e < S * V, other=0.0) * kept
    tl.store(local + e, own.to(local.dtype.element_ty), mask=e < S * V)
    if tl.program_id(1) == 0:
        s = tl.arange(0, SP)
        local_mass += slot * S
        mass = tl.load(local_mass + s, mask=s < tl.where(block > 0, S, 0), other=0.0)
        mass += tl.load(state + S * V + s, mask=s < S, other=0.0) * kept
        tl.store(local_mass + s, mass, mask=s < S)


@triton.jit
def from_state(
    numerator, denominator, logs, first, local, local_mass, features, stride, here, v,
    C: tl.constexpr, P: tl.constexpr, N: tl.constexpr, LIFT: tl.constexpr, V: tl.constexpr, S: tl.constexpr,
    GB: tl.constexpr, SB: tl.constexpr, WIDTH: tl.constexpr, HALVES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what the state gives by the GB buckets from ``first`` on, whose logarithms these are."""
    for at in tl.range(first, first + GB, SB, num_stages=2):
        phi = operand(buckets_at(logs, at, first >> P, C, SB, S, P, N, LIFT, PRECISION), PRECISION)
        s = at + tl.arange(0, SB)
        mask = (s < S)[:, None] & (v < V)[None, :]
        value_sum = tl.load(local + s[:, None] * V + v[None, :], mask=mask, other=0.0)
        mass = tl.load(local_mass + s, mask=s < S, other=0.0)
        numerator = add_dot(numerator, phi, value_sum, PRECISION)
        denominator += tl.sum(phi.to(tl.float32) * mass[None, :], 1)
        if not HALVES:
            to = features + ((tl.arange(0, C) * stride.to(tl.int32))[:, None] + s[None, :])
            tl.store(to, phi, mask=here[:, None] & (s < WIDTH)[None, :])
    return numerator, denominator


@triton.jit
def store_out(base, residual, at, stride, here, x, v, C: tl.constexpr, V: tl.constexpr, RESIDUAL: tl.constexpr):
    """Writes out [C, VB] to the columns v, from the element ``at`` on, and what rounding takes from it."""
    at += (tl.arange(0, C) * stride.to(tl.int32))[:, None] + v[None, :]
    mask = here[:, None] & (v < V)[None, :]
    rounded = x.to(base.dtype.element_ty)
    tl.store(base + at, rounded, mask=mask)
    if RESIDUAL:
        tl.store(residual + at, (x - rounded.to(tl.float32)).to(residual.dtype.element_ty), mask=mask)


@triton.jit
def load_queries(
    grad_out, out, residual, inverses, ot, H, batch, head, t, T, here, C: tl.constexpr, V: tl.constexpr,
    VP: tl.constexpr, ALIGNED: tl.constexpr, RESIDUAL: tl.constexpr, ROUNDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a block of queries: grad_out [C, VP], grad_out . out [C], 1 / denominators [C], and where those two lie.

    ``grad_out`` is the head's; ROUNDED, as an operand of products.
    """
    do = load_columns(grad_out, ot, t, here, 0, V, C, VP, ALIGNED)
    if ROUNDED:
        do = operand(do, PRECISION)
    WHOLE: tl.constexpr = ALIGNED and V % 8 == 0
    of_out = (batch * T * H + head) * V
    o = load_columns(out + of_out, H * V, t, here, 0, V, C, VP, WHOLE).to(tl.float32)
    if RESIDUAL:  # of the unrounded out
        o += load_columns(residual + of_out, H * V, t, here, 0, V, C, VP, WHOLE).to(tl.float32)
    delta = tl.sum(do.to(tl.float32) * o, 1)
    at = (batch * H + head) * T + t + tl.arange(0, C)
    return do, delta, tl.load(inverses + at, mask=here, other=0.0), at


@kernel
def readout_kernel(
    query, features_q, features_k, value, key_mask, planes, beta, ages, table, local, local_mass, out, residual,
    inverses,
    qb: tl.int64, qt: tl.int64, qh: tl.int64,
    vb: tl.int64, vt: tl.int64, vh: tl.int64,
    mb: tl.int64, mt: tl.int64, mh: tl.int64,
    first: tl.int64, lines: tl.int64, T: tl.int64, RUN: tl.int64, SUB: tl.int64, NC: tl.int64, G: tl.int64,
    BLOCKS: tl.int64,
    SHARE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr,
    LIFT: tl.constexpr, V: tl.constexpr, VB: tl.constexpr, S: tl.constexpr, SW: tl.constexpr, GB: tl.constexpr,
    SB: tl.constexpr, PL: tl.constexpr, HW: tl.constexpr, FW: tl.constexpr, HALVES: tl.constexpr,
    C: tl.constexpr, CK: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr, PACKED: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_DECAY: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """out of a block of queries (programs: runs * blocks * H * column tiles).

    ``out`` and ``residual`` are contiguous [B, T, H, V]; ``inverses`` [B, H, T] are 1 / denominators. ``local`` are the
    states before sub-runs, merged. Without HALVES the buckets go through ``features_q`` [column tiles, lines, H, FW]:
    they fill the registers, and each program reads its own.
    """
    NV: tl.constexpr = (V + VB - 1) // VB
    H = G * SHARE
    column = tl.program_id(0) % NV * VB
    head, run, batch, row, start, end, line, t = block_of(
        tl.program_id(0) // NV, H, first, table, T, RUN, NC, BLOCKS, C, PACKED
    )
    group = head // SHARE
    if t >= end:
        return
    query += whole_rows(batch * qb + head * qh, ALIGNED)
    value += whole_rows(batch * vb + group * vh, ALIGNED)
    key_mask += batch * mb + group * mh
    features_q += ((column // VB * lines + line + t - start) * H + head) * FW
    features_k += (line * G + group) * FW
    b = tl.load(beta + group)
    c = tl.arange(0, C)
    v = column + tl.arange(0, VB)
    queries = t + c < end
    sub, slot = before_sub_run(t, start, line, run, first, SUB, G, group)
    if HAS_DECAY:
        q_whole, q_part = load_ages(ages, lines, G, group, line + t - start, queries, C, PRECISION)

    numerator = tl.zeros([C, VB], tl.float32)
    denominator = tl.zeros([C], tl.float32)
    rows_q = load_rows(query, qt, t, queries, C, D, DP, ALIGNED)
    local += slot * (S * V)
    local_mass += slot * S
    if HALVES:
        w = load_hash(planes, group, 0, L, P, D, DP, N, PRECISION)
        logs = side_logs(hashed(rows_q, w, C, N, PRECISION), b, C, N, PRECISION)
        numerator, denominator = from_state(
            numerator, denominator, logs, 0, local, local_mass, features_q, H * FW, queries, v, C, P, N, LIFT, V, S, GB,
            SB, SW, HALVES, PRECISION,
        )  # fmt: skip
    else:
        for at in range(0, SW, GB):
            w = load_hash(planes, group, at >> P, L, P, D, DP, N, PRECISION)
            logs = side_logs(hashed(rows_q, w, C, N, PRECISION), b, C, N, PRECISION)
            numerator, denominator = from_state(
                numerator, denominator, logs, at, local, local_mass, features_q, H * FW, queries, v, C, P, N, LIFT, V,
                S, GB, SB, SW, HALVES, PRECISION,
            )  # fmt: skip
    if HAS_DECAY:
        since = kept_since(q_whole, q_part, PRECISION)
        numerator *= since[:, None]
        denominator *= since

    if HALVES:
        halves = halves_of(logs, queries, C, L, P, PL, N, HW, LIFT, PRECISION)
    else:
        tl.debug_barrier()
    for u in range(sub, tl.minimum(t + C, end), CK):
        j = u + tl.arange(0, CK)
        inside = keys_inside(key_mask, mt, u, end, CK, HAS_MASK)
        of_k = features_k + (u - start) * (G * FW)
        if HALVES:
            score = kernel_of(halves, of_k, G * FW, j < end, C, CK, L, HW, PRECISION)
        else:
            score = tl.zeros([C, CK], tl.float32)
            for at in range(0, SW, SB):
                q = load_columns(features_q, H * FW, 0, queries, at, SW, C, SB, True)
                k = load_columns(of_k, G * FW, 0, j < end, at, SW, CK, SB, True)
                score = add_dot(score, q, tl.trans(k), PRECISION)
        rows = load_columns(value, vt, u, inside, column, V, CK, VB, ALIGNED)
        past = (t + c)[:, None] >= j[None, :]
        if HAS_DECAY:
            whole, part = load_ages(ages, lines, G, group, line + u - start, j < end, CK, PRECISION)
            score *= weights(past, q_whole[:, None], q_part[:, None], whole[None, :], part[None, :], PRECISION)
        score = operand(tl.where(past, score, 0.0), PRECISION)
        numerator = add_dot(numerator, score, operand(rows, PRECISION), PRECISION)
        denominator += tl.sum(score.to(tl.float32), 1)

    inverse = reciprocal(denominator, LIFT)
    at = ((batch * T + t) * H + head) * V
    store_out(out, residual, at, H * V, queries, numerator * inverse[:, None], v, C, V, RESIDUAL)
    if column == 0:
        tl.store(inverses + (batch * H + head) * T + t + c, inverse, mask=queries)
