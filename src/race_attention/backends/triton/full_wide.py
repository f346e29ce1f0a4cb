"""Kernels where every query sees every key of its row, for heads whose buckets fill several tiles.

The keys' state is what :func:`race_attention.backends.triton.wide.accumulate_kernel` leaves of their runs, added up,
and its gradient the same of queries. What reads either takes its buckets in tiles, one after the other, so that blocks
of tokens are all that a program owns. Shape letters are those of wide.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import add_dot, fine_dot, keys_inside, load_rows, operand, reciprocal, store_rows, whole_rows
from .narrow import corners_of, hashed, load_hash, unhashed
from .wide import block_of, kernel, load_columns, load_queries, store_out
from .wide_features import buckets_at, side_logs
from .wide_halves import add_sums, projection_gradients, store_grad_y


@triton.jit
def load_tile(state, at, v, SB: tl.constexpr, S: tl.constexpr, V: tl.constexpr):
    """(value_sum [SB, VB], mass [SB]) of the buckets from ``at`` on and the columns ``v``; zeros past either."""
    s = at + tl.arange(0, SB)
    value_sum = tl.load(state + s[:, None] * V + v[None, :], mask=(s < S)[:, None] & (v < V)[None, :], other=0.0)
    return value_sum, tl.load(state + S * V + s, mask=s < S, other=0.0)


@kernel
def readout_kernel(
    query, planes, beta, table, states, out, residual, inverses,
    qb: tl.int64, qt: tl.int64, qh: tl.int64,
    T: tl.int64, RUN: tl.int64, NC: tl.int64, G: tl.int64, BLOCKS: tl.int64,
    SHARE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr,
    LIFT: tl.constexpr, V: tl.constexpr, VB: tl.constexpr, S: tl.constexpr, GB: tl.constexpr, SB: tl.constexpr,
    C: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr, PACKED: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """out of a block of queries (programs: runs * blocks * H * column tiles) from the state [rows, G] of all keys.

    ``out`` and ``residual`` are contiguous [B, T, H, V]; ``inverses`` [B, H, T] are 1 / denominators.
    """
    NV: tl.constexpr = (V + VB - 1) // VB
    H = G * SHARE
    column = tl.program_id(0) % NV * VB
    head, run, batch, row, start, end, line, t = block_of(
        tl.program_id(0) // NV, H, 0, table, T, RUN, NC, BLOCKS, C, PACKED
    )
    group = head // SHARE
    if t >= end:
        return
    query += whole_rows(batch * qb + head * qh, ALIGNED)
    state = states + (row * G + group) * (S * (V + 1))
    b = tl.load(beta + group)
    c = tl.arange(0, C)
    v = column + tl.arange(0, VB)
    queries = t + c < end
    rows_q = load_rows(query, qt, t, queries, C, D, DP, ALIGNED)
    numerator = tl.zeros([C, VB], tl.float32)
    denominator = tl.zeros([C], tl.float32)
    for first in range(0, S, GB):
        w = load_hash(planes, group, first >> P, L, P, D, DP, N, PRECISION)
        logs = side_logs(hashed(rows_q, w, C, N, PRECISION), b, C, N, PRECISION)
        for at in tl.range(first, first + GB, SB, num_stages=1):
            phi = operand(buckets_at(logs, at, first >> P, C, SB, S, P, N, LIFT, PRECISION), PRECISION)
            value_sum, mass = load_tile(state, at, v, SB, S, V)
            numerator = add_dot(numerator, phi, operand(value_sum, PRECISION), PRECISION)
            denominator += tl.sum(phi.to(tl.float32) * mass[None, :], 1)
    inverse = reciprocal(denominator)
    at = ((batch * T + t) * H + head) * V
    store_out(out, residual, at, H * V, queries, numerator * inverse[:, None], v, C, V, RESIDUAL)
    if column == 0:
        tl.store(inverses + (batch * H + head) * T + t + c, inverse, mask=queries)


@kernel
def query_gradient_kernel(
    query, grad_out, out, residual, planes, beta, deltas, inverses, table, states, grad_query, grad_y, beta_parts,
    qb: tl.int64, qt: tl.int64, qh: tl.int64, ob: tl.int64, ot: tl.int64, oh: tl.int64,
    T: tl.int64, RUN: tl.int64, NC: tl.int64, G: tl.int64, BLOCKS: tl.int64,
    SHARE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr,
    LIFT: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, S: tl.constexpr, GB: tl.constexpr, SB: tl.constexpr,
    C: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr, PACKED: tl.constexpr, NEED_PLANES: tl.constexpr,
    RESIDUAL: tl.constexpr,
):  # fmt: skip
    """grad_query of a block of queries, and ``deltas``, grad_out . out [B, H, T] (programs: runs * blocks * H).

    The rest as :func:`race_attention.backends.triton.wide_halves.query_gradient_kernel`, ``grad_y`` for each group of
    planes.
    """
    GROUPS: tl.constexpr = (S + GB - 1) // GB
    H = G * SHARE
    head, run, batch, row, start, end, line, t = block_of(tl.program_id(0), H, 0, table, T, RUN, NC, BLOCKS, C, PACKED)
    group = head // SHARE
    if t >= end:
        return
    query += whole_rows(batch * qb + head * qh, ALIGNED)
    grad_out += whole_rows(batch * ob + head * oh, ALIGNED)
    grad_y += ((line + t - start) * H + head) * (GROUPS * N)
    state = states + (row * G + group) * (S * (V + 1))
    b = tl.load(beta + group)
    c = tl.arange(0, C)
    v = tl.arange(0, VP)
    queries = t + c < end
    do, delta, inverse, query_at = load_queries(
        grad_out, out, residual, inverses, ot, H, batch, head, t, T, queries, C, V, VP, ALIGNED, RESIDUAL, False,
        PRECISION,
    )  # fmt: skip
    tl.store(deltas + query_at, delta, mask=queries)
    rows_q = load_rows(query, qt, t, queries, C, D, DP, ALIGNED)
    dq = tl.zeros([C, DP], tl.float32)
    beta_sum = tl.zeros([C, N], tl.float32)
    for first in range(0, S, GB):
        w = load_hash(planes, group, first >> P, L, P, D, DP, N, PRECISION)
        y = hashed(rows_q, w, C, N, PRECISION)
        logs = side_logs(y, b, C, N, PRECISION)
        of_logs = tl.zeros([C, 2 * N], tl.float32)
        for at in tl.range(first, first + GB, SB, num_stages=1):
            phi = buckets_at(logs, at, first >> P, C, SB, S, P, N, LIFT, PRECISION)
            value_sum, mass = load_tile(state, at, v, SB, S, V)
            d_phi = fine_dot(do, tl.trans(value_sum), PRECISION) - delta[:, None] * mass[None, :]
            choice = tl.trans(corners_of(at, first >> P, SB, P, N, PRECISION))
            of_logs = add_sums(of_logs, d_phi * inverse[:, None] * phi, choice, PRECISION)
        of_y, of_beta = projection_gradients(of_logs, y, b, C, N, PRECISION)
        dq += unhashed(of_y, w, C, N, PRECISION)
        beta_sum += of_beta
        if NEED_PLANES:
            store_grad_y(grad_y + first // GB * N, H * (GROUPS * N), queries, of_y, C, N)
    store_rows(grad_query + (batch * T * H + head) * D, H * D, t, queries, dq, C, D, DP)
    program = (tl.program_id(0) // H).to(tl.int64) * H + head
    tl.store(beta_parts + program, tl.sum(tl.sum(beta_sum, 1), 0))


@kernel
def key_gradient_kernel(
    key, value, key_mask, planes, beta, table, adjoints, grad_key, grad_value, grad_y, beta_parts,
    kb: tl.int64, kt: tl.int64, kh: tl.int64, vb: tl.int64, vt: tl.int64, vh: tl.int64,
    mb: tl.int64, mt: tl.int64, mh: tl.int64,
    T: tl.int64, RUN: tl.int64, NC: tl.int64, G: tl.int64, BLOCKS: tl.int64,
    L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr,
    LIFT: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, S: tl.constexpr, GB: tl.constexpr, SB: tl.constexpr,
    C: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr,
    NEED_PLANES: tl.constexpr,
):  # fmt: skip
    """grad_key and grad_value of a block of keys from the gradient of the row's state (programs: runs * blocks * G)."""
    GROUPS: tl.constexpr = (S + GB - 1) // GB
    group, run, batch, row, start, end, line, t = block_of(tl.program_id(0), G, 0, table, T, RUN, NC, BLOCKS, C, PACKED)
    if t >= end:
        return
    key += whole_rows(batch * kb + group * kh, ALIGNED)
    value += whole_rows(batch * vb + group * vh, ALIGNED)
    key_mask += batch * mb + group * mh
    grad_y += ((line + t - start) * G + group) * (GROUPS * N)
    adjoint = adjoints + (row * G + group) * (S * (V + 1))
    b = tl.load(beta + group)
    c = tl.arange(0, C)
    v = tl.arange(0, VP)
    keys = t + c < end
    inside = keys_inside(key_mask, mt, t, end, C, HAS_MASK)
    rows_k = load_rows(key, kt, t, inside, C, D, DP, ALIGNED)
    rows = load_columns(value, vt, t, inside, 0, V, C, VP, ALIGNED)
    dk = tl.zeros([C, DP], tl.float32)
    dv = tl.zeros([C, VP], tl.float32)
    beta_sum = tl.zeros([C, N], tl.float32)
    for first in range(0, S, GB):
        w = load_hash(planes, group, first >> P, L, P, D, DP, N, PRECISION)
        y = hashed(rows_k, w, C, N, PRECISION)
        logs = side_logs(y, b, C, N, PRECISION)
        of_logs = tl.zeros([C, 2 * N], tl.float32)
        for at in tl.range(first, first + GB, SB, num_stages=1):
            phi = buckets_at(logs, at, first >> P, C, SB, S, P, N, LIFT, PRECISION)
            phi = tl.where(inside[:, None], phi, 0.0)
            grad_sum, grad_mass = load_tile(adjoint, at, v, SB, S, V)
            d_phi = fine_dot(rows, tl.trans(grad_sum), PRECISION) + grad_mass[None, :]
            choice = tl.trans(corners_of(at, first >> P, SB, P, N, PRECISION))
            of_logs = add_sums(of_logs, d_phi * phi, choice, PRECISION)
            dv = add_dot(dv, operand(phi, PRECISION), operand(grad_sum, PRECISION), PRECISION)
        of_y, of_beta = projection_gradients(of_logs, y, b, C, N, PRECISION)
        dk += unhashed(of_y, w, C, N, PRECISION)
        beta_sum += of_beta
        if NEED_PLANES:
            store_grad_y(grad_y + first // GB * N, G * (GROUPS * N), keys, of_y, C, N)
    store_rows(grad_key + (batch * T * G + group) * D, G * D, t, keys, dk, C, D, DP)
    store_rows(grad_value + (batch * T * G + group) * V, G * V, t, keys, dv, C, V, VP)
    program = (tl.program_id(0) // G).to(tl.int64) * G + group
    tl.store(beta_parts + program, tl.sum(tl.sum(beta_sum, 1), 0))
