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
    dot,
    fine_dot,
    keys_inside,
    load_decay,
    load_planes,
    load_rows,
    load_state,
    operand,
    project,
    run_bounds,
    split_planes,
    store_planes,
    store_rows,
    store_state,
)

NEVER_SPECIALIZED = ["B", "T", "RUN", "NC", "G", "SHARE", "qb", "qt", "qh", "kb", "kt", "kh", "vb", "vt", "vh"]
NEVER_SPECIALIZED += ["mb", "mt", "mh", "gb", "gt", "gh", "ob", "ot", "oh"]


@triton.jit(do_not_specialize=[name for name in NEVER_SPECIALIZED if name not in ("B", "ob", "ot", "oh")])
def readout_kernel(
    query, key, value, key_mask, log_decay, planes, beta, table, before, out,
    qb: tl.int64, qt: tl.int64, qh: tl.int64, kb: tl.int64, kt: tl.int64, kh: tl.int64,
    vb: tl.int64, vt: tl.int64, vh: tl.int64, mb: tl.int64, mt: tl.int64, mh: tl.int64,
    gb: tl.int64, gt: tl.int64, gh: tl.int64,
    T: tl.int64, RUN: tl.int64, NC: tl.int64, G: tl.int64, SHARE: tl.int64,
    L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    DP: tl.constexpr, VP: tl.constexpr, LT: tl.constexpr, P2: tl.constexpr, PL: tl.constexpr, NS: tl.constexpr,
    C: tl.constexpr,
    LIFT: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DECAY: tl.constexpr,
):  # fmt: skip
    """out of a run of at most C queries (programs: runs * H). ``out`` is contiguous [B, T, H, V]."""
    S: tl.constexpr = L << P
    SP: tl.constexpr = LT << PL
    H = G * SHARE
    run = tl.program_id(0) // H
    head = tl.program_id(0) - run * H
    group = head // SHARE
    batch, row, start, end, last = run_bounds(run, table, T, RUN, NC, PACKED)
    query += batch * qb + head * qh
    key += batch * kb + group * kh
    value += batch * vb + group * vh
    key_mask += batch * mb + group * mh
    log_decay += batch * gb + group * gh
    out += (batch * T * H + head) * V
    state = before + (run.to(tl.int64) * G + group) * (S * (V + 1))
    b = tl.load(beta + group)
    c = tl.arange(0, C)
    past = c[:, None] >= c[None, :]
    inside = keys_inside(key_mask, mt, start, end, C, HAS_MASK)
    q = operand(load_rows(query, qt, start, start + c < end, C, D, DP, ALIGNED), PRECISION)
    k = operand(load_rows(key, kt, start, inside, C, D, DP, ALIGNED), PRECISION)
    score = tl.zeros([C, C], tl.float32)
    numerator = tl.zeros([C, VP], tl.float32)
    denominator = tl.zeros([C], tl.float32)
    for tile in range(NS):
        w = load_planes(planes, group, tile, L, D, DP, P, LT, P2, PL)
        value_sum, mass = load_state(state, tile, S, SP, V, VP)
        phi_q = buckets(split_planes(project(q, w, PRECISION), C, LT, P2), b, tile, L, C, P, LT, PL, LIFT)
        phi_q = operand(phi_q, PRECISION)
        phi_k = buckets(split_planes(project(k, w, PRECISION), C, LT, P2), b, tile, L, C, P, LT, PL, LIFT)
        phi_k = operand(tl.where(inside[:, None], phi_k, 0.0), PRECISION)
        score += dot(phi_q, tl.trans(phi_k), PRECISION)
        numerator += dot(phi_q, operand(value_sum, PRECISION), PRECISION)
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
    v = operand(load_rows(value, vt, start, inside, C, V, VP, ALIGNED), PRECISION)
    numerator += dot(score, v, PRECISION)
    denominator += tl.sum(score.to(tl.float32), 1)
    inverse = tl.where(denominator > 0, 1.0 / tl.where(denominator > 0, denominator, 1.0), 0.0)  # 0 where a query sees no key
    store_rows(out, H * V, start, start + c < end, numerator * inverse[:, None], C, V, VP)


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def query_gradient_kernel(
    query, key, value, grad_out, key_mask, log_decay, planes, beta, table, before,
    grad_query, adjoints, per_query, planes_parts, beta_parts,
    qb: tl.int64, qt: tl.int64, qh: tl.int64, kb: tl.int64, kt: tl.int64, kh: tl.int64,
    vb: tl.int64, vt: tl.int64, vh: tl.int64, ob: tl.int64, ot: tl.int64, oh: tl.int64,
    mb: tl.int64, mt: tl.int64, mh: tl.int64, gb: tl.int64, gt: tl.int64, gh: tl.int64,
    B: tl.int64, T: tl.int64, RUN: tl.int64, NC: tl.int64, G: tl.int64, SHARE: tl.int64,
    L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    DP: tl.constexpr, VP: tl.constexpr, LT: tl.constexpr, P2: tl.constexpr, PL: tl.constexpr, NS: tl.constexpr,
    C: tl.constexpr,
    LIFT: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DECAY: tl.constexpr, NEED_PLANES: tl.constexpr,
):  # fmt: skip
    """grad_query of a run of at most C tokens, and the gradient of the state before it (programs: runs * H)."""
    S: tl.constexpr = L << P
    SP: tl.constexpr = LT << PL
    H = G * SHARE
    run = tl.program_id(0) // H
    head = tl.program_id(0) - run * H
    group = head // SHARE
    batch, row, start, end, last = run_bounds(run, table, T, RUN, NC, PACKED)
    query += batch * qb + head * qh
    key += batch * kb + group * kh
    value += batch * vb + group * vh
    grad_out += batch * ob + head * oh
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
    q = operand(load_rows(query, qt, start, queries, C, D, DP, ALIGNED), PRECISION)
    k = operand(load_rows(key, kt, start, inside, C, D, DP, ALIGNED), PRECISION)
    do = operand(load_rows(grad_out, ot, start, queries, C, V, VP, ALIGNED), PRECISION)
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
        w = load_planes(planes, group, tile, L, D, DP, P, LT, P2, PL)
        value_sum, mass = load_state(state, tile, S, SP, V, VP)
        phi_q = buckets(split_planes(project(q, w, PRECISION), C, LT, P2), b, tile, L, C, P, LT, PL, LIFT)
        phi_q = operand(phi_q, PRECISION)
        phi_k = buckets(split_planes(project(k, w, PRECISION), C, LT, P2), b, tile, L, C, P, LT, PL, LIFT)
        phi_k = operand(tl.where(inside[:, None], phi_k, 0.0), PRECISION)
        score += dot(phi_q, tl.trans(phi_k), PRECISION)
        rounded = phi_q.to(tl.float32) * since[:, None]
        denominator += tl.sum(rounded * mass[None, :], 1)
        delta += tl.sum(rounded * fine_dot(do, tl.trans(value_sum), PRECISION), 1)
    score = operand(score * weight, PRECISION).to(tl.float32)
    v = operand(load_rows(value, vt, start, inside, C, V, VP, ALIGNED), PRECISION)
    along = dot(do, tl.trans(v), PRECISION)  # grad_out_i . v_j
    denominator += tl.sum(score, 1)
    inverse = tl.where(denominator > 0, 1.0 / tl.where(denominator > 0, denominator, 1.0), 0.0)
    delta = (delta + tl.sum(score * along, 1)) * inverse  # grad_out_i . out_i
    tl.store(delta_at + start + c, delta, mask=queries)
    tl.store(inverse_at + start + c, inverse, mask=queries)
    grad_score = operand((along - delta[:, None]) * weight * inverse[:, None], PRECISION)

    dq = tl.zeros([C, DP], tl.float32)
    beta_sum = tl.zeros([C, LT], tl.float32)
    for tile in range(NS):
        w = load_planes(planes, group, tile, L, D, DP, P, LT, P2, PL)
        value_sum, mass = load_state(state, tile, S, SP, V, VP)
        ys = split_planes(project(q, w, PRECISION), C, LT, P2)
        phi_q = buckets(ys, b, tile, L, C, P, LT, PL, LIFT)
        phi_k = buckets(split_planes(project(k, w, PRECISION), C, LT, P2), b, tile, L, C, P, LT, PL, LIFT)
        phi_k = operand(tl.where(inside[:, None], phi_k, 0.0), PRECISION)
        grad_phi = fine_dot(do, tl.trans(value_sum), PRECISION) - delta[:, None] * mass[None, :]
        grad_phi = grad_phi * (since * inverse)[:, None] + dot(grad_score, phi_k, PRECISION)
        grad_y, grad_beta = bucket_gradients(grad_phi * phi_q, ys, b, tile, C, P, LT, P2, PL)
        beta_sum += grad_beta
        grad_y = operand(grad_y, PRECISION)
        dq += dot(grad_y, operand(w, PRECISION), PRECISION)
        if NEED_PLANES:
            store_planes(
                planes_parts, program * NS + tile, dot(tl.trans(grad_y), q, PRECISION), LT * P2, D, DP
            )  # fmt: skip
        seen = operand(operand(phi_q, PRECISION).to(tl.float32) * (since * inverse)[:, None], PRECISION)
        grad_mass = -tl.sum(seen.to(tl.float32) * delta[:, None], 0)
        store_state(adjoint, tile, dot(tl.trans(seen), do, PRECISION), grad_mass, S, SP, V, VP)
    store_rows(grad_query, H * D, start, queries, dq, C, D, DP)
    tl.store(beta_parts + program, tl.sum(tl.sum(beta_sum, 1), 0))


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def key_gradient_kernel(
    query, key, value, grad_out, key_mask, log_decay, planes, beta, table, before, after, per_query, at_the_end,
    grad_key, grad_value, grad_decay, planes_parts, beta_parts,
    qb: tl.int64, qt: tl.int64, qh: tl.int64, kb: tl.int64, kt: tl.int64, kh: tl.int64,
    vb: tl.int64, vt: tl.int64, vh: tl.int64, ob: tl.int64, ot: tl.int64, oh: tl.int64,
    mb: tl.int64, mt: tl.int64, mh: tl.int64, gb: tl.int64, gt: tl.int64, gh: tl.int64,
    B: tl.int64, T: tl.int64, RUN: tl.int64, NC: tl.int64, G: tl.int64, SHARE: tl.int64,
    L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    DP: tl.constexpr, VP: tl.constexpr, LT: tl.constexpr, P2: tl.constexpr, PL: tl.constexpr, NS: tl.constexpr,
    C: tl.constexpr,
    LIFT: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DECAY: tl.constexpr, NEED_PLANES: tl.constexpr,
):  # fmt: skip
    """grad_key, grad_value and grad_log_decay of a run of at most C tokens (programs: runs * G)."""
    S: tl.constexpr = L << P
    SP: tl.constexpr = LT << PL
    H = G * SHARE
    run = tl.program_id(0) // G
    group = tl.program_id(0) - run * G
    batch, row, start, end, last = run_bounds(run, table, T, RUN, NC, PACKED)
    query += batch * qb + group * SHARE * qh
    key += batch * kb + group * kh
    value += batch * vb + group * vh
    grad_out += batch * ob + group * SHARE * oh
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
    k = operand(load_rows(key, kt, start, inside, C, D, DP, ALIGNED), PRECISION)
    v = operand(load_rows(value, vt, start, inside, C, V, VP, ALIGNED), PRECISION)
    weight = tl.where(past, 1.0, 0.0)
    left = tl.full([C], 1.0, tl.float32)
    if HAS_DECAY:
        whole, part, all_whole, all_part = load_decay(log_decay, gt, start, end, C)
        age = (whole[None, :] - whole[:, None]) + (part[None, :] - part[:, None])
        weight = tl.where(past, tl.exp(tl.where(past, age, 0.0)), 0.0)
        left = tl.exp((all_whole - whole) + (all_part - part))

    dv = tl.zeros([C, VP], tl.float32)
    for share in range(SHARE):
        q = operand(load_rows(query + share * qh, qt, start, queries, C, D, DP, ALIGNED), PRECISION)
        do = operand(load_rows(grad_out + share * oh, ot, start, queries, C, V, VP, ALIGNED), PRECISION)
        inverse = tl.load(per_query + inverses + share * T + start + c, mask=queries, other=0.0)
        score = tl.zeros([C, C], tl.float32)
        for tile in range(NS):
            w = load_planes(planes, group, tile, L, D, DP, P, LT, P2, PL)
            phi_q = buckets(split_planes(project(q, w, PRECISION), C, LT, P2), b, tile, L, C, P, LT, PL, LIFT)
            phi_k = buckets(split_planes(project(k, w, PRECISION), C, LT, P2), b, tile, L, C, P, LT, PL, LIFT)
            phi_k = operand(tl.where(inside[:, None], phi_k, 0.0), PRECISION)
            score += dot(phi_k, tl.trans(operand(phi_q, PRECISION)), PRECISION)
        dv += dot(operand(score * weight * inverse[None, :], PRECISION), do, PRECISION)

    dk = tl.zeros([C, DP], tl.float32)
    beta_sum = tl.zeros([C, LT], tl.float32)
    of_key = tl.zeros([C], tl.float32)
    if HAS_DECAY:
        crossing = tl.where(last, tl.load(at_the_end + row * G + group), 0.0)
    for tile in range(NS):
        w = load_planes(planes, group, tile, L, D, DP, P, LT, P2, PL)
        grad_sum, grad_mass = load_state(adjoint, tile, S, SP, V, VP)
        ys = split_planes(project(k, w, PRECISION), C, LT, P2)
        phi_k = tl.where(inside[:, None], buckets(ys, b, tile, L, C, P, LT, PL, LIFT), 0.0)
        grad_phi = (fine_dot(v, tl.trans(grad_sum), PRECISION) + grad_mass[None, :]) * left[:, None]
        dv += dot(operand(phi_k * left[:, None], PRECISION), operand(grad_sum, PRECISION), PRECISION)
        for share in range(SHARE):
            q = operand(load_rows(query + share * qh, qt, start, queries, C, D, DP, ALIGNED), PRECISION)
            do = operand(load_rows(grad_out + share * oh, ot, start, queries, C, V, VP, ALIGNED), PRECISION)
            delta = tl.load(per_query + share * T + start + c, mask=queries, other=0.0)
            inverse = tl.load(per_query + inverses + share * T + start + c, mask=queries, other=0.0)
            along = dot(v, tl.trans(do), PRECISION)
            grad_score = operand((along - delta[None, :]) * weight * inverse[None, :], PRECISION)
            phi_q = buckets(split_planes(project(q, w, PRECISION), C, LT, P2), b, tile, L, C, P, LT, PL, LIFT)
            grad_phi += dot(grad_score, operand(phi_q, PRECISION), PRECISION)
        grad_log = grad_phi * phi_k
        grad_y, grad_beta = bucket_gradients(grad_log, ys, b, tile, C, P, LT, P2, PL)
        beta_sum += grad_beta
        grad_y = operand(grad_y, PRECISION)
        dk += dot(grad_y, operand(w, PRECISION), PRECISION)
        if NEED_PLANES:
            store_planes(
                planes_parts, program * NS + tile, dot(tl.trans(grad_y), k, PRECISION), LT * P2, D, DP
            )  # fmt: skip
        if HAS_DECAY:
            of_key += tl.sum(grad_log, 1)
            if not last:
                value_sum, mass = load_state(before + (program + G) * (S * (V + 1)), tile, S, SP, V, VP)
                crossing += tl.sum(tl.sum(value_sum * grad_sum, 1) + mass * grad_mass, 0)
    if HAS_DECAY:
        tl.store(grad_decay + (start + c) * G, crossing - tl.cumsum(of_key, 0, reverse=True), mask=queries)
    store_rows(grad_key, G * D, start, queries, dk, C, D, DP)
    store_rows(grad_value, G * V, start, queries, dv, C, V, VP)
    tl.store(beta_parts + program, tl.sum(tl.sum(beta_sum, 1), 0))
