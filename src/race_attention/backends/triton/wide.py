"""Causal kernels for heads whose buckets fill several tiles: runs of one block, the state read tile by tile.

Scores inside the block and the state before it are both sums over tiles, so nothing of the size of the state is
ever held. What needs the finished sums (a score's gradient, delta) goes through the tiles a second time. The
mathematics is that of :mod:`race_attention.backends.triton.causal`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import (
    bucket_gradients,
    buckets,
    corner_signs,
    dot,
    fine_dot,
    keys_inside,
    load_decay,
    load_planes,
    load_rows,
    load_state,
    operand,
    project,
    reciprocal,
    run_bounds,
    store_planes,
    store_rows,
    store_state,
    whole_rows,
)

NEVER_SPECIALIZED = ["B", "T", "RUN", "NC", "G", "qb", "qt", "qh", "kb", "kt", "kh", "vb", "vt", "vh"]
NEVER_SPECIALIZED += ["mb", "mt", "mh", "gb", "gt", "gh", "ob", "ot", "oh"]


@triton.jit(do_not_specialize=[name for name in NEVER_SPECIALIZED if name not in ("B", "ob", "ot", "oh")])
def readout_kernel(
    query, key, value, key_mask, log_decay, planes, beta, table, before, out,
    qb: tl.int64, qt: tl.int64, qh: tl.int64, kb: tl.int64, kt: tl.int64, kh: tl.int64,
    vb: tl.int64, vt: tl.int64, vh: tl.int64, mb: tl.int64, mt: tl.int64, mh: tl.int64,
    gb: tl.int64, gt: tl.int64, gh: tl.int64,
    T: tl.int64, RUN: tl.int64, NC: tl.int64, G: tl.int64,
    SHARE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    DP: tl.constexpr, VP: tl.constexpr, N: tl.constexpr, SP: tl.constexpr, NS: tl.constexpr,
    C: tl.constexpr,
    LIFT: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DECAY: tl.constexpr,
):  # fmt: skip
    """out of a run of at most C queries (programs: runs * H). ``out`` is contiguous [B, T, H, V]."""
    S: tl.constexpr = L << P
    H = G * SHARE
    run = tl.program_id(0) // H
    head = tl.program_id(0) - run * H
    group = head // SHARE
    batch, row, start, end, last = run_bounds(run, table, T, RUN, NC, PACKED)
    query += whole_rows(batch * qb + head * qh, ALIGNED)
    key += whole_rows(batch * kb + group * kh, ALIGNED)
    value += whole_rows(batch * vb + group * vh, ALIGNED)
    key_mask += batch * mb + group * mh
    log_decay += batch * gb + group * gh
    out += (batch * T * H + head) * V
    state = before + (run.to(tl.int64) * G + group) * (S * (V + 1))
    b = tl.load(beta + group)
    c = tl.arange(0, C)
    past = c[:, None] >= c[None, :]
    inside = keys_inside(key_mask, mt, start, end, C, HAS_MASK)
    q = load_rows(query, qt, start, start + c < end, C, D, DP, ALIGNED)
    k = load_rows(key, kt, start, inside, C, D, DP, ALIGNED)
    score = tl.zeros([C, C], tl.float32)
    numerator = tl.zeros([C, VP], tl.float32)
    denominator = tl.zeros([C], tl.float32)
    for tile in range(NS):
        w = load_planes(planes, group, tile, L, P, D, DP, N, SP)
        up, down = corner_signs(tile, P, N, SP, PRECISION)
        value_sum, mass = load_state(state, tile, S, SP, V, VP)
        phi_q = buckets(project(q, w, PRECISION), b, up, down, tile, S, SP, LIFT, PRECISION)
        phi_q = operand(phi_q, PRECISION)
        phi_k = buckets(project(k, w, PRECISION), b, up, down, tile, S, SP, LIFT, PRECISION)
        phi_k = operand(tl.where(inside[:, None], phi_k, 0.0), PRECISION)
        score += dot(phi_q, tl.trans(phi_k), PRECISION)
        numerator += dot(phi_q, tl.trans(operand(value_sum, PRECISION)), PRECISION)
        denominator += tl.sum(phi_q.to(tl.float32) * mass[None, :], 1)
    score = tl.where(past, score, 0.0)
    if HAS_DECAY:
        whole, part, all_whole, all_part = load_decay(log_decay, gt, start, end, C)
        age = (whole[:, None] - whole[None, :]) + (part[:, None] - part[None, :])
        score *= tl.exp(tl.where(past, age, 0.0))
        since = tl.exp(whole + part)
        numerator *= since[:, None]
        denominator *= since
    score = operand(score, PRECISION)
    v = load_rows(value, vt, start, inside, C, V, VP, ALIGNED)
    numerator += dot(score, operand(v, PRECISION), PRECISION)
    denominator += tl.sum(score.to(tl.float32), 1)
    inverse = reciprocal(denominator)
    store_rows(out, H * V, start, start + c < end, numerator * inverse[:, None], C, V, VP)


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def query_gradient_kernel(
    query, key, value, grad_out, key_mask, log_decay, planes, beta, table, before,
    grad_query, adjoints, per_query, planes_parts, beta_parts,
    qb: tl.int64, qt: tl.int64, qh: tl.int64, kb: tl.int64, kt: tl.int64, kh: tl.int64,
    vb: tl.int64, vt: tl.int64, vh: tl.int64, ob: tl.int64, ot: tl.int64, oh: tl.int64,
    mb: tl.int64, mt: tl.int64, mh: tl.int64, gb: tl.int64, gt: tl.int64, gh: tl.int64,
    B: tl.int64, T: tl.int64, RUN: tl.int64, NC: tl.int64, G: tl.int64,
    SHARE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    DP: tl.constexpr, VP: tl.constexpr, N: tl.constexpr, SP: tl.constexpr, NS: tl.constexpr,
    C: tl.constexpr,
    LIFT: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DECAY: tl.constexpr, NEED_PLANES: tl.constexpr,
):  # fmt: skip
    """grad_query of a run of at most C tokens, and the gradient of the state before it (programs: runs * H)."""
    S: tl.constexpr = L << P
    H = G * SHARE
    run = tl.program_id(0) // H
    head = tl.program_id(0) - run * H
    group = head // SHARE
    batch, row, start, end, last = run_bounds(run, table, T, RUN, NC, PACKED)
    query += whole_rows(batch * qb + head * qh, ALIGNED)
    key += whole_rows(batch * kb + group * kh, ALIGNED)
    value += whole_rows(batch * vb + group * vh, ALIGNED)
    grad_out += whole_rows(batch * ob + head * oh, ALIGNED)
    key_mask += batch * mb + group * mh
    log_decay += batch * gb + group * gh
    grad_query += (batch * T * H + head) * D
    delta_at = per_query + (batch * H + head) * T
    inverse_at = delta_at + B * H * T
    program = run.to(tl.int64) * H + head
    state = before + (run.to(tl.int64) * G + group) * (S * (V + 1))
    adjoint = adjoints + program * (S * (V + 1))
    b = tl.load(beta + group)
    c = tl.arange(0, C)
    past = c[:, None] >= c[None, :]
    inside = keys_inside(key_mask, mt, start, end, C, HAS_MASK)
    queries = start + c < end
    q = load_rows(query, qt, start, queries, C, D, DP, ALIGNED)
    k = load_rows(key, kt, start, inside, C, D, DP, ALIGNED)
    do = load_rows(grad_out, ot, start, queries, C, V, VP, ALIGNED)
    weight = tl.where(past, 1.0, 0.0)
    since = tl.full([C], 1.0, tl.float32)
    if HAS_DECAY:
        whole, part, all_whole, all_part = load_decay(log_decay, gt, start, end, C)
        age = (whole[:, None] - whole[None, :]) + (part[:, None] - part[None, :])
        weight = tl.where(past, tl.exp(tl.where(past, age, 0.0)), 0.0)
        since = tl.exp(whole + part)
    score = tl.zeros([C, C], tl.float32)
    denominator = tl.zeros([C], tl.float32)
    delta = tl.zeros([C], tl.float32)
    for tile in range(NS):
        w = load_planes(planes, group, tile, L, P, D, DP, N, SP)
        up, down = corner_signs(tile, P, N, SP, PRECISION)
        value_sum, mass = load_state(state, tile, S, SP, V, VP)
        phi_q = buckets(project(q, w, PRECISION), b, up, down, tile, S, SP, LIFT, PRECISION)
        phi_q = operand(phi_q, PRECISION)
        phi_k = buckets(project(k, w, PRECISION), b, up, down, tile, S, SP, LIFT, PRECISION)
        phi_k = operand(tl.where(inside[:, None], phi_k, 0.0), PRECISION)
        score += dot(phi_q, tl.trans(phi_k), PRECISION)
        rounded = phi_q.to(tl.float32) * since[:, None]
        denominator += tl.sum(rounded * mass[None, :], 1)
        delta += tl.sum(rounded * fine_dot(do, value_sum, PRECISION), 1)
    score = operand(score * weight, PRECISION).to(tl.float32)
    v = load_rows(value, vt, start, inside, C, V, VP, ALIGNED)
    along = dot(operand(do, PRECISION), tl.trans(operand(v, PRECISION)), PRECISION)  # grad_out_i . v_j
    denominator += tl.sum(score, 1)
    inverse = reciprocal(denominator)
    delta = (delta + tl.sum(score * along, 1)) * inverse  # grad_out_i . out_i
    tl.store(delta_at + start + c, delta, mask=queries)
    tl.store(inverse_at + start + c, inverse, mask=queries)
    grad_score = operand((along - delta[:, None]) * weight * inverse[:, None], PRECISION)

    dq = tl.zeros([C, DP], tl.float32)
    beta_sum = tl.zeros([C, N], tl.float32)
    for tile in range(NS):
        w = load_planes(planes, group, tile, L, P, D, DP, N, SP)
        up, down = corner_signs(tile, P, N, SP, PRECISION)
        value_sum, mass = load_state(state, tile, S, SP, V, VP)
        y = project(q, w, PRECISION)
        phi_q = buckets(y, b, up, down, tile, S, SP, LIFT, PRECISION)
        phi_k = buckets(project(k, w, PRECISION), b, up, down, tile, S, SP, LIFT, PRECISION)
        phi_k = operand(tl.where(inside[:, None], phi_k, 0.0), PRECISION)
        grad_phi = fine_dot(do, value_sum, PRECISION) - delta[:, None] * mass[None, :]
        grad_phi = grad_phi * (since * inverse)[:, None] + dot(grad_score, phi_k, PRECISION)
        grad_y, grad_beta = bucket_gradients(grad_phi * phi_q, y, b, up, down, PRECISION)
        beta_sum += grad_beta
        grad_y = operand(grad_y, PRECISION)
        dq += dot(grad_y, operand(w, PRECISION), PRECISION)
        if NEED_PLANES:
            of_planes = dot(tl.trans(operand(q, PRECISION)), grad_y, PRECISION)
            store_planes(planes_parts, program * NS + tile, of_planes, N, D, DP)
        seen = operand(operand(phi_q, PRECISION).to(tl.float32) * (since * inverse)[:, None], PRECISION)
        grad_mass = -tl.sum(seen.to(tl.float32) * delta[:, None], 0)
        store_state(adjoint, tile, dot(tl.trans(operand(do, PRECISION)), seen, PRECISION), grad_mass, S, SP, V, VP)
    store_rows(grad_query, H * D, start, queries, dq, C, D, DP)
    tl.store(beta_parts + program, tl.sum(tl.sum(beta_sum, 1), 0))


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def key_gradient_kernel(
    query, key, value, grad_out, key_mask, log_decay, planes, beta, table, before, after, per_query, at_the_end,
    grad_key, grad_value, grad_decay, planes_parts, beta_parts,
    qb: tl.int64, qt: tl.int64, qh: tl.int64, kb: tl.int64, kt: tl.int64, kh: tl.int64,
    vb: tl.int64, vt: tl.int64, vh: tl.int64, ob: tl.int64, ot: tl.int64, oh: tl.int64,
    mb: tl.int64, mt: tl.int64, mh: tl.int64, gb: tl.int64, gt: tl.int64, gh: tl.int64,
    B: tl.int64, T: tl.int64, RUN: tl.int64, NC: tl.int64, G: tl.int64,
    SHARE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    DP: tl.constexpr, VP: tl.constexpr, N: tl.constexpr, SP: tl.constexpr, NS: tl.constexpr,
    C: tl.constexpr,
    LIFT: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DECAY: tl.constexpr, NEED_PLANES: tl.constexpr,
):  # fmt: skip
    """grad_key, grad_value and grad_log_decay of a run of at most C tokens (programs: runs * G)."""
    S: tl.constexpr = L << P
    H = G * SHARE
    run = tl.program_id(0) // G
    group = tl.program_id(0) - run * G
    batch, row, start, end, last = run_bounds(run, table, T, RUN, NC, PACKED)
    query += whole_rows(batch * qb + group * SHARE * qh, ALIGNED)
    key += whole_rows(batch * kb + group * kh, ALIGNED)
    value += whole_rows(batch * vb + group * vh, ALIGNED)
    grad_out += whole_rows(batch * ob + group * SHARE * oh, ALIGNED)
    key_mask += batch * mb + group * mh
    log_decay += batch * gb + group * gh
    grad_key += (batch * T * G + group) * D
    grad_value += (batch * T * G + group) * V
    grad_decay += batch * T * G + group
    per_query += (batch * H + group * SHARE) * T
    inverses = B * H * T
    program = run.to(tl.int64) * G + group
    adjoint = after + program * (S * (V + 1))
    b = tl.load(beta + group)
    c = tl.arange(0, C)
    past = c[:, None] <= c[None, :]  # keys down, queries across
    queries = start + c < end
    inside = keys_inside(key_mask, mt, start, end, C, HAS_MASK)
    k = load_rows(key, kt, start, inside, C, D, DP, ALIGNED)
    v = load_rows(value, vt, start, inside, C, V, VP, ALIGNED)
    weight = tl.where(past, 1.0, 0.0)
    left = tl.full([C], 1.0, tl.float32)
    if HAS_DECAY:
        whole, part, all_whole, all_part = load_decay(log_decay, gt, start, end, C)
        age = (whole[None, :] - whole[:, None]) + (part[None, :] - part[:, None])
        weight = tl.where(past, tl.exp(tl.where(past, age, 0.0)), 0.0)
        left = tl.exp((all_whole - whole) + (all_part - part))

    dv = tl.zeros([C, VP], tl.float32)
    of_key = tl.zeros([C], tl.float32)  # phi_k . grad phi_k
    for share in range(SHARE):
        share_q, share_o = whole_rows(share * qh, ALIGNED), whole_rows(share * oh, ALIGNED)
        q = load_rows(query + share_q, qt, start, queries, C, D, DP, ALIGNED)
        do = load_rows(grad_out + share_o, ot, start, queries, C, V, VP, ALIGNED)
        delta = tl.load(per_query + share * T + start + c, mask=queries, other=0.0)
        inverse = tl.load(per_query + inverses + share * T + start + c, mask=queries, other=0.0)
        score = tl.zeros([C, C], tl.float32)
        for tile in range(NS):
            w = load_planes(planes, group, tile, L, P, D, DP, N, SP)
            up, down = corner_signs(tile, P, N, SP, PRECISION)
            phi_q = buckets(project(q, w, PRECISION), b, up, down, tile, S, SP, LIFT, PRECISION)
            phi_k = buckets(project(k, w, PRECISION), b, up, down, tile, S, SP, LIFT, PRECISION)
            phi_k = operand(tl.where(inside[:, None], phi_k, 0.0), PRECISION)
            score += dot(phi_k, tl.trans(operand(phi_q, PRECISION)), PRECISION)
        score *= weight * inverse[None, :]
        dv += dot(operand(score, PRECISION), operand(do, PRECISION), PRECISION)
        if HAS_DECAY:
            along = dot(operand(v, PRECISION), tl.trans(operand(do, PRECISION)), PRECISION)
            of_key += tl.sum((along - delta[None, :]) * score, 1)

    dk = tl.zeros([C, DP], tl.float32)
    beta_sum = tl.zeros([C, N], tl.float32)
    if HAS_DECAY:
        crossing = tl.where(last, tl.load(at_the_end + row * G + group), 0.0)
    for tile in range(NS):
        w = load_planes(planes, group, tile, L, P, D, DP, N, SP)
        up, down = corner_signs(tile, P, N, SP, PRECISION)
        grad_sum, grad_mass = load_state(adjoint, tile, S, SP, V, VP)
        y = project(k, w, PRECISION)
        phi_k = tl.where(inside[:, None], buckets(y, b, up, down, tile, S, SP, LIFT, PRECISION), 0.0)
        grad_phi = fine_dot(v, grad_sum, PRECISION) + grad_mass[None, :]
        phi_left = operand(phi_k * left[:, None], PRECISION)
        dv += dot(phi_left, tl.trans(operand(grad_sum, PRECISION)), PRECISION)
        if HAS_DECAY:
            of_key += tl.sum(grad_phi * phi_left.to(tl.float32), 1)
        grad_phi *= left[:, None]
        for share in range(SHARE):
            share_q, share_o = whole_rows(share * qh, ALIGNED), whole_rows(share * oh, ALIGNED)
            q = load_rows(query + share_q, qt, start, queries, C, D, DP, ALIGNED)
            do = load_rows(grad_out + share_o, ot, start, queries, C, V, VP, ALIGNED)
            delta = tl.load(per_query + share * T + start + c, mask=queries, other=0.0)
            inverse = tl.load(per_query + inverses + share * T + start + c, mask=queries, other=0.0)
            along = dot(operand(v, PRECISION), tl.trans(operand(do, PRECISION)), PRECISION)
            grad_score = operand((along - delta[None, :]) * weight * inverse[None, :], PRECISION)
            phi_q = buckets(project(q, w, PRECISION), b, up, down, tile, S, SP, LIFT, PRECISION)
            grad_phi += dot(grad_score, operand(phi_q, PRECISION), PRECISION)
        grad_log = grad_phi * phi_k
        grad_y, grad_beta = bucket_gradients(grad_log, y, b, up, down, PRECISION)
        beta_sum += grad_beta
        grad_y = operand(grad_y, PRECISION)
        dk += dot(grad_y, operand(w, PRECISION), PRECISION)
        if NEED_PLANES:
            of_planes = dot(tl.trans(operand(k, PRECISION)), grad_y, PRECISION)
            store_planes(planes_parts, program * NS + tile, of_planes, N, D, DP)
        if HAS_DECAY:
            if not last:
                value_sum, mass = load_state(before + (program + G) * (S * (V + 1)), tile, S, SP, V, VP)
                crossing += tl.sum(tl.sum(value_sum * grad_sum, 0) + mass * grad_mass, 0)
    if HAS_DECAY:
        tl.store(grad_decay + (start + c) * G, crossing - tl.cumsum(of_key, 0, reverse=True), mask=queries)
    store_rows(grad_key, G * D, start, queries, dk, C, D, DP)
    store_rows(grad_value, G * V, start, queries, dv, C, V, VP)
    tl.store(beta_parts + program, tl.sum(tl.sum(beta_sum, 1), 0))
