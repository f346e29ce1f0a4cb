"""Launching the kernels of short packed sequences where every query sees every key."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import full_short, plan
from .launch import Problem, pointer_or
from .start import start

#: (block, warps, stages), of 16-bit inputs with D and Dv up to 128: the longer the block, the more a program spills,
#: which holds the sums of a sequence and their gradients. Wider ones have twice the warps, float32 blocks of 16.
CONFIGS = {"forward": (64, 4, 1), "backward": (32, 4, 1)}
#: Likewise where sequences have no more tokens on average than such a block.
VERY_SHORT = (16, 4, 1)


def spans_of(bounds: Tensor, key_bounds: Tensor, queries: int, keys: int) -> Tensor:
    """(first token, end) of the long rows' queries and keys, [2, rows, 2] int64, and behind them (0, 0)."""
    room = plan.long_rows(queries, keys)
    spans = bounds.new_empty(2, room, 2)
    start(
        full_short.long_rows_kernel, (1,), bounds.contiguous(), key_bounds.contiguous(), *spans.unbind(),
        plan.rows_of(bounds), plan.SHORT, room, X=4096, num_warps=16,
    )  # fmt: skip
    return spans


def programs_of(p: Problem) -> int:
    """The programs of a head; each takes every so many-th row."""
    assert p.all_bounds is not None
    return min(plan.rows_of(p.all_bounds[0]), max(1, plan.SHORT_PROGRAMS // p.groups))


def _options(p: Problem, kernel: str) -> dict[str, Any]:
    shape = p.shape
    very_short = max(p.queries, p.keys) <= VERY_SHORT[0] * _of_rows(p)[0]
    block, warps, stages = VERY_SHORT if very_short else CONFIGS[kernel]
    if shape.dtype == torch.float32:
        block = min(block, 16)
    return {
        **shape.constants(tiles=False),
        "SHARE": p.share,
        "C": block,
        "ALIGNED": p.aligned,
        "HAS_MASK": p.key_mask is not None,
        "num_warps": min(8, warps if max(shape.dim, shape.value_dim) <= 128 else 2 * warps),
        "num_stages": stages,
        **plan.alike(shape.precision),
    }


def _of_rows(p: Problem) -> tuple[int, ...]:
    assert p.all_bounds is not None
    return plan.rows_of(p.all_bounds[0]), programs_of(p), plan.SHORT, p.groups


def forward(p: Problem, out: Tensor) -> None:
    """Writes out of the short rows."""
    assert p.all_bounds is not None
    if programs_of(p) * p.groups:
        start(
            full_short.forward_kernel, (programs_of(p) * p.groups,),
            p.query, p.key, p.value, pointer_or(p.key_mask, p.beta), p.hyperplanes, p.beta, *p.all_bounds, out,
            *p.query.stride()[1:3], *p.key.stride()[1:3], *p.value.stride()[1:3], *p.mask_strides[1:],
            *_of_rows(p), **_options(p, "forward"),
        )  # fmt: skip


def backward(p: Problem, grads: tuple[Tensor, Tensor, Tensor], parts: tuple[Tensor, Tensor], first: int) -> None:
    """Writes the gradients of the short rows, and of the parameters' those parts from ``first`` on."""
    assert p.all_bounds is not None
    assert p.grad_out is not None
    planes, of_beta = parts
    need_planes = planes.numel() > 0
    if programs_of(p) * p.groups:
        start(
            full_short.backward_kernel, (programs_of(p) * p.groups,),
            p.query, p.key, p.value, pointer_or(p.key_mask, p.beta), p.grad_out, p.hyperplanes, p.beta, *p.all_bounds,
            *grads, planes[first:] if need_planes else planes, of_beta[first:],
            *p.query.stride()[1:3], *p.key.stride()[1:3], *p.value.stride()[1:3], *p.mask_strides[1:],
            *p.grad_out.stride()[1:3], *_of_rows(p), NEED_PLANES=need_planes, **_options(p, "backward"),
        )  # fmt: skip
