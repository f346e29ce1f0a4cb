"""Short packed sequences where every query sees every key: forward and backward in one kernel each, without a state.

A program takes one sequence after another, adds up its keys and reads out its queries: the state of a sequence is as
much as some hundred tokens and never leaves the registers. Longer ones are the kernels' of
:mod:`race_attention.backends.triton.full`, whose parts these are made of.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import corner_signs, load_planes, store_planes, whole_rows
from .full import key_gradients, mean_value, query_gradients, read_out, sums_of

NEVER_SPECIALIZED = ["rows", "programs", "LIMIT", "G", "qt", "qh", "kt", "kh", "vt", "vh", "mt", "mh", "ot", "oh"]


@triton.jit(do_not_specialize=["rows", "LIMIT", "room"])
def long_rows_kernel(bounds, key_bounds, spans, key_spans, rows: tl.int64, LIMIT: tl.int64, room: tl.int64,
                     X: tl.constexpr):  # fmt: skip
    """spans and key_spans [room, 2]: (first token, end) of the rows of more than LIMIT queries or keys (one program).

    Behind them (0, 0).
    """
    x = tl.arange(0, X)
    for begin in range(0, room, X):
        entry = (begin + x) * 2
        inside = begin + x < room
        tl.store(spans + entry, x.to(tl.int64) * 0, mask=inside)
        tl.store(spans + entry + 1, x.to(tl.int64) * 0, mask=inside)
        tl.store(key_spans + entry, x.to(tl.int64) * 0, mask=inside)
        tl.store(key_spans + entry + 1, x.to(tl.int64) * 0, mask=inside)
    tl.debug_barrier()
    found = tl.zeros([], tl.int64)
    for begin in range(0, rows, X):
        row = begin + x
        inside = row < rows
        first = tl.load(bounds + row, mask=inside, other=0)
        end = tl.load(bounds + row + 1, mask=inside, other=0)
        key_first = tl.load(key_bounds + row, mask=inside, other=0)
        key_end = tl.load(key_bounds + row + 1, mask=inside, other=0)
        is_long = (tl.maximum(end - first, key_end - key_first) > LIMIT).to(tl.int64)
        entry = (found + tl.cumsum(is_long, 0) - 1) * 2
        tl.store(spans + entry, first, mask=is_long > 0)
        tl.store(spans + entry + 1, end, mask=is_long > 0)
        tl.store(key_spans + entry, key_first, mask=is_long > 0)
        tl.store(key_spans + entry + 1, key_end, mask=is_long > 0)
        found += tl.sum(is_long, 0)


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def forward_kernel(
    query, key, value, key_mask, planes, beta, bounds, key_bounds, out,
    qt: tl.int64, qh: tl.int64, kt: tl.int64, kh: tl.int64, vt: tl.int64, vh: tl.int64, mt: tl.int64, mh: tl.int64,
    rows: tl.int64, programs: tl.int64, LIMIT: tl.int64, G: tl.int64,
    SHARE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    DP: tl.constexpr, VP: tl.constexpr, N: tl.constexpr, SP: tl.constexpr, LIFT: tl.constexpr,
    PRECISION: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """out of the rows of at most LIMIT queries and keys (programs: programs * G, each every programs-th row)."""
    S: tl.constexpr = L << P
    H = G * SHARE
    group = tl.program_id(0) % G
    key += whole_rows(group * kh, ALIGNED)
    value += whole_rows(group * vh, ALIGNED)
    key_mask += group * mh
    b = tl.load(beta + group)
    w = load_planes(planes, group, 0, L, P, D, DP, N, SP)
    up, down = corner_signs(0, P, N, SP, PRECISION)
    for row in range(tl.program_id(0) // G, rows, programs):
        start = tl.load(bounds + row)
        end = tl.load(bounds + row + 1)
        key_start = tl.load(key_bounds + row)
        key_end = tl.load(key_bounds + row + 1)
        if (end > start) & (tl.maximum(end - start, key_end - key_start) <= LIMIT):
            value_sum, masses = sums_of(
                key, value, key_mask, kt, vt, mt, key_start, key_end, b, w, up, down, D, V, DP, VP, S, SP, LIFT,
                PRECISION, C, ALIGNED, HAS_MASK,
            )  # fmt: skip
            mass = tl.sum(masses, 0)
            for share in range(SHARE):
                head = group * SHARE + share
                read_out(
                    query + whole_rows(head * qh, ALIGNED), out + head * V, qt, H * V, start, end, value_sum, mass,
                    b, w, up, down, D, V, DP, VP, S, SP, LIFT, PRECISION, C, ALIGNED,
                )  # fmt: skip


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def backward_kernel(
    query, key, value, key_mask, grad_out, planes, beta, bounds, key_bounds, grad_query, grad_key, grad_value,
    planes_parts, beta_parts,
    qt: tl.int64, qh: tl.int64, kt: tl.int64, kh: tl.int64, vt: tl.int64, vh: tl.int64, mt: tl.int64, mh: tl.int64,
    ot: tl.int64, oh: tl.int64, rows: tl.int64, programs: tl.int64, LIMIT: tl.int64, G: tl.int64,
    SHARE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    DP: tl.constexpr, VP: tl.constexpr, N: tl.constexpr, SP: tl.constexpr, LIFT: tl.constexpr,
    PRECISION: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr, HAS_MASK: tl.constexpr,
    NEED_PLANES: tl.constexpr,
):  # fmt: skip
    """The gradients of those rows, and each program's part of the hyperplanes' and beta's, as forward_kernel."""
    S: tl.constexpr = L << P
    H = G * SHARE
    group = tl.program_id(0) % G
    key += whole_rows(group * kh, ALIGNED)
    value += whole_rows(group * vh, ALIGNED)
    key_mask += group * mh
    b = tl.load(beta + group)
    w = load_planes(planes, group, 0, L, P, D, DP, N, SP)
    up, down = corner_signs(0, P, N, SP, PRECISION)
    beta_sum = tl.zeros([C, N], tl.float32)
    planes_sum = tl.zeros([DP, N], tl.float32)
    for row in range(tl.program_id(0) // G, rows, programs):
        start = tl.load(bounds + row)
        end = tl.load(bounds + row + 1)
        key_start = tl.load(key_bounds + row)
        key_end = tl.load(key_bounds + row + 1)
        if tl.maximum(end - start, key_end - key_start) <= LIMIT:
            value_sum, masses = sums_of(
                key, value, key_mask, kt, vt, mt, key_start, key_end, b, w, up, down, D, V, DP, VP, S, SP, LIFT,
                PRECISION, C, ALIGNED, HAS_MASK,
            )  # fmt: skip
            mass = tl.sum(masses, 0)
            mean = mean_value(value_sum, mass)
            centred = value_sum - mean[:, None] * mass[None, :]
            grad_sum = tl.zeros([VP, SP], tl.float32)
            grad_masses = tl.zeros([C, SP], tl.float32)
            for share in range(SHARE):
                head = group * SHARE + share
                grad_sum, grad_masses, beta_sum, planes_sum = query_gradients(
                    query + whole_rows(head * qh, ALIGNED), grad_out + whole_rows(head * oh, ALIGNED),
                    grad_query + head * D, qt, ot, H * D, start, end, centred, mass, b, w, up, down,
                    grad_sum, grad_masses, beta_sum, planes_sum, D, V, DP, VP, SP, S, LIFT, PRECISION, C, ALIGNED,
                    NEED_PLANES,
                )  # fmt: skip
            grad_mass = tl.sum(grad_masses, 0) - tl.sum(grad_sum * mean[:, None], 0)
            beta_sum, planes_sum = key_gradients(
                key, value, key_mask, grad_key + group * D, grad_value + group * V, kt, vt, mt, G, key_start, key_end,
                grad_sum, grad_mass, b, w, up, down, beta_sum, planes_sum, D, V, DP, VP, SP, S, LIFT, PRECISION, C,
                ALIGNED, HAS_MASK, NEED_PLANES,
            )  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    tl.store(beta_parts + program, tl.sum(tl.sum(beta_sum, 1), 0))
    if NEED_PLANES:
        store_planes(planes_parts, program, planes_sum, N, D, DP)
