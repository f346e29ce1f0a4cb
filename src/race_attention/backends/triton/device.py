"""What every kernel shares: loading tiles, soft buckets and their gradients, decay inside a block.

Shape letters are those of :mod:`race_attention.backends.call`; besides them

    C   tokens of a block            DP, VP  D and Dv padded to a power of two
    SP  buckets of a tile            N       planes of a tile's tables, padded to a power of two

A tile is SP consecutive buckets of a head: whole tables, or part of one. Bucket ``s`` of tile ``i`` is bucket
``i * SP + s`` of the head; bit ``p`` of it is the sign of plane ``p``, and its upper bits are the table.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

from race_attention.features import FLOOR as _FLOOR

FLOOR = tl.constexpr(_FLOOR)
LOG2_E = tl.constexpr(1.4426950408889634)
#: The log decay of what belongs to another sequence: its exponential is 0, and stays so with more added.
FORGOTTEN = tl.constexpr(-1e30)
#: Whether one instruction of NVIDIA's may stand for a call of its mathematical library, which for a logarithm is
#: thirty: the approximations are good to 2**-22, and the packed conversion rounds as the plain one does.
PTX = tl.constexpr(torch.version.hip is None and os.environ.get("TRITON_INTERPRET") != "1")


@triton.jit
def run_bounds(run, table, T, RUN, NC, PACKED: tl.constexpr):
    """(batch, row, first token, end, last run of its row?) of a run of at most RUN tokens."""
    if PACKED:
        entry = table + run.to(tl.int64) * 4
        row = tl.load(entry)
        start = tl.load(entry + 1)
        end = tl.load(entry + 2)
        last = tl.load(entry + 3) != 0
        batch = row * 0
    else:
        batch = (run.to(tl.int32) // NC.to(tl.int32)).to(tl.int64)  # of 64 bits it takes a hundred instructions more
        row = batch
        chunk = run.to(tl.int64) - batch * NC
        start = chunk * RUN
        end = tl.minimum(start + RUN, T)
        last = chunk == NC - 1
    return batch, row, start, end, last


@triton.jit
def whole_rows(elements, ALIGNED: tl.constexpr):
    """``elements``, in a form that tells the compiler it is a multiple of 8, where the launch found that it is.

    Rows then begin at multiples of 16 bytes and loads are wide, whatever the length: strides are never
    specialised on, since a batch stride changes with the length.
    """
    return elements // 8 * 8 if ALIGNED else elements


@triton.jit
def load_rows(base, stride, start, inside, C: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ALIGNED: tl.constexpr):
    """[C, DP] elements of tokens start .. start + C - 1; zeros where not ``inside`` [C], and past D."""
    c = tl.arange(0, C)
    d = tl.arange(0, DP)
    step = whole_rows(stride.to(tl.int32), ALIGNED)
    pointer = (base + start * whole_rows(stride, ALIGNED)) + ((c * step)[:, None] + d[None, :])
    mask = inside[:, None]
    if DP != D:
        mask = mask & (d < D)[None, :]
    return tl.load(pointer, mask=mask, other=0.0)


@triton.jit
def store_rows(base, stride, start, inside, x, C: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Writes [C, DP] to the tokens from ``start`` on that are ``inside`` [C]. Rows are contiguous, D apart or more."""
    c = tl.arange(0, C)
    d = tl.arange(0, DP)
    pointer = (base + start * stride) + ((c * stride.to(tl.int32))[:, None] + d[None, :])
    mask = inside[:, None]
    if DP != D:
        mask = mask & (d < D)[None, :]
    tl.store(pointer, x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_state(base, tile, S: tl.constexpr, SP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr):
    """(value_sum [VP, SP], mass [SP]) of a tile; in memory a state is S * V value sums, then S masses, float32.

    Transposed: what is added to it, v^T phi, then has Dv rows, enough for a Hopper matrix instruction.
    """
    s = tile * SP + tl.arange(0, SP)
    v = tl.arange(0, VP)
    pointer = base + s[None, :] * V + v[:, None]
    value_sum = tl.load(pointer, mask=(s < S)[None, :] & (v < V)[:, None], other=0.0)
    return value_sum, tl.load(base + S * V + s, mask=s < S, other=0.0)


@triton.jit
def store_state(base, tile, value_sum, mass, S: tl.constexpr, SP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr):
    s = tile * SP + tl.arange(0, SP)
    v = tl.arange(0, VP)
    pointer = base + s[None, :] * V + v[:, None]
    tl.store(pointer, value_sum, mask=(s < S)[None, :] & (v < V)[:, None])
    tl.store(base + S * V + s, mass, mask=s < S)


@triton.jit
def store_planes(base, part, x, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Writes x [DP, N] as part number ``part`` of the sums for the hyperplanes' gradient, [parts, N, D] float32."""
    n = tl.arange(0, N)
    d = tl.arange(0, DP)
    tl.store(base + (part * N + n)[None, :] * D + d[:, None], x, mask=(d < D)[:, None] & (n >= 0)[None, :])


@triton.jit
def inverse_of(x):
    """1 / x of a positive x."""
    if PTX:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / x


@triton.jit
def anew(x):
    """An int32 x, as if it changed: what follows from it is computed where it stands, not kept through a loop."""
    if PTX:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], tl.int32, is_pure=False, pack=1)
    else:
        return x


