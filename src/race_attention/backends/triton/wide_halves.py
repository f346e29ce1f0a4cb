"""Gradients of the causal kernels of wide heads whose tokens are compared by halves, see wide_features.py.

With w_ij the decay between key j and query i, den_i the denominator of a query and delta_i = grad_out_i . out_i, the
kernel of the two has the gradient

    c_ij = (grad_out_i . v_j - delta_i) w_ij / den_i

and kappa_ij = sum over tables of lower_ij upper_ij, each an inner product of the halves' buckets. So the lower half of
a query gets sum_j (c_ij upper_ij) lower(k_j), and the upper half, and a key, likewise. What lies before the sub-run,
or for a key after it, comes by all buckets from a state. Either is summed up into gradients of the logarithms of the
sides of planes, [C, 2N], and no gradient of a bucket is stored. Tensors are those of wide.py.

Values and grad_out are rounded to the products' dtype wherever they appear, in delta too, as the forward pass rounds
values: what one query's c_ij sum up to by their weights is zero only then, and float16 gradients were off by 2e-2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import (
    add_by_tokens,
    add_dot,
    bfloat16_of,
    dot,
    fine_dot,
    keys_inside,
    load_rows,
    operand,
    side_gradients,
    store_rows,
    whole_rows,
)
from .narrow import corners_of, hashed, load_hash, unhashed
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
from .wide_features import buckets_at, half_corners, halves_of, load_halves, side_logs

# ------------------------------------------------------------------------------------------------ parts


@triton.jit
def add_sums(total, x, choice, PRECISION: tl.constexpr):
    """total + x by a matrix of zeros and ones, x in two parts of bfloat16 where that is the dots' precision."""
    if PRECISION == "ieee":
        return tl.dot(x, choice, total, input_precision="ieee")
    else:
        choice = choice.to(tl.bfloat16)
        high = bfloat16_of(x)
        return tl.dot(bfloat16_of(x - high.to(tl.float32)), choice, tl.dot(high, choice, total))


@triton.jit
def zeros_of(L: tl.constexpr, C: tl.constexpr, HW: tl.constexpr):
    """A tuple of 2 L [C, HW]."""
    zeros = ()
    for _ in tl.static_range(2 * L):
        zeros = zeros + (tl.zeros([C, HW], tl.float32),)
    return zeros


