"""The forward and the backward pass of a call: what the operators of ops.py run. Host code only."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import (
    launch_causal,
    launch_causal_gradients,
    launch_full,
    launch_full_wide,
    launch_short,
    launch_wide,
    runs,
)
from .launch import ParameterSums, Problem, on
from .ops import SPARE, goes_without_states, kept_chunks, kept_features, kept_inverses, kept_residual, shape_of


def _launches_of(problem: Problem, narrow: ModuleType) -> ModuleType:
    """The module whose function does it; ``narrow`` where the call is causal and one tile holds the buckets."""
    if not problem.causal:
        return launch_full if problem.shape.narrow else launch_full_wide
    return narrow if problem.shape.narrow else launch_wide


def _packing(causal: bool, query: Tensor, key: Tensor, bounds: Tensor | None, key_bounds: Tensor | None) -> Tensor:
    """How packed sequences that neither take nor give a state are told apart: ages, or the spans of long ones."""
    assert bounds is not None
    assert key_bounds is not None
    if causal:
        return runs.ages_of(bounds, query.shape[1])
    return launch_short.spans_of(bounds, key_bounds, query.shape[1], key.shape[1])


def forward(
    query: Tensor, key: Tensor, value: Tensor, hyperplanes: Tensor, beta: Tensor, log_decay: Tensor | None,
    key_mask: Tensor | None, bounds: Tensor | None, key_bounds: Tensor | None, mass: Tensor | None,
    value_sum: Tensor | None, causal: bool, keep: bool = True, watched: bool = True,
    final: bool = True,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What the operator ``triton_forward`` returns: out, final mass and value_sum, and what the backward pass reads.

    Without ``keep`` some of the last is not computed, and holds anything; not ``watched``, it is as small as can be.
    Without ``final`` the final state is empty.
    """
    shape = shape_of(query, value, hyperplanes)
    packed = None
    if goes_without_states(shape, bounds is not None, mass, value_sum, final):
        with on(query.device):
            packed = _packing(causal, query, key, bounds, key_bounds)
    p = Problem(query, key, value, hyperplanes, beta, log_decay, key_mask, bounds, key_bounds, causal, shape)
    p.keep, p.watched, p.final = keep, watched, final
    if packed is None:
        p.inverses = kept_inverses(query, value, hyperplanes, causal)
    else:
        p.told_apart(packed)
    p.features = kept_features(query, key, value, hyperplanes, causal, keep)
    spare = SPARE if watched else 0
    p.inner, p.marks, p.fades = kept_chunks(
        key, value, hyperplanes, p.rows, log_decay is not None, p.bounds is not None, causal, keep, spare
    )
    if watched:  # an operator's result is the same every time, all of it
        for x in (p.inner, p.marks):
            x[-spare:].zero_()
    p.inner = kept_residual(query, value, hyperplanes, p.inner, keep)
    with on(query.device):
        result: tuple[Tensor, Tensor, Tensor, Tensor] = _launches_of(p, launch_causal).forward(p, (mass, value_sum))
    assert p.inverses is not None
    return *result, p.inverses, p.features, p.inner, p.marks, p.fades


def backward(
    grad_out: Tensor, grad_mass: Tensor | None, grad_value_sum: Tensor | None, query: Tensor, key: Tensor,
    value: Tensor, hyperplanes: Tensor, beta: Tensor, log_decay: Tensor | None, key_mask: Tensor | None,
    bounds: Tensor | None, key_bounds: Tensor | None, final_mass: Tensor | None, final_value_sum: Tensor | None,
    out: Tensor | None, kept: Tensor, inverses: Tensor, features: Tensor,
    inner: Tensor, marks: Tensor, fades: Tensor, causal: bool, need_planes: bool, final: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What the operator ``triton_backward`` returns; without ``final`` the gradient of the initial state is empty.

    From the queries comes the gradient of the state before each run, and, after the scan over those, that of the keys.
    """
    shape = shape_of(query, value, hyperplanes)
    packed = inverses if bounds is not None and shape.narrow and inverses.numel() else None
    p = Problem(
        query, key, value, hyperplanes, beta, log_decay, key_mask, bounds, key_bounds, causal, shape, grad_out,
        out, inverses, features, inner, marks, fades,
    )  # fmt: skip
    p.final = final and packed is None
    if packed is not None:
        p.told_apart(packed)
    with on(query.device):
        sums = ParameterSums(p, need_planes)
        dq, dk, dv, decay, initial = _launches_of(p, launch_causal_gradients).backward(
            p, kept, (grad_mass, grad_value_sum), (final_mass, final_value_sum), sums
        )
        planes, of_beta = sums.reduced()
    if final and packed is not None and bounds is not None:  # of states that nobody gave
        size = bounds.shape[0] - 1, p.groups, *hyperplanes.shape[1:2], 1 << hyperplanes.shape[2]
        initial = tuple(p.new(*x, dtype=torch.float64).zero_() for x in (size, (*size, shape.value_dim)))
    return dq, dk, dv, planes, of_beta, decay, *initial
