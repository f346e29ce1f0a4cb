"""Soft buckets for 16-bit inputs, in fewer instructions than device.py's, which serve float32.

Base-2 logarithms of a plane's two factors, from u = 2 beta tanh|y| log2(e), their errors below 3e-5:

    log2 sigmoid(z) = -log2(1 + 2**-u)      log2 ((1 - F/2) 2**-u + F/2) = max(-u, -14) + log2(1 + 2**-|u - 14|)

the logarithms of 1 + s by a polynomial: Triton's log2 is twenty instructions, its exp2 is one. The sum over the planes
of a table is a product with zeros and ones in float16, whose rounding of a logarithm matters only where the bucket
does not. Shape letters are those of device.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import device
from .device import FLOOR, corner_signs, load_planes

TWO_LOG2E = tl.constexpr(2.885390081777927)
FLOOR_BITS = tl.constexpr(14.0)  # F / 2 is 2**-14
ABOVE = tl.constexpr(8.8061e-05)  # -log2(1 - F / 2)


@triton.jit
def hash_of(
    planes, head, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr,
    SP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the kernels of one tile need of the hyperplanes: (high, low, up, down).

    high + low are the hyperplanes, [DP, N], in two parts of bfloat16; up and down, [N, SP], which planes are on
    the +1 and the -1 side of which buckets.
    """
    w = load_planes(planes, head, 0, L, P, D, DP, N, SP)
    up, down = corner_signs(0, P, N, SP, "ieee")
    if PRECISION == "ieee":
        high = tl.trans(w)
        low = high
    else:
        up = up.to(tl.float16)
        down = down.to(tl.float16)
        coarse = w.to(tl.bfloat16)
        high = tl.trans(coarse)
        low = tl.trans((w - coarse.to(tl.float32)).to(tl.bfloat16))
    return high, low, up, down


@triton.jit
def project(x, high, low, PRECISION: tl.constexpr):
    """x [C, DP] by the hyperplanes, [C, N] to float32's accuracy."""
    if PRECISION == "ieee":
        return tl.dot(x.to(tl.float32), high, input_precision="ieee")
    else:
        coarse = x.to(tl.bfloat16)
        y = tl.dot(coarse, high)
        y = tl.dot(coarse, low, y)
        if x.dtype != tl.bfloat16:  # float16 has three bits more
            y = tl.dot((x.to(tl.float32) - coarse.to(tl.float32)).to(tl.bfloat16), high, y)
        return y


@triton.jit
def _log2_1p(s):
    """log2(1 + s) for s in [0, 1], to 1.5e-5."""
    return s * (1.441965565 + s * (-0.7096623168 + s * (0.4175942349 + s * (-0.1962677595 + s * 0.04638457536))))


@triton.jit
def buckets(
    y, beta, up, down, S: tl.constexpr, SP: tl.constexpr, LIFT: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """phi [C, SP], times 2**(LIFT * P), float32; zero past the last bucket."""
    if PRECISION == "ieee":
        return device.buckets(y, beta, up, down, 0, S, SP, LIFT, PRECISION)
    else:
        away = tl.exp2(tl.abs(y) * -TWO_LOG2E)
        u = beta * TWO_LOG2E * (2.0 / (1.0 + away) - 1.0)
        large = LIFT - _log2_1p(tl.exp2(-u))
        v = u + ABOVE
        small = large + tl.maximum(-v, -FLOOR_BITS) + _log2_1p(tl.exp2(-tl.abs(v - FLOOR_BITS)))
        logit = tl.dot(tl.where(y >= 0, large, small).to(tl.float16), up)
        logit = tl.dot(tl.where(y >= 0, small, large).to(tl.float16), down, logit)
        if S % SP != 0:
            # A sum and not a mask, whose predicates would be kept through the loop.
            s = tl.arange(0, SP)
            logit += (tl.minimum(S - 1 - s, 0) * 1024).to(tl.float32)[None, :]
        return tl.exp2(logit)


@triton.jit
def bucket_gradients(dphi_phi, y, beta, up, down, PRECISION: tl.constexpr):
    """As ``device.bucket_gradients``: the gradient of the projections, and of beta by token and plane, [C, N] twice."""
    if PRECISION == "ieee":
        return device.bucket_gradients(dphi_phi, y, beta, up, down, PRECISION)
    else:
        away = tl.exp2(tl.abs(y) * -TWO_LOG2E)
        half = 1.0 / (1.0 + away)
        soft = 2.0 * half - 1.0
        small = tl.exp2(-(beta * TWO_LOG2E * soft))
        large = 1.0 / (1.0 + small)
        slope = small * large  # of the logarithm of the larger factor, to F
        fall = large * (slope / (slope + 0.5 * FLOOR))
        coarse = dphi_phi.to(tl.bfloat16)
        fine = (dphi_phi - coarse.to(tl.float32)).to(tl.bfloat16)
        above = tl.trans(up.to(tl.bfloat16))
        below = tl.trans(down.to(tl.bfloat16))
        rising = tl.dot(fine, above, tl.dot(coarse, above))
        falling = tl.dot(fine, below, tl.dot(coarse, below))
        dz = tl.where(y >= 0, rising * slope - falling * fall, rising * fall - falling * slope)
        dz_dy = 8.0 * beta * away * half * half  # 2 beta (1 - tanh(y)**2)
        return dz * dz_dy, dz * tl.where(y >= 0, 2.0 * soft, -2.0 * soft)


@triton.jit
def masses_as_columns(mass, SP: tl.constexpr):
    """mass [SP] in two parts of bfloat16, [SP, 16]: a product with it sums buckets weighted by mass."""
    n = tl.arange(0, 16)[None, :]
    high = mass.to(tl.bfloat16)
    low = (mass - high.to(tl.float32)).to(tl.bfloat16)
    return tl.where(n == 0, high[:, None], tl.where(n == 1, low[:, None], 0.0)).to(tl.bfloat16)
