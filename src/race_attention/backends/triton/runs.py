"""The runs of packed sequences, found on the device: no length ever reaches the host."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .start import start


@triton.jit(do_not_specialize=["rows", "length"])
def first_kernel(bounds, first, rows: tl.int64, length: tl.int64, X: tl.constexpr):
    """first [rows + 1]: how many runs come before each row, and in all (one program)."""
    total = tl.zeros([], tl.int64)
    tl.store(first, total)
    for begin in range(0, rows, X):
        row = begin + tl.arange(0, X)
        inside = row < rows
        tokens = tl.load(bounds + row + 1, mask=inside, other=0) - tl.load(bounds + row, mask=inside, other=0)
        runs = (tokens + (length - 1)) // length
        tl.store(first + row + 1, total + tl.cumsum(runs, 0), mask=inside)
        total += tl.sum(runs, 0)


@triton.jit(do_not_specialize=["rows", "length", "count", "steps"])
def table_kernel(
    bounds, first, table, rows: tl.int64, length: tl.int64, count: tl.int64, steps: tl.int64, X: tl.constexpr
):  # fmt: skip
    """table [count, 4], see plan.Runs (programs: blocks of X runs); the row of a run by ``steps`` halvings."""
    run = tl.program_id(0).to(tl.int64) * X + tl.arange(0, X)
    row = run * 0
    past = row + rows
    for _ in range(steps):
        middle = (row + past) // 2
        open = row < past
        later = tl.load(first + middle + 1, mask=open, other=0) > run  # the first row that ends past the run
        past = tl.where(open & later, middle, past)
        row = tl.where(open & (later == 0), middle + 1, row)
    alive = (row < rows) & (run < count)
    begin = tl.load(bounds + row, mask=alive, other=0)
    begin += (run - tl.load(first + row, mask=alive, other=0)) * length
    end = tl.minimum(begin + length, tl.load(bounds + row + 1, mask=alive, other=0))
    last = tl.load(first + row + 1, mask=alive, other=0) == run + 1
    entry = table + run * 4
    tl.store(entry, tl.where(alive, row, 0), mask=run < count)
    tl.store(entry + 1, tl.where(alive, begin, 0), mask=run < count)
    tl.store(entry + 2, tl.where(alive, end, 0), mask=run < count)
    tl.store(entry + 3, tl.where(alive & last, 1, 0).to(tl.int64), mask=run < count)


def packed_table(bounds: Tensor, length: int, count: int) -> tuple[Tensor, Tensor]:
    """(table [count, 4], first [rows + 1]) of :class:`plan.Runs`, int64, for offsets [rows + 1] int64."""
    rows, bounds = bounds.shape[0] - 1, bounds.contiguous()
    first, table = torch.empty_like(bounds), bounds.new_empty(count, 4)
    if not rows:
        return table, first.zero_()
    start(first_kernel, (1,), bounds, first, rows, length, X=1024, num_warps=4)
    start(
        table_kernel, (-(-count // 128),), bounds, first, table, rows, length, count, rows.bit_length() + 1, X=128,
        num_warps=4,
    )  # fmt: skip
    return table, first
