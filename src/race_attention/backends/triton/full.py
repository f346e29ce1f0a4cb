"""Kernels where every query sees every key of its row, for heads whose buckets fit one tile.

One state of a row is read by all of its queries. Programs own runs of tokens and keep what they need of the state in
registers. Shape letters are those of :mod:`race_attention.backends.triton.device`.

The gradients subtract: (grad_out . value_sum - delta mass) is small where values differ little from their mean. The
value sums are therefore centred first, about the mean value, and the gradient of the value sums is multiplied with
all its digits, in two parts of bfloat16: all keys see the same rounding of it, which their sum, the gradient of beta,
does not average away. By emulation of the case where 11 queries see 15 keys, whose terms cancel to a quarter: 1.2e-2
off with one part (as on a GPU), 7e-3 with two, 2e-3 with what else goes into the queries' gradients in two as well,
which at 64 buckets takes a fifth more time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import (
    add_by_tokens,
    bfloat16_of,
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


@triton.jit
def _masses_as_columns(mass, SP: tl.constexpr):
    """mass [SP] in two parts of bfloat16, [SP, 16]: a product with it sums buckets weighted by mass."""
    n = tl.arange(0, 16)[None, :]
    high = bfloat16_of(mass)
    low = bfloat16_of(mass - high.to(tl.float32))
    return tl.where(n == 0, high[:, None], tl.where(n == 1, low[:, None], 0.0)).to(tl.bfloat16)


@triton.jit
def _exact_dot(x, b, rounded, PRECISION: tl.constexpr):
    """x, with all of its digits, by b, whose bfloat16 rounding is enough for a bfloat16 x."""
    if PRECISION == "bf16" and x.dtype == tl.bfloat16:
        return tl.dot(x, rounded)
    else:
        return fine_dot(x, b, PRECISION)


@triton.jit
def _weights(phi, FINE: tl.constexpr, PRECISION: tl.constexpr):
    """phi as a product weighs with it, float32: rounded as an operand, or with all its digits if FINE."""
    return phi if FINE else operand(phi, PRECISION).to(tl.float32)


@triton.jit
def _transposed_dot(x, b, FINE: tl.constexpr, PRECISION: tl.constexpr):
    """x^T by b [C, SP]. FINE: with all of their digits, b in two parts, and x where float16 has three bits more."""
    coarse, high = operand(x, PRECISION), operand(b, PRECISION)
    result = dot(tl.trans(coarse), high, PRECISION)
    if FINE:
        if x.dtype == tl.float16:
            result = tl.dot(tl.trans((x.to(tl.float32) - coarse.to(tl.float32)).to(tl.bfloat16)), high, result)
        result = tl.dot(tl.trans(coarse), bfloat16_of(b - high.to(tl.float32)), result)
    return result


@triton.jit
def mean_value(value_sum, mass):
    """[VP], of all keys, weighted by mass."""
    return tl.sum(value_sum, 1) * reciprocal(tl.sum(mass, 0))


@triton.jit
def sums_of(
    key, value, key_mask, kt, vt, mt, start, end, b, w, up, down,
    D: tl.constexpr, V: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr, S: tl.constexpr, SP: tl.constexpr,
    LIFT: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """(value sums [VP, SP], masses [C, SP], once added up) of the keys from ``start`` to ``end``."""
    FINE: tl.constexpr = PRECISION == "bf16" and value.dtype.element_ty == tl.float16
    value_sum = tl.zeros([VP, SP], tl.float32)
    masses = tl.zeros([C, SP], tl.float32)
    for t in range(start, end, C):
        inside = keys_inside(key_mask, mt, t, end, C, HAS_MASK)
        k = load_rows(key, kt, t, inside, C, D, DP, ALIGNED)
        v = load_rows(value, vt, t, inside, C, V, VP, ALIGNED)
        phi = buckets(project(k, w, PRECISION), b, up, down, 0, S, SP, LIFT, PRECISION)
        phi = tl.where(inside[:, None], phi, 0.0)
        value_sum += _transposed_dot(v, phi, FINE, PRECISION)
        masses += _weights(phi, FINE, PRECISION)  # mass and value_sum stay consistent
    return value_sum, masses


@triton.jit(do_not_specialize=[*NEVER_SPECIALIZED, "kb", "kt", "kh", "vb", "vt", "vh", "mb", "mt", "mh"])
def accumulate_kernel(
    key, value, key_mask, planes, beta, table, states,
    kb: tl.int64, kt: tl.int64, kh: tl.int64, vb: tl.int64, vt: tl.int64, vh: tl.int64,
    mb: tl.int64, mt: tl.int64, mh: tl.int64,
    T: tl.int64, RUN: tl.int64, NC: tl.int64, G: tl.int64,
    L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    DP: tl.constexpr, VP: tl.constexpr, N: tl.constexpr, SP: tl.constexpr, LIFT: tl.constexpr,
    PRECISION: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """The state that each run of keys alone leaves (programs: runs * G)."""
    S: tl.constexpr = L << P
    run = tl.program_id(0) // G
    head = tl.program_id(0) - run * G
    batch, row, start, end, last = run_bounds(run, table, T, RUN, NC, PACKED)
    key += whole_rows(batch * kb + head * kh, ALIGNED)
    value += whole_rows(batch * vb + head * vh, ALIGNED)
    key_mask += batch * mb + head * mh
    b = tl.load(beta + head)
    w = load_planes(planes, head, 0, L, P, D, DP, N, SP)
    up, down = corner_signs(0, P, N, SP, PRECISION)
    value_sum, masses = sums_of(
        key, value, key_mask, kt, vt, mt, start, end, b, w, up, down, D, V, DP, VP, S, SP, LIFT, PRECISION, C, ALIGNED,
        HAS_MASK,
    )  # fmt: skip
    base = states + (run.to(tl.int64) * G + head) * (S * (V + 1))
    store_state(base, 0, value_sum, tl.sum(masses, 0), S, SP, V, VP)


@triton.jit
def read_out(
    query, out, qt, width, start, end, value_sum, mass, b, w, up, down,
    D: tl.constexpr, V: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr, S: tl.constexpr, SP: tl.constexpr,
    LIFT: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Writes out, of rows ``width`` apart, of the queries from ``start`` to ``end``."""
    c = tl.arange(0, C)
    sums = tl.trans(operand(value_sum, PRECISION))
    columns = _masses_as_columns(mass, SP)
    for t in range(start, end, C):
        q = load_rows(query, qt, t, t + c < end, C, D, DP, ALIGNED)
        phi = buckets(project(q, w, PRECISION), b, up, down, 0, S, SP, LIFT, PRECISION)
        phi = operand(phi, PRECISION)
        numerator = dot(phi, sums, PRECISION)
        if PRECISION == "bf16":
            denominator = tl.sum(tl.dot(phi, columns), 1)
        else:
            denominator = tl.sum(phi * mass[None, :], 1)
        store_rows(out, width, t, t + c < end, numerator * reciprocal(denominator)[:, None], C, V, VP)


