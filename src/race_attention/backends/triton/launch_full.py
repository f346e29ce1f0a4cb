"""Launching the kernels of calls that are not causal, for heads whose buckets fit one tile."""

from __future__ import annotations

import torch
from torch import Tensor

from . import full, launch_short, plan
from .launch import ParameterSums, Problem, pointer_or
from .launch_states import scan
from .ops import kept_states
from .start import start

State = tuple[Tensor | None, Tensor | None]


def forward(p: Problem, initial: State) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, final mass, final value_sum, the state of each row's keys)."""
    runs = p.runs(of_keys=True)
    parts = _accumulate(p, runs)
    seen = kept_states(p.query, p.value, p.hyperplanes, p.rows, causal=False)
    mass, value_sum = scan(p, runs, parts, p.beta, seen, initial)
    out = _readout(p, p.runs(of_keys=False), seen)
    if p.all_bounds is not None:
        launch_short.forward(p, out)
    return out, mass, value_sum, seen


def _accumulate(p: Problem, runs: plan.Runs) -> Tensor:
    """The state that the keys of each run leave."""
    parts = p.new(max(runs.count, 1), p.groups, p.shape.state_size)
    if runs.count * p.groups:
        start(
            full.accumulate_kernel, (runs.count * p.groups,),
            p.key, p.value, pointer_or(p.key_mask, p.beta), p.hyperplanes, p.beta, pointer_or(runs.table, p.beta),
            parts, *p.key.stride()[:3], *p.value.stride()[:3], *p.mask_strides,
            p.keys, runs.length, runs.per_row, p.groups, HAS_MASK=p.key_mask is not None,
            **p.options("full_accumulate", tiles=False),
        )  # fmt: skip
    return parts


def _readout(p: Problem, runs: plan.Runs, seen: Tensor) -> Tensor:
    """out of the queries, from the state of their row."""
    out = p.query.new_empty(p.batch, p.queries, p.heads, p.shape.value_dim)
    if runs.count * p.heads:
        start(
            full.readout_kernel, (runs.count * p.heads,),
            p.query, p.hyperplanes, p.beta, pointer_or(runs.table, p.beta), seen, out, *p.query.stride()[:3],
            p.queries, runs.length, runs.per_row, p.groups, SHARE=p.share,
            **p.options("full_readout", tiles=False),
        )  # fmt: skip
    return out


def backward(
    p: Problem, kept: Tensor, grad_final: State, final: State, sums: ParameterSums
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """(dq, dk, dv, nothing, the gradient of the initial state); adds to ``sums``."""
    assert p.grad_out is not None
    runs, key_runs, shape = p.runs(of_keys=False), p.runs(of_keys=True), p.shape
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (p.query, p.key, p.value))
    adjoints = p.new(max(runs.count, 1), p.heads, shape.state_size)
    of_queries = sums.parts(runs, p.heads)
    if runs.count * p.heads:
        start(
            full.query_gradient_kernel, (runs.count * p.heads,),
            p.query, p.grad_out, p.hyperplanes, p.beta, pointer_or(runs.table, p.beta), kept, dq, adjoints,
            *of_queries, *p.query.stride()[:3], *p.grad_out.stride()[:3],
            p.queries, runs.length, runs.per_row, p.groups, SHARE=p.share,
            NEED_PLANES=sums.need_planes, **p.options("full_query_gradient", tiles=False),
        )  # fmt: skip
    after = p.new(max(p.rows, 1), p.groups, shape.state_size)
    initial = scan(p, runs, adjoints, p.beta, after, grad_final, share=p.share, reverse=True)
    short = 0 if p.all_bounds is None else launch_short.programs_of(p)
    of_keys = sums.parts(key_runs, p.groups, short)
    if key_runs.count * p.groups:
        start(
            full.key_gradient_kernel, (key_runs.count * p.groups,),
            p.key, p.value, pointer_or(p.key_mask, p.beta), p.hyperplanes, p.beta,
            pointer_or(key_runs.table, p.beta), after, dk, dv,
            *of_keys, *p.key.stride()[:3], *p.value.stride()[:3], *p.mask_strides,
            p.keys, key_runs.length, key_runs.per_row, p.groups, HAS_MASK=p.key_mask is not None,
            NEED_PLANES=sums.need_planes, **p.options("full_key_gradient", tiles=False),
        )  # fmt: skip
    if short:
        launch_short.backward(p, (dq, dk, dv), of_keys, key_runs.count)
    return dq, dk, dv, p.new(0), initial
