"""Projections of tokens kept for the backward pass, which then does not read the tokens again.

A row has YW numbers of the operands' size: float32, or float16 in the place of a bfloat16, since a projection needs
no exponent and its gradient is good to what it keeps.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_projections(base, t, here, y, C: tl.constexpr, N: tl.constexpr, YW: tl.constexpr):
    """Writes y [C, N] of the tokens from the run's t-th on. Past +-30 no bucket can tell the difference."""
    n = tl.arange(0, N)
    y = tl.maximum(y, -30.0, propagate_nan=tl.PropagateNan.ALL)
    y = tl.minimum(y, 30.0, propagate_nan=tl.PropagateNan.ALL)
    if base.dtype.element_ty == tl.bfloat16:
        y = y.to(tl.float16).to(tl.bfloat16, bitcast=True)
    at = (base + t * YW) + (tl.arange(0, C)[:, None] * YW + n[None, :])
    tl.store(at, y, mask=here[:, None] & (n < YW)[None, :])


@triton.jit
def load_projections(base, t, here, C: tl.constexpr, N: tl.constexpr, YW: tl.constexpr):
    """[C, N] float32 of the tokens from the run's t-th on, 0 where not ``here`` [C]."""
    n = tl.arange(0, N)
    at = (base + t * YW) + (tl.arange(0, C)[:, None] * YW + n[None, :])
    y = tl.load(at, mask=here[:, None] & (n < YW)[None, :], other=0.0)
    if base.dtype.element_ty == tl.bfloat16:
        y = y.to(tl.float16, bitcast=True)
    return y.to(tl.float32)
