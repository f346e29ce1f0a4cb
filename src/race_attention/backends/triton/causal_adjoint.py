"""The pass that leaves the gradients of the states before runs, for heads whose buckets fit one tile."""

from __future__ import annotations

import triton
import triton.language as tl

from .device import operand, run_bounds, whole_rows
from .narrow import (
    block_decay,
    buckets_of,
    hashed,
    load_corners,
    load_hash,
    rows_at,
    store_features,
    store_sums,
    taken_up,
)


@triton.jit(
    do_not_specialize=["T", "RUN", "NC", "G", "qb", "qt", "qh", "ob", "ot", "oh", "gb", "gt", "gh"],
)
def adjoint_kernel(
    query, grad_out, inverses, log_decay, planes, beta, table, adjoints, query_features,
    qb: tl.int64, qt: tl.int64, qh: tl.int64, ob: tl.int64, ot: tl.int64, oh: tl.int64,
    gb: tl.int64, gt: tl.int64, gh: tl.int64, T: tl.int64, RUN: tl.int64, NC: tl.int64, G: tl.int64,
    SHARE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    DP: tl.constexpr, VP: tl.constexpr, N: tl.constexpr, SP: tl.constexpr, SW: tl.constexpr, C: tl.constexpr,
    LIFT: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    PACKED: tl.constexpr, HAS_DECAY: tl.constexpr,
):  # fmt: skip
    """The gradient of the value sums before each run that its own queries give (programs: runs * H).

    Leaves phi_q / den, [B, H, T, SW], for the kernels of :mod:`race_attention.backends.triton.causal_gradients`, and
    the gradient of the mass to the first of them.
    """
    S: tl.constexpr = L << P
    TALL: tl.constexpr = SP >= 64
    H = G * SHARE
    run = tl.program_id(0) // H
    head = tl.program_id(0) - run * H
    group = head // SHARE
    batch, row, start, end, last = run_bounds(run, table, T, RUN, NC, PACKED)
    count = (end - start).to(tl.int32)
    query += whole_rows(batch * qb + head * qh + start * qt, ALIGNED)
    grad_out += whole_rows(batch * ob + head * oh + start * ot, ALIGNED)
    log_decay += batch * gb + group * gh + start * gt
    inverses += (batch * H + head) * T + start
    query_features += ((batch * H + head) * T + start) * SW
    b = tl.load(beta + group)
    hashes = load_hash(planes, group, L, P, D, DP, N, PRECISION)
    corners = load_corners(P, N, SP, PRECISION)
    grads = tl.zeros([SP, VP] if TALL else [VP, SP], tl.float32)
    kept_so_far = tl.full([], 1.0, tl.float32)
    c = tl.arange(0, C)

    for t in range(0, count, C):
        here = c < count - t
        q = rows_at(query, qt, t, here, C, D, DP, ALIGNED)
        do = rows_at(grad_out, ot, t, here, C, V, VP, ALIGNED)
        inverse = tl.load(inverses + t + c, mask=here, other=0.0)
        phi = buckets_of(hashed(q, hashes, C, N, PRECISION), b, corners, C, N, S, SP, LIFT, PRECISION)
        seen = operand(phi * inverse[:, None], PRECISION)
        store_features(query_features, t, here, seen, C, SP, SW)
        if HAS_DECAY:
            whole, part, since, left, kept, total = block_decay(log_decay, gt, t, count, C, PRECISION)
            seen = operand(seen.to(tl.float32) * (since * kept_so_far)[:, None], PRECISION)
            kept_so_far *= kept
        grads = taken_up(grads, operand(do, PRECISION), seen, TALL, PRECISION)

    store_sums(adjoints + (run.to(tl.int64) * H + head) * (S * (V + 1)), grads, S, SP, V, VP, TALL)
