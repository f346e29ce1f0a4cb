"""The causal readout for heads whose buckets fit one tile, and the queries' part of its mirror image.

Each program owns a run of tokens and goes through it in blocks of C: scores inside the block, masked, and the state
for all tokens before it, which then takes the block up. Shape letters are those of
:mod:`race_attention.backends.triton.device`; besides them VH, half of VP, and SW, the buckets of a stored row.

A token's buckets are computed where it is first read (keys in :func:`~.states.accumulate_kernel`, queries in
:func:`adjoint_kernel`) and kept for the next kernel, S numbers in place of D.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import (
    add_dot,
    block_decay,
    buckets,
    by_bucket,
    corner_signs,
    dot,
    fading,
    keys_inside,
    load_features,
    load_half,
    load_mass,
    load_planes,
    load_rows,
    operand,
    project,
    reciprocal,
    run_bounds,
    store_features,
    store_half,
    store_mass,
    store_rows,
    taken_up,
    whole_rows,
)

NEVER_SPECIALIZED = ["T", "RUN", "NC", "G", "qb", "qt", "qh", "vb", "vt", "vh", "ob", "ot", "oh"]
NEVER_SPECIALIZED += ["mb", "mt", "mh", "gb", "gt", "gh"]


@triton.jit(do_not_specialize=[name for name in NEVER_SPECIALIZED if name[0] != "o"])
def readout_kernel(
    query, key_features, value, key_mask, log_decay, planes, beta, table, before, out, inverses,
    qb: tl.int64, qt: tl.int64, qh: tl.int64, vb: tl.int64, vt: tl.int64, vh: tl.int64,
    mb: tl.int64, mt: tl.int64, mh: tl.int64, gb: tl.int64, gt: tl.int64, gh: tl.int64,
    T: tl.int64, RUN: tl.int64, NC: tl.int64, G: tl.int64,
    SHARE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    DP: tl.constexpr, VP: tl.constexpr, N: tl.constexpr, SP: tl.constexpr, SW: tl.constexpr, C: tl.constexpr,
    LIFT: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DECAY: tl.constexpr,
):  # fmt: skip
    """out of a run of queries (programs: runs * H), contiguous [B, T, H, V], and 1 / denominators [B, H, T]."""
    S: tl.constexpr = L << P
    VH: tl.constexpr = VP // 2
    V0: tl.constexpr = V if V < VH else VH
    TALL: tl.constexpr = SP >= 64
    H = G * SHARE
    run = tl.program_id(0) // H
    head = tl.program_id(0) - run * H
    group = head // SHARE
    batch, row, start, end, last = run_bounds(run, table, T, RUN, NC, PACKED)
    query += whole_rows(batch * qb + head * qh, ALIGNED)
    key_features += (batch * G + group) * T * SW
    value += whole_rows(batch * vb + group * vh, ALIGNED)
    key_mask += batch * mb + group * mh
    log_decay += batch * gb + group * gh
    out += (batch * T * H + head) * V
    inverses += (batch * H + head) * T
    b = tl.load(beta + group)
    w = load_planes(planes, group, 0, L, P, D, DP, N, SP)
    up, down = corner_signs(0, P, N, SP, PRECISION)
    state = before + (run.to(tl.int64) * G + group) * (S * (V + 1))
    sum0 = load_half(state, 0, S, SP, V, VH, TALL)
    sum1 = load_half(state, 1, S, SP, V, VH, TALL)
    mass = load_mass(state, S, SP, V)
    c = tl.arange(0, C)
    past = c[:, None] >= c[None, :]

    for t in range(start, end, C):
        here = t + c < end
        inside = keys_inside(key_mask, mt, t, end, C, HAS_MASK)
        q = load_rows(query, qt, t, here, C, D, DP, ALIGNED)
        phi_k = load_features(key_features, t, here, C, SP, SW)
        v0 = operand(load_rows(value, vt, t, inside, C, V0, VH, ALIGNED), PRECISION)
        v1 = operand(load_rows(value + VH, vt, t, inside, C, V - V0, VH, ALIGNED), PRECISION)
        phi = buckets(project(q, w, PRECISION), b, up, down, 0, S, SP, LIFT, PRECISION)
        phi_q = operand(phi, PRECISION)
        score = dot(phi_q, tl.trans(phi_k), PRECISION)
        if HAS_DECAY:
            whole, part, since, left, kept, total = block_decay(log_decay, gt, t, end, C, PRECISION)
            score *= fading(whole, part, past, False, PRECISION)
            phi_q = operand(phi * since[:, None], PRECISION)
        score = operand(tl.where(past, score, 0.0), PRECISION)
        denominator = tl.sum(phi_q.to(tl.float32) * mass[None, :], 1) + tl.sum(score.to(tl.float32), 1)
        inverse = reciprocal(denominator)
        tl.store(inverses + t + c, inverse, mask=here)

        phi_left = phi_k
        if HAS_DECAY:
            phi_left = operand(phi_k.to(tl.float32) * left[:, None], PRECISION)
            mass *= kept
        mass += tl.sum(phi_left.to(tl.float32), 0)
        out0 = add_dot(dot(phi_q, by_bucket(operand(sum0, PRECISION), TALL), PRECISION), score, v0, PRECISION)
        store_rows(out, H * V, t, here, out0 * inverse[:, None], C, V0, VH)
        if HAS_DECAY:
            sum0 *= kept
        sum0 = taken_up(sum0, v0, phi_left, TALL, PRECISION)
        out1 = add_dot(dot(phi_q, by_bucket(operand(sum1, PRECISION), TALL), PRECISION), score, v1, PRECISION)
        store_rows(out + VH, H * V, t, here, out1 * inverse[:, None], C, V - V0, VH)
        if HAS_DECAY:
            sum1 *= kept
        sum1 = taken_up(sum1, v1, phi_left, TALL, PRECISION)


@triton.jit(do_not_specialize=[name for name in NEVER_SPECIALIZED if name[0] not in "vm"])
def adjoint_kernel(
    query, grad_out, out, inverses, log_decay, planes, beta, table, adjoints, deltas, query_features,
    qb: tl.int64, qt: tl.int64, qh: tl.int64, ob: tl.int64, ot: tl.int64, oh: tl.int64,
    gb: tl.int64, gt: tl.int64, gh: tl.int64, T: tl.int64, RUN: tl.int64, NC: tl.int64, G: tl.int64,
    SHARE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    DP: tl.constexpr, VP: tl.constexpr, N: tl.constexpr, SP: tl.constexpr, SW: tl.constexpr, C: tl.constexpr,
    LIFT: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    PACKED: tl.constexpr, HAS_DECAY: tl.constexpr,
):  # fmt: skip
    """The gradient of the state before each run that its own queries give (programs: runs * H).

    With den_i the denominator and delta_i = grad_out_i . out_i, a weight of query i and key j has the gradient
    (grad_out_i . v_j - delta_i) / den_i. Leaves delta [B, H, T] and phi_q / den, [B, H, T, SW], for the kernels of
    :mod:`race_attention.backends.triton.causal_gradients`.
    """
    S: tl.constexpr = L << P
    VH: tl.constexpr = VP // 2
    V0: tl.constexpr = V if V < VH else VH
    TALL: tl.constexpr = SP >= 64
    H = G * SHARE
    run = tl.program_id(0) // H
    head = tl.program_id(0) - run * H
    group = head // SHARE
    batch, row, start, end, last = run_bounds(run, table, T, RUN, NC, PACKED)
    query += whole_rows(batch * qb + head * qh, ALIGNED)
    grad_out += whole_rows(batch * ob + head * oh, ALIGNED)
    log_decay += batch * gb + group * gh
    out += (batch * T * H + head) * V
    inverses += (batch * H + head) * T
    deltas += (batch * H + head) * T
    query_features += (batch * H + head) * T * SW
    b = tl.load(beta + group)
    w = load_planes(planes, group, 0, L, P, D, DP, N, SP)
    up, down = corner_signs(0, P, N, SP, PRECISION)
    grad0 = tl.zeros([SP, VH] if TALL else [VH, SP], tl.float32)
    grad1 = tl.zeros([SP, VH] if TALL else [VH, SP], tl.float32)
    grad_mass = tl.zeros([SP], tl.float32)
    kept_so_far = tl.full([], 1.0, tl.float32)
    c = tl.arange(0, C)

    for t in range(start, end, C):
        here = t + c < end
        q = load_rows(query, qt, t, here, C, D, DP, ALIGNED)
        do0 = load_rows(grad_out, ot, t, here, C, V0, VH, ALIGNED)
        do1 = load_rows(grad_out + VH, ot, t, here, C, V - V0, VH, ALIGNED)
        out0 = load_rows(out, H * V, t, here, C, V0, VH, V % 8 == 0)
        out1 = load_rows(out + VH, H * V, t, here, C, V - V0, VH, V % 8 == 0)
        inverse = tl.load(inverses + t + c, mask=here, other=0.0)
        delta = tl.sum(do0.to(tl.float32) * out0.to(tl.float32) + do1.to(tl.float32) * out1.to(tl.float32), 1)
        tl.store(deltas + t + c, delta, mask=here)
        seen = buckets(project(q, w, PRECISION), b, up, down, 0, S, SP, LIFT, PRECISION) * inverse[:, None]
        store_features(query_features, t, here, operand(seen, PRECISION), C, SP, SW)
        if HAS_DECAY:
            whole, part, since, left, kept, total = block_decay(log_decay, gt, t, end, C, PRECISION)
            seen *= (since * kept_so_far)[:, None]
            kept_so_far *= kept
        seen = operand(seen, PRECISION)
        grad0 = taken_up(grad0, operand(do0, PRECISION), seen, TALL, PRECISION)
        grad1 = taken_up(grad1, operand(do1, PRECISION), seen, TALL, PRECISION)
        grad_mass -= tl.sum(seen.to(tl.float32) * delta[:, None], 0)

    adjoint = adjoints + (run.to(tl.int64) * H + head) * (S * (V + 1))
    store_half(adjoint, 0, grad0, S, SP, V, VH, TALL)
    store_half(adjoint, 1, grad1, S, SP, V, VH, TALL)
    store_mass(adjoint, grad_mass, S, SP, V)
