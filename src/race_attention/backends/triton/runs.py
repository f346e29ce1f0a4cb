"""The runs of packed sequences, found on the device: no length ever reaches the host."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plan
from .start import start

#: An age at most: older than any run is long, and a number of 32 bits.
LONGEST = tl.constexpr(1 << 30)


@triton.jit(do_not_specialize=["rows", "length"])
def first_kernel(bounds, first, rows: tl.int64, length: tl.int64, X: tl.constexpr, STEP: tl.constexpr):
    """first [rows + 1]: how many runs come before each row, and in all (one program); STEP is 2 of spans."""
    total = tl.zeros([], tl.int64)
    tl.store(first, total)
    for begin in range(0, rows, X):
        row = begin + tl.arange(0, X)
        inside = row < rows
        at = bounds + row * STEP
        tokens = tl.load(at + 1, mask=inside, other=0) - tl.load(at, mask=inside, other=0)
        runs = (tokens + (length - 1)) // length
        tl.store(first + row + 1, total + tl.cumsum(runs, 0), mask=inside)
        total += tl.sum(runs, 0)


@triton.jit
def row_past(place, firsts, rows, steps):
    """The first row that ends past each place, of offsets [rows + 1], by ``steps`` halvings; else ``rows``."""
    row = place * 0
    past = row + rows
    for _ in range(steps):
        middle = (row + past) // 2
        open = row < past
        later = tl.load(firsts + middle + 1, mask=open, other=0) > place
        past = tl.where(open & later, middle, past)
        row = tl.where(open & (later == 0), middle + 1, row)
    return row


@triton.jit(do_not_specialize=["rows", "length", "count", "steps"])
def table_kernel(
    bounds, first, table, rows: tl.int64, length: tl.int64, count: tl.int64, steps: tl.int64, X: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """table [count, 4], see plan.Runs (programs: blocks of X runs); the row of a run by ``steps`` halvings."""
    run = tl.program_id(0).to(tl.int64) * X + tl.arange(0, X)
    row = row_past(run, first, rows, steps)
    alive = (row < rows) & (run < count)
    begin = tl.load(bounds + row * STEP, mask=alive, other=0)
    begin += (run - tl.load(first + row, mask=alive, other=0)) * length
    end = tl.minimum(begin + length, tl.load(bounds + row * STEP + 1, mask=alive, other=0))
    last = tl.load(first + row + 1, mask=alive, other=0) == run + 1
    entry = table + run * 4
    tl.store(entry, tl.where(alive, row, 0), mask=run < count)
    tl.store(entry + 1, tl.where(alive, begin, 0), mask=run < count)
    tl.store(entry + 2, tl.where(alive, end, 0), mask=run < count)
    tl.store(entry + 3, tl.where(alive & last, 1, 0).to(tl.int64), mask=run < count)


@triton.jit(do_not_specialize=["rows", "tokens", "steps"])
def ages_kernel(bounds, ages, rows: tl.int64, tokens: tl.int64, steps: tl.int64, X: tl.constexpr):
    """ages [tokens + 1]: how many tokens of its sequence come before each (programs: blocks of X tokens)."""
    token = tl.program_id(0).to(tl.int64) * X + tl.arange(0, X)
    row = row_past(token, bounds, rows, steps)
    age = token - tl.load(bounds + row, mask=row < rows, other=0)
    tl.store(ages + token, tl.minimum(age, LONGEST).to(tl.int32), mask=token <= tokens)


def ages_of(bounds: Tensor, tokens: int) -> Tensor:
    """How many tokens of its sequence come before each, [tokens + 1] int32, for offsets [rows + 1] int64.

    Never empty, so that a backward pass knows what it is given.
    """
    rows, bounds = bounds.shape[0] - 1, bounds.contiguous()
    ages = bounds.new_empty(tokens + 1, dtype=torch.int32)
    start(ages_kernel, (tokens // 256 + 1,), bounds, ages, rows, tokens, rows.bit_length() + 1, X=256, num_warps=4)
    return ages


def packed_table(bounds: Tensor, length: int, count: int) -> tuple[Tensor, Tensor]:
    """(table [count, 4], first [rows + 1]) of :class:`plan.Runs`, int64, for offsets [rows + 1] or spans [rows, 2]."""
    rows, step, bounds = plan.rows_of(bounds), bounds.ndim, bounds.contiguous()
    first, table = bounds.new_empty(rows + 1), bounds.new_empty(count, 4)
    if not rows:
        return table, first.zero_()
    start(first_kernel, (1,), bounds, first, rows, length, X=1024, STEP=step, num_warps=4)
    start(
        table_kernel, (-(-count // 128),), bounds, first, table, rows, length, count, rows.bit_length() + 1, X=128,
        STEP=step, num_warps=4,
    )  # fmt: skip
    return table, first
