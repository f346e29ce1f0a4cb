"""Launching the causal kernels of heads whose buckets fit one tile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import causal, causal_gradients, plan
from .launch import ParameterSums, Problem, at_the_end, pointer_or
from .launch_states import accumulate, run_totals, scan
from .ops import kept_states
from .start import start

State = tuple[Tensor | None, Tensor | None]


def forward(p: Problem, initial: State) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, final mass, final value_sum, the state before each run); fills ``p.inverses``."""
    runs = p.runs(of_keys=True)
    features = _room_for_features(p, p.groups)
    parts, totals = accumulate(p, runs, features)
    before = kept_states(p.query, p.value, p.hyperplanes, p.rows, causal=True)
    mass, value_sum = scan(p, runs, parts, totals, before, initial)
    return readout(p, runs, features, before), mass, value_sum, before


def readout(p: Problem, runs: plan.Runs, features: Tensor, before: Tensor) -> Tensor:
    """out of the queries, from the state before their run and the keys of it."""
    out = p.query.new_empty(p.batch, p.queries, p.heads, p.shape.value_dim)
    if runs.count * p.heads:
        start(
            causal.readout_kernel, (runs.count * p.heads,),
            p.query, features, p.value, pointer_or(p.key_mask, p.beta), pointer_or(p.log_decay, p.beta),
            p.hyperplanes, p.beta, pointer_or(runs.table, p.beta), before, out, p.inverses,
            *p.query.stride()[:3], *p.value.stride()[:3], *p.mask_strides, *p.decay_strides,
            p.queries, runs.length, runs.per_row, p.groups, SHARE=p.share,
            **p.conditions, **_options(p, "causal_readout"),
        )  # fmt: skip
    return out


def backward(
    p: Problem, kept: Tensor, grad_final: State, final: State, sums: ParameterSums
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """(dq, dk, dv, the gradient of log_decay, that of the initial state); adds to ``sums``."""
    assert p.inverses is not None
    runs = p.runs(of_keys=True)
    of_queries, of_keys = sums.parts(runs, p.heads), sums.parts(runs, p.groups)
    deltas, query_features = torch.empty_like(p.inverses), _room_for_features(p, p.heads)
    adjoints = _adjoints(p, runs, deltas, query_features)
    after = p.new_states(max(runs.count, 1), p.groups)
    initial = scan(p, runs, adjoints, run_totals(p, runs), after, grad_final, share=p.share, reverse=True)
    del adjoints
    dk, dv, decay, key_features = _key_gradients(
        p, runs, kept, after, at_the_end(p, final, grad_final), deltas, query_features, of_keys
    )
    del after, query_features
    return _query_gradients(p, runs, kept, deltas, key_features, of_queries), dk, dv, decay, initial


def _adjoints(p: Problem, runs: plan.Runs, deltas: Tensor, features: Tensor) -> Tensor:
    """The gradient of the state before each run from its own queries; fills ``deltas`` and ``features``."""
    assert p.grad_out is not None
    adjoints = p.new(max(runs.count, 1), p.heads, p.shape.state_size)
    if runs.count * p.heads:
        start(
            causal.adjoint_kernel, (runs.count * p.heads,),
            p.query, p.grad_out, p.out, p.inverses, pointer_or(p.log_decay, p.beta), p.hyperplanes, p.beta,
            pointer_or(runs.table, p.beta), adjoints, deltas, features,
            *p.query.stride()[:3], *p.grad_out.stride()[:3], *p.decay_strides,
            p.queries, runs.length, runs.per_row, p.groups, SHARE=p.share,
            HAS_DECAY=p.log_decay is not None, **_options(p, "causal_adjoint"),
        )  # fmt: skip
    return adjoints


def _key_gradients(
    p: Problem, runs: plan.Runs, before: Tensor, after: Tensor, at_the_end: Tensor, deltas: Tensor, features: Tensor,
    parts: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dk, dv, the gradient of log_decay, the keys' buckets)."""
    assert p.grad_out is not None
    dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (p.key, p.value))
    decay = p.new(*p.key.shape[:3]) if p.log_decay is not None else p.new(0)
    key_features = _room_for_features(p, p.groups)
    if runs.count * p.groups:
        start(
            causal_gradients.key_gradient_kernel, (runs.count * p.groups,),
            features, p.key, p.value, p.grad_out, pointer_or(p.key_mask, p.beta), pointer_or(p.log_decay, p.beta),
            p.hyperplanes, p.beta, pointer_or(runs.table, p.beta), before, after, deltas, at_the_end,
            key_features, dk, dv, decay, *parts,
            *p.key.stride()[:3], *p.value.stride()[:3], *p.grad_out.stride()[:3], *p.mask_strides, *p.decay_strides,
            p.queries, runs.length, runs.per_row, p.groups, SHARE=p.share,
            **p.conditions, NEED_PLANES=parts[0].numel() > 0, **_options(p, "causal_key_gradient"),
        )  # fmt: skip
    return dk, dv, decay, key_features


def _query_gradients(
    p: Problem, runs: plan.Runs, before: Tensor, deltas: Tensor, features: Tensor, parts: tuple[Tensor, Tensor]
) -> Tensor:
    assert p.grad_out is not None
    dq = torch.empty_like(p.query, memory_format=torch.contiguous_format)
    if runs.count * p.heads:
        start(
            causal_gradients.query_gradient_kernel, (runs.count * p.heads,),
            p.query, features, p.value, p.grad_out, pointer_or(p.key_mask, p.beta), pointer_or(p.log_decay, p.beta),
            p.hyperplanes, p.beta, pointer_or(runs.table, p.beta), before, deltas, p.inverses, dq, *parts,
            *p.query.stride()[:3], *p.value.stride()[:3], *p.grad_out.stride()[:3], *p.mask_strides, *p.decay_strides,
            p.queries, runs.length, runs.per_row, p.groups, SHARE=p.share,
            **p.conditions, NEED_PLANES=parts[0].numel() > 0, **_options(p, "causal_query_gradient"),
        )  # fmt: skip
    return dq


def _room_for_features(p: Problem, heads: int) -> Tensor:
    """Buckets of each token and head, [B, heads, T, SW], as operands of the kernels' products."""
    dtype = torch.bfloat16 if p.shape.precision == "bf16" else torch.float32
    return p.new(p.batch, heads, p.queries, p.shape.row, dtype=dtype)


def _options(p: Problem, kernel: str) -> dict[str, Any]:
    """Heads are cut in halves, each at least 16 wide."""
    options = p.options(kernel, tiles=False)
    return options | {"DP": max(32, options["DP"]), "VP": max(32, options["VP"]), "SW": p.shape.row}