@triton.jit
def compared(
    halves, grads, along, base, stride, here, C: tl.constexpr, CK: tl.constexpr, L: tl.constexpr, HW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(L kappa [C, CK] of own and stored tokens, ``grads`` and what ``along``, the kernel's gradient, adds to them)."""
    score = tl.zeros([C, CK], tl.float32)
    new = ()
    for table in tl.static_range(L):
        both = load_halves(base, stride, table, here, CK, HW)
        by_lower = dot(halves[2 * table], tl.trans(both), PRECISION)
        by_upper = dot(halves[2 * table + 1], tl.trans(both), PRECISION)
        score += by_lower * by_upper
        of_lower = add_dot(grads[2 * table], operand(along * by_upper, PRECISION), both, PRECISION)
        of_upper = add_dot(grads[2 * table + 1], operand(along * by_lower, PRECISION), both, PRECISION)
        new = new + (of_lower, of_upper)
    return score, new


@triton.jit
def add_halves(
    of_logs, halves, grads, L: tl.constexpr, P: tl.constexpr, PL: tl.constexpr, N: tl.constexpr, HW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to the gradients of logarithms what those of the halves' buckets give."""
    for table in tl.static_range(L):
        both = grads[2 * table] * halves[2 * table].to(tl.float32)
        both += grads[2 * table + 1] * halves[2 * table + 1].to(tl.float32)
        choice = tl.trans(half_corners(table, HW, P, PL, N, HW, PRECISION))
        of_logs = add_sums(of_logs, both, choice, PRECISION)
    return of_logs


@triton.jit
def projection_gradients(of_logs, y, b, C: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
    """From the gradients of logarithms those of the projections, and of beta by token and plane, [C, N] twice."""
    of_up, of_down = tl.split(tl.permute(tl.reshape(of_logs, [C, 2, N]), (0, 2, 1)))
    return side_gradients(of_up, of_down, y, b, PRECISION)


@triton.jit
def store_grad_y(base, stride, here, of_y, C: tl.constexpr, N: tl.constexpr):
    at = base + (tl.arange(0, C) * stride.to(tl.int32))[:, None] + tl.arange(0, N)[None, :]
    tl.store(at, of_y, mask=here[:, None])


# -------------------------------------------------------------------------------------------- gradients


@kernel
def query_gradient_kernel(
    query, features_k, value, grad_out, out, residual, key_mask, planes, beta, deltas, inverses, ages, boundaries,
    table, before, local, local_mass, grad_query, grad_y, beta_parts, of_query,
    qb: tl.int64, qt: tl.int64, qh: tl.int64,
    vb: tl.int64, vt: tl.int64, vh: tl.int64, ob: tl.int64, ot: tl.int64, oh: tl.int64,
    mb: tl.int64, mt: tl.int64, mh: tl.int64, first: tl.int64, lines: tl.int64,
    T: tl.int64, RUN: tl.int64, SUB: tl.int64, NC: tl.int64, G: tl.int64, BLOCKS: tl.int64,
    SHARE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr,
    LIFT: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, S: tl.constexpr, GB: tl.constexpr, SB: tl.constexpr,
    PL: tl.constexpr, HW: tl.constexpr, FW: tl.constexpr,
    C: tl.constexpr, CK: tl.constexpr, CA: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DECAY: tl.constexpr, RESIDUAL: tl.constexpr,
    NEED_PLANES: tl.constexpr,
):  # fmt: skip
    """grad_query of a block of queries, contiguous [B, T, H, D] (programs: runs * blocks * H).

    It leaves ``deltas``, grad_out . out, [B, H, T], and with NEED_PLANES the gradients of projections too, ``grad_y``
    [lines, H, N]. ``beta_parts`` [runs * blocks, H] are of beta. With decay ``of_query`` [B, H, T] is the sum, over the
    keys before a query, of the weight times its gradient.
    """
    H = G * SHARE
    head, run, batch, row, start, end, line, t = block_of(
        tl.program_id(0), H, first, table, T, RUN, NC, BLOCKS, C, PACKED
    )
    group = head // SHARE
    if t >= end:
        return
    query += whole_rows(batch * qb + head * qh, ALIGNED)
    value += whole_rows(batch * vb + group * vh, ALIGNED)
    grad_out += whole_rows(batch * ob + head * oh, ALIGNED)
    key_mask += batch * mb + group * mh
    features_k += (line * G + group) * FW
    b = tl.load(beta + group)
    c = tl.arange(0, C)
    v = tl.arange(0, VP)
    queries = t + c < end
    sub, slot = before_sub_run(t, start, line, run, first, SUB, G, group)
    state = before + (run * G + group) * (S * (V + 1))
    local += slot * (S * V)
    local_mass += slot * S
    do, delta, inverse, query_at = load_queries(
        grad_out, out, residual, inverses, ot, H, batch, head, t, T, queries, C, V, VP, ALIGNED, RESIDUAL, True,
        PRECISION,
    )  # fmt: skip
    tl.store(deltas + query_at, delta, mask=queries)
    scale = inverse
    kept = kept_before(boundaries, slot, sub > start, HAS_DECAY)
    if HAS_DECAY:
        q_whole, q_part = load_ages(ages, lines, G, group, line + t - start, queries, C, PRECISION)
        scale *= kept_since(q_whole, q_part, PRECISION)
        kept_here, since = kept_of_block(
            ages, lines, G, group, line, start, t, end, SUB, q_whole, q_part, C, CA, PRECISION
        )
        kept_here *= inverse
        terms = tl.zeros([C], tl.float32)

    w = load_hash(planes, group, 0, L, P, D, DP, N, PRECISION)
    y = hashed(load_rows(query, qt, t, queries, C, D, DP, ALIGNED), w, C, N, PRECISION)
    logs = side_logs(y, b, C, N, PRECISION)
    of_logs = tl.zeros([C, 2 * N], tl.float32)
    for at in tl.range(0, GB, SB, num_stages=1):
        phi = buckets_at(logs, at, 0, C, SB, S, P, N, LIFT, PRECISION)
        s = at + tl.arange(0, SB)
        value_sum, mass = load_between(state, local, local_mass, kept, sub > start, s, v, S, V)
        d_phi = fine_dot(do, tl.trans(value_sum), PRECISION) - delta[:, None] * mass[None, :]
        if HAS_DECAY:
            terms += tl.sum(d_phi * operand(phi * kept_here[:, None], PRECISION).to(tl.float32), 1)
        d_phi *= scale[:, None] * phi
        choice = tl.trans(corners_of(at, 0, SB, P, N, PRECISION))
        of_logs = add_sums(of_logs, d_phi, choice, PRECISION)

    if HAS_DECAY:
        terms *= since
    halves = halves_of(logs, queries, C, L, P, PL, N, HW, LIFT, PRECISION)
    grads = zeros_of(L, C, HW)
    for u in range(sub, tl.minimum(t + C, end), CK):
        j = u + tl.arange(0, CK)
        inside = keys_inside(key_mask, mt, u, end, CK, HAS_MASK)
        rows = operand(load_columns(value, vt, u, inside, 0, V, CK, VP, ALIGNED), PRECISION)
        along = dot(do, tl.trans(rows), PRECISION)
        along = (along - delta[:, None]) * inverse[:, None]
        past = ((t + c)[:, None] >= j[None, :]) & queries[:, None]  # past the end a decay would grow
        if HAS_DECAY:
            whole, part = load_ages(ages, lines, G, group, line + u - start, j < end, CK, PRECISION)
            along *= weights(past, q_whole[:, None], q_part[:, None], whole[None, :], part[None, :], PRECISION)
        along = tl.where(past, along, 0.0)
        of_k = features_k + (u - start) * (G * FW)
        score, grads = compared(halves, grads, along, of_k, G * FW, j < end, C, CK, L, HW, PRECISION)
        if HAS_DECAY:  # but for its own key, see decay_gradient_kernel
            terms += tl.sum(tl.where((t + c)[:, None] > j[None, :], along * score, 0.0), 1)
    if HAS_DECAY:
        tl.store(of_query + query_at, terms, mask=queries)
    of_logs = add_halves(of_logs, halves, grads, L, P, PL, N, HW, PRECISION)
    program = (tl.program_id(0) // H).to(tl.int64) * H + head
    of_y, of_beta = projection_gradients(of_logs, y, b, C, N, PRECISION)
    store_rows(grad_query + (batch * T * H + head) * D, H * D, t, queries, unhashed(of_y, w, C, N, PRECISION), C, D, DP)
    if NEED_PLANES:
        store_grad_y(grad_y + ((line + t - start) * H + head) * N, H * N, queries, of_y, C, N)
    tl.store(beta_parts + program, tl.sum(tl.sum(of_beta, 1), 0))


@kernel
def key_gradient_kernel(
    key, features_q, value, grad_out, key_mask, planes, beta, deltas, inverses, ages, boundaries, totals, table,
    after, local, local_mass, grad_key, grad_value, grad_y, beta_parts, of_key,
    kb: tl.int64, kt: tl.int64, kh: tl.int64,
    vb: tl.int64, vt: tl.int64, vh: tl.int64, ob: tl.int64, ot: tl.int64, oh: tl.int64,
    mb: tl.int64, mt: tl.int64, mh: tl.int64, first: tl.int64, lines: tl.int64,
    T: tl.int64, RUN: tl.int64, SUB: tl.int64, NC: tl.int64, G: tl.int64, BLOCKS: tl.int64,
    SHARE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr,
    LIFT: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, S: tl.constexpr, GB: tl.constexpr, SB: tl.constexpr,
    PL: tl.constexpr, HW: tl.constexpr, FW: tl.constexpr,
    C: tl.constexpr, CK: tl.constexpr, CA: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DECAY: tl.constexpr, NEED_PLANES: tl.constexpr,
):  # fmt: skip
    """grad_key and grad_value of a block of keys, contiguous (programs: runs * blocks * G).

    ``after`` is the gradient of the state after each run, ``local`` what the queries of the later sub-runs add to it.
    With decay also ``of_key`` [lines, G], the same as ``of_query`` over the queries after a key. The rest as
    :func:`query_gradient_kernel`.
    """
    H = G * SHARE
    group, run, batch, row, start, end, line, t = block_of(
        tl.program_id(0), G, first, table, T, RUN, NC, BLOCKS, C, PACKED
    )
    if t >= end:
        return
    key += whole_rows(batch * kb + group * kh, ALIGNED)
    value += whole_rows(batch * vb + group * vh, ALIGNED)
    key_mask += batch * mb + group * mh
    b = tl.load(beta + group)
    c = tl.arange(0, C)
    v = tl.arange(0, VP)
    keys = t + c < end
    sub_end, slot, has_local = after_sub_run(t, start, end, line, run, first, SUB, G, group)
    state = after + (run * G + group) * (S * (V + 1))
    local += slot * (S * V)
    local_mass += slot * S
    inside = keys_inside(key_mask, mt, t, end, C, HAS_MASK)
    kept = kept_after(boundaries, totals + run * G + group, slot, has_local, HAS_DECAY)
    left = tl.full([C], 1.0, tl.float32)
    if HAS_DECAY:
        k_whole, k_part = load_ages(ages, lines, G, group, line + t - start, keys, C, PRECISION)
        end_whole, end_part = load_age(ages, lines, G, group, line + sub_end - 1 - start, True, PRECISION)
        left = kept_between(end_whole, end_part, k_whole, k_part, True, PRECISION)
        kept_here, last_whole, last_part = kept_in_block(
            ages, lines, G, group, line, start, t, end, k_whole, k_part, C, CA, PRECISION
        )

    w = load_hash(planes, group, 0, L, P, D, DP, N, PRECISION)
    y = hashed(load_rows(key, kt, t, inside, C, D, DP, ALIGNED), w, C, N, PRECISION)
    logs = side_logs(y, b, C, N, PRECISION)
    rows = operand(load_columns(value, vt, t, inside, 0, V, C, VP, ALIGNED), PRECISION)
    of_logs = tl.zeros([C, 2 * N], tl.float32)
    dv = tl.zeros([C, VP], tl.float32)
    terms = tl.zeros([C], tl.float32)
    for at in tl.range(0, GB, SB, num_stages=1):
        phi = tl.where(inside[:, None], buckets_at(logs, at, 0, C, SB, S, P, N, LIFT, PRECISION), 0.0)
        s = at + tl.arange(0, SB)
        grad_sum, grad_mass = load_between(state, local, local_mass, kept, has_local, s, v, S, V)
        d_phi = fine_dot(rows, tl.trans(grad_sum), PRECISION) + grad_mass[None, :]
        if HAS_DECAY:
            terms += tl.sum(d_phi * operand(phi * kept_here[:, None], PRECISION).to(tl.float32), 1)
        phi *= left[:, None]
        choice = tl.trans(corners_of(at, 0, SB, P, N, PRECISION))
        d_phi *= phi
        of_logs = add_sums(of_logs, d_phi, choice, PRECISION)
        dv = add_dot(dv, operand(phi, PRECISION), operand(grad_sum, PRECISION), PRECISION)

    if HAS_DECAY:
        terms *= kept_between(end_whole, end_part, last_whole, last_part, keys, PRECISION)
    halves = halves_of(logs, inside, C, L, P, PL, N, HW, LIFT, PRECISION)
    grads = zeros_of(L, C, HW)
    for n in range(0, (sub_end - t + CK - 1) // CK * SHARE):
        u = t + n // SHARE * CK
        head = group * SHARE + n % SHARE
        i = u + tl.arange(0, CK)
        queries = i < sub_end
        do = operand(load_columns(grad_out + whole_rows(batch * ob + head * oh, ALIGNED), ot, u, queries, 0,
                                  V, CK, VP, ALIGNED), PRECISION)  # fmt: skip
        query_at = (batch * H + head) * T + i
        delta = tl.load(deltas + query_at, mask=queries, other=0.0)
        inverse = tl.load(inverses + query_at, mask=queries, other=0.0)
        past = ((t + c)[:, None] <= i[None, :]) & queries[None, :]  # past the end a decay would grow
        weight = tl.where(past, inverse[None, :], 0.0)
        if HAS_DECAY:
            whole, part = load_ages(ages, lines, G, group, line + u - start, queries, CK, PRECISION)
            weight *= weights(past, whole[None, :], part[None, :], k_whole[:, None], k_part[:, None], PRECISION)
        along = (dot(rows, tl.trans(do), PRECISION) - delta[None, :]) * weight
        of_q = features_q + ((line + u - start) * H + head) * FW
        score, grads = compared(halves, grads, along, of_q, H * FW, queries, C, CK, L, HW, PRECISION)
        dv = add_dot(dv, operand(score * weight, PRECISION), do, PRECISION)
        if HAS_DECAY:
            terms += tl.sum(tl.where((t + c)[:, None] < i[None, :], along * score, 0.0), 1)

    to = grad_value + ((batch * T + t) * G + group) * V
    mask = keys[:, None] & (v < V)[None, :]
    tl.store(to + ((c * (G * V).to(tl.int32))[:, None] + v[None, :]), dv.to(grad_value.dtype.element_ty), mask=mask)
    if HAS_DECAY:
        tl.store(of_key + (line + t - start + c) * G + group, terms, mask=keys)
    of_logs = add_halves(of_logs, halves, grads, L, P, PL, N, HW, PRECISION)
    program = (tl.program_id(0) // G).to(tl.int64) * G + group
    of_y, of_beta = projection_gradients(of_logs, y, b, C, N, PRECISION)
    store_rows(grad_key + (batch * T * G + group) * D, G * D, t, keys, unhashed(of_y, w, C, N, PRECISION), C, D, DP)
    if NEED_PLANES:
        store_grad_y(grad_y + ((line + t - start) * G + group) * N, G * N, keys, of_y, C, N)
    tl.store(beta_parts + program, tl.sum(tl.sum(of_beta, 1), 0))


@kernel
def planes_kernel(
    x, grad_y, table, planes_parts, xb: tl.int64, xt: tl.int64, xh: tl.int64,
    first: tl.int64, T: tl.int64, RUN: tl.int64, NC: tl.int64, G: tl.int64,
    SHARE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr,
    GROUPS: tl.constexpr, GB: tl.constexpr, ROWS: tl.constexpr, SP: tl.constexpr, NS: tl.constexpr,
    C: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """A run's part of the gradient of the hyperplanes, from that of projections (programs: runs * H, groups of planes).

    ``grad_y`` is [lines, H, GROUPS * N]. A part is [NS, ROWS, D], one place for each tile of SP buckets: that of the
    table's first tile where it has several, whose others are zero.
    """
    H = G * SHARE
    run = first + tl.program_id(0) // H
    head = tl.program_id(0) % H
    batch, row, start, end, last, line = place(run, first, table, T, RUN, NC, PACKED)
    x += whole_rows(batch * xb + head * xh, ALIGNED)
    c = tl.arange(0, C)
    n = tl.arange(0, N)
    d = tl.arange(0, DP)
    total = tl.zeros([DP, N], tl.float32)
    for t in range(start, end, C):
        here = t + c < end
        rows = load_rows(x, xt, t, here, C, D, DP, ALIGNED)
        at = ((line + t - start + c) * H + head) * (GROUPS * N) + tl.program_id(1) * N
        of_y = tl.load(grad_y + at[:, None] + n[None, :], mask=here[:, None], other=0.0)
        total = add_by_tokens(total, rows, of_y, PRECISION)
    own = tl.program_id(1) * (GB >> P) + n // P
    of_group: tl.constexpr = GB >> P if GB > (1 << P) else 1  # tables
    tables: tl.constexpr = SP >> P if SP > (1 << P) else 1
    tiles: tl.constexpr = (1 << P) // SP if (1 << P) > SP else 1
    place_of = own // tables * tiles * ROWS + own % tables * P + n % P
    part = (run * H + head) * (NS * ROWS) + place_of
    mask = (d < D)[:, None] & ((n // P < of_group) & (own < L))[None, :]
    tl.store(planes_parts + part[None, :] * D + d[:, None], total, mask=mask)
