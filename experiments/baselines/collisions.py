"""Counts in which hashes codes of queries and keys agree, for all pairs at once: a Triton kernel for sampled YOSO."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Queries and keys of a tile, whose counts stay in registers while the hashes pass by.
TILE = 64


@triton.jit  # type: ignore[misc,unused-ignore]
def _shares(of_query, of_key, out, queries, keys, hashes, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    query = tl.program_id(1) * TILE + tl.arange(0, TILE)
    key = tl.program_id(2) * TILE + tl.arange(0, TILE)
    count = tl.zeros([TILE, TILE], dtype=tl.int32)
    for number in range(hashes):
        at = number * tl.num_programs(0).to(tl.int64) + row
        here = tl.load(of_query + at * queries + query, mask=query < queries, other=0)
        there = tl.load(of_key + at * keys + key, mask=key < keys, other=0)
        count += (here[:, None] == there[None, :]).to(tl.int32)
    place = (row * queries + query[:, None]) * keys + key[None, :]
    seen = (query[:, None] < queries) & (key[None, :] < keys)
    tl.store(out + place, count.to(tl.float32) / hashes, mask=seen)


def shares(of_query: Tensor, of_key: Tensor) -> Tensor:
    """Share of the hashes in which two codes agree.

    Args:
        of_query: [M, N, T] int32, contiguous; M hashes, N rows.
        of_key: [M, N, S], the same.

    Returns:
        [N, T, S] float32.
    """
    hashes, rows, queries = of_query.shape
    keys = of_key.shape[2]
    out = torch.empty(rows, queries, keys, device=of_query.device)
    grid = (rows, triton.cdiv(queries, TILE), triton.cdiv(keys, TILE))
    if out.numel():
        _shares[grid](of_query, of_key, out, queries, keys, hashes, TILE=TILE)
    return out
