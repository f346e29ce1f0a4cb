"""Causal kernels for heads whose buckets fit one tile: the state stays in registers from block to block.

Each program owns a run of tokens and goes through it in blocks of C: scores inside the block, masked, and the state
for all tokens before it, which then takes the block up. Shape letters are those of
:mod:`race_attention.backends.triton.device`.
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
    DP: tl.constexpr, VP: tl.constexpr, N: tl.constexpr, SP: tl.constexpr, C: tl.constexpr,
    LIFT: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DECAY: tl.constexpr,
):  # fmt: skip
    """out of a run of queries (programs: runs * H). ``out`` is contiguous [B, T, H, V]."""
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
    b = tl.load(beta + group)
    w = load_planes(planes, group, 0, L, P, D, DP, N, SP)
    up, down = corner_signs(0, P, N, SP, PRECISION)
    value_sum, mass = load_state(before + (run.to(tl.int64) * G + group) * (S * (V + 1)), 0, S, SP, V, VP)
    c = tl.arange(0, C)
    past = c[:, None] >= c[None, :]

    for t in range(start, end, C):
        inside = keys_inside(key_mask, mt, t, end, C, HAS_MASK)
        q = load_rows(query, qt, t, t + c < end, C, D, DP, ALIGNED)
        k = load_rows(key, kt, t, inside, C, D, DP, ALIGNED)
        v = load_rows(value, vt, t, inside, C, V, VP, ALIGNED)
        phi_q = buckets(project(q, w, PRECISION), b, up, down, 0, S, SP, LIFT, PRECISION)
        phi_q = operand(phi_q, PRECISION)
        phi_k = buckets(project(k, w, PRECISION), b, up, down, 0, S, SP, LIFT, PRECISION)
        phi_k = operand(tl.where(inside[:, None], phi_k, 0.0), PRECISION)

        score = tl.where(past, dot(phi_q, tl.trans(phi_k), PRECISION), 0.0)
        numerator = dot(phi_q, tl.trans(operand(value_sum, PRECISION)), PRECISION)
        denominator = tl.sum(phi_q.to(tl.float32) * mass[None, :], 1)
        if HAS_DECAY:
            whole, part, all_whole, all_part = load_decay(log_decay, gt, t, end, C)
            age = (whole[:, None] - whole[None, :]) + (part[:, None] - part[None, :])
            score *= tl.exp(tl.where(past, age, 0.0))
            since = tl.exp(whole + part)
            numerator *= since[:, None]
            denominator *= since
        score = operand(score, PRECISION)
        numerator += dot(score, operand(v, PRECISION), PRECISION)
        denominator += tl.sum(score.to(tl.float32), 1)
        inverse = reciprocal(denominator)
        store_rows(out, H * V, t, t + c < end, numerator * inverse[:, None], C, V, VP)

        if HAS_DECAY:
            kept = tl.exp(all_whole + all_part)
            value_sum *= kept
            mass *= kept
            left = tl.exp((all_whole - whole) + (all_part - part))
            phi_k = operand(phi_k.to(tl.float32) * left[:, None], PRECISION)
        value_sum += dot(tl.trans(operand(v, PRECISION)), phi_k, PRECISION)
        mass += tl.sum(phi_k.to(tl.float32), 0)


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def query_gradient_kernel(
    query, key, value, grad_out, key_mask, log_decay, planes, beta, table, before,
    grad_query, adjoints, per_query, planes_parts, beta_parts,
    qb: tl.int64, qt: tl.int64, qh: tl.int64, kb: tl.int64, kt: tl.int64, kh: tl.int64,
    vb: tl.int64, vt: tl.int64, vh: tl.int64, ob: tl.int64, ot: tl.int64, oh: tl.int64,
    mb: tl.int64, mt: tl.int64, mh: tl.int64, gb: tl.int64, gt: tl.int64, gh: tl.int64,
    B: tl.int64, T: tl.int64, RUN: tl.int64, NC: tl.int64, G: tl.int64,
    SHARE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    DP: tl.constexpr, VP: tl.constexpr, N: tl.constexpr, SP: tl.constexpr, C: tl.constexpr,
    LIFT: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DECAY: tl.constexpr, NEED_PLANES: tl.constexpr,
):  # fmt: skip
    """grad_query of a run, and the gradient of the state before it (programs: runs * H).

    With den_i the denominator and delta_i = grad_out_i . out_i, the gradient of phi_q(i) is
    sum_s over keys seen (grad_out_i . v_j - delta_i) phi_k(j) / den_i; out itself is not needed. Leaves
    (delta, 1/den) of every query, [2, B, H, T], for :func:`key_gradient_kernel`.
    """
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
    b = tl.load(beta + group)
    w = load_planes(planes, group, 0, L, P, D, DP, N, SP)
    up, down = corner_signs(0, P, N, SP, PRECISION)
    value_sum, mass = load_state(before + (run.to(tl.int64) * G + group) * (S * (V + 1)), 0, S, SP, V, VP)
    c = tl.arange(0, C)
    past = c[:, None] >= c[None, :]
    grad_sum = tl.zeros([VP, SP], tl.float32)  # of the state before this run
    grad_mass = tl.zeros([SP], tl.float32)
    kept_so_far = tl.full([], 1.0, tl.float32)
    planes_sum = tl.zeros([DP, N], tl.float32)
    beta_sum = tl.zeros([C, N], tl.float32)

    for t in range(start, end, C):
        inside = keys_inside(key_mask, mt, t, end, C, HAS_MASK)
        q = load_rows(query, qt, t, t + c < end, C, D, DP, ALIGNED)
        k = load_rows(key, kt, t, inside, C, D, DP, ALIGNED)
        v = load_rows(value, vt, t, inside, C, V, VP, ALIGNED)
        do = load_rows(grad_out, ot, t, t + c < end, C, V, VP, ALIGNED)
        y = project(q, w, PRECISION)
        full_phi = buckets(y, b, up, down, 0, S, SP, LIFT, PRECISION)
        phi_q = operand(full_phi, PRECISION)
        phi_k = buckets(project(k, w, PRECISION), b, up, down, 0, S, SP, LIFT, PRECISION)
        phi_k = operand(tl.where(inside[:, None], phi_k, 0.0), PRECISION)

        score = dot(phi_q, tl.trans(phi_k), PRECISION)
        if HAS_DECAY:
            whole, part, all_whole, all_part = load_decay(log_decay, gt, t, end, C)
            age = (whole[:, None] - whole[None, :]) + (part[:, None] - part[None, :])
            weight = tl.exp(tl.where(past, age, 0.0))
            since = tl.exp(whole + part)
            score *= weight
        score = tl.where(past, score, 0.0)
        score_rounded = operand(score, PRECISION).to(tl.float32)
        along = dot(operand(do, PRECISION), tl.trans(operand(v, PRECISION)), PRECISION)  # grad_out_i . v_j
        along_state = fine_dot(do, value_sum, PRECISION)  # grad_out_i . value_sum[s]
        mass_seen = tl.broadcast_to(mass[None, :], [C, SP])
        if HAS_DECAY:
            along_state *= since[:, None]
            mass_seen *= since[:, None]
        rounded = phi_q.to(tl.float32)
        denominator = tl.sum(rounded * mass_seen, 1) + tl.sum(score_rounded, 1)
        inverse = reciprocal(denominator)
        delta = (tl.sum(rounded * along_state, 1) + tl.sum(score_rounded * along, 1)) * inverse
        tl.store(delta_at + t + c, delta, mask=t + c < end)
        tl.store(inverse_at + t + c, inverse, mask=t + c < end)

        grad_score = (along - delta[:, None]) * inverse[:, None]
        if HAS_DECAY:
            grad_score *= weight
        grad_score = operand(tl.where(past, grad_score, 0.0), PRECISION)
        grad_phi = (along_state - delta[:, None] * mass_seen) * inverse[:, None] + dot(grad_score, phi_k, PRECISION)
        grad_y, grad_beta = bucket_gradients(grad_phi * full_phi, y, b, up, down, PRECISION)
        beta_sum += grad_beta
        grad_y = operand(grad_y, PRECISION)
        if NEED_PLANES:
            planes_sum += dot(tl.trans(operand(q, PRECISION)), grad_y, PRECISION)
        dq = dot(grad_y, operand(w, PRECISION), PRECISION)
        store_rows(grad_query, H * D, t, t + c < end, dq, C, D, DP)

        seen = rounded * inverse[:, None]
        if HAS_DECAY:
            seen *= (since * kept_so_far)[:, None]
        seen = operand(seen, PRECISION)
        grad_sum += dot(tl.trans(operand(do, PRECISION)), seen, PRECISION)
        grad_mass -= tl.sum(seen.to(tl.float32) * delta[:, None], 0)
        if HAS_DECAY:
            kept = tl.exp(all_whole + all_part)
            kept_so_far *= kept
            value_sum *= kept
            mass *= kept
            left = tl.exp((all_whole - whole) + (all_part - part))
            phi_k = operand(phi_k.to(tl.float32) * left[:, None], PRECISION)
        value_sum += dot(tl.trans(operand(v, PRECISION)), phi_k, PRECISION)
        mass += tl.sum(phi_k.to(tl.float32), 0)

    program = run.to(tl.int64) * H + head
    store_state(adjoints + program * (S * (V + 1)), 0, grad_sum, grad_mass, S, SP, V, VP)
    tl.store(beta_parts + program, tl.sum(tl.sum(beta_sum, 1), 0))
    if NEED_PLANES:
        store_planes(planes_parts, program, planes_sum, N, D, DP)


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def key_gradient_kernel(
    query, key, value, grad_out, key_mask, log_decay, planes, beta, table, before, after, per_query, at_the_end,
    grad_key, grad_value, grad_decay, planes_parts, beta_parts,
    qb: tl.int64, qt: tl.int64, qh: tl.int64, kb: tl.int64, kt: tl.int64, kh: tl.int64,
    vb: tl.int64, vt: tl.int64, vh: tl.int64, ob: tl.int64, ot: tl.int64, oh: tl.int64,
    mb: tl.int64, mt: tl.int64, mh: tl.int64, gb: tl.int64, gt: tl.int64, gh: tl.int64,
    B: tl.int64, T: tl.int64, RUN: tl.int64, NC: tl.int64, G: tl.int64,
    SHARE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    DP: tl.constexpr, VP: tl.constexpr, N: tl.constexpr, SP: tl.constexpr, C: tl.constexpr,
    LIFT: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DECAY: tl.constexpr, NEED_PLANES: tl.constexpr,
):  # fmt: skip
    """grad_key, grad_value and grad_log_decay of a run, from its last block to its first (programs: runs * G).

    ``after`` is the gradient of the state after each run; it takes up the queries of a block as the state takes up
    keys in :func:`readout_kernel`. A log decay's gradient is the sum, over the pairs of a key before it and a query
    from it on, of weight times the weight's gradient: at the end of a run the inner product of the state with its
    gradient (``at_the_end`` [rows, G] for the last run of a row), inside it minus the sum of phi_k . grad phi_k.
    """
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
    b = tl.load(beta + group)
    w = load_planes(planes, group, 0, L, P, D, DP, N, SP)
    up, down = corner_signs(0, P, N, SP, PRECISION)
    program = run.to(tl.int64) * G + group
    grad_sum, grad_mass = load_state(after + program * (S * (V + 1)), 0, S, SP, V, VP)
    c = tl.arange(0, C)
    past = c[:, None] <= c[None, :]  # keys down, queries across
    planes_sum = tl.zeros([DP, N], tl.float32)
    beta_sum = tl.zeros([C, N], tl.float32)
    if HAS_DECAY:
        if last:
            crossing = tl.load(at_the_end + row * G + group)
        else:
            value_sum, mass = load_state(before + (program + G) * (S * (V + 1)), 0, S, SP, V, VP)
            crossing = tl.sum(tl.sum(value_sum * grad_sum, 0) + mass * grad_mass, 0)

    blocks = (end - start + C - 1) // C
    for i in range(0, blocks):
        t = start + (blocks - 1 - i) * C
        inside = keys_inside(key_mask, mt, t, end, C, HAS_MASK)
        k = load_rows(key, kt, t, inside, C, D, DP, ALIGNED)
        v = load_rows(value, vt, t, inside, C, V, VP, ALIGNED)
        y = project(k, w, PRECISION)
        full_phi = tl.where(inside[:, None], buckets(y, b, up, down, 0, S, SP, LIFT, PRECISION), 0.0)
        phi_k = operand(full_phi, PRECISION)
        phi_left = phi_k
        grad_phi = fine_dot(v, grad_sum, PRECISION) + grad_mass[None, :]
        if HAS_DECAY:
            whole, part, all_whole, all_part = load_decay(log_decay, gt, t, end, C)
            age = (whole[None, :] - whole[:, None]) + (part[None, :] - part[:, None])
            weight = tl.exp(tl.where(past, age, 0.0))
            since = tl.exp(whole + part)
            left = tl.exp((all_whole - whole) + (all_part - part))
            phi_left = operand(full_phi * left[:, None], PRECISION)
            of_key = tl.sum(grad_phi * phi_left.to(tl.float32), 1)  # phi_k . grad phi_k, of the weights as rounded
            grad_phi *= left[:, None]
            kept = tl.exp(all_whole + all_part)
        dv = dot(phi_left, tl.trans(operand(grad_sum, PRECISION)), PRECISION)
        if HAS_DECAY:
            grad_sum *= kept
            grad_mass *= kept
        for share in range(SHARE):
            share_q, share_o = whole_rows(share * qh, ALIGNED), whole_rows(share * oh, ALIGNED)
            q = load_rows(query + share_q, qt, t, t + c < end, C, D, DP, ALIGNED)
            do = load_rows(grad_out + share_o, ot, t, t + c < end, C, V, VP, ALIGNED)
            delta = tl.load(per_query + share * T + t + c, mask=t + c < end, other=0.0)
            inverse = tl.load(per_query + inverses + share * T + t + c, mask=t + c < end, other=0.0)
            phi_q = buckets(project(q, w, PRECISION), b, up, down, 0, S, SP, LIFT, PRECISION)
            seen = phi_q * inverse[:, None]
            phi_q = operand(phi_q, PRECISION)
            score = dot(phi_k, tl.trans(phi_q), PRECISION) * inverse[None, :]
            if HAS_DECAY:
                score *= weight
            score = tl.where(past, score, 0.0)
            dv += dot(operand(score, PRECISION), operand(do, PRECISION), PRECISION)
            along = dot(operand(v, PRECISION), tl.trans(operand(do, PRECISION)), PRECISION)
            along -= delta[None, :]
            grad_score = along * inverse[None, :]
            if HAS_DECAY:
                grad_score *= weight
            grad_score = operand(tl.where(past, grad_score, 0.0), PRECISION)
            grad_phi += dot(grad_score, phi_q, PRECISION)
            if HAS_DECAY:
                of_key += tl.sum(along * score, 1)
                seen *= since[:, None]
            seen = operand(seen, PRECISION)
            grad_sum += dot(tl.trans(operand(do, PRECISION)), seen, PRECISION)
            grad_mass -= tl.sum(seen.to(tl.float32) * delta[:, None], 0)

        grad_log = grad_phi * full_phi
        if HAS_DECAY:
            tl.store(grad_decay + (t + c) * G, crossing - tl.cumsum(of_key, 0, reverse=True), mask=t + c < end)
            crossing -= tl.sum(of_key, 0)
        grad_y, grad_beta = bucket_gradients(grad_log, y, b, up, down, PRECISION)
        beta_sum += grad_beta
        grad_y = operand(grad_y, PRECISION)
        if NEED_PLANES:
            planes_sum += dot(tl.trans(operand(k, PRECISION)), grad_y, PRECISION)
        dk = dot(grad_y, operand(w, PRECISION), PRECISION)
        store_rows(grad_key, G * D, t, t + c < end, dk, C, D, DP)
        store_rows(grad_value, G * V, t, t + c < end, dv, C, V, VP)

    tl.store(beta_parts + program, tl.sum(tl.sum(beta_sum, 1), 0))
    if NEED_PLANES:
        store_planes(planes_parts, program, planes_sum, N, D, DP)
