"""The gradients of hyperplanes and beta: the parts that programs left, added in float64 in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sum(parts, runs, per_run, stride, at, here, RT: tl.constexpr, E: tl.constexpr):
    """The sum of parts [runs, per_run] of ``stride`` elements each, at the elements ``at`` [E]: float64."""
    total = tl.zeros([E], tl.float64)
    r = tl.arange(0, RT)
    for first in range(0, runs, RT):
        part = (first + r).to(tl.int64)
        inside = (part < runs)[:, None] & here[None, :]
        x = tl.load(parts + (part * per_run * stride)[:, None] + at[None, :], mask=inside, other=0.0)
        total += tl.sum(x.to(tl.float64), 0)
    return total


@triton.jit(do_not_specialize=["runs", "key_runs", "beta_runs", "key_beta_runs", "G"])
def parameters_kernel(
    planes_parts, beta_parts, key_planes_parts, key_beta_parts, planes, beta,
    runs: tl.int64, key_runs: tl.int64, beta_runs: tl.int64, key_beta_runs: tl.int64, G: tl.int64,
    SHARE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, N: tl.constexpr, SP: tl.constexpr,
    NS: tl.constexpr, RT: tl.constexpr, E: tl.constexpr, NEED_PLANES: tl.constexpr,
):  # fmt: skip
    """planes [G, L, P, D] and beta [G], float32 (programs: G, and 1 for beta + parts of a head's planes).

    The parts of the queries' pass are [runs, G * SHARE, NS, N, D] and [beta_runs, G * SHARE], those of the keys'
    [key_runs, G, NS, N, D] and [key_beta_runs, G]. A table is some rows of a tile, or the same rows of several tiles.
    """
    group = tl.program_id(0).to(tl.int64)
    H = G * SHARE
    if tl.program_id(1) == 0:
        one = tl.arange(0, 16)
        alone = one < 1
        of_beta = _sum(key_beta_parts, key_beta_runs, G, 1, group + one, alone, RT, 16)
        for share in range(SHARE):
            of_beta += _sum(beta_parts, beta_runs, H, 1, group * SHARE + share + one, alone, RT, 16)
        tl.store(beta + group + one, of_beta.to(tl.float32), mask=alone)
    elif NEED_PLANES:
        e = (tl.program_id(1) - 1) * E + tl.arange(0, E)
        here = e < L * P * D
        row = e // D
        table = row // P
        tiles: tl.constexpr = (1 << P) // SP if (1 << P) > SP else 1
        if tiles > 1:  # of one table
            at = (table * tiles * N + row % P) * D + e % D
        else:
            tables: tl.constexpr = SP >> P
            at = ((table // tables) * N + (table % tables) * P + row % P) * D + e % D
        size: tl.constexpr = NS * N * D
        total = tl.zeros([E], tl.float64)
        for tile in tl.static_range(tiles):
            here_at = at + tile * N * D
            total += _sum(key_planes_parts, key_runs, G, size, group * size + here_at, here, RT, E)
            for share in range(SHARE):
                total += _sum(planes_parts, runs, H, size, (group * SHARE + share) * size + here_at, here, RT, E)
        tl.store(planes + group * (L * P * D) + e, total.to(tl.float32), mask=here)
