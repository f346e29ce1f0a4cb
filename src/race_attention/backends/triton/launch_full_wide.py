"""Launching the kernels of calls that are not causal, for heads whose buckets fill several tiles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import configs, full_wide, plan, wide
from .launch import ParameterSums, Problem, pointer_or
from .launch_states import scan
from .ops import kept_states
from .start import start
from .wide_configs import compiled, group_of, planes_of, tiles_of
from .wide_shared import has_residual, planes_of_runs, residual_of

State = tuple[Tensor | None, Tensor | None]


def forward(p: Problem, initial: State) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, final mass, final value_sum, the state of each row's keys); fills ``p.inverses``."""
    runs = _runs(p, of_keys=True)
    parts = p.new(max(runs.count, 1), p.groups, p.shape.state_size)
    _accumulate(p, runs, True, p.key, p.value, None, parts)
    seen = kept_states(p.query, p.value, p.hyperplanes, p.rows, causal=False)
    mass, value_sum = scan(p, runs, parts, p.beta, seen, initial)
    return _readout(p, seen), mass, value_sum, seen


def backward(
    p: Problem, kept: Tensor, grad_final: State, final: State, sums: ParameterSums
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """(dq, dk, dv, nothing, the gradient of the initial state); adds to ``sums``."""
    assert p.grad_out is not None
    runs, key_runs = _runs(p, of_keys=False), _runs(p, of_keys=True)
    dq, deltas = _query_gradient(p, runs, kept, sums)
    adjoints = p.new(max(runs.count, 1), p.groups, p.shape.state_size)
    _accumulate(p, runs, False, p.query, p.grad_out, deltas, adjoints)
    after = p.new(max(p.rows, 1), p.groups, p.shape.state_size)
    initial = scan(p, runs, adjoints, p.beta, after, grad_final, reverse=True)
    dk, dv = _key_gradient(p, key_runs, after, sums)
    return dq, dk, dv, p.new(0), initial


def _runs(p: Problem, of_keys: bool) -> plan.Runs:
    tokens, bounds = (p.keys, p.key_bounds) if of_keys else (p.queries, p.bounds)
    return plan.runs_of(p.batch, tokens, p.groups, plan.SUB_RUN, configs.LONGEST_RUN, bounds)


def _options(p: Problem, config: tuple[int, ...], group: int) -> dict[str, Any]:
    """The options of a kernel that takes GB buckets at a time."""
    always = p.shape.constants(False)
    options = {name: always[name] for name in ("L", "P", "D", "DP", "LIFT", "V", "PRECISION")}
    return options | {
        "N": planes_of(p.shape, group),
        "S": p.shape.buckets,
        "ALIGNED": p.aligned,
        "PACKED": p.bounds is not None,
        **compiled(config),
    }


def _accumulate(
    p: Problem, runs: plan.Runs, of_keys: bool, x: Tensor, rows: Tensor, deltas: Tensor | None, parts: Tensor
) -> None:
    """The state that the keys of each run leave, or the gradient of the state that its queries do."""
    tiles = tiles_of(p.shape)
    config = tiles.accumulate if of_keys else tiles.accumulate_queries
    block, buckets, columns = config[:3]
    nothing = p.beta
    if runs.count * p.groups:
        start(
            wide.accumulate_kernel,
            (runs.count * p.groups * (tiles.width // buckets) * -(-p.shape.value_dim // columns),),
            x, rows, pointer_or(p.key_mask, p.beta), p.hyperplanes, p.beta, pointer_or(deltas, p.beta),
            pointer_or(p.inverses, p.beta), nothing, pointer_or(runs.table, p.beta), nothing, parts, nothing, nothing,
            *x.stride()[:3], *rows.stride()[:3], *p.mask_strides,
            0, 0, x.shape[1], runs.length, plan.SUB_RUN, runs.per_row, p.groups,
            SHARE=1 if of_keys else p.share, VB=columns, SB=buckets, C=block, MIRRORED=not of_keys, CAUSAL=False,
            HAS_MASK=of_keys and p.key_mask is not None, HAS_DECAY=False, SW=tiles.width,
            PL=0, HW=0, FW=0, HALVES=False, **_options(p, config, buckets),
        )  # fmt: skip


def _readout(p: Problem, seen: Tensor) -> Tensor:
    """out of the queries, from the state of their row."""
    runs, config = _runs(p, of_keys=False), tiles_of(p.shape).full_readout
    block, buckets, columns = config[:3]
    out = p.query.new_empty(p.batch, p.queries, p.heads, p.shape.value_dim)
    blocks, group = -(-runs.length // block), group_of(p.shape, buckets, False)
    if runs.count * p.heads:
        start(
            full_wide.readout_kernel, (runs.count * blocks * p.heads * -(-p.shape.value_dim // columns),),
            p.query, p.hyperplanes, p.beta, pointer_or(runs.table, p.beta), seen, out,
            residual_of(p), p.inverses,
            *p.query.stride()[:3], p.queries, runs.length, runs.per_row, p.groups, blocks,
            SHARE=p.share, VB=columns, GB=group, SB=buckets, C=block, RESIDUAL=has_residual(p),
            **_options(p, config, group),
        )  # fmt: skip
    return out


def _gradient_options(p: Problem, runs: plan.Runs, config: tuple[int, ...]) -> tuple[int, dict[str, Any]]:
    """(blocks of a run, the options of the kernels of gradients)."""
    group = group_of(p.shape, config[1], False)
    options = {"GB": group, "SB": config[1], "C": config[0], "VP": plan.power_of_two(p.shape.value_dim, 16)}
    return -(-runs.length // config[0]), options | _options(p, config, group)


def _query_gradient(p: Problem, runs: plan.Runs, kept: Tensor, sums: ParameterSums) -> tuple[Tensor, Tensor]:
    """(dq, grad_out . out [B, H, T])."""
    assert p.grad_out is not None
    config = tiles_of(p.shape).full_query_gradient
    blocks, options = _gradient_options(p, runs, config)
    dq = torch.empty_like(p.query, memory_format=torch.contiguous_format)
    deltas = p.new(p.batch, p.heads, p.queries)
    of_beta = p.new(runs.count * blocks, p.heads).zero_()
    grad_y = _grad_y(p, p.query, options, sums.need_planes)
    if of_beta.numel():
        start(
            full_wide.query_gradient_kernel, (of_beta.numel(),),
            p.query, p.grad_out, p.out, residual_of(p), p.hyperplanes, p.beta, deltas, p.inverses,
            pointer_or(runs.table, p.beta), kept, dq, grad_y, of_beta, *p.query.stride()[:3], *p.grad_out.stride()[:3],
            p.queries, runs.length, runs.per_row, p.groups, blocks,
            SHARE=p.share, NEED_PLANES=sums.need_planes, RESIDUAL=has_residual(p), **options,
        )  # fmt: skip
    _parameters(p, runs, p.query, p.share, grad_y, of_beta, options["GB"], sums)
    return dq, deltas


def _key_gradient(p: Problem, runs: plan.Runs, after: Tensor, sums: ParameterSums) -> tuple[Tensor, Tensor]:
    """(dk, dv)."""
    config = tiles_of(p.shape).full_key_gradient
    blocks, options = _gradient_options(p, runs, config)
    dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (p.key, p.value))
    of_beta = p.new(runs.count * blocks, p.groups).zero_()
    grad_y = _grad_y(p, p.key, options, sums.need_planes)
    if of_beta.numel():
        start(
            full_wide.key_gradient_kernel, (of_beta.numel(),),
            p.key, p.value, pointer_or(p.key_mask, p.beta), p.hyperplanes, p.beta, pointer_or(runs.table, p.beta),
            after, dk, dv, grad_y, of_beta, *p.key.stride()[:3], *p.value.stride()[:3], *p.mask_strides,
            p.keys, runs.length, runs.per_row, p.groups, blocks,
            HAS_MASK=p.key_mask is not None, NEED_PLANES=sums.need_planes, **options,
        )  # fmt: skip
    _parameters(p, runs, p.key, 1, grad_y, of_beta, options["GB"], sums)
    return dk, dv


def _grad_y(p: Problem, x: Tensor, options: dict[str, Any], wanted: bool) -> Tensor:
    """Room for the gradients of projections, [lines, heads, groups of planes], where they are wanted."""
    if not wanted:
        return x
    width = -(-p.shape.buckets // options["GB"]) * options["N"]
    return p.new(x.shape[0] * x.shape[1], x.shape[2], width)


def _parameters(
    p: Problem, runs: plan.Runs, x: Tensor, share: int, grad_y: Tensor, of_beta: Tensor, group: int,
    sums: ParameterSums,
) -> None:  # fmt: skip
    """From the blocks' parts of the parameters' gradients the runs'."""
    planes, beta = sums.parts(runs, x.shape[2])
    if not runs.count:
        return
    beta[:] = of_beta.view(runs.count, -1, x.shape[2]).sum(1)
    if sums.need_planes:
        table = pointer_or(runs.table, p.beta)
        lengths = (0, x.shape[1], runs.length, runs.per_row, p.groups)
        planes_of_runs(p, x, share, grad_y, table, planes.zero_(), lengths, runs.count, group)
