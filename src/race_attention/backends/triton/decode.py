"""One token: the state takes up its key and value in place and is read at once, all heads in one launch.

Nothing is returned to the host and no shape depends on how many tokens came before, so a decoding loop can be
captured in a CUDA graph.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .device import FLOOR, corner_signs, load_planes
from .plan import power_of_two

#: Buckets of a tile, and elements of a state that a program holds at a time.
TILE, HELD = 64, 8192


@triton.jit
def _buckets(
    x, planes, head, tile, beta, S: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, N: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    """phi [SP] float64 of one token x [DP], as device.buckets computes it for a block."""
    w = load_planes(planes, head, tile, L, P, D, DP, N, SP)
    up, down = corner_signs(tile, P, N, SP, "ieee")
    y = tl.sum(w * x[None, :], 1)
    away = tl.exp(-2.0 * tl.abs(y))
    small = tl.exp(-2.0 * beta * (1.0 - away) / (1.0 + away))
    large = (1.0 - FLOOR) / (1.0 + small)
    log_small = tl.log2(small * large + 0.5 * FLOOR)
    log_large = tl.log2(large + 0.5 * FLOOR)
    log_up = tl.where(y >= 0, log_large, log_small)
    log_down = tl.where(y >= 0, log_small, log_large)
    logit = tl.sum(up * log_up[:, None] + down * log_down[:, None], 0)
    s = tile * SP + tl.arange(0, SP)
    return tl.where(s < S, tl.exp2(logit.to(tl.float64)), 0.0)


@triton.jit
def decode_kernel(
    query, key, value, planes, beta, log_decay, mass, value_sum, out,
    qb, qh, kb, kh, vb, vh, gb, gh, G,
    SHARE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, V: tl.constexpr, DP: tl.constexpr,
    VP: tl.constexpr, VT: tl.constexpr, N: tl.constexpr, SP: tl.constexpr, NS: tl.constexpr,
    HAS_DECAY: tl.constexpr,
):  # fmt: skip
    """Programs: B * G. The state goes through registers once where its buckets fit one tile, else it is read again."""
    S: tl.constexpr = L << P
    row = (tl.program_id(0) // G).to(tl.int64)
    group = tl.program_id(0) % G
    d = tl.arange(0, DP)
    k = tl.load(key + row * kb + group * kh + d, mask=d < D, other=0.0).to(tl.float32)
    b = tl.load(beta + group)
    kept = tl.full([], 1.0, tl.float64)
    if HAS_DECAY:
        kept = tl.exp(tl.load(log_decay + row * gb + group * gh).to(tl.float64))
    mass += (row * G + group) * S
    value_sum += (row * G + group) * S * V
    for tile in range(NS):
        s = tile * SP + tl.arange(0, SP)
        phi = _buckets(k, planes, group, tile, b, S, L, P, D, DP, N, SP)
        new_mass = tl.load(mass + s, mask=s < S, other=0.0).to(tl.float64) * kept + phi
        tl.store(mass + s, new_mass.to(mass.dtype.element_ty), mask=s < S)
        for part in range(0, VP, VT):
            v = part + tl.arange(0, VT)
            x = tl.load(value + row * vb + group * vh + v, mask=v < V, other=0.0).to(tl.float64)
            here = (s < S)[:, None] & (v < V)[None, :]
            at = value_sum + s[:, None] * V + v[None, :]
            new_sum = tl.load(at, mask=here, other=0.0).to(tl.float64) * kept + phi[:, None] * x[None, :]
            tl.store(at, new_sum.to(value_sum.dtype.element_ty), mask=here)
            if NS == 1:
                for share in range(SHARE):
                    head = group * SHARE + share
                    q = tl.load(query + row * qb + head * qh + d, mask=d < D, other=0.0).to(tl.float32)
                    phi_q = _buckets(q, planes, group, 0, b, S, L, P, D, DP, N, SP)
                    result = tl.sum(phi_q[:, None] * new_sum, 0) / tl.sum(phi_q * new_mass, 0)
                    to = out + (row * G * SHARE + head) * V + v
                    tl.store(to, result.to(out.dtype.element_ty), mask=v < V)
    if NS > 1:
        tl.debug_barrier()  # what was just written is read by other threads of the program
        for share in range(SHARE):
            head = group * SHARE + share
            q = tl.load(query + row * qb + head * qh + d, mask=d < D, other=0.0).to(tl.float32)
            for part in range(0, VP, VT):
                v = part + tl.arange(0, VT)
                numerator = tl.zeros([VT], tl.float64)
                denominator = tl.zeros([], tl.float64)
                for tile in range(NS):
                    s = tile * SP + tl.arange(0, SP)
                    phi_q = _buckets(q, planes, group, tile, b, S, L, P, D, DP, N, SP)
                    here = (s < S)[:, None] & (v < V)[None, :]
                    sums = tl.load(value_sum + s[:, None] * V + v[None, :], mask=here, other=0.0).to(tl.float64)
                    numerator += tl.sum(phi_q[:, None] * sums, 0)
                    denominator += tl.sum(phi_q * tl.load(mass + s, mask=s < S, other=0.0).to(tl.float64), 0)
                to = out + (row * G * SHARE + head) * V + v
                tl.store(to, (numerator / denominator).to(out.dtype.element_ty), mask=v < V)


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
    tile = min(TILE, power_of_two(tables << planes, 16))
    decay_strides = (0, 0) if log_decay is None else log_decay.stride()
    decode_kernel[(batch * groups,)](
        query, key, value, hyperplanes.contiguous(), beta.contiguous(), beta if log_decay is None else log_decay,
        mass, value_sum, out, *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], *decay_strides, groups,
        SHARE=heads // groups, L=tables, P=planes, D=dim, V=value_dim, DP=power_of_two(dim, 16), VP=padded,
        VT=min(padded, HELD // tile), N=power_of_two(max(1, min(tables, tile >> planes)) * planes, 16), SP=tile,
        NS=-(-(tables << planes) // tile), HAS_DECAY=log_decay is not None, num_warps=8,
    )  # fmt: skip
    return out