@triton.jit(do_not_specialize=[*NEVER_SPECIALIZED, "qb", "qt", "qh"])
def readout_kernel(
    query, planes, beta, table, states, out,
    qb: tl.int64, qt: tl.int64, qh: tl.int64,
    T: tl.int64, RUN: tl.int64, NC: tl.int64, G: tl.int64,
    SHARE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    DP: tl.constexpr, VP: tl.constexpr, N: tl.constexpr, SP: tl.constexpr, LIFT: tl.constexpr,
    PRECISION: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr, PACKED: tl.constexpr,
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
    w = load_planes(planes, group, 0, L, P, D, DP, N, SP)
    up, down = corner_signs(0, P, N, SP, PRECISION)
    value_sum, mass = load_state(state, 0, S, SP, V, VP)
    read_out(
        query, out, qt, H * V, start, end, value_sum, mass, b, w, up, down, D, V, DP, VP, S, SP, LIFT, PRECISION, C,
        ALIGNED,
    )  # fmt: skip


@triton.jit
def query_gradients(
    query, grad_out, grad_query, qt, ot, width, start, end, centred, mass, b, w, up, down,
    grad_sum, grad_mass, beta_sum, planes_sum,
    D: tl.constexpr, V: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr, SP: tl.constexpr, S: tl.constexpr,
    LIFT: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr, NEED_PLANES: tl.constexpr,
):  # fmt: skip
    """The four sums with what the queries from ``start`` to ``end`` add; writes grad_query, of rows ``width`` apart."""
    FINE: tl.constexpr = PRECISION == "bf16" and grad_out.dtype.element_ty == tl.float16
    c = tl.arange(0, C)
    rounded_sums = operand(centred, PRECISION)
    for t in range(start, end, C):
        q = load_rows(query, qt, t, t + c < end, C, D, DP, ALIGNED)
        do = load_rows(grad_out, ot, t, t + c < end, C, V, VP, ALIGNED)
        y = project(q, w, PRECISION)
        phi = buckets(y, b, up, down, 0, S, SP, LIFT, PRECISION)
        # What is subtracted is the mean by these very weights, or the difference is not what is left of it.
        inverse = reciprocal(tl.sum(phi * mass[None, :], 1))
        grad_phi = _exact_dot(do, centred, rounded_sums, PRECISION)
        delta = tl.sum(phi * grad_phi, 1) * inverse  # grad_out . (out - mean)
        grad_phi = (grad_phi - delta[:, None] * mass[None, :]) * inverse[:, None]
        grad_y, grad_beta = bucket_gradients(grad_phi * phi, y, b, up, down, PRECISION)
        beta_sum += grad_beta
        dq = dot(operand(grad_y, PRECISION), operand(w, PRECISION), PRECISION)
        store_rows(grad_query, width, t, t + c < end, dq, C, D, DP)
        seen = phi * inverse[:, None]
        grad_sum += _transposed_dot(do, seen, FINE, PRECISION)
        grad_mass -= _weights(seen, FINE, PRECISION) * delta[:, None]
        if NEED_PLANES:
            planes_sum = add_by_tokens(planes_sum, q, grad_y, PRECISION)
    return grad_sum, grad_mass, beta_sum, planes_sum


@triton.jit(do_not_specialize=[*NEVER_SPECIALIZED, "qb", "qt", "qh", "ob", "ot", "oh"])
def query_gradient_kernel(
    query, grad_out, planes, beta, table, states, grad_query, adjoints, planes_parts, beta_parts,
    qb: tl.int64, qt: tl.int64, qh: tl.int64, ob: tl.int64, ot: tl.int64, oh: tl.int64,
    T: tl.int64, RUN: tl.int64, NC: tl.int64, G: tl.int64,
    SHARE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    DP: tl.constexpr, VP: tl.constexpr, N: tl.constexpr, SP: tl.constexpr, LIFT: tl.constexpr,
    PRECISION: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr, PACKED: tl.constexpr, NEED_PLANES: tl.constexpr,
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
    b = tl.load(beta + group)
    w = load_planes(planes, group, 0, L, P, D, DP, N, SP)
    up, down = corner_signs(0, P, N, SP, PRECISION)
    value_sum, mass = load_state(state, 0, S, SP, V, VP)
    mean = mean_value(value_sum, mass)
    centred = value_sum - mean[:, None] * mass[None, :]
    beta_sum = tl.zeros([C, N], tl.float32)
    grad_sum = tl.zeros([VP, SP], tl.float32)
    grad_mass = tl.zeros([C, SP], tl.float32)
    planes_sum = tl.zeros([DP, N], tl.float32)
    grad_sum, grad_mass, beta_sum, planes_sum = query_gradients(
        query, grad_out, grad_query, qt, ot, H * D, start, end, centred, mass, b, w, up, down,
        grad_sum, grad_mass, beta_sum, planes_sum, D, V, DP, VP, SP, S, LIFT, PRECISION, C, ALIGNED, NEED_PLANES,
    )  # fmt: skip
    tl.store(beta_parts + program, tl.sum(tl.sum(beta_sum, 1), 0))
    of_mass = tl.sum(grad_mass, 0) - tl.sum(grad_sum * mean[:, None], 0)
    store_state(adjoints + program * (S * (V + 1)), 0, grad_sum, of_mass, S, SP, V, VP)
    if NEED_PLANES:
        store_planes(planes_parts, program, planes_sum, N, D, DP)


@triton.jit
def key_gradients(
    key, value, key_mask, grad_key, grad_value, kt, vt, mt, G, start, end, grad_sum, grad_mass, b, w, up, down,
    beta_sum, planes_sum,
    D: tl.constexpr, V: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr, SP: tl.constexpr, S: tl.constexpr,
    LIFT: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr,
    HAS_MASK: tl.constexpr, NEED_PLANES: tl.constexpr,
):  # fmt: skip
    """The two sums with what the keys from ``start`` to ``end`` add; writes grad_key and grad_value of G heads."""
    c = tl.arange(0, C)
    rounded = operand(grad_sum, PRECISION)
    for t in range(start, end, C):
        inside = keys_inside(key_mask, mt, t, end, C, HAS_MASK)
        k = load_rows(key, kt, t, inside, C, D, DP, ALIGNED)
        v = load_rows(value, vt, t, inside, C, V, VP, ALIGNED)
        y = project(k, w, PRECISION)
        phi = tl.where(inside[:, None], buckets(y, b, up, down, 0, S, SP, LIFT, PRECISION), 0.0)
        dv = dot(operand(phi, PRECISION), tl.trans(rounded), PRECISION)
        store_rows(grad_value, G * V, t, t + c < end, dv, C, V, VP)
        grad_phi = fine_dot(v, grad_sum, PRECISION) + grad_mass[None, :]
        grad_y, grad_beta = bucket_gradients(grad_phi * phi, y, b, up, down, PRECISION)
        beta_sum += grad_beta
        dk = dot(operand(grad_y, PRECISION), operand(w, PRECISION), PRECISION)
        store_rows(grad_key, G * D, t, t + c < end, dk, C, D, DP)
        if NEED_PLANES:
            planes_sum = add_by_tokens(planes_sum, k, grad_y, PRECISION)
    return beta_sum, planes_sum


@triton.jit(do_not_specialize=[*NEVER_SPECIALIZED, "kb", "kt", "kh", "vb", "vt", "vh", "mb", "mt", "mh"])
def key_gradient_kernel(
    key, value, key_mask, planes, beta, table, adjoints, grad_key, grad_value, planes_parts, beta_parts,
    kb: tl.int64, kt: tl.int64, kh: tl.int64, vb: tl.int64, vt: tl.int64, vh: tl.int64,
    mb: tl.int64, mt: tl.int64, mh: tl.int64,
    T: tl.int64, RUN: tl.int64, NC: tl.int64, G: tl.int64,
    L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    DP: tl.constexpr, VP: tl.constexpr, N: tl.constexpr, SP: tl.constexpr, LIFT: tl.constexpr,
    PRECISION: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr, PACKED: tl.constexpr,
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
    offset = (row * G + group) * (S * (V + 1))
    program = run.to(tl.int64) * G + group
    b = tl.load(beta + group)
    w = load_planes(planes, group, 0, L, P, D, DP, N, SP)
    up, down = corner_signs(0, P, N, SP, PRECISION)
    grad_sum, grad_mass = load_state(adjoints + offset, 0, S, SP, V, VP)
    beta_sum = tl.zeros([C, N], tl.float32)
    planes_sum = tl.zeros([DP, N], tl.float32)
    beta_sum, planes_sum = key_gradients(
        key, value, key_mask, grad_key, grad_value, kt, vt, mt, G, start, end, grad_sum, grad_mass, b, w, up, down,
        beta_sum, planes_sum, D, V, DP, VP, SP, S, LIFT, PRECISION, C, ALIGNED, HAS_MASK, NEED_PLANES,
    )  # fmt: skip
    tl.store(beta_parts + program, tl.sum(tl.sum(beta_sum, 1), 0))
    if NEED_PLANES:
        store_planes(planes_parts, program, planes_sum, N, D, DP)
