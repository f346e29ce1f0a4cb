"""Causal kernels for heads whose buckets fill several tiles: linear attention over stored soft buckets.

Three lengths cut the tokens: *runs* carry a state in registers and are scanned over as in
:mod:`race_attention.backends.triton.causal`; a run consists of *sub-runs* of SUB tokens, and the state between two of
them, of the run alone, is left in memory (``local``); *blocks* of C tokens are what one program of the other kernels
owns. Inside a sub-run a block compares its tokens with those of the other blocks, so that no program ever holds a
state, and all of them run at once.

Scratch tensors have one *line* a token, for the tokens of the runs from ``first`` on: ``phi`` [lines, heads, SW], the
buckets padded to SW with zeros. The state between two sub-runs, before token ``t``, lies in slot ``line of t // SUB``,
which no other has: such tokens are at least SUB apart. Gradients use the same tensors mirrored. Shape letters are
those of :mod:`race_attention.backends.triton.device`; SB buckets and VB of the Dv columns make a tile.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .device import (
    add_dot,
    buckets,
    corner_signs,
    dot,
    fine_dot,
    keys_inside,
    load_decay,
    load_planes,
    load_rows,
    operand,
    project,
    reciprocal,
    run_bounds,
    whole_rows,
)

NEVER_SPECIALIZED = ["first", "lines", "T", "RUN", "SUB", "NC", "G", "BLOCKS"]
NEVER_SPECIALIZED += ["xb", "xt", "xh", "vb", "vt", "vh", "ob", "ot", "oh", "mb", "mt", "mh", "gb", "gt", "gh"]


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
def load_ages(ages, lines, G, group, line, inside, C: tl.constexpr):
    """Sums of log_decay from the beginning of the sub-run to each token, [C] twice: whole parts, and the rest."""
    at = ages + (line + tl.arange(0, C)) * G + group
    whole = tl.load(at, mask=inside, other=0.0)
    return whole, tl.load(at + lines * G, mask=inside, other=0.0)


@triton.jit
def load_age(ages, lines, G, group, line, inside):
    """The same of one token, and 0 where it is not ``inside``."""
    at = ages + line * G + group
    return tl.load(at, mask=inside, other=0.0), tl.load(at + lines * G, mask=inside, other=0.0)


@triton.jit
def weights(past, later_whole, later_part, whole, part):
    """exp of the log decay between a later and an earlier token where ``past``, else 0."""
    age = (later_whole - whole) + (later_part - part)
    return tl.where(past, tl.exp(tl.where(past, age, 0.0)), 0.0)


# --------------------------------------------------------------------------------------------- features


@kernel
def features_kernel(
    x, key_mask, planes, beta, table, phi,
    xb: tl.int64, xt: tl.int64, xh: tl.int64, mb: tl.int64, mt: tl.int64, mh: tl.int64,
    first: tl.int64, T: tl.int64, RUN: tl.int64, NC: tl.int64, G: tl.int64, BLOCKS: tl.int64,
    SHARE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr,
    SP: tl.constexpr, SW: tl.constexpr, C: tl.constexpr, LIFT: tl.constexpr, PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """The buckets of queries (x [B, T, H, D]) or, SHARE = 1, of keys (programs: runs * blocks * H)."""
    S: tl.constexpr = L << P
    H = G * SHARE
    head = tl.program_id(0) % H
    block = tl.program_id(0) // H % BLOCKS
    run = first + tl.program_id(0) // H // BLOCKS
    group = head // SHARE
    batch, row, start, end, last, line = place(run, first, table, T, RUN, NC, PACKED)
    t = start + block * C
    if t >= end:
        return
    x += whole_rows(batch * xb + head * xh, ALIGNED)
    key_mask += batch * mb + group * mh
    phi += ((line + block * C) * H + head) * SW
    c = tl.arange(0, C)
    inside = keys_inside(key_mask, mt, t, end, C, HAS_MASK)
    rows = load_rows(x, xt, t, inside, C, D, DP, ALIGNED)
    b = tl.load(beta + group)
    for tile in tl.static_range(SW // SP):
        w = load_planes(planes, group, tile, L, P, D, DP, N, SP)
        up, down = corner_signs(tile, P, N, SP, PRECISION)
        s = tile * SP + tl.arange(0, SP)
        x_phi = buckets(project(rows, w, PRECISION), b, up, down, tile, S, SP, LIFT, PRECISION)
        x_phi = tl.where(inside[:, None] & (s < S)[None, :], x_phi, 0.0)
        pointer = phi + ((c * (H * SW).to(tl.int32))[:, None] + s[None, :])
        tl.store(pointer, operand(x_phi, PRECISION), mask=(t + c < end)[:, None])


# ------------------------------------------------------------------------------------------------- decay


@kernel
def decay_kernel(
    log_decay, table, ages, boundaries, totals, gb: tl.int64, gt: tl.int64, gh: tl.int64,
    first: tl.int64, lines: tl.int64, T: tl.int64, RUN: tl.int64, SUB: tl.int64, NC: tl.int64, G: tl.int64,
    C: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Sums of log_decay of a run (programs: runs * G).

    To each token from the beginning of its sub-run, as :func:`load_ages` reads them; to each slot from that of the
    run, [slots, G] float64; of all, [runs, G] float64.
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
                tl.store(boundaries + (line + t - start) // SUB * G + group, so_far)
        whole, part, all_whole, all_part = load_decay(log_decay, gt, t, end, C)
        at = ages + (line + t - start + c) * G + group
        tl.store(at, whole_before + whole, mask=t + c < end)
        tl.store(at + lines * G, part_before + part, mask=t + c < end)
        so_far += all_whole.to(tl.float64) + all_part.to(tl.float64)
        carried = tl.floor(part_before + all_part + 0.5)
        whole_before += all_whole + carried
        part_before += all_part - carried
    tl.store(totals + run * G + group, so_far)


# ------------------------------------------------------------------------------------------------ states


@kernel
def accumulate_kernel(
    phi, x, key_mask, deltas, inverses, ages, table, states, local, local_mass,
    xb: tl.int64, xt: tl.int64, xh: tl.int64, mb: tl.int64, mt: tl.int64, mh: tl.int64,
    first: tl.int64, lines: tl.int64, T: tl.int64, RUN: tl.int64, SUB: tl.int64, NC: tl.int64, G: tl.int64,
    SHARE: tl.constexpr, V: tl.constexpr, VB: tl.constexpr, S: tl.constexpr, SW: tl.constexpr, SB: tl.constexpr,
    C: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_DECAY: tl.constexpr, MIRRORED: tl.constexpr,
):  # fmt: skip
    """The state that each run leaves, and those between its sub-runs (programs: runs * G * tiles).

    phi and x are those of keys and values; MIRRORED, those of queries and grad_out, from the last block to the first:
    the gradient of the state before each run.
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
    c = tl.arange(0, C)
    state_at = s[:, None] * V + v[None, :]
    fits = (s < S)[:, None] & (v < V)[None, :]
    fits_mass = s + tile % NV * S < S  # once, by the first columns
    value_sum = tl.zeros([SB, VB], tl.float32)
    mass = tl.zeros([SB], tl.float32)
    blocks = (end - start + C - 1) // C
    for i in range(0, blocks * SHARE):
        t = start + (blocks - 1 - i // SHARE if MIRRORED else i) * C
        head = group * SHARE + i % SHARE
        slot = ((line + t - start) // SUB * G + group) * S
        between = ((t - start) % SUB == 0) & (t > start)
        if not MIRRORED:
            if between:
                tl.store(local + slot * V + state_at, value_sum.to(local.dtype.element_ty), mask=fits)
                tl.store(local_mass + slot + s, mass, mask=fits_mass)
        inside = keys_inside(key_mask, mt, t, end, C, HAS_MASK)
        rows = load_columns(x + whole_rows(batch * xb + head * xh, ALIGNED), xt, t, inside, tile % NV * VB,
                            V, C, VB, ALIGNED)  # fmt: skip
        rows_phi = load_columns(phi + ((line + t - start) * H + head) * SW, H * SW, 0, t + c < end, tile // NV * SB,
                                SW, C, SB, True)  # fmt: skip
        if HAS_DECAY:
            whole, part = load_ages(ages, lines, G, group, line + t - start, t + c < end, C)
            end_whole, end_part = load_age(ages, lines, G, group, line + tl.minimum(t + C, end) - 1 - start, True)
            new_whole, new_part = load_age(ages, lines, G, group, line + t - 1 - start, (t - start) % SUB != 0)
            kept = tl.exp((end_whole - new_whole) + (end_part - new_part))
            if SHARE > 1:
                kept = tl.where(i % SHARE == 0, kept, 1.0)
            value_sum *= kept
            mass *= kept
        if MIRRORED:
            at = (batch * H + head) * T + t + c
            delta = tl.load(deltas + at, mask=t + c < end, other=0.0)
            weight = tl.load(inverses + at, mask=t + c < end, other=0.0)
            if HAS_DECAY:
                age = (whole - new_whole) + (part - new_part)
                weight *= tl.exp(tl.where(t + c < end, age, 0.0))  # past the end it would grow
            rows_phi = operand(rows_phi.to(tl.float32) * weight[:, None], PRECISION)
            mass -= tl.sum(rows_phi.to(tl.float32) * delta[:, None], 0)
        else:
            if HAS_DECAY:
                left = tl.exp((end_whole - whole) + (end_part - part))
                rows_phi = operand(rows_phi.to(tl.float32) * left[:, None], PRECISION)
            mass += tl.sum(rows_phi.to(tl.float32), 0)
        value_sum = add_dot(value_sum, tl.trans(rows_phi), operand(rows, PRECISION), PRECISION)
        if MIRRORED:
            if between & (i % SHARE == SHARE - 1):
                tl.store(local + slot * V + state_at, value_sum.to(local.dtype.element_ty), mask=fits)
                tl.store(local_mass + slot + s, mass, mask=fits_mass)
    state = states + (run * G + group) * (S * (V + 1))
    tl.store(state + state_at, value_sum, mask=fits)
    tl.store(state + S * V + s, mass, mask=fits_mass)


# ----------------------------------------------------------------------------------------------- readout


@kernel
def readout_kernel(
    phi_q, phi_k, value, key_mask, ages, boundaries, table, before, local, local_mass, grad_out, out, inverses, deltas,
    vb: tl.int64, vt: tl.int64, vh: tl.int64, ob: tl.int64, ot: tl.int64, oh: tl.int64,
    mb: tl.int64, mt: tl.int64, mh: tl.int64,
    first: tl.int64, lines: tl.int64, T: tl.int64, RUN: tl.int64, SUB: tl.int64, NC: tl.int64, G: tl.int64,
    BLOCKS: tl.int64,
    SHARE: tl.constexpr, V: tl.constexpr, VB: tl.constexpr, S: tl.constexpr, SW: tl.constexpr, SB: tl.constexpr,
    C: tl.constexpr, CK: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr, PACKED: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_DECAY: tl.constexpr, FEW: tl.constexpr, OF_GRADIENT: tl.constexpr,
):  # fmt: skip
    """out of a block of queries (programs: runs * blocks * H * column tiles).

    ``out`` is contiguous [B, T, H, V]; ``inverses`` [B, H, T] are 1 / denominators.

    OF_GRADIENT, with all columns in one tile: ``deltas`` instead, grad_out . out before out is rounded. The gradient
    of a decay is a running sum, in which the rounding of out would pile up.
    """
    NV: tl.constexpr = (V + VB - 1) // VB
    H = G * SHARE
    column = tl.program_id(0) % NV * VB
    head = tl.program_id(0) // NV % H
    block = tl.program_id(0) // NV // H % BLOCKS
    run = first + tl.program_id(0) // NV // H // BLOCKS
    group = head // SHARE
    batch, row, start, end, last, line = place(run, first, table, T, RUN, NC, PACKED)
    t = start + block * C
    if t >= end:
        return
    value += whole_rows(batch * vb + group * vh, ALIGNED)
    key_mask += batch * mb + group * mh
    phi_q += ((line + t - start) * H + head) * SW
    phi_k += (line * G + group) * SW
    c = tl.arange(0, C)
    v = column + tl.arange(0, VB)
    queries = t + c < end
    sub = start + (t - start) // SUB * SUB
    slot = (line + sub - start) // SUB * G + group
    state = before + (run * G + group) * (S * (V + 1))
    kept = tl.full([], 1.0, tl.float32)
    if HAS_DECAY:
        kept = tl.exp(tl.load(boundaries + slot, mask=sub > start, other=0.0)).to(tl.float32)
        q_whole, q_part = load_ages(ages, lines, G, group, line + t - start, queries, C)

    numerator = tl.zeros([C, VB], tl.float32)
    denominator = tl.zeros([C], tl.float32)
    if OF_GRADIENT:
        for at in tl.range(0, SW, FEW, num_stages=1):
            q = load_columns(phi_q, H * SW, 0, queries, at, SW, C, FEW, True)
            value_sum, mass = load_between(state, local + slot * (S * V), local_mass + slot * S, kept, sub > start,
                                           at + tl.arange(0, FEW), v, S, V)  # fmt: skip
            numerator += fine_dot(q, value_sum, PRECISION)
            denominator += tl.sum(q.to(tl.float32) * mass[None, :], 1)
    else:
        for at in tl.range(0, SW, SB, num_stages=1):
            q = load_columns(phi_q, H * SW, 0, queries, at, SW, C, SB, True)
            value_sum, mass = load_between(state, local + slot * (S * V), local_mass + slot * S, kept, sub > start,
                                           at + tl.arange(0, SB), v, S, V)  # fmt: skip
            numerator = add_dot(numerator, q, operand(value_sum, PRECISION), PRECISION)
            denominator += tl.sum(q.to(tl.float32) * mass[None, :], 1)
    if HAS_DECAY:
        since = tl.exp(q_whole + q_part)
        numerator *= since[:, None]
        denominator *= since

    if SW == SB:
        q = load_columns(phi_q, H * SW, 0, queries, 0, SW, C, SB, True)
    for u in range(sub, tl.minimum(t + C, end), CK):
        j = u + tl.arange(0, CK)
        inside = keys_inside(key_mask, mt, u, end, CK, HAS_MASK)
        if SW == SB:
            k = load_columns(phi_k + (u - start) * (G * SW), G * SW, 0, j < end, 0, SW, CK, SB, True)
            score = dot(q, tl.trans(k), PRECISION)
        else:
            score = tl.zeros([C, CK], tl.float32)
            for at in range(0, SW, SB):
                q_tile = load_columns(phi_q, H * SW, 0, queries, at, SW, C, SB, True)
                k = load_columns(phi_k + (u - start) * (G * SW), G * SW, 0, j < end, at, SW, CK, SB, True)
                score = add_dot(score, q_tile, tl.trans(k), PRECISION)
        rows = load_columns(value, vt, u, inside, column, V, CK, VB, ALIGNED)
        past = (t + c)[:, None] >= j[None, :]
        if HAS_DECAY:
            whole, part = load_ages(ages, lines, G, group, line + u - start, j < end, CK)
            score *= weights(past, q_whole[:, None], q_part[:, None], whole[None, :], part[None, :])
        score = operand(tl.where(past, score, 0.0), PRECISION)
        numerator = add_dot(numerator, score, operand(rows, PRECISION), PRECISION)
        denominator += tl.sum(score.to(tl.float32), 1)

    inverse = reciprocal(denominator)
    numerator *= inverse[:, None]
    if OF_GRADIENT:
        grad_out += whole_rows(batch * ob + head * oh, ALIGNED)
        do = load_columns(grad_out, ot, t, queries, column, V, C, VB, ALIGNED)
        tl.store(deltas + (batch * H + head) * T + t + c, tl.sum(numerator * do.to(tl.float32), 1), mask=queries)
    else:
        to = out + ((batch * T + t) * H + head) * V
        mask = queries[:, None] & (v < V)[None, :]
        tl.store(to + ((c * (H * V).to(tl.int32))[:, None] + v[None, :]), numerator.to(out.dtype.element_ty), mask=mask)
        if column == 0:
            tl.store(inverses + (batch * H + head) * T + t + c, inverse, mask=queries)
