"""Kernels where every query sees every key of its row, for heads whose buckets fill several tiles.

A program goes through the tiles one by one; sums over tokens then need runs of one block. Shape letters are those of
:mod:`race_attention.backends.triton.device`; NS is the number of tiles.
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

NEVER_SPECIALIZED = ["T", "RUN", "NC", "G"]


@triton.jit(do_not_specialize=[*NEVER_SPECIALIZED, "qb", "qt", "qh"])
def readout_kernel(
    query, planes, beta, table, states, out,
    qb: tl.int64, qt: tl.int64, qh: tl.int64,
    T: tl.int64, RUN: tl.int64, NC: tl.int64, G: tl.int64,
    SHARE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    DP: tl.constexpr, VP: tl.constexpr, N: tl.constexpr, SP: tl.constexpr, NS: tl.constexpr,
    C: tl.constexpr, LIFT: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """out of a run of queries (programs: runs * H) from the state [rows, G] of all keys of the row."""
    S: tl.constexpr = L << P
    H = G * SHARE
    run = tl.program_id(0) // H
    head = tl.program_id(0) - run * H
    group = head // SHARE
    batch, row, start, end, last = run_bounds(run, table, T, RUN, NC, PACKED)
    query += whole_rows(batch * qb + head * qh, ALIGNED)
    out += (batch * T * H + head) * V
    state = states + (row * G + group) * (S * (V + 1))
    b = tl.load(beta + group)
    c = tl.arange(0, C)
    for t in range(start, end, C):
        q = load_rows(query, qt, t, t + c < end, C, D, DP, ALIGNED)
        numerator = tl.zeros([C, VP], tl.float32)
        denominator = tl.zeros([C], tl.float32)
        for tile in range(NS):
            w = load_planes(planes, group, tile, L, P, D, DP, N, SP)
            up, down = corner_signs(tile, P, N, SP, PRECISION)
            value_sum, mass = load_state(state, tile, S, SP, V, VP)
            phi = buckets(project(q, w, PRECISION), b, up, down, tile, S, SP, LIFT, PRECISION)
            phi = operand(phi, PRECISION)
            numerator += dot(phi, tl.trans(operand(value_sum, PRECISION)), PRECISION)
            denominator += tl.sum(phi.to(tl.float32) * mass[None, :], 1)
        inverse = reciprocal(denominator)
        store_rows(out, H * V, t, t + c < end, numerator * inverse[:, None], C, V, VP)


@triton.jit(do_not_specialize=[*NEVER_SPECIALIZED, "qb", "qt", "qh", "ob", "ot", "oh"])
def query_gradient_kernel(
    query, grad_out, planes, beta, table, states, grad_query, adjoints, planes_parts, beta_parts,
    qb: tl.int64, qt: tl.int64, qh: tl.int64, ob: tl.int64, ot: tl.int64, oh: tl.int64,
    T: tl.int64, RUN: tl.int64, NC: tl.int64, G: tl.int64,
    SHARE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    DP: tl.constexpr, VP: tl.constexpr, N: tl.constexpr, SP: tl.constexpr, NS: tl.constexpr,
    C: tl.constexpr, LIFT: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr, PACKED: tl.constexpr,
    NEED_PLANES: tl.constexpr,
):  # fmt: skip
    """grad_query of a run, and its part of the gradient of the state (programs: runs * H)."""
    S: tl.constexpr = L << P
    H = G * SHARE
    run = tl.program_id(0) // H
    head = tl.program_id(0) - run * H
    group = head // SHARE
    batch, row, start, end, last = run_bounds(run, table, T, RUN, NC, PACKED)
    query += whole_rows(batch * qb + head * qh, ALIGNED)
    grad_out += whole_rows(batch * ob + head * oh, ALIGNED)
    grad_query += (batch * T * H + head) * D
    state = states + (row * G + group) * (S * (V + 1))
    program = run.to(tl.int64) * H + head
    adjoint = adjoints + program * (S * (V + 1))
    b = tl.load(beta + group)
    c = tl.arange(0, C)
    beta_sum = tl.zeros([C, N], tl.float32)
    for t in range(start, end, C):
        q = load_rows(query, qt, t, t + c < end, C, D, DP, ALIGNED)
        do = load_rows(grad_out, ot, t, t + c < end, C, V, VP, ALIGNED)
        denominator = tl.zeros([C], tl.float32)
        delta = tl.zeros([C], tl.float32)
        for tile in range(NS):
            w = load_planes(planes, group, tile, L, P, D, DP, N, SP)
            up, down = corner_signs(tile, P, N, SP, PRECISION)
            value_sum, mass = load_state(state, tile, S, SP, V, VP)
            phi = buckets(project(q, w, PRECISION), b, up, down, tile, S, SP, LIFT, PRECISION)
            denominator += tl.sum(phi * mass[None, :], 1)  # by the weights that are multiplied below
            delta += tl.sum(phi * fine_dot(do, value_sum, PRECISION), 1)
        inverse = reciprocal(denominator)
        delta *= inverse  # grad_out . out
        dq = tl.zeros([C, DP], tl.float32)
        for tile in range(NS):
            w = load_planes(planes, group, tile, L, P, D, DP, N, SP)
            up, down = corner_signs(tile, P, N, SP, PRECISION)
            value_sum, mass = load_state(state, tile, S, SP, V, VP)
            y = project(q, w, PRECISION)
            phi = buckets(y, b, up, down, tile, S, SP, LIFT, PRECISION)
            grad_phi = fine_dot(do, value_sum, PRECISION) - delta[:, None] * mass[None, :]
            grad_phi *= inverse[:, None]
            grad_y, grad_beta = bucket_gradients(grad_phi * phi, y, b, up, down, PRECISION)
            beta_sum += grad_beta
            grad_y = operand(grad_y, PRECISION)
            dq += dot(grad_y, operand(w, PRECISION), PRECISION)
            seen = operand(phi * inverse[:, None], PRECISION)
            grad_sum = dot(tl.trans(operand(do, PRECISION)), seen, PRECISION)
            grad_mass = -tl.sum(seen.to(tl.float32) * delta[:, None], 0)
            store_state(adjoint, tile, grad_sum, grad_mass, S, SP, V, VP)
            if NEED_PLANES:
                planes_sum = dot(tl.trans(operand(q, PRECISION)), grad_y, PRECISION)
                store_planes(planes_parts, program * NS + tile, planes_sum, N, D, DP)
        store_rows(grad_query, H * D, t, t + c < end, dq, C, D, DP)
    tl.store(beta_parts + program, tl.sum(tl.sum(beta_sum, 1), 0))


@triton.jit(
    do_not_specialize=["T", "RUN", "NC", "G", "kb", "kt", "kh", "vb", "vt", "vh", "mb", "mt", "mh"]
)  # fmt: skip
def key_gradient_kernel(
    key, value, key_mask, planes, beta, table, adjoints, grad_key, grad_value, planes_parts, beta_parts,
    kb: tl.int64, kt: tl.int64, kh: tl.int64, vb: tl.int64, vt: tl.int64, vh: tl.int64,
    mb: tl.int64, mt: tl.int64, mh: tl.int64,
    T: tl.int64, RUN: tl.int64, NC: tl.int64, G: tl.int64,
    L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    DP: tl.constexpr, VP: tl.constexpr, N: tl.constexpr, SP: tl.constexpr, NS: tl.constexpr,
    C: tl.constexpr, LIFT: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr, PACKED: tl.constexpr,
    HAS_MASK: tl.constexpr, NEED_PLANES: tl.constexpr,
):  # fmt: skip
    """grad_key and grad_value of a run from the gradient of the row's state (programs: runs * G)."""
    S: tl.constexpr = L << P
    run = tl.program_id(0) // G
    group = tl.program_id(0) - run * G
    batch, row, start, end, last = run_bounds(run, table, T, RUN, NC, PACKED)
    key += whole_rows(batch * kb + group * kh, ALIGNED)
    value += whole_rows(batch * vb + group * vh, ALIGNED)
    key_mask += batch * mb + group * mh
    grad_key += (batch * T * G + group) * D
    grad_value += (batch * T * G + group) * V
    adjoint = adjoints + (row * G + group) * (S * (V + 1))
    program = run.to(tl.int64) * G + group
    b = tl.load(beta + group)
    c = tl.arange(0, C)
    beta_sum = tl.zeros([C, N], tl.float32)
    for t in range(start, end, C):
        inside = keys_inside(key_mask, mt, t, end, C, HAS_MASK)
        k = load_rows(key, kt, t, inside, C, D, DP, ALIGNED)
        v = load_rows(value, vt, t, inside, C, V, VP, ALIGNED)
        dk = tl.zeros([C, DP], tl.float32)
        dv = tl.zeros([C, VP], tl.float32)
        for tile in range(NS):
            w = load_planes(planes, group, tile, L, P, D, DP, N, SP)
            up, down = corner_signs(tile, P, N, SP, PRECISION)
            grad_sum, grad_mass = load_state(adjoint, tile, S, SP, V, VP)
            y = project(k, w, PRECISION)
            phi = tl.where(inside[:, None], buckets(y, b, up, down, tile, S, SP, LIFT, PRECISION), 0.0)
            grad_phi = fine_dot(v, grad_sum, PRECISION) + grad_mass[None, :]
            dv += dot(operand(phi, PRECISION), tl.trans(operand(grad_sum, PRECISION)), PRECISION)
            grad_y, grad_beta = bucket_gradients(grad_phi * phi, y, b, up, down, PRECISION)
            beta_sum += grad_beta
            grad_y = operand(grad_y, PRECISION)
            dk += dot(grad_y, operand(w, PRECISION), PRECISION)
            if NEED_PLANES:
                planes_sum = dot(tl.trans(operand(k, PRECISION)), grad_y, PRECISION)
                store_planes(planes_parts, program * NS + tile, planes_sum, N, D, DP)
        store_rows(grad_key, G * D, t, t + c < end, dk, C, D, DP)
        store_rows(grad_value, G * V, t, t + c < end, dv, C, V, VP)
    tl.store(beta_parts + program, tl.sum(tl.sum(beta_sum, 1), 0))
