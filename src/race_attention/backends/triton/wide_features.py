"""Soft buckets of wide heads, computed where they are used: a program asks for some of a token's at a time.

A bucket is the exponential of a sum of logarithms, of one side of each plane. The logarithms of a token are computed
once for a *group* of GB buckets, whole tables or one table, and lie side by side: [C, 2N], first those of the planes'
+1 sides. Any buckets of the group are then one product with zeros and ones and one exp2 each.

Between two tokens a table needs no buckets. Its planes fall into a lower and an upper *half*, a bucket is the product
of its sides' buckets, and so is the kernel:

    kappa = sum over tables of (sum over the lower half's buckets) * (sum over the upper half's)

Two products of at most 16 or 32 terms instead of one of 2**P, and that much less to store of a token. Shape letters
are those of :mod:`race_attention.backends.triton.device`; PL planes are in a lower half, PU in an upper.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import FLOOR, dot, float16_of, inverse_of, log2_of, operand, sides
from .narrow import beside


@triton.jit
def load_group(
    planes, head, table, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The hyperplanes from a table on, [2N, DP]: in two parts of bfloat16, or float32 and below them zeros."""
    d = tl.arange(0, DP)
    row = tl.arange(0, 2 * N)
    n = table * P + row % N
    pointer = planes + (head.to(tl.int64) * (L * P) + n)[:, None] * D + d[None, :]
    w = tl.load(pointer, mask=(n < L * P)[:, None] & (d < D)[None, :], other=0.0)
    if PRECISION == "ieee":
        return tl.where((row < N)[:, None], w, 0.0)
    else:
        high = w.to(tl.bfloat16)
        return tl.where((row < N)[:, None], high, (w - high.to(tl.float32)).to(tl.bfloat16))


