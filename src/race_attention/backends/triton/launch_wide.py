"""Launching the causal kernels of heads whose buckets fill several tiles: runs of one block."""

from __future__ import annotations

import torch
from torch import Tensor

from . import plan, wide
from .launch import ParameterSums, Problem, at_the_end, pointer_or
from .launch_states import accumulate, run_totals, scan
from .ops import kept_states
from .start import start

State = tuple[Tensor | None, Tensor | None]


def forward(p: Problem, initial: State) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, final mass, final value_sum, the state before each run)."""
    runs = p.runs(of_keys=True)
    parts, totals = accumulate(p, runs)
    before = kept_states(p.query, p.value, p.hyperplanes, p.rows, causal=True)
    if p.bounds is not None:
        before.zero_()  # those of empty runs are read
    mass, value_sum = scan(p, runs, parts, totals, before, initial)
    return readout(p, runs, before), mass, value_sum, before


def readout(p: Problem, runs: plan.Runs, before: Tensor) -> Tensor:
    """out of the queries, from the state before their run and the keys of it."""
    out = p.query.new_empty(p.batch, p.queries, p.heads, p.shape.value_dim)
    if runs.count * p.heads:
        start(
            wide.readout_kernel, (runs.count * p.heads,),
            p.query, p.key, p.value, pointer_or(p.key_mask, p.beta), pointer_or(p.log_decay, p.beta), p.hyperplanes,
            p.beta, pointer_or(runs.table, p.beta), before, out,
            *p.query.stride()[:3], *p.key.stride()[:3], *p.value.stride()[:3], *p.mask_strides, *p.decay_strides,
            p.queries, runs.length, runs.per_row, p.groups, SHARE=p.share,
            **p.conditions, **p.options("causal_readout", tiles=True),
        )  # fmt: skip
    return out


def backward(
    p: Problem, kept: Tensor, grad_final: State, final: State, sums: ParameterSums
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """(dq, dk, dv, the gradient of log_decay, that of the initial state); adds to ``sums``."""
    assert p.grad_out is not None
    runs, shape = p.runs(of_keys=True), p.shape
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (p.query, p.key, p.value))
    decay = p.new(*p.key.shape[:3]) if p.log_decay is not None else p.new(0)
    adjoints = p.new(max(runs.count, 1), p.heads, shape.state_size)
    per_query = p.new(2, p.batch, p.heads, p.queries)
    inputs: tuple[Tensor, ...] = (
        p.query,
        p.key,
        p.value,
        p.grad_out,
        pointer_or(p.key_mask, p.beta),
        pointer_or(p.log_decay, p.beta),
    )
    inputs += (p.hyperplanes, p.beta, pointer_or(runs.table, p.beta))
    numbers = (
        *p.query.stride()[:3], *p.key.stride()[:3], *p.value.stride()[:3], *p.grad_out.stride()[:3],
        *p.mask_strides, *p.decay_strides, p.batch, p.queries, runs.length, runs.per_row, p.groups,
    )  # fmt: skip
    conditions = p.conditions | {"NEED_PLANES": sums.need_planes, "SHARE": p.share}
    if runs.count * p.heads:
        options = p.options("causal_query_gradient", tiles=True)
        start(
            wide.query_gradient_kernel, (runs.count * p.heads,),
            *inputs, kept, dq, adjoints, per_query, *sums.parts(runs, p.heads), *numbers, **conditions, **options
        )  # fmt: skip
    totals = run_totals(p, runs)
    after = p.new_states(max(runs.count, 1), p.groups)
    initial = scan(p, runs, adjoints, totals, after, grad_final, share=p.share, reverse=True)
    if runs.count * p.groups:
        options = p.options("causal_key_gradient", tiles=True)
        start(
            wide.key_gradient_kernel, (runs.count * p.groups,),
            *inputs, kept, after, per_query, at_the_end(p, final, grad_final), dk, dv, decay,
            *sums.parts(runs, p.groups), *numbers, **conditions, **options,
        )  # fmt: skip
    return dq, dk, dv, decay, initial
