"""What every kernel shares: loading tiles, soft buckets and their gradients, decay inside a block.

Shape letters are those of :mod:`race_attention.backends.call`; besides them

    C   tokens of a block            DP, VP  D and Dv padded to a power of two
    LT  tables of a bucket tile      SP      buckets of a tile, LT * 2**PL
    P2  planes padded to 2, 4, 8, 16 PL      planes whose bit a tile resolves; a tile has one value of the others

A tile of buckets is ``LT`` whole tables, or, where one table has more than ``SP`` buckets, the part of a table
whose upper bits equal the tile's number. Bucket ``s`` of tile ``i`` is always bucket ``i * SP + s`` of the head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from race_attention.features import FLOOR as _FLOOR

FLOOR = tl.constexpr(_FLOOR)


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
        batch = run.to(tl.int64) // NC
        row = batch
        chunk = run.to(tl.int64) - batch * NC
        start = chunk * RUN
        end = tl.minimum(start + RUN, T)
        last = chunk == NC - 1
    return batch, row, start, end, last


@triton.jit
def load_rows(base, stride, start, inside, C: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ALIGNED: tl.constexpr):
    """[C, DP] elements of tokens start .. start + C - 1; zeros where not ``inside`` [C], and past D."""
    c = tl.arange(0, C)
    d = tl.arange(0, DP)
    if ALIGNED:  # rows begin at multiples of 16 bytes, whatever the length
        stride = tl.multiple_of(stride, 8)
        base = tl.multiple_of(base, 16)
    pointer = (base + start * stride) + (c.to(tl.int64) * stride)[:, None] + d[None, :]
    mask = inside[:, None]
    if DP != D:
        mask = mask & (d < D)[None, :]
    return tl.load(pointer, mask=mask, other=0.0)


@triton.jit
def store_rows(base, stride, start, inside, x, C: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Writes [C, DP] to the tokens from ``start`` on that are ``inside`` [C]. Rows are contiguous, D apart or more."""
    c = tl.arange(0, C)
    d = tl.arange(0, DP)
    pointer = (base + start * stride) + (c.to(tl.int64) * stride)[:, None] + d[None, :]
    mask = inside[:, None]
    if DP != D:
        mask = mask & (d < D)[None, :]
    tl.store(pointer, x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_state(base, tile, S: tl.constexpr, SP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr):
    """(value_sum [SP, VP], mass [SP]) of a tile; a state is S * V value sums, then S masses, float32."""
    s = tile * SP + tl.arange(0, SP)
    v = tl.arange(0, VP)
    pointer = base + s[:, None] * V + v[None, :]
    value_sum = tl.load(pointer, mask=(s < S)[:, None] & (v < V)[None, :], other=0.0)
    return value_sum, tl.load(base + S * V + s, mask=s < S, other=0.0)


@triton.jit
def store_state(base, tile, value_sum, mass, S: tl.constexpr, SP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr):
    s = tile * SP + tl.arange(0, SP)
    v = tl.arange(0, VP)
    pointer = base + s[:, None] * V + v[None, :]
    tl.store(pointer, value_sum, mask=(s < S)[:, None] & (v < V)[None, :])
    tl.store(base + S * V + s, mass, mask=s < S)


@triton.jit
def store_planes(base, part, x, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Writes [N, DP] as part number ``part`` of the sums for the hyperplanes' gradient, [parts, N, D] float32."""
    n = tl.arange(0, N)
    d = tl.arange(0, DP)
    tl.store(base + (part * N + n)[:, None] * D + d[None, :], x, mask=(d < D)[None, :] & (n >= 0)[:, None])


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """x as an operand of :func:`dot`. Never float16, whose exponent is too short for a soft bucket."""
    return x.to(tl.bfloat16) if PRECISION == "bf16" else x.to(tl.float32)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    if PRECISION == "bf16":
        return tl.dot(a, b)
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def fine_dot(a, b, PRECISION: tl.constexpr):
    """a by the float32 b to float32 accuracy for an ``a`` that is exact: what is subtracted next must not be rounded."""
    if PRECISION == "bf16":
        high = b.to(tl.bfloat16)
        low = (b - high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(a, high) + tl.dot(a, low)
    elif PRECISION == "ieee":
        return tl.dot(a, b, input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def load_planes(
    planes, head, tile, L, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, LT: tl.constexpr, P2: tl.constexpr,
    PL: tl.constexpr,
):  # fmt: skip
    """[LT * P2, DP] float32 hyperplanes of a tile, row ``table * P2 + plane``; zeros where there is none."""
    row = tl.arange(0, LT * P2)
    d = tl.arange(0, DP)
    table = (tile >> (P - PL)) * LT + row // P2
    plane = row % P2
    pointer = planes + ((head.to(tl.int64) * L + table) * P + plane)[:, None] * D + d[None, :]
    return tl.load(pointer, mask=((table < L) & (plane < P))[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def project(x, planes, PRECISION: tl.constexpr):
    """x [C, DP] by the hyperplanes [N, DP] in float32: their bfloat16 rounding alone would cost a percent."""
    w = tl.trans(planes)
    return fine_dot(x, w, PRECISION)


@triton.jit
def split_planes(y, C: tl.constexpr, LT: tl.constexpr, P2: tl.constexpr):
    """y [C, LT * P2] -> P2 of [C, LT]."""
    if P2 == 2:
        a, b = tl.split(tl.reshape(y, [C, LT, 2]))
        return a, b
    else:
        even, odd = tl.split(tl.reshape(y, [C, LT, P2 // 2, 2]))
        if P2 == 4:
            a, c = tl.split(even)
            b, d = tl.split(odd)
            return a, b, c, d
        elif P2 == 8:
            a, c, e, g = split_planes(tl.reshape(even, [C, LT * 4]), C, LT, 4)
            b, d, f, h = split_planes(tl.reshape(odd, [C, LT * 4]), C, LT, 4)
            return a, b, c, d, e, f, g, h
        else:
            a, c, e, g, i, k, m, o = split_planes(tl.reshape(even, [C, LT * 8]), C, LT, 8)
            b, d, f, h, j, l, n, p = split_planes(tl.reshape(odd, [C, LT * 8]), C, LT, 8)
            return a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p


@triton.jit
def two_sides(y, beta):
    """The factors of sign +1 and -1, (1 - F) sigmoid(+-z) + F/2 with z = 2 beta tanh(y): no cancellation."""
    decay = tl.exp(-2.0 * tl.abs(y))
    size = 2.0 * beta * (1.0 - decay) / (1.0 + decay)  # |z|
    small = tl.exp(-size)
    large = (1.0 - FLOOR) / (1.0 + small)
    small = small * large + 0.5 * FLOOR
    large = large + 0.5 * FLOOR
    return tl.where(y >= 0, large, small), tl.where(y >= 0, small, large)


@triton.jit
def buckets(
    ys, beta, tile, L, C: tl.constexpr, P: tl.constexpr, LT: tl.constexpr, PL: tl.constexpr, LIFT: tl.constexpr,
):  # fmt: skip
    """phi [C, SP] of a tile, times LIFT**P, float32; zero past the last table.

    Built by products, P at most 10 a bucket, all shared as in a tree: about two multiplications a bucket.
    """
    phi = tl.full([C, LT, 1], 1.0, tl.float32)
    for i in tl.static_range(PL):
        p: tl.constexpr = PL - 1 - i
        up, down = two_sides(ys[p], beta)
        both = tl.join(phi * (down * LIFT)[:, :, None], phi * (up * LIFT)[:, :, None])
        phi = tl.reshape(both, [C, LT, 2 << i])
    if PL < P:
        for p in tl.static_range(PL, P):
            up, down = two_sides(ys[p], beta)
            side = tl.where(((tile >> (p - PL)) & 1) == 1, up, down) * LIFT
            phi = phi * side[:, :, None]
    table = (tile >> (P - PL)) * LT + tl.arange(0, LT)
    phi = tl.where((table < L)[None, :, None], phi, 0.0)
    return tl.reshape(phi, [C, LT << PL])


@triton.jit
def slopes(y, beta):
    """d log f+ / dz, -d log f- / dz, dz/dy and dz/dbeta for the factors f+- of :func:`two_sides`."""
    decay = tl.exp(-2.0 * tl.abs(y))
    soft = (1.0 - decay) / (1.0 + decay)
    small = tl.exp(-2.0 * beta * soft)
    large = 1.0 / (1.0 + small)
    bell = (1.0 - FLOOR) * small * large * large  # (1 - F) sigmoid(z) sigmoid(-z)
    at_large = bell / ((1.0 - FLOOR) * large + 0.5 * FLOOR)
    at_small = bell / ((1.0 - FLOOR) * small * large + 0.5 * FLOOR)
    per_y = 8.0 * beta * decay / ((1.0 + decay) * (1.0 + decay))  # 2 beta (1 - tanh(y)**2)
    per_beta = 2.0 * tl.where(y >= 0, soft, -soft)
    return tl.where(y >= 0, at_large, at_small), tl.where(y >= 0, at_small, at_large), per_y, per_beta


@triton.jit
def bucket_gradients(
    dphi_phi, ys, beta, tile, C: tl.constexpr, P: tl.constexpr, LT: tl.constexpr, P2: tl.constexpr,
    PL: tl.constexpr,
):  # fmt: skip
    """From dphi * phi [C, SP]: the gradient of the projections [C, LT * P2], and of beta by token and table [C, LT].

    phi is a product, so d phi / d z_p is phi times the slope of its p-th factor's logarithm, and only the sums of
    dphi * phi over the buckets of either side of a plane are needed.
    """
    rest = tl.reshape(dphi_phi, [C, LT, 1 << PL])
    dbeta = tl.zeros([C, LT], tl.float32)
    dys = ()
    for p in tl.static_range(PL):
        down, up = tl.split(tl.reshape(rest, [C, LT, (1 << PL) >> (p + 1), 2]))
        rest = down + up
        rise, fall, per_y, per_beta = slopes(ys[p], beta)
        dz = tl.sum(up, 2) * rise - tl.sum(down, 2) * fall
        dbeta += dz * per_beta
        dys = dys + (dz * per_y,)
    if PL < P:
        total = tl.reshape(rest, [C, LT])
        for p in tl.static_range(PL, P):
            rise, fall, per_y, per_beta = slopes(ys[p], beta)
            dz = total * tl.where(((tile >> (p - PL)) & 1) == 1, rise, -fall)
            dbeta += dz * per_beta
            dys = dys + (dz * per_y,)
    for p in tl.static_range(P, P2):
        dys = dys + (tl.zeros([C, LT], tl.float32),)
    return join_planes(dys, C, LT, P2), dbeta


@triton.jit
def join_planes(ys, C: tl.constexpr, LT: tl.constexpr, P2: tl.constexpr):
    """P2 of [C, LT] -> [C, LT * P2], the inverse of :func:`split_planes`."""
    if P2 == 2:
        return tl.reshape(tl.join(ys[0], ys[1]), [C, LT * 2])
    elif P2 == 4:
        return tl.reshape(tl.join(tl.join(ys[0], ys[2]), tl.join(ys[1], ys[3])), [C, LT * 4])
    elif P2 == 8:
        even = join_planes((ys[0], ys[2], ys[4], ys[6]), C, LT, 4)
        odd = join_planes((ys[1], ys[3], ys[5], ys[7]), C, LT, 4)
        return tl.reshape(tl.join(even, odd), [C, LT * 8])
    else:
        even = join_planes((ys[0], ys[2], ys[4], ys[6], ys[8], ys[10], ys[12], ys[14]), C, LT, 8)
        odd = join_planes((ys[1], ys[3], ys[5], ys[7], ys[9], ys[11], ys[13], ys[15]), C, LT, 8)
        return tl.reshape(tl.join(even, odd), [C, LT * 16])


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