@triton.jit
def side_logs(y, beta, C: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
    """log2 of the factors of both sides of each plane from the projections y [C, N]: [C, 2N], as products take them.

    They are at most 14 in size. float16 has 11 bits for them, and phi in bfloat16 keeps 8; what lifts a bucket is
    added to their sum, since it would take bits from each.
    """
    r, rest, odds = sides(y, beta)
    share = inverse_of(1.0 + odds)
    log_up = log2_of(share * (1.0 - FLOOR) + 0.5 * FLOOR)
    log_down = log2_of(odds * share * (1.0 - FLOOR) + 0.5 * FLOOR)
    logs = beside(log_up, log_down, C, N)
    return logs if PRECISION == "ieee" else float16_of(logs)


@triton.jit
def corners_of(at, table, W: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
    """Which of the logarithms of the planes from ``table`` on make the buckets at .. at + W - 1: 0 or 1, [2N, W]."""
    row = tl.arange(0, 2 * N)[:, None]
    s = at + tl.arange(0, W)[None, :]
    n = row % N
    chosen = (n // P == (s >> P) - table) & ((((s >> (n % P)) & 1) == 1) == (row < N))
    corners = tl.where(chosen, 1.0, 0.0)
    return corners if PRECISION == "ieee" else corners.to(tl.float16)


@triton.jit
def sum_of_logs(logs, corners, lift, C: tl.constexpr, W: tl.constexpr, PRECISION: tl.constexpr):
    """logs [C, 2N] by corners [2N, W], and ``lift`` [W]."""
    start = tl.broadcast_to(lift[None, :], [C, W])
    if PRECISION == "ieee":
        return tl.dot(logs, corners, start, input_precision="ieee")
    else:
        return tl.dot(logs, corners, start)


@triton.jit
def buckets_at(
    logs, at, table, C: tl.constexpr, W: tl.constexpr, S: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    LIFT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """phi [C, W] of the buckets from ``at`` on, times 2**(LIFT * P), float32; 0 past the last bucket."""
    lift = (LIFT * P + tl.minimum(S - 1 - (at + tl.arange(0, W)), 0) * 1024).to(tl.float32)
    corners = corners_of(at, table, W, P, N, PRECISION)
    return tl.exp2(sum_of_logs(logs, corners, lift, C, W, PRECISION))


@triton.jit
def half_corners(
    table, UPPER: tl.constexpr, W: tl.constexpr, P: tl.constexpr, PL: tl.constexpr, N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """As :func:`corners_of`, of the table'th table of a group: the buckets of one half of its planes alone, [2N, W]."""
    row = tl.arange(0, 2 * N)[:, None]
    s = tl.arange(0, W)[None, :]
    p = row % N - table * P
    if UPPER:
        chosen = (p >= PL) & (p < P) & ((((s >> tl.maximum(p - PL, 0)) & 1) == 1) == (row < N))
    else:
        chosen = (p >= 0) & (p < PL) & ((((s >> tl.maximum(p, 0)) & 1) == 1) == (row < N))
    corners = tl.where(chosen, 1.0, 0.0)
    return corners if PRECISION == "ieee" else corners.to(tl.float16)


@triton.jit
def half_buckets(
    logs, table, UPPER: tl.constexpr, C: tl.constexpr, W: tl.constexpr, P: tl.constexpr, PL: tl.constexpr,
    N: tl.constexpr, LIFT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The buckets of one half of the planes of a group's table'th table, [C, W] float32; 0 where there are fewer."""
    PH: tl.constexpr = P - PL if UPPER else PL
    lift = (LIFT * PH + tl.minimum((1 << PH) - 1 - tl.arange(0, W), 0) * 1024).to(tl.float32)
    corners = half_corners(table, UPPER, W, P, PL, N, PRECISION)
    return tl.exp2(sum_of_logs(logs, corners, lift, C, W, PRECISION))


@triton.jit
def halves_of(
    logs, here, C: tl.constexpr, L: tl.constexpr, P: tl.constexpr, PL: tl.constexpr, N: tl.constexpr, HW: tl.constexpr,
    LIFT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The buckets of both halves of the planes of L tables, a tuple of 2 L [C, HW]; zeros where not ``here`` [C]."""
    halves = ()
    for table in tl.static_range(L):
        lower = half_buckets(logs, table, False, C, HW, P, PL, N, LIFT, PRECISION)
        upper = half_buckets(logs, table, True, C, HW, P, PL, N, LIFT, PRECISION)
        lower = operand(tl.where(here[:, None], lower, 0.0), PRECISION)
        halves = halves + (lower, operand(tl.where(here[:, None], upper, 0.0), PRECISION))
    return halves


# What is stored of a token, [FW]: for each table the lower half's 2**PL buckets and the upper's 2**(P - PL).


@triton.jit
def _store_half(base, stride, half, here, C: tl.constexpr, HW: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.arange(0, HW)
    mask = here[:, None]
    if HW != WIDTH:
        mask = mask & (column < WIDTH)[None, :]
    tl.store(base + ((tl.arange(0, C) * stride.to(tl.int32))[:, None] + column[None, :]), half, mask=mask)


@triton.jit
def store_halves(
    base, stride, logs, table, inside, here, C: tl.constexpr, L: tl.constexpr, SB: tl.constexpr, P: tl.constexpr,
    PL: tl.constexpr, N: tl.constexpr, HW: tl.constexpr, FW: tl.constexpr, LIFT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes the halves of the tables of SB buckets, from ``table`` on, to the tokens that are ``here`` [C].

    ``logs`` are the tables'. Zeros where not ``inside`` [C].
    """
    for i in tl.static_range(((SB - 1) >> P) + 1):
        here_too = here & (tl.zeros([C], tl.int32) + (table + i) < L)
        at = base + (table + i) * (FW // L)
        lower = half_buckets(logs, i, False, C, HW, P, PL, N, LIFT, PRECISION)
        lower = operand(tl.where(inside[:, None], lower, 0.0), PRECISION)
        _store_half(at, stride, lower, here_too, C, HW, 1 << PL)
        upper = half_buckets(logs, i, True, C, HW, P, PL, N, LIFT, PRECISION)
        upper = operand(tl.where(inside[:, None], upper, 0.0), PRECISION)
        _store_half(at + (1 << PL), stride, upper, here_too, C, HW, 1 << (P - PL))


@triton.jit
def load_half(
    base, stride, table, UPPER: tl.constexpr, here, C: tl.constexpr, L: tl.constexpr, P: tl.constexpr,
    PL: tl.constexpr, HW: tl.constexpr, FW: tl.constexpr,
):  # fmt: skip
    """One half of a table of C tokens, [C, HW]; zeros where not ``here`` [C], and past its buckets."""
    PH: tl.constexpr = P - PL if UPPER else PL
    column = tl.arange(0, HW)
    at = table * (FW // L) + UPPER * (1 << PL)
    mask = here[:, None]
    if HW != 1 << PH:
        mask = mask & (column < (1 << PH))[None, :]
    pointer = base + ((tl.arange(0, C) * stride.to(tl.int32))[:, None] + (at + column)[None, :])
    return tl.load(pointer, mask=mask, other=0.0)


@triton.jit
def kernel_of(
    halves, base, stride, here, C: tl.constexpr, CK: tl.constexpr, L: tl.constexpr, P: tl.constexpr,
    PL: tl.constexpr, HW: tl.constexpr, FW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """L kappa [C, CK] of a program's own tokens, by their ``halves``, and of stored ones."""
    score = tl.zeros([C, CK], tl.float32)
    for table in tl.static_range(L):
        lower = load_half(base, stride, table, False, here, CK, L, P, PL, HW, FW)
        upper = load_half(base, stride, table, True, here, CK, L, P, PL, HW, FW)
        by_lower = dot(halves[2 * table], tl.trans(lower), PRECISION)
        score += by_lower * dot(halves[2 * table + 1], tl.trans(upper), PRECISION)
    return score