@triton.jit
def ask_for(base, count, ASK: tl.constexpr):
    """Where ASK, brings ``count`` bytes from ``base`` on into the second cache, for a load that comes later.

    One instruction of one thread, which holds no register and waits for nothing, of Hopper and newer. Whole pieces of
    16 bytes that end inside.
    """
    if PTX and ASK:
        first = base.to(tl.int64) // 16 * 16
        size = ((base.to(tl.int64) + count) // 16 * 16 - first).to(tl.int32)
        i = tl.arange(0, 128)
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.lt.s32 p, $2, $3; @p cp.async.bulk.prefetch.L2.global [$1], $3; mov.b32 $0, 0; }",
            "=r,l,r,r",
            [i * 0 + first, i << 20, i * 0 + size],
            tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def log2_of(x):
    """log2 of a normal x."""
    if PTX:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.log2(x)


@triton.jit
def bfloat16_of(x):
    """A float32 x rounded to bfloat16, two at a time: alone each would take the slow unit's turn."""
    if PTX:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], tl.bfloat16, is_pure=True, pack=2
        )
    else:
        return x.to(tl.bfloat16)


@triton.jit
def float16_of(x):
    """A float32 x rounded to float16, two at a time."""
    if PTX:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], tl.float16, is_pure=True, pack=2
        )
    else:
        return x.to(tl.float16)


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """x as an operand of :func:`dot`. Never float16, whose exponent is too short for a soft bucket."""
    if PRECISION != "bf16":
        return x.to(tl.float32)
    elif x.dtype == tl.float32:
        return bfloat16_of(x)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    if PRECISION == "bf16":
        return tl.dot(a, b)
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def as_given_dot(a, b, PRECISION: tl.constexpr):
    """a by b, of one dtype and as they were given: as operands float16 would lose three bits."""
    if PRECISION == "bf16":
        return tl.dot(a, b)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)


@triton.jit
def add_dot(total, a, b, PRECISION: tl.constexpr):
    """total + a b, in the registers of the total."""
    if PRECISION == "bf16":
        return tl.dot(a, b, total)
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def add_fine_dot(total, a, b, FINE: tl.constexpr, PRECISION: tl.constexpr):
    """total + a b, the float32 a in one part of bfloat16, or in two where FINE."""
    high = operand(a, PRECISION)
    if PRECISION == "bf16":
        total = tl.dot(high, b, total)
        if FINE:
            total = tl.dot(bfloat16_of(a - high.to(tl.float32)), b, total)
        return total
    else:
        return tl.dot(high, b, total, input_precision=PRECISION)


@triton.jit
def add_by_tokens(total, rows, grad_y, PRECISION: tl.constexpr):
    """total [DP, N] and the tokens' rows [C, DP] by the gradients of their projections [C, N], float32.

    With all digits of both, in two parts of bfloat16: of rounded ones, terms that cancel to a third were 1e-2 off.
    Rows of which nothing is asked, as of masked keys, may hold NaN.
    """
    idle = tl.sum(tl.abs(grad_y), 1) == 0
    rows = tl.trans(tl.where(idle[:, None], 0.0, rows))
    high = operand(grad_y, PRECISION)
    total = add_fine_dot(total, rows, high, rows.dtype == tl.float16, PRECISION)
    if PRECISION == "bf16":
        total = add_dot(total, operand(rows, PRECISION), bfloat16_of(grad_y - high.to(tl.float32)), PRECISION)
    return total


@triton.jit
def reciprocal(x, LIFT: tl.constexpr = 0):
    """1 / x, and 0 where x is 0: a query that sees no key, or what decay has left of keys long past. NaN stays NaN.

    A key just seen has 2**-78 or more, lifted 2**-50. Of less than 2**-100 (2**-70) the inverse, in gradients that add
    up over heads and tokens, came to more than float32 holds.
    """
    LEAST: tl.constexpr = 8.470329472543003e-22 if LIFT else 7.888609052210118e-31
    nothing = x < LEAST
    return tl.where(nothing, 0.0, inverse_of(tl.where(nothing, 1.0, x)))


