"""The forward and the backward pass of a call: what the operators of ops.py run. Host code only."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from . import launch_causal, launch_causal_gradients, launch_full, launch_full_wide, launch_wide
from .launch import ParameterSums, Problem, on
from .ops import kept_chunks, kept_features, kept_inverses, kept_residual, shape_of


def _launches_of(problem: Problem, narrow: ModuleType) -> ModuleType:
    """The module whose function does it; ``narrow`` where the call is causal and one tile holds the buckets."""
    if not problem.causal:
        return launch_full if problem.shape.narrow else launch_full_wide
    return narrow if problem.shape.narrow else launch_wide


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
    p = Problem(query, key, value, hyperplanes, beta, log_decay, key_mask, bounds, key_bounds, causal, shape)
    p.keep, p.watched, p.final = keep, watched, final
    p.inverses = kept_inverses(query, value, hyperplanes, causal)
    p.features = kept_features(query, key, value, hyperplanes, causal, keep)
    p.inner, p.marks, p.fades = kept_chunks(
        key, value, hyperplanes, p.rows, log_decay is not None, bounds is not None, causal, keep
    )
    p.inner = kept_residual(query, value, hyperplanes, p.inner, keep)
    with on(query.device):
        result: tuple[Tensor, Tensor, Tensor, Tensor] = _launches_of(p, launch_causal).forward(p, (mass, value_sum))
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
    p = Problem(
        query, key, value, hyperplanes, beta, log_decay, key_mask, bounds, key_bounds, causal, shape, grad_out,
        out, inverses, features, inner, marks, fades,
    )  # fmt: skip
    p.final = final
    with on(query.device):
        sums = ParameterSums(p, need_planes)
        dq, dk, dv, decay, initial = _launches_of(p, launch_causal_gradients).backward(
            p, kept, (grad_mass, grad_value_sum), (final_mass, final_value_sum), sums
        )
        planes, of_beta = sums.reduced()
    return dq, dk, dv, planes, of_beta, decay, *initial
