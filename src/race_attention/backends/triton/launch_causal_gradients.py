"""Launching the causal backward kernels of heads whose buckets fit one tile."""

from __future__ import annotations

import torch
from torch import Tensor

from . import causal_adjoint, causal_gradients, plan
from .launch import ParameterSums, Problem, at_the_end, pointer_or
from .launch_causal import State, options
from .launch_states import run_totals, scan
from .start import start


def backward(
    p: Problem, kept: Tensor, grad_final: State, final: State, sums: ParameterSums
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """(dq, dk, dv, the gradient of log_decay, that of the initial state); adds to ``sums``."""
    assert p.inverses is not None
    runs = p.runs(of_keys=True)
    of_queries, of_keys = sums.parts(runs, p.heads), sums.parts(runs, p.groups)
    seen, adjoints = _adjoints(p, runs)
    dq, deltas = _query_gradients(p, runs, kept, seen, adjoints, of_queries)
    after = p.new_states(max(runs.count, 1), p.groups)
    initial = scan(p, runs, adjoints, run_totals(p, runs), after, grad_final, share=p.share, reverse=True)
    del adjoints
    at_end = at_the_end(p, final, grad_final)
    dk, dv, decay = _key_gradients(p, runs, kept, after, at_end, deltas, seen, of_keys)
    return dq, dk, dv, decay, initial


def _adjoints(p: Problem, runs: plan.Runs) -> tuple[Tensor, Tensor]:
    """The queries' buckets over their denominators; and from a run's queries the gradient of the state before it.

    Of that the value sums' part, with room for the mass's.
    """
    assert p.grad_out is not None
    assert p.features is not None
    features = p.features.new_empty(p.batch, p.heads, p.queries, p.shape.row)
    adjoints = p.new(max(runs.count, 1), p.heads, p.shape.state_size)
    if runs.count * p.heads:
        start(
            causal_adjoint.adjoint_kernel, (runs.count * p.heads,),
            p.query, p.grad_out, p.inverses, pointer_or(p.log_decay, p.beta), p.hyperplanes, p.beta,
            pointer_or(runs.table, p.beta), adjoints, features,
            *p.query.stride()[:3], *p.grad_out.stride()[:3], *p.decay_strides,
            p.queries, runs.length, runs.per_row, p.groups, SHARE=p.share,
            HAS_DECAY=p.log_decay is not None, **options(p, "causal_adjoint"),
        )  # fmt: skip
    return features, adjoints


def _query_gradients(
    p: Problem, runs: plan.Runs, before: Tensor, seen: Tensor, adjoints: Tensor, parts: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """(dq, grad_out . out [B, H, T]); completes ``adjoints`` with the gradient of the mass."""
    assert p.grad_out is not None
    assert p.inverses is not None
    dq, deltas = torch.empty_like(p.query, memory_format=torch.contiguous_format), torch.empty_like(p.inverses)
    if runs.count * p.heads:
        start(
            causal_gradients.query_gradient_kernel, (runs.count * p.heads,),
            p.query, seen, p.features, p.value, p.grad_out, pointer_or(p.key_mask, p.beta),
            pointer_or(p.log_decay, p.beta), p.hyperplanes, p.beta, pointer_or(runs.table, p.beta), before, adjoints,
            deltas, dq, *parts,
            *p.query.stride()[:3], *p.value.stride()[:3], *p.grad_out.stride()[:3], *p.mask_strides, *p.decay_strides,
            p.queries, runs.length, runs.per_row, p.groups, SHARE=p.share, **p.conditions,
            NEED_PLANES=parts[0].numel() > 0, ROWS=p.shape.rows, **options(p, "causal_query_gradient"),
        )  # fmt: skip
    return dq, deltas


def _key_gradients(
    p: Problem, runs: plan.Runs, before: Tensor, after: Tensor, at_the_end: Tensor, deltas: Tensor, seen: Tensor,
    parts: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dk, dv, the gradient of log_decay)."""
    assert p.grad_out is not None
    dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (p.key, p.value))
    decay = p.new(*p.key.shape[:3]) if p.log_decay is not None else p.new(0)
    if runs.count * p.groups:
        start(
            causal_gradients.key_gradient_kernel, (runs.count * p.groups,),
            seen, p.features, p.key, p.value, p.grad_out, pointer_or(p.key_mask, p.beta),
            pointer_or(p.log_decay, p.beta), p.hyperplanes, p.beta, pointer_or(runs.table, p.beta), before, after,
            deltas, at_the_end, dk, dv, decay, *parts,
            *p.key.stride()[:3], *p.value.stride()[:3], *p.grad_out.stride()[:3], *p.mask_strides, *p.decay_strides,
            p.queries, runs.length, runs.per_row, p.groups, SHARE=p.share, **p.conditions,
            NEED_PLANES=parts[0].numel() > 0, ROWS=p.shape.rows, **options(p, "causal_key_gradient"),
        )  # fmt: skip
    return dk, dv, decay