@triton.jit
def fine_dot(a, b, PRECISION: tl.constexpr):
    """a by the float32 b to float32's accuracy, for an ``a`` that is exact: the next step subtracts."""
    if PRECISION == "ieee":
        return tl.dot(a.to(tl.float32), b, input_precision="ieee")
    else:
        high = bfloat16_of(b)
        low = bfloat16_of(b - high.to(tl.float32))
        coarse = a.to(tl.bfloat16)
        result = tl.dot(coarse, low, tl.dot(coarse, high))
        if a.dtype != tl.bfloat16:  # float16 has three bits more
            result += tl.dot((a.to(tl.float32) - coarse.to(tl.float32)).to(tl.bfloat16), high)
        return result


@triton.jit
def load_planes(
    planes, head, tile, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr,
    SP: tl.constexpr,
):  # fmt: skip
    """[N, DP] float32 hyperplanes of a tile's tables, row ``table * P + plane``; zeros where there is none."""
    n = tl.arange(0, N)
    d = tl.arange(0, DP)
    row = ((tile * SP) >> P) * P + n
    pointer = planes + (head.to(tl.int64) * (L * P) + row)[:, None] * D + d[None, :]
    return tl.load(pointer, mask=(row < L * P)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def corner_signs(tile, P: tl.constexpr, N: tl.constexpr, SP: tl.constexpr, PRECISION: tl.constexpr):
    """Which planes are on the +1 side of which buckets, and which on the -1 side: 0 or 1, [N, SP] twice."""
    n = tl.arange(0, N)[:, None]
    s = tile * SP + tl.arange(0, SP)[None, :]
    own = n // P == (s >> P) - ((tile * SP) >> P)
    bit = (s >> (n % P)) & 1
    up = tl.where(own & (bit == 1), 1.0, 0.0)
    down = tl.where(own & (bit == 0), 1.0, 0.0)
    return operand(up, PRECISION), operand(down, PRECISION)


@triton.jit
def project(x, planes, PRECISION: tl.constexpr):
    """x [C, DP] by the hyperplanes [N, DP] in float32: their bfloat16 rounding alone would cost a percent."""
    return fine_dot(x, tl.trans(planes), PRECISION)


@triton.jit
def sum_of(x, choice, PRECISION: tl.constexpr):
    """x by a matrix of zeros and ones, x in two parts of bfloat16 where that is the dots' precision."""
    if PRECISION == "ieee":
        return tl.dot(x, choice, input_precision="ieee")
    else:
        high = bfloat16_of(x)
        return tl.dot(bfloat16_of(x - high.to(tl.float32)), choice, tl.dot(high, choice))


@triton.jit
def tanh_of(y, r):
    """tanh(y) in float32 to the last digits, from r = (1 - tanh(y)) / 2: near 0 that cancels, and a series serves."""
    z = y * y
    series = ((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1
    return tl.where(z < 0.390625, y + y * z * (series * z - 3.33332819422e-1), 1.0 - 2.0 * r)


@triton.jit
def sides(y, beta, PRECISION: tl.constexpr):
    """(r, 1 - r, e) of a projection y: tanh(y) = 1 - 2r, and the odds of the -1 side e = exp(-2 beta tanh(y)).

    The factor of a side is f+- = (1 - F) sigmoid(+-z) + F/2 with z = 2 beta tanh(y), so

        f+ = (1 - F/2 + (F/2) e) / (1 + e)        f- = ((1 - F/2) e + F/2) / (1 + e)

    without cancellation at either end; past odds of 2**40 both are constant. NaN stays NaN. 1 - 2r errs by 2**-24,
    which a beta of 1e4 makes 6e-4 of the odds: nothing to 16 bits, too much for float32.
    """
    grown = tl.exp2(tl.minimum(y * (2.0 * LOG2_E), 100.0, propagate_nan=tl.PropagateNan.ALL))
    r = inverse_of(1.0 + grown)
    falls = 2.0 * r - 1.0
    if PRECISION == "ieee":
        falls = -tanh_of(y, r)
    odds = tl.maximum(falls * (beta * (2.0 * LOG2_E)), -40.0, propagate_nan=tl.PropagateNan.ALL)
    odds = tl.exp2(tl.minimum(odds, 40.0, propagate_nan=tl.PropagateNan.ALL))
    return r, grown * r, odds


@triton.jit
def factor_logs(odds, LIFT: tl.constexpr, PRECISION: tl.constexpr):
    """LIFT and the logarithms of f+ and f-, see :func:`sides`, in powers of two.

    What both have in common is the logarithm of up to 2**40, which float32 holds to 2e-6, and the hardware's logarithm
    to 1e-5: enough for 16 bits. In float32 each is that of its own number below 1.
    """
    if PRECISION == "ieee":
        share = inverse_of(1.0 + odds)
        log_up = LIFT + log2_of(share * (1.0 - FLOOR) + 0.5 * FLOOR)
        log_down = LIFT + log2_of(odds * share * (1.0 - FLOOR) + 0.5 * FLOOR)
    else:
        base = LIFT - log2_of(1.0 + odds)
        log_up = log2_of(odds * (0.5 * FLOOR) + (1.0 - 0.5 * FLOOR)) + base
        log_down = log2_of(odds * (1.0 - 0.5 * FLOOR) + 0.5 * FLOOR) + base
    return log_up, log_down


@triton.jit
def buckets(
    y, beta, up, down, tile, S: tl.constexpr, SP: tl.constexpr, LIFT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """phi [C, SP] of a tile, times 2**(LIFT * P), float32; zero past the last bucket.

    A bucket is the exponential of a sum of its factors' logarithms, and the sum is a product with zeros and ones.
    The logarithms are at most 14 + LIFT in size: float16 has 11 bits for them, and phi in bfloat16 keeps 8.
    """
    r, rest, odds = sides(y, beta, PRECISION)
    log_up, log_down = factor_logs(odds, LIFT, PRECISION)
    if PRECISION == "ieee":
        logit = tl.dot(log_up, up, input_precision="ieee") + tl.dot(log_down, down, input_precision="ieee")
    else:
        logit = tl.dot(float16_of(log_up), up.to(tl.float16))
        logit = tl.dot(float16_of(log_down), down.to(tl.float16), logit)
    if S % SP != 0:
        # A sum and not a mask, whose predicates would be kept through the loop.
        s = tile * SP + tl.arange(0, SP)
        logit += (tl.minimum(S - 1 - s, 0) * 1024).to(tl.float32)[None, :]
    return tl.exp2(logit)


@triton.jit
def bucket_gradients(dphi_phi, y, beta, up, down, PRECISION: tl.constexpr):
    """From dphi * phi [C, SP]: the gradient of the projections, and of beta by token and plane, [C, N] twice.

    phi is a product, so d phi / dz is phi times the slope of one factor's logarithm, and only the sums of
    dphi * phi over the buckets of either side of a plane are needed.
    """
    return side_gradients(
        sum_of(dphi_phi, tl.trans(up), PRECISION), sum_of(dphi_phi, tl.trans(down), PRECISION), y, beta, PRECISION
    )


@triton.jit
def side_gradients(of_up, of_down, y, beta, PRECISION: tl.constexpr):
    """The same from the sums of dphi * phi over the buckets of either side of each plane, [C, N] twice."""
    r, rest, odds = sides(y, beta, PRECISION)
    bell = odds * inverse_of(1.0 + odds) * (1.0 - FLOOR)  # (1 - F) sigmoid(z) sigmoid(-z) (1 + e), the slope of f+
    rise = bell * inverse_of(odds * (0.5 * FLOOR) + (1.0 - 0.5 * FLOOR))
    fall = bell * inverse_of(odds * (1.0 - 0.5 * FLOOR) + 0.5 * FLOOR)
    dz = of_up * rise - of_down * fall
    dz_dy = (8.0 * beta) * (r * rest)  # 2 beta (1 - tanh(y)**2)
    sign = rest - r
    if PRECISION == "ieee":
        sign = tanh_of(y, r)
    return dz * dz_dy, dz * (2.0 * sign)


@triton.jit
def keys_inside(mask, stride, start, end, C: tl.constexpr, HAS_MASK: tl.constexpr):
    """[C] keys that lie before ``end`` and take part."""
    c = tl.arange(0, C)
    inside = start + c < end
    if HAS_MASK:
        inside = inside & (tl.load(mask + (start + c) * stride, mask=inside, other=0) != 0)
    return inside


@triton.jit
def load_decay(base, stride, start, end, C: tl.constexpr):
    """Running sums of log_decay over a block, [C] twice, and their totals: whole parts, and the rest.

    Differences of plain sums lose all digits once one token of the block has forgotten nearly everything; sums of
    whole numbers are exact, and what remains is at most half a token each.
    """
    c = tl.arange(0, C)
    x = tl.load(base + (start + c) * stride, mask=start + c < end, other=0.0).to(tl.float32)
    x = tl.maximum(x, -65536.0)  # e**-65536 is 0, and 128 such sums are still exact
    whole = tl.floor(x + 0.5)
    part = x - whole
    return tl.cumsum(whole, 0), tl.cumsum(part, 0), tl.sum(whole, 0), tl.sum(part, 0)
