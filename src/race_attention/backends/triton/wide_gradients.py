"""Gradients of the causal kernels for heads whose buckets fill several tiles.

With w_ij the decay between key j and query i, den_i the denominator of a query and delta_i = grad_out_i . out_i:

    grad phi_q(i) = sum over the keys j seen of  (grad_out_i . v_j - delta_i) w_ij / den_i  phi_k(j)
    grad phi_k(j) = sum over the queries i of the same factor and phi_q(i)
    grad v_j      = sum over the queries i of  phi_q(i) . phi_k(j) w_ij / den_i  grad_out_i

Keys before the sub-run of a query, and queries after that of a key, come as a state and as a state's gradient, which
the accumulating kernel of :mod:`race_attention.backends.triton.wide` makes of queries too. Tensors are as there.
"""

from __future__ import annotations

import triton.language as tl

from .device import (
    add_by_tokens,
    add_dot,
    bucket_gradients,
    buckets,
    corner_signs,
    dot,
    fine_dot,
    keys_inside,
    load_planes,
    load_rows,
    operand,
    project,
    store_planes,
    store_rows,
    whole_rows,
)
from .narrow import hashed, load_hash
from .wide import (
    after_sub_run,
    before_sub_run,
    block_of,
    kept_after,
    kept_before,
    kept_between,
    kept_in_block,
    kept_of_block,
    kept_since,
    kernel,
    load_age,
    load_ages,
    load_between,
    load_columns,
    load_queries,
    place,
    weights,
)
from .wide_features import buckets_at, side_logs


