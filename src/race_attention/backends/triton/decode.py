"""One token: the state takes up its key and value and is read at once, all heads in one launch.

Nothing is returned to the host and no shape depends on how many tokens came before, so a decoding loop can be
captured in a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import FLOOR, corner_signs, load_planes
from .launch import on
from .plan import power_of_two
from .start import start

#: Buckets of a tile; elements of a state that a program holds at a time, where one program has a whole head (in
#: place: all of it reads the masses before any of it writes them) and where several share it.
TILE, HELD, HELD_SHARED = 64, 8192, 2048


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


@triton.jit(do_not_specialize=["qb", "qh", "kb", "kh", "vb", "vh", "gb", "gh", "G"])
def decode_kernel(
    query, key, value, planes, beta, log_decay, mass, value_sum, new_mass, new_value_sum, out,
    qb: tl.int64, qh: tl.int64, kb: tl.int64, kh: tl.int64, vb: tl.int64, vh: tl.int64, gb: tl.int64, gh: tl.int64,
    G: tl.int64,
    SHARE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, V: tl.constexpr, DP: tl.constexpr,
    VP: tl.constexpr, VT: tl.constexpr, N: tl.constexpr, SP: tl.constexpr, NS: tl.constexpr,
    HAS_DECAY: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """Programs: B * G, parts of Dv. A state goes through registers once where its buckets fit one tile or with ONCE.

    ONCE: one query head to a key head, one part to a program; what a tile gives is then added up on the way.

    The masses are the same for all parts, and each writes them; so only a single one may work in place.
    """
    S: tl.constexpr = L << P
    row = tl.program_id(0) // G
    group = tl.program_id(0) - row * G
    d = tl.arange(0, DP)
    k = tl.load(key + row * kb + group * kh + d, mask=d < D, other=0.0).to(tl.float32)
    b = tl.load(beta + group)
    kept = tl.full([], 1.0, tl.float64)
    if HAS_DECAY:
        kept = tl.exp(tl.load(log_decay + row * gb + group * gh).to(tl.float64))
    state = (row * G + group) * S
    mass += state
    new_mass += state
    value_sum += state * V
    new_value_sum += state * V
    query += row * qb + group * SHARE * qh
    out += (row * G + group) * SHARE * V
    first, step = tl.program_id(1) * VT, tl.num_programs(1) * VT
    numerator = tl.zeros([VT], tl.float64)
    denominator = tl.zeros([], tl.float64)
    if ONCE:
        q = tl.load(query + d, mask=d < D, other=0.0).to(tl.float32)
    for tile in range(NS):
        s = tile * SP + tl.arange(0, SP)
        phi = _buckets(k, planes, group, tile, b, S, L, P, D, DP, N, SP)
        masses = tl.load(mass + s, mask=s < S, other=0.0).to(tl.float64) * kept + phi
        tl.debug_barrier()  # in place: several threads may hold an element, and all must have read it before one writes
        tl.store(new_mass + s, masses.to(new_mass.dtype.element_ty), mask=s < S)
        for part in range(first, VP, step):
            v = part + tl.arange(0, VT)
            x = tl.load(value + row * vb + group * vh + v, mask=v < V, other=0.0).to(tl.float64)
            here = (s < S)[:, None] & (v < V)[None, :]
            at = s[:, None] * V + v[None, :]
            sums = tl.load(value_sum + at, mask=here, other=0.0).to(tl.float64) * kept + phi[:, None] * x[None, :]
            tl.debug_barrier()  # likewise
            tl.store(new_value_sum + at, sums.to(new_value_sum.dtype.element_ty), mask=here)
            if ONCE:
                phi_q = _buckets(q, planes, group, tile, b, S, L, P, D, DP, N, SP)
                numerator += tl.sum(phi_q[:, None] * sums, 0)
                denominator += tl.sum(phi_q * masses, 0)
            elif NS == 1:
                for share in range(SHARE):
                    q = tl.load(query + share * qh + d, mask=d < D, other=0.0).to(tl.float32)
                    phi_q = _buckets(q, planes, group, 0, b, S, L, P, D, DP, N, SP)
                    result = tl.sum(phi_q[:, None] * sums, 0) / tl.sum(phi_q * masses, 0)
                    tl.store(out + share * V + v, result.to(out.dtype.element_ty), mask=v < V)
    if ONCE:
        v = first + tl.arange(0, VT)
        tl.store(out + v, (numerator / denominator).to(out.dtype.element_ty), mask=v < V)
    elif NS > 1:
        tl.debug_barrier()  # what was just written is read by other threads of the program
        for share in range(SHARE):
            q = tl.load(query + share * qh + d, mask=d < D, other=0.0).to(tl.float32)
            for part in range(first, VP, step):
                v = part + tl.arange(0, VT)
                numerator = tl.zeros([VT], tl.float64)
                denominator = tl.zeros([], tl.float64)
                for tile in range(NS):
                    s = tile * SP + tl.arange(0, SP)
                    phi_q = _buckets(q, planes, group, tile, b, S, L, P, D, DP, N, SP)
                    here = (s < S)[:, None] & (v < V)[None, :]
                    at = s[:, None] * V + v[None, :]
                    sums = tl.load(new_value_sum + at, mask=here, other=0.0).to(tl.float64)
                    numerator += tl.sum(phi_q[:, None] * sums, 0)
                    denominator += tl.sum(phi_q * tl.load(new_mass + s, mask=s < S, other=0.0).to(tl.float64), 0)
                result = numerator / denominator
                tl.store(out + share * V + v, result.to(out.dtype.element_ty), mask=v < V)


def decode(
    query: Tensor, key: Tensor, value: Tensor, hyperplanes: Tensor, beta: Tensor, log_decay: Tensor | None,
    mass: Tensor, value_sum: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As :func:`decode_`, with the state after the token in new tensors: (out, mass, value_sum)."""
    mass, value_sum = mass.contiguous(), value_sum.contiguous()
    new = torch.empty_like(mass), torch.empty_like(value_sum)
    return _launch(query, key, value, hyperplanes, beta, log_decay, (mass, value_sum), new), *new


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
    if not (mass.is_contiguous() and value_sum.is_contiguous()):
        raise ValueError("mass, value_sum: got strided tensors, allowed are contiguous ones, changed in place")
    state = mass, value_sum
    return _launch(query, key, value, hyperplanes, beta, log_decay, state, state)


