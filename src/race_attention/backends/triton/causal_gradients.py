"""The causal gradients for heads whose buckets fit one tile: of the keys and values, and of the queries.

Each holds one state, the mirror image of the other: the keys' kernel goes from a run's last block to its first with the
gradient of the state after each block, the queries' kernel from the first to the last with the state before it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import (
    add_dot,
    block_decay,
    bucket_gradients,
    buckets,
    by_bucket,
    by_value,
    corner_signs,
    dot,
    fading,
    fine_dot,
    keys_inside,
    load_features,
    load_half,
    load_half_planes,
    load_mass,
    load_planes,
    load_rows,
    operand,
    project,
    run_bounds,
    store_features,
    store_planes,
    store_rows,
    taken_up,
    whole_rows,
)

NEVER_SPECIALIZED = ["T", "RUN", "NC", "G", "qb", "qt", "qh", "kb", "kt", "kh", "vb", "vt", "vh", "ob", "ot", "oh"]
NEVER_SPECIALIZED += ["mb", "mt", "mh", "gb", "gt", "gh"]


@triton.jit(do_not_specialize=[name for name in NEVER_SPECIALIZED if name[0] != "q"])
def key_gradient_kernel(
    query_features, key, value, grad_out, key_mask, log_decay, planes, beta, table, before, after, deltas,
    at_the_end, key_features, grad_key, grad_value, grad_decay, planes_parts, beta_parts,
    kb: tl.int64, kt: tl.int64, kh: tl.int64, vb: tl.int64, vt: tl.int64, vh: tl.int64,
    ob: tl.int64, ot: tl.int64, oh: tl.int64,
    mb: tl.int64, mt: tl.int64, mh: tl.int64, gb: tl.int64, gt: tl.int64, gh: tl.int64,
    T: tl.int64, RUN: tl.int64, NC: tl.int64, G: tl.int64,
    SHARE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    DP: tl.constexpr, VP: tl.constexpr, N: tl.constexpr, SP: tl.constexpr, SW: tl.constexpr, C: tl.constexpr,
    LIFT: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DECAY: tl.constexpr, NEED_PLANES: tl.constexpr,
):  # fmt: skip
    """grad_key, grad_value and grad_log_decay of a run, from its last block to its first (programs: runs * G).

    ``after`` is the gradient of the state after each run; it takes up the queries of a block as the state takes up
    keys. Leaves phi_k, [B, G, T, SW], for :func:`query_gradient_kernel`. A log decay's gradient is the sum, over the
    pairs of a key before it and a query from it on, of weight times the weight's gradient: at the end of a run the
    inner product of the state with its gradient (``at_the_end`` [rows, G] for the last run of a row), inside it minus
    the sum of phi_k . grad phi_k.
    """
    S: tl.constexpr = L << P
    VH: tl.constexpr = VP // 2
    V0: tl.constexpr = V if V < VH else VH
    DH: tl.constexpr = DP // 2
    D0: tl.constexpr = D if D < DH else DH
    TALL: tl.constexpr = SP >= 64
    H = G * SHARE
    run = tl.program_id(0) // G
    group = tl.program_id(0) - run * G
    batch, row, start, end, last = run_bounds(run, table, T, RUN, NC, PACKED)
    query_features += (batch * H + group * SHARE) * T * SW
    key += whole_rows(batch * kb + group * kh, ALIGNED)
    value += whole_rows(batch * vb + group * vh, ALIGNED)
    grad_out += whole_rows(batch * ob + group * SHARE * oh, ALIGNED)
    key_mask += batch * mb + group * mh
    log_decay += batch * gb + group * gh
    deltas += (batch * H + group * SHARE) * T
    key_features += (batch * G + group) * T * SW
    grad_key += (batch * T * G + group) * D
    grad_value += (batch * T * G + group) * V
    grad_decay += batch * T * G + group
    b = tl.load(beta + group)
    w = load_planes(planes, group, 0, L, P, D, DP, N, SP)
    w0 = operand(load_half_planes(planes, group, 0, L, P, D, DH, N), PRECISION)
    w1 = operand(load_half_planes(planes, group, 1, L, P, D, DH, N), PRECISION)
    up, down = corner_signs(0, P, N, SP, PRECISION)
    program = run.to(tl.int64) * G + group
    adjoint = after + program * (S * (V + 1))
    grad0 = load_half(adjoint, 0, S, SP, V, VH, TALL)
    grad1 = load_half(adjoint, 1, S, SP, V, VH, TALL)
    grad_mass = load_mass(adjoint, S, SP, V)
    c = tl.arange(0, C)
    past = c[:, None] <= c[None, :]  # keys down, queries across
    planes_sum = tl.zeros([DP, N], tl.float32)
    beta_sum = tl.zeros([C, N], tl.float32)
    if HAS_DECAY:
        if last:
            crossing = tl.load(at_the_end + row * G + group)
        else:
            state = before + (program + G) * (S * (V + 1))
            product = load_half(state, 0, S, SP, V, VH, TALL) * grad0 + load_half(state, 1, S, SP, V, VH, TALL) * grad1
            crossing = tl.sum(tl.sum(product, 0), 0) + tl.sum(load_mass(state, S, SP, V) * grad_mass, 0)

    blocks = (end - start + C - 1) // C
    for i in range(0, blocks):
        t = start + (blocks - 1 - i) * C
        here = t + c < end
        inside = keys_inside(key_mask, mt, t, end, C, HAS_MASK)
        k = load_rows(key, kt, t, inside, C, D, DP, ALIGNED)
        v0 = load_rows(value, vt, t, inside, C, V0, VH, ALIGNED)
        v1 = load_rows(value + VH, vt, t, inside, C, V - V0, VH, ALIGNED)
        y = project(k, w, PRECISION)
        phi = tl.where(inside[:, None], buckets(y, b, up, down, 0, S, SP, LIFT, PRECISION), 0.0)
        phi_k = operand(phi, PRECISION)
        store_features(key_features, t, here, phi_k, C, SP, SW)
        grad_phi = fine_dot(v0, by_value(grad0, TALL), PRECISION) + fine_dot(v1, by_value(grad1, TALL), PRECISION)
        grad_phi += grad_mass[None, :]
        phi_left = phi_k
        if HAS_DECAY:
            whole, part, since, left, kept, total = block_decay(log_decay, gt, t, end, C, PRECISION)
            weight = fading(whole, part, past, True, PRECISION)
            phi_left = operand(phi * left[:, None], PRECISION)
            of_key = tl.sum(grad_phi * phi_left.to(tl.float32), 1)  # phi_k . grad phi_k, of the weights as rounded
            grad_phi *= left[:, None]
        dv0 = dot(phi_left, by_bucket(operand(grad0, PRECISION), TALL), PRECISION)
        dv1 = dot(phi_left, by_bucket(operand(grad1, PRECISION), TALL), PRECISION)
        if HAS_DECAY:
            grad0 *= kept
            grad1 *= kept
            grad_mass *= kept
        for share in range(SHARE):
            rows = grad_out + whole_rows(share * oh, ALIGNED)
            do0 = operand(load_rows(rows, ot, t, here, C, V0, VH, ALIGNED), PRECISION)
            do1 = operand(load_rows(rows + VH, ot, t, here, C, V - V0, VH, ALIGNED), PRECISION)
            seen = load_features(query_features + share * T * SW, t, here, C, SP, SW)
            delta = tl.load(deltas + share * T + t + c, mask=here, other=0.0)
            score = tl.where(past, dot(phi_k, tl.trans(seen), PRECISION), 0.0)
            along = dot(operand(v0, PRECISION), tl.trans(do0), PRECISION)
            along = add_dot(along, operand(v1, PRECISION), tl.trans(do1), PRECISION) - delta[None, :]
            if HAS_DECAY:
                score *= weight
                of_key += tl.sum(along * score, 1)
                along *= weight
            grad_phi = add_dot(grad_phi, operand(tl.where(past, along, 0.0), PRECISION), seen, PRECISION)
            score = operand(score, PRECISION)
            dv0 = add_dot(dv0, score, do0, PRECISION)
            dv1 = add_dot(dv1, score, do1, PRECISION)
            if HAS_DECAY:
                seen = operand(seen.to(tl.float32) * since[:, None], PRECISION)
            grad0 = taken_up(grad0, do0, seen, TALL, PRECISION)
            grad1 = taken_up(grad1, do1, seen, TALL, PRECISION)
            grad_mass -= tl.sum(seen.to(tl.float32) * delta[:, None], 0)

        store_rows(grad_value, G * V, t, here, dv0, C, V0, VH)
        store_rows(grad_value + VH, G * V, t, here, dv1, C, V - V0, VH)
        if HAS_DECAY:
            tl.store(grad_decay + (t + c) * G, crossing - tl.cumsum(of_key, 0, reverse=True), mask=here)
            crossing -= tl.sum(of_key, 0)
        grad_y, grad_beta = bucket_gradients(grad_phi * phi, y, b, up, down, PRECISION)
        beta_sum += grad_beta
        grad_y = operand(grad_y, PRECISION)
        if NEED_PLANES:
            planes_sum = add_dot(planes_sum, tl.trans(operand(k, PRECISION)), grad_y, PRECISION)
        store_rows(grad_key, G * D, t, here, dot(grad_y, w0, PRECISION), C, D0, DH)
        store_rows(grad_key + DH, G * D, t, here, dot(grad_y, w1, PRECISION), C, D - D0, DH)

    tl.store(beta_parts + program, tl.sum(tl.sum(beta_sum, 1), 0))
    if NEED_PLANES:
        store_planes(planes_parts, program, planes_sum, N, D, DP)


@triton.jit(do_not_specialize=[name for name in NEVER_SPECIALIZED if name[0] != "k"])
def query_gradient_kernel(
    query, key_features, value, grad_out, key_mask, log_decay, planes, beta, table, before, deltas, inverses,
    grad_query, planes_parts, beta_parts,
    qb: tl.int64, qt: tl.int64, qh: tl.int64, vb: tl.int64, vt: tl.int64, vh: tl.int64,
    ob: tl.int64, ot: tl.int64, oh: tl.int64,
    mb: tl.int64, mt: tl.int64, mh: tl.int64, gb: tl.int64, gt: tl.int64, gh: tl.int64,
    T: tl.int64, RUN: tl.int64, NC: tl.int64, G: tl.int64,
    SHARE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    DP: tl.constexpr, VP: tl.constexpr, N: tl.constexpr, SP: tl.constexpr, SW: tl.constexpr, C: tl.constexpr,
    LIFT: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DECAY: tl.constexpr, NEED_PLANES: tl.constexpr,
):  # fmt: skip
    """grad_query of a run (programs: runs * H).

    With delta and den of :func:`~.causal.adjoint_kernel`, phi_q(i) has the gradient sum over the keys seen of
    (grad_out_i . v_j - delta_i) phi_k(j), divided by den_i.
    """
    S: tl.constexpr = L << P
    VH: tl.constexpr = VP // 2
    V0: tl.constexpr = V if V < VH else VH
    DH: tl.constexpr = DP // 2
    D0: tl.constexpr = D if D < DH else DH
    TALL: tl.constexpr = SP >= 64
    H = G * SHARE
    run = tl.program_id(0) // H
    head = tl.program_id(0) - run * H
    group = head // SHARE
    batch, row, start, end, last = run_bounds(run, table, T, RUN, NC, PACKED)
    query += whole_rows(batch * qb + head * qh, ALIGNED)
    key_features += (batch * G + group) * T * SW
    value += whole_rows(batch * vb + group * vh, ALIGNED)
    grad_out += whole_rows(batch * ob + head * oh, ALIGNED)
    key_mask += batch * mb + group * mh
    log_decay += batch * gb + group * gh
    deltas += (batch * H + head) * T
    inverses += (batch * H + head) * T
    grad_query += (batch * T * H + head) * D
    b = tl.load(beta + group)
    w = load_planes(planes, group, 0, L, P, D, DP, N, SP)
    w0 = operand(load_half_planes(planes, group, 0, L, P, D, DH, N), PRECISION)
    w1 = operand(load_half_planes(planes, group, 1, L, P, D, DH, N), PRECISION)
    up, down = corner_signs(0, P, N, SP, PRECISION)
    state = before + (run.to(tl.int64) * G + group) * (S * (V + 1))
    sum0 = load_half(state, 0, S, SP, V, VH, TALL)
    sum1 = load_half(state, 1, S, SP, V, VH, TALL)
    mass = load_mass(state, S, SP, V)
    c = tl.arange(0, C)
    past = c[:, None] >= c[None, :]
    planes_sum = tl.zeros([DP, N], tl.float32)
    beta_sum = tl.zeros([C, N], tl.float32)

    for t in range(start, end, C):
        here = t + c < end
        inside = keys_inside(key_mask, mt, t, end, C, HAS_MASK)
        q = load_rows(query, qt, t, here, C, D, DP, ALIGNED)
        phi_k = load_features(key_features, t, here, C, SP, SW)
        v0 = operand(load_rows(value, vt, t, inside, C, V0, VH, ALIGNED), PRECISION)
        v1 = operand(load_rows(value + VH, vt, t, inside, C, V - V0, VH, ALIGNED), PRECISION)
        do0 = load_rows(grad_out, ot, t, here, C, V0, VH, ALIGNED)
        do1 = load_rows(grad_out + VH, ot, t, here, C, V - V0, VH, ALIGNED)
        delta = tl.load(deltas + t + c, mask=here, other=0.0)
        inverse = tl.load(inverses + t + c, mask=here, other=0.0)
        along = dot(operand(do0, PRECISION), tl.trans(v0), PRECISION)
        along = add_dot(along, operand(do1, PRECISION), tl.trans(v1), PRECISION) - delta[:, None]
        grad_phi = fine_dot(do0, by_value(sum0, TALL), PRECISION) + fine_dot(do1, by_value(sum1, TALL), PRECISION)
        grad_phi -= delta[:, None] * mass[None, :]
        phi_left = phi_k
        if HAS_DECAY:
            whole, part, since, left, kept, total = block_decay(log_decay, gt, t, end, C, PRECISION)
            along *= fading(whole, part, past, False, PRECISION)
            grad_phi *= since[:, None]
            phi_left = operand(phi_k.to(tl.float32) * left[:, None], PRECISION)
            sum0 *= kept
            sum1 *= kept
            mass *= kept
        grad_phi = add_dot(grad_phi, operand(tl.where(past, along, 0.0), PRECISION), phi_k, PRECISION)
        sum0 = taken_up(sum0, v0, phi_left, TALL, PRECISION)
        sum1 = taken_up(sum1, v1, phi_left, TALL, PRECISION)
        mass += tl.sum(phi_left.to(tl.float32), 0)

        y = project(q, w, PRECISION)
        phi = buckets(y, b, up, down, 0, S, SP, LIFT, PRECISION) * inverse[:, None]
        grad_y, grad_beta = bucket_gradients(grad_phi * phi, y, b, up, down, PRECISION)
        beta_sum += grad_beta
        grad_y = operand(grad_y, PRECISION)
        if NEED_PLANES:
            planes_sum = add_dot(planes_sum, tl.trans(operand(q, PRECISION)), grad_y, PRECISION)
        store_rows(grad_query, H * D, t, here, dot(grad_y, w0, PRECISION), C, D0, DH)
        store_rows(grad_query + DH, H * D, t, here, dot(grad_y, w1, PRECISION), C, D - D0, DH)

    program = run.to(tl.int64) * H + head
    tl.store(beta_parts + program, tl.sum(tl.sum(beta_sum, 1), 0))
    if NEED_PLANES:
        store_planes(planes_parts, program, planes_sum, N, D, DP)