@kernel
def value_gradient_kernel(
    phi_q, phi_k, value, grad_out, key_mask, deltas, inverses, ages, boundaries, totals, table, after, local,
    local_mass, grad_value, of_key, of_query,
    vb: tl.int64, vt: tl.int64, vh: tl.int64, ob: tl.int64, ot: tl.int64, oh: tl.int64,
    mb: tl.int64, mt: tl.int64, mh: tl.int64, first: tl.int64, lines: tl.int64,
    T: tl.int64, RUN: tl.int64, SUB: tl.int64, NC: tl.int64, G: tl.int64, BLOCKS: tl.int64,
    SHARE: tl.constexpr, V: tl.constexpr, VB: tl.constexpr, S: tl.constexpr, SW: tl.constexpr, SB: tl.constexpr,
    C: tl.constexpr, CK: tl.constexpr, CA: tl.constexpr, FEW: tl.constexpr, QP: tl.constexpr, PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DECAY: tl.constexpr,
):  # fmt: skip
    """grad_value of a block of keys, contiguous [B, T, G, V] (programs: runs * blocks * G * column tiles).

    The mirror of :func:`readout_kernel`: ``after`` is the gradient of the state after each run, ``local`` what the
    queries of the later sub-runs add to it. With decay also the sums of the weight times its gradient, ``of_key``
    [column tiles, lines, G] over the queries after a key, and ``of_query`` [B, H, T, QP] over the keys of this block
    before a query, its part. Those of two tokens of a sub-run are the same numbers in both, and so cancel.
    """
    NV: tl.constexpr = (V + VB - 1) // VB
    H = G * SHARE
    column = tl.program_id(0) % NV * VB
    group, run, batch, row, start, end, line, t = block_of(
        tl.program_id(0) // NV, G, first, table, T, RUN, NC, BLOCKS, C, PACKED
    )
    if t >= end:
        return
    key_mask += batch * mb + group * mh
    phi_k += ((line + t - start) * G + group) * SW
    c = tl.arange(0, C)
    v = column + tl.arange(0, VB)
    keys = t + c < end
    sub_end, slot, has_local = after_sub_run(t, start, end, line, run, first, SUB, G, group)
    state = after + (run * G + group) * (S * (V + 1))
    kept = kept_after(boundaries, totals + run * G + group, slot, has_local, HAS_DECAY)
    if HAS_DECAY:
        k_whole, k_part = load_ages(ages, lines, G, group, line + t - start, keys, C, PRECISION)
        end_whole, end_part = load_age(ages, lines, G, group, line + sub_end - 1 - start, True, PRECISION)
        kept_here, last_whole, last_part = kept_in_block(
            ages, lines, G, group, line, start, t, end, k_whole, k_part, C, CA, PRECISION
        )

    dv = tl.zeros([C, VB], tl.float32)
    of_mass = tl.zeros([C], tl.float32)
    if HAS_DECAY:
        for at in tl.range(0, SW, FEW, num_stages=1):
            k = load_columns(phi_k, G * SW, 0, keys, at, SW, C, FEW, True)
            k = operand(k.to(tl.float32) * kept_here[:, None], PRECISION)
            grad_sum, grad_mass = load_between(state, local + slot * (S * V), local_mass + slot * S, kept, has_local,
                                               at + tl.arange(0, FEW), v, S, V)  # fmt: skip
            dv += fine_dot(k, grad_sum, PRECISION)
            of_mass += tl.sum(k.to(tl.float32) * grad_mass[None, :], 1)
    else:
        for at in tl.range(0, SW, SB, num_stages=1):
            k = load_columns(phi_k, G * SW, 0, keys, at, SW, C, SB, True)
            grad_sum, grad_mass = load_between(state, local + slot * (S * V), local_mass + slot * S, kept, has_local,
                                               at + tl.arange(0, SB), v, S, V)  # fmt: skip
            dv = add_dot(dv, k, operand(grad_sum, PRECISION), PRECISION)
    if HAS_DECAY:
        left = kept_between(end_whole, end_part, last_whole, last_part, keys, PRECISION)
        dv *= left[:, None]
        inside = keys_inside(key_mask, mt, t, end, C, HAS_MASK)
        values = operand(load_columns(value + whole_rows(batch * vb + group * vh, ALIGNED), vt, t, inside, column,
                                      V, C, VB, ALIGNED), PRECISION)  # fmt: skip
        terms = tl.sum(dv * values.to(tl.float32), 1) + tl.where(column == 0, of_mass * left, 0.0)
        piece = (t - start) % SUB // C * NV + column // VB

    if SW == SB:
        k = load_columns(phi_k, G * SW, 0, keys, 0, SW, C, SB, True)
    for n in range(0, (sub_end - t + CK - 1) // CK * SHARE):
        u = t + n // SHARE * CK
        head = group * SHARE + n % SHARE
        i = u + tl.arange(0, CK)
        queries = i < sub_end
        their_phi = phi_q + ((line + u - start) * H + head) * SW
        if SW == SB:
            q = load_columns(their_phi, H * SW, 0, queries, 0, SW, CK, SB, True)
            score = dot(k, tl.trans(q), PRECISION)
        else:
            score = tl.zeros([C, CK], tl.float32)
            for at in range(0, SW, SB):
                k_tile = load_columns(phi_k, G * SW, 0, keys, at, SW, C, SB, True)
                q = load_columns(their_phi, H * SW, 0, queries, at, SW, CK, SB, True)
                score = add_dot(score, k_tile, tl.trans(q), PRECISION)
        rows = load_columns(grad_out + whole_rows(batch * ob + head * oh, ALIGNED), ot, u, queries, column,
                            V, CK, VB, ALIGNED)  # fmt: skip
        query_at = (batch * H + head) * T + i
        inverse = tl.load(inverses + query_at, mask=queries, other=0.0)
        past = ((t + c)[:, None] <= i[None, :]) & queries[None, :]  # past the end a decay would grow
        score *= inverse[None, :]
        if HAS_DECAY:
            whole, part = load_ages(ages, lines, G, group, line + u - start, queries, CK, PRECISION)
            score *= weights(past, whole[None, :], part[None, :], k_whole[:, None], k_part[:, None], PRECISION)
        rows = operand(rows, PRECISION)
        dv = add_dot(dv, operand(tl.where(past, score, 0.0), PRECISION), rows, PRECISION)
        if HAS_DECAY:  # but for a token's own key, see decay_gradient_kernel
            delta = tl.where(column == 0, tl.load(deltas + query_at, mask=queries, other=0.0), 0.0)
            score *= dot(values, tl.trans(rows), PRECISION) - delta[None, :]
            score = tl.where(past & ((t + c)[:, None] < i[None, :]), score, 0.0)
            terms += tl.sum(score, 1)
            tl.store(of_query + query_at * QP + piece, tl.sum(score, 0), mask=queries)

    to = grad_value + ((batch * T + t) * G + group) * V
    mask = keys[:, None] & (v < V)[None, :]
    tl.store(to + ((c * (G * V).to(tl.int32))[:, None] + v[None, :]), dv.to(grad_value.dtype.element_ty), mask=mask)
    if HAS_DECAY:
        tl.store(of_key + (column // VB * lines + line + t - start + c) * G + group, terms, mask=keys)


@kernel
def query_buckets_gradient_kernel(
    query, phi_k, value, grad_out, out, residual, key_mask, planes, beta, deltas, inverses, ages, boundaries, table,
    before, local, local_mass, grad_phi, of_query,
    qb: tl.int64, qt: tl.int64, qh: tl.int64,
    vb: tl.int64, vt: tl.int64, vh: tl.int64, ob: tl.int64, ot: tl.int64, oh: tl.int64,
    mb: tl.int64, mt: tl.int64, mh: tl.int64, first: tl.int64, lines: tl.int64,
    T: tl.int64, RUN: tl.int64, SUB: tl.int64, NC: tl.int64, G: tl.int64, BLOCKS: tl.int64,
    SHARE: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, S: tl.constexpr, SW: tl.constexpr, SB: tl.constexpr,
    L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr, LIFT: tl.constexpr,
    C: tl.constexpr, CK: tl.constexpr, CA: tl.constexpr, FEW: tl.constexpr, QP: tl.constexpr, PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DECAY: tl.constexpr,
    RESIDUAL: tl.constexpr,
):  # fmt: skip
    """The gradient of the buckets of a block of queries, [lines, H, SW] (programs: runs * blocks * H * tiles).

    It leaves ``deltas``, grad_out . out, [B, H, T], and with decay the last parts of ``of_query`` [B, H, T, QP], over
    the keys before a query's sub-run: one for each tile.
    """
    NT: tl.constexpr = SW // SB
    H = G * SHARE
    tile = tl.program_id(0) % NT
    head, run, batch, row, start, end, line, t = block_of(
        tl.program_id(0) // NT, H, first, table, T, RUN, NC, BLOCKS, C, PACKED
    )
    group = head // SHARE
    if t >= end:
        return
    value += whole_rows(batch * vb + group * vh, ALIGNED)
    grad_out += whole_rows(batch * ob + head * oh, ALIGNED)
    key_mask += batch * mb + group * mh
    phi_k += (line * G + group) * SW
    c = tl.arange(0, C)
    s = tile * SB + tl.arange(0, SB)
    queries = t + c < end
    sub, slot = before_sub_run(t, start, line, run, first, SUB, G, group)
    state = before + (run * G + group) * (S * (V + 1))
    do, delta, inverse, query_at = load_queries(
        grad_out, out, residual, inverses, ot, H, batch, head, t, T, queries, C, V, VP, ALIGNED, RESIDUAL, True,
        PRECISION,
    )  # fmt: skip
    if tile == 0:
        tl.store(deltas + query_at, delta, mask=queries)
    kept = kept_before(boundaries, slot, sub > start, HAS_DECAY)
    if HAS_DECAY:
        q_whole, q_part = load_ages(ages, lines, G, group, line + t - start, queries, C, PRECISION)
    d_phi = tl.zeros([C, SB], tl.float32)
    for at in tl.range(0, VP, FEW, num_stages=1):
        some = operand(load_columns(grad_out, ot, t, queries, at, V, C, FEW, ALIGNED), PRECISION)
        value_sum, mass = load_between(state, local + slot * (S * V), local_mass + slot * S, kept, sub > start,
                                       s, at + tl.arange(0, FEW), S, V)  # fmt: skip
        d_phi += fine_dot(some, tl.trans(value_sum), PRECISION)
        d_phi -= tl.where(at == 0, delta, 0.0)[:, None] * mass[None, :]
    if HAS_DECAY:
        of_table = tile * SB >> P
        w = load_hash(planes, group, of_table, L, P, D, DP, N, PRECISION)
        rows_q = load_rows(query + whole_rows(batch * qb + head * qh, ALIGNED), qt, t, queries, C, D, DP, ALIGNED)
        logs = side_logs(hashed(rows_q, w, C, N, PRECISION), tl.load(beta + group), C, N, PRECISION)
        phi = buckets_at(logs, tile * SB, of_table, C, SB, S, P, N, LIFT, PRECISION)
        kept_here, since = kept_of_block(
            ages, lines, G, group, line, start, t, end, SUB, q_whole, q_part, C, CA, PRECISION
        )
        q = operand(phi * (inverse * kept_here)[:, None], PRECISION)
        terms = tl.sum(d_phi * q.to(tl.float32), 1) * since
        tl.store(of_query + query_at * QP + (QP - NT + tile), terms, mask=queries)
        d_phi *= (kept_since(q_whole, q_part, PRECISION) * inverse)[:, None]
    else:
        d_phi *= inverse[:, None]
    for u in range(sub, tl.minimum(t + C, end), CK):
        j = u + tl.arange(0, CK)
        inside = keys_inside(key_mask, mt, u, end, CK, HAS_MASK)
        rows = load_columns(value, vt, u, inside, 0, V, CK, VP, ALIGNED)
        k = load_columns(phi_k + (u - start) * (G * SW), G * SW, 0, j < end, tile * SB, SW, CK, SB, True)
        along = dot(do, tl.trans(operand(rows, PRECISION)), PRECISION)
        along = (along - delta[:, None]) * inverse[:, None]
        past = (t + c)[:, None] >= j[None, :]
        if HAS_DECAY:
            whole, part = load_ages(ages, lines, G, group, line + u - start, j < end, CK, PRECISION)
            along *= weights(past, q_whole[:, None], q_part[:, None], whole[None, :], part[None, :], PRECISION)
        along = operand(tl.where(past, along, 0.0), PRECISION)
        d_phi = add_dot(d_phi, along, k, PRECISION)
    to = grad_phi + ((line + t - start) * H + head) * SW
    tl.store(
        to + ((c * (H * SW).to(tl.int32))[:, None] + s[None, :]),
        d_phi.to(grad_phi.dtype.element_ty),
        mask=queries[:, None],
    )


@kernel
def key_buckets_gradient_kernel(
    phi_q, value, grad_out, out, residual, key_mask, deltas, inverses, ages, boundaries, totals, table, after, local,
    local_mass, grad_phi,
    vb: tl.int64, vt: tl.int64, vh: tl.int64, ob: tl.int64, ot: tl.int64, oh: tl.int64,
    mb: tl.int64, mt: tl.int64, mh: tl.int64, first: tl.int64, lines: tl.int64,
    T: tl.int64, RUN: tl.int64, SUB: tl.int64, NC: tl.int64, G: tl.int64, BLOCKS: tl.int64,
    SHARE: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, S: tl.constexpr, SW: tl.constexpr, SB: tl.constexpr,
    C: tl.constexpr, CK: tl.constexpr, FEW: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DECAY: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """The gradient of the buckets of a block of keys, [lines, G, SW] (programs: runs * blocks * G * tiles)."""
    NT: tl.constexpr = SW // SB
    H = G * SHARE
    tile = tl.program_id(0) % NT
    group, run, batch, row, start, end, line, t = block_of(
        tl.program_id(0) // NT, G, first, table, T, RUN, NC, BLOCKS, C, PACKED
    )
    if t >= end:
        return
    value += whole_rows(batch * vb + group * vh, ALIGNED)
    key_mask += batch * mb + group * mh
    c = tl.arange(0, C)
    s = tile * SB + tl.arange(0, SB)
    keys = t + c < end
    sub_end, slot, has_local = after_sub_run(t, start, end, line, run, first, SUB, G, group)
    state = after + (run * G + group) * (S * (V + 1))
    inside = keys_inside(key_mask, mt, t, end, C, HAS_MASK)
    kept = kept_after(boundaries, totals + run * G + group, slot, has_local, HAS_DECAY)
    if HAS_DECAY:
        k_whole, k_part = load_ages(ages, lines, G, group, line + t - start, keys, C, PRECISION)
        end_whole, end_part = load_age(ages, lines, G, group, line + sub_end - 1 - start, True, PRECISION)
    d_phi = tl.zeros([C, SB], tl.float32)
    for at in tl.range(0, VP, FEW, num_stages=1):
        some = operand(load_columns(value, vt, t, inside, at, V, C, FEW, ALIGNED), PRECISION)
        grad_sum, grad_mass = load_between(state, local + slot * (S * V), local_mass + slot * S, kept, has_local,
                                           s, at + tl.arange(0, FEW), S, V)  # fmt: skip
        d_phi += fine_dot(some, tl.trans(grad_sum), PRECISION)
        d_phi += tl.where(at == 0, grad_mass, 0.0)[None, :]
    if HAS_DECAY:
        d_phi *= kept_between(end_whole, end_part, k_whole, k_part, True, PRECISION)[:, None]
    rows = operand(load_columns(value, vt, t, inside, 0, V, C, VP, ALIGNED), PRECISION)
    for n in range(0, (sub_end - t + CK - 1) // CK * SHARE):
        u = t + n // SHARE * CK
        head = group * SHARE + n % SHARE
        i = u + tl.arange(0, CK)
        queries = i < sub_end
        do = load_columns(grad_out + whole_rows(batch * ob + head * oh, ALIGNED), ot, u, queries, 0,
                          V, CK, VP, ALIGNED)  # fmt: skip
        q = load_columns(phi_q + ((line + u - start) * H + head) * SW, H * SW, 0, queries, tile * SB, SW, CK, SB, True)
        query_at = (batch * H + head) * T + i
        delta = tl.load(deltas + query_at, mask=queries, other=0.0)
        inverse = tl.load(inverses + query_at, mask=queries, other=0.0)
        along = dot(rows, tl.trans(operand(do, PRECISION)), PRECISION)
        along = (along - delta[None, :]) * inverse[None, :]
        past = ((t + c)[:, None] <= i[None, :]) & queries[None, :]  # past the end a decay would grow
        if HAS_DECAY:
            whole, part = load_ages(ages, lines, G, group, line + u - start, queries, CK, PRECISION)
            along *= weights(past, whole[None, :], part[None, :], k_whole[:, None], k_part[:, None], PRECISION)
        along = operand(tl.where(past, along, 0.0), PRECISION)
        d_phi = add_dot(d_phi, along, q, PRECISION)
    to = grad_phi + ((line + t - start) * G + group) * SW
    tl.store(
        to + ((c * (G * SW).to(tl.int32))[:, None] + s[None, :]),
        d_phi.to(grad_phi.dtype.element_ty),
        mask=keys[:, None],
    )


@kernel
def feature_gradients_kernel(
    x, key_mask, planes, beta, table, grad_phi, grad_x, planes_parts, beta_parts,
    xb: tl.int64, xt: tl.int64, xh: tl.int64, mb: tl.int64, mt: tl.int64, mh: tl.int64,
    first: tl.int64, T: tl.int64, RUN: tl.int64, NC: tl.int64, G: tl.int64,
    SHARE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr,
    SP: tl.constexpr, NS: tl.constexpr, SW: tl.constexpr, C: tl.constexpr, LIFT: tl.constexpr, PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr, OF_PLANES: tl.constexpr,
):  # fmt: skip
    """The gradient of queries or keys from that of their buckets, and of beta (programs: runs * H).

    OF_PLANES: that of the hyperplanes instead (programs: runs * H, NS tiles).
    """
    S: tl.constexpr = L << P
    H = G * SHARE
    run = first + tl.program_id(0) // H
    head = tl.program_id(0) % H
    group = head // SHARE
    batch, row, start, end, last, line = place(run, first, table, T, RUN, NC, PACKED)
    x += whole_rows(batch * xb + head * xh, ALIGNED)
    key_mask += batch * mb + group * mh
    grad_x += (batch * T * H + head) * D
    b = tl.load(beta + group)
    c = tl.arange(0, C)
    program = run * H + head
    beta_sum = tl.zeros([C, N], tl.float32)
    planes_sum = tl.zeros([DP, N], tl.float32)
    for t in range(start, end, C):
        inside = keys_inside(key_mask, mt, t, end, C, HAS_MASK)
        rows = load_rows(x, xt, t, inside, C, D, DP, ALIGNED)
        dx = tl.zeros([C, DP], tl.float32)
        for turn in range(1 if OF_PLANES else NS):
            tile = tl.program_id(1) if OF_PLANES else turn
            w = load_planes(planes, group, tile, L, P, D, DP, N, SP)
            up, down = corner_signs(tile, P, N, SP, PRECISION)
            y = project(rows, w, PRECISION)
            phi = buckets(y, b, up, down, tile, S, SP, LIFT, PRECISION)
            at = grad_phi + ((line + t - start) * H + head) * SW
            d_phi = load_columns(at, H * SW, 0, inside, tile * SP, SW, C, SP, True).to(tl.float32)
            grad_y, grad_beta = bucket_gradients(d_phi * phi, y, b, up, down, PRECISION)
            if OF_PLANES:
                planes_sum = add_by_tokens(planes_sum, rows, grad_y, PRECISION)
            else:
                beta_sum += grad_beta
                dx = add_dot(dx, operand(grad_y, PRECISION), operand(w, PRECISION), PRECISION)
        if not OF_PLANES:
            store_rows(grad_x, H * D, t, t + c < end, dx, C, D, DP)
    if OF_PLANES:
        store_planes(planes_parts, program * NS + tl.program_id(1), planes_sum, N, D, DP)
    else:
        tl.store(beta_parts + program, tl.sum(tl.sum(beta_sum, 1), 0))


@kernel
def decay_gradient_kernel(
    table, before, after, at_the_end, of_key, of_query, grad_decay,
    first: tl.int64, lines: tl.int64, T: tl.int64, RUN: tl.int64, NC: tl.int64, G: tl.int64,
    SIZE: tl.constexpr, PARTS: tl.constexpr, QP: tl.constexpr, SHARE: tl.constexpr, E: tl.constexpr,
    C: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """grad_log_decay of a run, from its last token to its first (programs: runs * G).

    As in :func:`race_attention.backends.triton.causal.key_gradient_kernel`: <state, its gradient> at the end of the
    run, minus the sum of phi_k . grad phi_k from the token on, plus that of phi_q . grad phi_q, of the pairs of a key
    and a later query alone: ``of_key`` [PARTS, lines, G], ``of_query`` [B, H, T, QP]. The latter is 0 with its own key,
    so that a token's own weight times its gradient is what all others are worth; where they are hardly anything that is
    all rounding, and what two kernels round differently adds up.
    """
    run = first + tl.program_id(0) // G
    group = tl.program_id(0) % G
    batch, row, start, end, last, line = place(run, first, table, T, RUN, NC, PACKED)
    grad_decay += batch * T * G + group
    c = tl.arange(0, C)
    if last | (start >= end):
        crossing = tl.load(at_the_end + row * G + group)
    else:
        products = tl.zeros([E], tl.float32)
        for e in range(0, SIZE, E):
            here = e + tl.arange(0, E)
            a = tl.load(before + ((run + 1) * G + group) * SIZE + here, mask=here < SIZE, other=0.0)
            products += a * tl.load(after + (run * G + group) * SIZE + here, mask=here < SIZE, other=0.0)
        crossing = tl.sum(products, 0)
    blocks = (end - start + C - 1) // C
    for i in range(0, blocks):
        t = start + (blocks - 1 - i) * C
        at = of_key + (line + t - start + c) * G + group
        terms = tl.zeros([C], tl.float32)
        for part in range(PARTS):
            terms += tl.load(at + part * lines * G, mask=t + c < end, other=0.0)
        for share in range(SHARE):
            of_head = of_query + (((batch * G + group) * SHARE + share) * T + t + c) * QP
            for part in range(QP):
                terms -= tl.load(of_head + part, mask=t + c < end, other=0.0)
        tl.store(grad_decay + (t + c) * G, crossing - tl.cumsum(terms, 0, reverse=True), mask=t + c < end)
        crossing -= tl.sum(terms, 0)
