"""The causal gradients for heads whose buckets fit one tile: of the keys and values, and of the queries.

Each holds one state, the mirror image of the other: the queries' kernel goes from a run's first block to its last with
the state before each, the keys' kernel from the last to the first with the gradient of the state after it. Buckets
come from the passes before.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import (
    add_dot,
    add_fine_dot,
    as_given_dot,
    dot,
    fine_dot,
    keys_inside,
    operand,
    reciprocal,
    run_bounds,
    store_rows,
    whole_rows,
)
from .narrow import (
    block_decay,
    by_bucket,
    by_value,
    fading,
    features_at,
    hash_gradients,
    hashed,
    load_hash,
    load_mass,
    load_sides,
    load_sums,
    rows_at,
    store_hash_gradient,
    store_mass,
    taken_up,
    unhashed,
)

NEVER_SPECIALIZED = ["T", "RUN", "NC", "G", "qb", "qt", "qh", "kb", "kt", "kh", "vb", "vt", "vh", "ob", "ot", "oh"]
NEVER_SPECIALIZED += ["mb", "mt", "mh", "gb", "gt", "gh"]


@triton.jit(do_not_specialize=[name for name in NEVER_SPECIALIZED if name[0] != "k"])
def query_gradient_kernel(
    query, query_features, key_features, value, grad_out, key_mask, log_decay, planes, beta, table, before,
    adjoints, deltas, grad_query, planes_parts, beta_parts,
    qb: tl.int64, qt: tl.int64, qh: tl.int64, vb: tl.int64, vt: tl.int64, vh: tl.int64,
    ob: tl.int64, ot: tl.int64, oh: tl.int64,
    mb: tl.int64, mt: tl.int64, mh: tl.int64, gb: tl.int64, gt: tl.int64, gh: tl.int64,
    T: tl.int64, RUN: tl.int64, NC: tl.int64, G: tl.int64,
    SHARE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    DP: tl.constexpr, VP: tl.constexpr, N: tl.constexpr, SP: tl.constexpr, SW: tl.constexpr, C: tl.constexpr,
    LIFT: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DECAY: tl.constexpr,
    NEED_PLANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """grad_query of a run, and what its queries give to the gradient of the mass before it (programs: runs * H).

    With den_i the denominator and delta_i = grad_out_i . out_i, the weight of query i and key j has the gradient
    (grad_out_i . v_j - delta_i) / den_i. delta, [B, H, T], is added up here from the weights as rounded, so that of a
    query's weights' gradients nothing is left over, and left for :func:`key_gradient_kernel`; out itself is rounded,
    which the gradient of log_decay, a sum over many tokens, does not forgive.
    """
    S: tl.constexpr = L << P
    TALL: tl.constexpr = SP >= 64
    H = G * SHARE
    run = tl.program_id(0) // H
    head = tl.program_id(0) - run * H
    group = head // SHARE
    batch, row, start, end, last = run_bounds(run, table, T, RUN, NC, PACKED)
    count = (end - start).to(tl.int32)
    query += whole_rows(batch * qb + head * qh + start * qt, ALIGNED)
    key_features += ((batch * G + group) * T + start) * SW
    value += whole_rows(batch * vb + group * vh + start * vt, ALIGNED)
    grad_out += whole_rows(batch * ob + head * oh + start * ot, ALIGNED)
    key_mask += batch * mb + group * mh + start * mt
    log_decay += batch * gb + group * gh + start * gt
    deltas += (batch * H + head) * T + start
    query_features += ((batch * H + head) * T + start) * SW
    grad_query += ((batch * T + start) * H + head) * D
    b = tl.load(beta + group)
    hashes = load_hash(planes, group, L, P, D, DP, N, PRECISION)
    choice = load_sides(P, N, SP, PRECISION)
    state = before + (run.to(tl.int64) * G + group) * (S * (V + 1))
    sums = load_sums(state, 0, S, SP, V, VP, TALL)
    mass = load_mass(state, S, SP, V)
    TILED: tl.constexpr = SP <= 32  # the mass once a token, where registers allow: no sum over the warps
    if TILED:
        mass = tl.broadcast_to(mass[None, :], [C, SP])
        ones = operand(tl.full([C, C], 1.0, tl.float32), PRECISION)
    c = tl.arange(0, C)
    past = c[:, None] >= c[None, :]
    planes_sum = tl.zeros([DP, N], tl.float32)
    beta_sum = tl.zeros([C, N], tl.float32)
    grad_mass = tl.zeros([C, SP] if TILED else [SP], tl.float32)
    kept_so_far = tl.full([], 1.0, tl.float32)

    for t in range(0, count, C):
        here = c < count - t
        inside = keys_inside(key_mask, mt, t, count, C, HAS_MASK)
        phi_k = features_at(key_features, t, here, C, SP, SW)
        seen = features_at(query_features, t, here, C, SP, SW)
        v = rows_at(value, vt, t, inside, C, V, VP, ALIGNED)
        do = rows_at(grad_out, ot, t, here, C, V, VP, ALIGNED)
        along = as_given_dot(do, tl.trans(v), PRECISION)  # grad_out_i . v_j
        score = tl.where(past, dot(seen, tl.trans(phi_k), PRECISION), 0.0)
        grad_phi = fine_dot(do, by_value(sums, TALL), PRECISION)
        seen_now = seen
        phi_left = phi_k
        if HAS_DECAY:
            whole, part, since, left, kept, total = block_decay(log_decay, gt, t, count, C, PRECISION)
            weight = fading(whole, part, past, False, PRECISION)
            score *= weight
            grad_phi *= since[:, None]
            seen_now = operand(seen.to(tl.float32) * (since * kept_so_far)[:, None], PRECISION)
            kept_so_far *= kept
        delta = tl.sum(seen.to(tl.float32) * grad_phi, 1)
        delta += tl.sum(score * along, 1)
        total_weight = tl.sum(seen.to(tl.float32) * (mass if TILED else mass[None, :]), 1)
        if HAS_DECAY:
            total_weight *= since
        delta *= reciprocal(total_weight + tl.sum(score, 1))  # 1 but for roundings
        tl.store(deltas + t + c, delta, mask=here)
        of_mass = seen_now.to(tl.float32) * delta[:, None]
        grad_mass -= of_mass if TILED else tl.sum(of_mass, 0)
        along = tl.where(past, along - delta[:, None], 0.0)
        mass_seen = delta[:, None] * (mass if TILED else mass[None, :])
        if HAS_DECAY:
            along *= weight
            mass_seen *= since[:, None]
            phi_left = operand(phi_k.to(tl.float32) * left[:, None], PRECISION)
            sums *= kept
            mass *= kept
        grad_phi = add_fine_dot(grad_phi - mass_seen, along, phi_k, v.dtype == tl.float16, PRECISION)
        sums = taken_up(sums, operand(v, PRECISION), phi_left, TALL, PRECISION)
        if TILED:
            mass = add_dot(mass, ones, phi_left, PRECISION)
        else:
            mass += tl.sum(phi_left.to(tl.float32), 0)

        q = rows_at(query, qt, t, here, C, D, DP, ALIGNED)
        y = hashed(q, hashes, C, N, PRECISION)
        grad_y, grad_beta = hash_gradients(grad_phi * seen.to(tl.float32), y, b, choice, C, N, SP, PRECISION)
        beta_sum += grad_beta
        if NEED_PLANES:
            planes_sum = add_dot(planes_sum, tl.trans(operand(q, PRECISION)), operand(grad_y, PRECISION), PRECISION)
        store_rows(grad_query, H * D, t, here, unhashed(grad_y, hashes, C, N, PRECISION), C, D, DP)

    program = run.to(tl.int64) * H + head
    store_mass(adjoints + program * (S * (V + 1)), tl.sum(grad_mass, 0) if TILED else grad_mass, S, SP, V)
    tl.store(beta_parts + program, tl.sum(tl.sum(beta_sum, 1), 0))
    if NEED_PLANES:
        store_hash_gradient(planes_parts, program, planes_sum, N, D, DP, ROWS)


@triton.jit(do_not_specialize=[name for name in NEVER_SPECIALIZED if name[0] != "q"])
def key_gradient_kernel(
    query_features, key_features, key, value, grad_out, key_mask, log_decay, planes, beta, table, before, after,
    deltas, at_the_end, grad_key, grad_value, grad_decay, planes_parts, beta_parts,
    kb: tl.int64, kt: tl.int64, kh: tl.int64, vb: tl.int64, vt: tl.int64, vh: tl.int64,
    ob: tl.int64, ot: tl.int64, oh: tl.int64,
    mb: tl.int64, mt: tl.int64, mh: tl.int64, gb: tl.int64, gt: tl.int64, gh: tl.int64,
    T: tl.int64, RUN: tl.int64, NC: tl.int64, G: tl.int64,
    SHARE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    DP: tl.constexpr, VP: tl.constexpr, N: tl.constexpr, SP: tl.constexpr, SW: tl.constexpr, C: tl.constexpr,
    LIFT: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DECAY: tl.constexpr,
    NEED_PLANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """grad_key, grad_value and grad_log_decay of a run, from its last block to its first (programs: runs * G).

    ``after`` is the gradient of the state after each run; it takes up the queries of a block as the state takes up
    keys. A log decay's gradient is the sum, over the
    pairs of a key before it and a query from it on, of weight times the weight's gradient: at the end of a run the
    inner product of the state with its gradient (``at_the_end`` [rows, G] for the last run of a row), inside it minus
    the sum of phi_k . grad phi_k.
    """
    S: tl.constexpr = L << P
    TALL: tl.constexpr = SP >= 128  # never: fewer registers here
    H = G * SHARE
    run = tl.program_id(0) // G
    group = tl.program_id(0) - run * G
    batch, row, start, end, last = run_bounds(run, table, T, RUN, NC, PACKED)
    count = (end - start).to(tl.int32)
    query_features += ((batch * H + group * SHARE) * T + start) * SW
    key += whole_rows(batch * kb + group * kh + start * kt, ALIGNED)
    value += whole_rows(batch * vb + group * vh + start * vt, ALIGNED)
    grad_out += whole_rows(batch * ob + group * SHARE * oh + start * ot, ALIGNED)
    key_mask += batch * mb + group * mh + start * mt
    log_decay += batch * gb + group * gh + start * gt
    deltas += (batch * H + group * SHARE) * T + start
    key_features += ((batch * G + group) * T + start) * SW
    grad_key += ((batch * T + start) * G + group) * D
    grad_value += ((batch * T + start) * G + group) * V
    grad_decay += (batch * T + start) * G + group
    b = tl.load(beta + group)
    hashes = load_hash(planes, group, L, P, D, DP, N, PRECISION)
    choice = load_sides(P, N, SP, PRECISION)
    program = run.to(tl.int64) * G + group
    adjoint = after + program * (S * (V + 1))
    grads = load_sums(adjoint, 0, S, SP, V, VP, TALL)
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
            product = load_sums(state, 0, S, SP, V, VP, TALL) * grads
            crossing = tl.sum(tl.sum(product, 0), 0) + tl.sum(load_mass(state, S, SP, V) * grad_mass, 0)

    blocks = (count + C - 1) // C
    for i in range(blocks):
        t = (blocks - 1 - i) * C
        here = c < count - t
        inside = keys_inside(key_mask, mt, t, count, C, HAS_MASK)
        phi_k = features_at(key_features, t, here, C, SP, SW)
        v = rows_at(value, vt, t, inside, C, V, VP, ALIGNED)
        do = rows_at(grad_out, ot, t, here, C, V, VP, ALIGNED)
        seen = features_at(query_features, t, here, C, SP, SW)
        delta = tl.load(deltas + t + c, mask=here, other=0.0)
        phi_left = phi_k
        if HAS_DECAY:
            whole, part, since, left, kept, total = block_decay(log_decay, gt, t, count, C, PRECISION)
            weight = fading(whole, part, past, True, PRECISION)
            phi_left = operand(phi_k.to(tl.float32) * left[:, None], PRECISION)

        # The gradient of phi_k, to the end: dk is stored before dv needs the registers.
        grad_phi = fine_dot(v, by_value(grads, TALL), PRECISION) + grad_mass[None, :]
        if HAS_DECAY:
            of_key = tl.sum(grad_phi * phi_left.to(tl.float32), 1)  # phi_k . grad phi_k, of the weights as rounded
            grad_phi *= left[:, None]
        along = tl.where(past, as_given_dot(v, tl.trans(do), PRECISION) - delta[None, :], 0.0)
        if HAS_DECAY:
            along *= weight
            of_key += tl.sum(along * dot(phi_k, tl.trans(seen), PRECISION), 1)
        grad_phi = add_fine_dot(grad_phi, along, seen, v.dtype == tl.float16, PRECISION)
        for share in range(1, SHARE):
            rows = grad_out + whole_rows(share * oh, ALIGNED)
            other = rows_at(rows, ot, t, here, C, V, VP, ALIGNED)
            other_seen = features_at(query_features + share * T * SW, t, here, C, SP, SW)
            other_delta = tl.load(deltas + share * T + t + c, mask=here, other=0.0)
            along = tl.where(past, as_given_dot(v, tl.trans(other), PRECISION) - other_delta[None, :], 0.0)
            if HAS_DECAY:
                along *= weight
                of_key += tl.sum(along * dot(phi_k, tl.trans(other_seen), PRECISION), 1)
            grad_phi = add_fine_dot(grad_phi, along, other_seen, v.dtype == tl.float16, PRECISION)
        if HAS_DECAY:
            tl.store(grad_decay + (t + c) * G, crossing - tl.cumsum(of_key, 0, reverse=True), mask=here)
            crossing -= tl.sum(of_key, 0)
        k = rows_at(key, kt, t, inside, C, D, DP, ALIGNED)
        y = hashed(k, hashes, C, N, PRECISION)
        grad_y, grad_beta = hash_gradients(grad_phi * phi_k.to(tl.float32), y, b, choice, C, N, SP, PRECISION)
        beta_sum += grad_beta
        if NEED_PLANES:
            planes_sum = add_dot(planes_sum, tl.trans(operand(k, PRECISION)), operand(grad_y, PRECISION), PRECISION)
        store_rows(grad_key, G * D, t, here, unhashed(grad_y, hashes, C, N, PRECISION), C, D, DP)

        score = tl.where(past, dot(phi_k, tl.trans(seen), PRECISION), 0.0)
        if HAS_DECAY:
            score *= weight
        dv = dot(phi_left, by_bucket(operand(grads, PRECISION), TALL), PRECISION)
        dv = add_dot(dv, operand(score, PRECISION), operand(do, PRECISION), PRECISION)
        for share in range(1, SHARE):
            rows = grad_out + whole_rows(share * oh, ALIGNED)
            other = rows_at(rows, ot, t, here, C, V, VP, ALIGNED)
            other_seen = features_at(query_features + share * T * SW, t, here, C, SP, SW)
            score = tl.where(past, dot(phi_k, tl.trans(other_seen), PRECISION), 0.0)
            if HAS_DECAY:
                score *= weight
            dv = add_dot(dv, operand(score, PRECISION), operand(other, PRECISION), PRECISION)
        store_rows(grad_value, G * V, t, here, dv, C, V, VP)

        if HAS_DECAY:
            grads *= kept
            grad_mass *= kept
            seen = operand(seen.to(tl.float32) * since[:, None], PRECISION)
        grads = taken_up(grads, operand(do, PRECISION), seen, TALL, PRECISION)
        grad_mass -= tl.sum(seen.to(tl.float32) * delta[:, None], 0)
        for share in range(1, SHARE):
            rows = grad_out + whole_rows(share * oh, ALIGNED)
            other = rows_at(rows, ot, t, here, C, V, VP, ALIGNED)
            other_seen = features_at(query_features + share * T * SW, t, here, C, SP, SW)
            other_delta = tl.load(deltas + share * T + t + c, mask=here, other=0.0)
            if HAS_DECAY:
                other_seen = operand(other_seen.to(tl.float32) * since[:, None], PRECISION)
            grads = taken_up(grads, operand(other, PRECISION), other_seen, TALL, PRECISION)
            grad_mass -= tl.sum(other_seen.to(tl.float32) * other_delta[:, None], 0)

    tl.store(beta_parts + program, tl.sum(tl.sum(beta_sum, 1), 0))
    if NEED_PLANES:
        store_hash_gradient(planes_parts, program, planes_sum, N, D, DP, ROWS)
