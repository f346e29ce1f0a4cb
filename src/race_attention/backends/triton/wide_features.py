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
from .narrow import beside, corners_of


@triton.jit
def side_logs(y, beta, C: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
    """log2 of the factors of both sides of each plane from the projections y [C, N]: [C, 2N], as products take them.

    They are at most 14 in size. float16 has 11 bits for them, and phi in bfloat16 keeps 8; what lifts a bucket is
    added to their sum, since it would take bits from each.
    """
    r, rest, odds = sides(y, beta, PRECISION)
    share = inverse_of(1.0 + odds)
    log_up = log2_of(share * (1.0 - FLOOR) + 0.5 * FLOOR)
    log_down = log2_of(odds * share * (1.0 - FLOOR) + 0.5 * FLOOR)
    logs = beside(log_up, log_down, C, N)
    return logs if PRECISION == "ieee" else float16_of(logs)


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


# What is stored of a token, [FW]: for each table HW numbers, the 2**PL buckets of the lower half of its planes, those
# of the upper half, and zeros. Between an operand of all of them and one whose other half is zero a product sees one.


@triton.jit
def half_corners(
    first, W: tl.constexpr, P: tl.constexpr, PL: tl.constexpr, N: tl.constexpr, HW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """As :func:`~.narrow.corners_of`: of the halves of a group's tables from the first'th on, [2N, W]."""
    row = tl.arange(0, 2 * N)[:, None]
    column = tl.arange(0, W)[None, :]
    p = row % N - (first + column // HW) * P
    s = column % HW
    lower = s < (1 << PL)
    bit = tl.where(lower, s >> tl.maximum(p, 0), (s - (1 << PL)) >> tl.maximum(p - PL, 0)) & 1
    own = (p >= 0) & (p < P) & ((p < PL) == lower) & (s < (1 << PL) + (1 << (P - PL)))
    corners = tl.where(own & ((bit == 1) == (row < N)), 1.0, 0.0)
    return corners if PRECISION == "ieee" else corners.to(tl.float16)


@triton.jit
def half_buckets(
    logs, first, C: tl.constexpr, W: tl.constexpr, P: tl.constexpr, PL: tl.constexpr, N: tl.constexpr,
    HW: tl.constexpr, LIFT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The halves of W // HW tables of a group from the first'th on, [C, W] float32."""
    s = tl.arange(0, W) % HW
    past = tl.minimum((1 << PL) + (1 << (P - PL)) - 1 - s, 0) * 1024
    lift = (tl.where(s < (1 << PL), LIFT * PL, LIFT * (P - PL)) + past).to(tl.float32)
    corners = half_corners(first, W, P, PL, N, HW, PRECISION)
    return tl.exp2(sum_of_logs(logs, corners, lift, C, W, PRECISION))


@triton.jit
def halves_of(
    logs, here, C: tl.constexpr, L: tl.constexpr, P: tl.constexpr, PL: tl.constexpr, N: tl.constexpr, HW: tl.constexpr,
    LIFT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The lower and the upper half of each of L tables, zeros for the other: a tuple of 2 L [C, HW].

    Zeros where not ``here`` [C].
    """
    halves = ()
    lower = (tl.arange(0, HW) < (1 << PL))[None, :]
    for table in tl.static_range(L):
        both = half_buckets(logs, table, C, HW, P, PL, N, HW, LIFT, PRECISION)
        both = operand(tl.where(here[:, None], both, 0.0), PRECISION)
        halves = halves + (tl.where(lower, both, 0.0), tl.where(lower, 0.0, both))
    return halves


@triton.jit
def store_halves(
    base, stride, logs, table, inside, here, C: tl.constexpr, L: tl.constexpr, SB: tl.constexpr, P: tl.constexpr,
    PL: tl.constexpr, N: tl.constexpr, HW: tl.constexpr, LIFT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes the halves of the tables of SB buckets, from ``table`` on, to the tokens that are ``here`` [C].

    ``logs`` are the tables'. Zeros where not ``inside`` [C].
    """
    TABLES: tl.constexpr = SB >> P if SB > (1 << P) else 1
    W: tl.constexpr = TABLES * HW
    halves = half_buckets(logs, 0, C, W, P, PL, N, HW, LIFT, PRECISION)
    halves = operand(tl.where(inside[:, None], halves, 0.0), PRECISION)
    column = table * HW + tl.arange(0, W)
    mask = here[:, None]
    if L % TABLES != 0:
        mask = mask & (column < L * HW)[None, :]
    tl.store(base + ((tl.arange(0, C) * stride.to(tl.int32))[:, None] + column[None, :]), halves, mask=mask)


@triton.jit
def load_halves(base, stride, table, here, C: tl.constexpr, HW: tl.constexpr):
    """Both halves of a table of C tokens, [C, HW]; zeros where not ``here`` [C]."""
    at = (tl.arange(0, C) * stride.to(tl.int32))[:, None] + (table * HW + tl.arange(0, HW))[None, :]
    return tl.load(base + at, mask=here[:, None], other=0.0)


@triton.jit
def kernel_of(
    halves, base, stride, here, C: tl.constexpr, CK: tl.constexpr, L: tl.constexpr, HW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """L kappa [C, CK] of a program's own tokens, by their ``halves``, and of stored ones."""
    score = tl.zeros([C, CK], tl.float32)
    for table in tl.static_range(L):
        both = tl.trans(load_halves(base, stride, table, here, CK, HW))
        by_lower = dot(halves[2 * table], both, PRECISION)
        score += by_lower * dot(halves[2 * table + 1], both, PRECISION)
    return score
