"""One token: the state takes up its key and value in place and is read at once, all heads in one launch.

Nothing is returned to the host and no shape depends on how many tokens came before, so a decoding loop can be
captured in a CUDA graph.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .device import FLOOR
from .plan import power_of_two


@triton.jit
def _sides(x, planes, head, table, beta, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
           R: tl.constexpr):  # fmt: skip
    """phi [R] of one token x [DP] in one table: a product over planes of the factor of each bucket's sign."""
    d = tl.arange(0, DP)
    r = tl.arange(0, R)
    phi = tl.full([R], 1.0, tl.float64)
    for p in tl.static_range(P):
        w = tl.load(planes + ((head * L + table) * P + p) * D + d, mask=d < D, other=0.0)
        y = tl.sum(w * x, 0)
        away = tl.exp(-2.0 * tl.abs(y))
        small = tl.exp(-2.0 * beta * (1.0 - away) / (1.0 + away))
        large = (1.0 - FLOOR) / (1.0 + small)
        small = small * large + 0.5 * FLOOR
        large = large + 0.5 * FLOOR
        up = tl.where(y >= 0, large, small)
        down = tl.where(y >= 0, small, large)
        phi *= tl.where(((r >> p) & 1) == 1, up, down).to(tl.float64)
    return phi


@triton.jit
def decode_kernel(
    query, key, value, planes, beta, log_decay, mass, value_sum, out,
    qb, qh, kb, kh, vb, vh, gb, gh, G,
    SHARE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, V: tl.constexpr, DP: tl.constexpr,
    VP: tl.constexpr, VT: tl.constexpr, HAS_DECAY: tl.constexpr,
):  # fmt: skip
    """Programs: B * G. Masses first, then value sums and outputs in parts of VT values, table by table."""
    R: tl.constexpr = 1 << P
    row = (tl.program_id(0) // G).to(tl.int64)
    group = tl.program_id(0) % G
    d = tl.arange(0, DP)
    r = tl.arange(0, R)
    k = tl.load(key + row * kb + group * kh + d, mask=d < D, other=0.0).to(tl.float32)
    b = tl.load(beta + group)
    kept = tl.full([], 1.0, tl.float64)
    if HAS_DECAY:
        kept = tl.exp(tl.load(log_decay + row * gb + group * gh).to(tl.float64))
    state = (row * G + group) * (L * R)
    for table in range(L):
        at_mass = mass + state + table * R + r
        new_mass = tl.load(at_mass).to(tl.float64) * kept + _sides(k, planes, group, table, b, L, P, D, DP, R)
        tl.store(at_mass, new_mass.to(mass.dtype.element_ty))
    for part in range(0, VP, VT):
        v = part + tl.arange(0, VT)
        x = tl.load(value + row * vb + group * vh + v, mask=v < V, other=0.0).to(tl.float64)
        here = (v < V)[None, :] & (r >= 0)[:, None]
        for table in range(L):
            phi = _sides(k, planes, group, table, b, L, P, D, DP, R)
            at_sum = value_sum + (state + table * R + r)[:, None] * V + v[None, :]
            new_sum = tl.load(at_sum, mask=here, other=0.0).to(tl.float64) * kept + phi[:, None] * x[None, :]
            tl.store(at_sum, new_sum.to(value_sum.dtype.element_ty), mask=here)
        tl.debug_barrier()  # what was just written is read by other threads of the program
        for share in range(SHARE):
            head = group * SHARE + share
            q = tl.load(query + row * qb + head * qh + d, mask=d < D, other=0.0).to(tl.float32)
            numerator = tl.zeros([VT], tl.float64)
            denominator = tl.zeros([], tl.float64)
            for table in range(L):
                phi = _sides(q, planes, group, table, b, L, P, D, DP, R)
                at_sum = value_sum + (state + table * R + r)[:, None] * V + v[None, :]
                numerator += tl.sum(phi[:, None] * tl.load(at_sum, mask=here, other=0.0).to(tl.float64), 0)
                denominator += tl.sum(phi * tl.load(mass + state + table * R + r).to(tl.float64), 0)
            result = numerator / tl.where(denominator > 0, denominator, 1.0)
            tl.store(out + ((row * G + group) * SHARE + share) * V + v, result.to(out.dtype.element_ty), mask=v < V)


def decode_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hyperplanes: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    mass: Tensor,
    value_sum: Tensor,
) -> Tensor:
    """Adds one token to a state in place and returns what its query reads: one step of Algorithm 2 of the paper.

    Not differentiable. One launch, which a CUDA graph can capture.

    Args:
        query: [B, H, D], unit stride along D; H a multiple of G.
        key: [B, G, D]. value: [B, G, Dv]. Both of the query's dtype, unit stride along the last dimension.
        hyperplanes: [G, L, P, D] float32, multiplied by the scale. beta: [G] float32.
        log_decay: [B, G] float32 or None; it multiplies the state before the token is added.
        mass: [B, G, L, R], value_sum: [B, G, L, R, Dv], float64 or float32, contiguous. Changed in place.

    Returns:
        [B, H, Dv] of the query's dtype.

    Raises:
        ValueError: a state is not contiguous, or shapes do not fit.
    """
    batch, heads, dim = query.shape
    groups, tables, planes = hyperplanes.shape[:3]
    value_dim = value.shape[2]
    if value_sum.shape != (batch, groups, tables, 1 << planes, value_dim) or mass.shape != value_sum.shape[:4]:
        raise ValueError(
            f"value_sum: got {tuple(value_sum.shape)} and a mass of {tuple(mass.shape)}, allowed is "
            f"{(batch, groups, tables, 1 << planes, value_dim)} and the same without the last"
        )
    if not (mass.is_contiguous() and value_sum.is_contiguous()):
        raise ValueError("mass, value_sum: got strided tensors, allowed are contiguous ones, changed in place")
    out = query.new_empty(batch, heads, value_dim)
    if out.numel() == 0:
        return out
    padded = power_of_two(value_dim, 16)
    decay_strides = (0, 0) if log_decay is None else log_decay.stride()
    decode_kernel[(batch * groups,)](
        query, key, value, hyperplanes.contiguous(), beta.contiguous(), beta if log_decay is None else log_decay,
        mass, value_sum, out, *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], *decay_strides, groups,
        SHARE=heads // groups, L=tables, P=planes, D=dim, V=value_dim, DP=power_of_two(dim, 16), VP=padded,
        VT=max(16, min(padded, 4096 >> planes)), HAS_DECAY=log_decay is not None, num_warps=4,
    )  # fmt: skip
    return out