def _launch(
    query: Tensor, key: Tensor, value: Tensor, hyperplanes: Tensor, beta: Tensor, log_decay: Tensor | None,
    state: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor],
) -> Tensor:  # fmt: skip
    batch, heads, dim = query.shape
    groups, tables, planes = hyperplanes.shape[:3]
    value_dim, (mass, value_sum) = value.shape[2], state
    if value_sum.shape != (batch, groups, tables, 1 << planes, value_dim) or mass.shape != value_sum.shape[:4]:
        raise ValueError(
            f"value_sum: got {tuple(value_sum.shape)} and a mass of {tuple(mass.shape)}, allowed is "
            f"{(batch, groups, tables, 1 << planes, value_dim)} and the same without the last"
        )
    query, key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (query, key, value))
    out = query.new_empty(batch, heads, value_dim)
    if out.numel() == 0:
        return out
    padded = power_of_two(value_dim, 16)
    tile = min(TILE, power_of_two(tables << planes, 16))
    width = min(padded, (HELD if new is state else HELD_SHARED) // tile)
    with on(query.device):
        start(
            decode_kernel, (batch * groups, 1 if new is state else padded // width),
            query, key, value, hyperplanes.contiguous(), beta.contiguous(), beta if log_decay is None else log_decay,
            *state, *new, out, *query.stride()[:2], *key.stride()[:2], *value.stride()[:2],
            *((0, 0) if log_decay is None else log_decay.stride()), groups,
            SHARE=heads // groups, L=tables, P=planes, D=dim, V=value_dim, DP=power_of_two(dim, 16), VP=padded,
            VT=width, N=power_of_two(max(1, min(tables, tile >> planes)) * planes, 16), SP=tile,
            NS=-(-(tables << planes) // tile), HAS_DECAY=log_decay is not None,
            ONCE=heads == groups and (new is not state or width == padded), num_warps=8 if new is state else 4,
        )  # fmt: skip
    return out
