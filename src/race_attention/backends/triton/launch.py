"""Launching the kernels: the three verbs, forward and mirrored. Every function here runs on the host only."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import causal, full, plan, states, wide
from .ops import kept_states, shape_of

#: Runs and elements of a state that one program of the scan takes at a time.
SCAN_RUNS, SCAN_ELEMENTS = 32, 64


@dataclass
class Problem:
    """The tensors of a call as the kernels read them, and its shape class."""

    query: Tensor
    key: Tensor
    value: Tensor
    hyperplanes: Tensor
    beta: Tensor
    log_decay: Tensor | None
    key_mask: Tensor | None
    bounds: Tensor | None
    key_bounds: Tensor | None
    causal: bool
    shape: plan.Shape
    grad_out: Tensor | None = None

    def __post_init__(self) -> None:
        self.query, self.key, self.value = map(_unit_stride, (self.query, self.key, self.value))
        if self.grad_out is not None:
            self.grad_out = _unit_stride(self.grad_out)
        self.hyperplanes, self.beta = self.hyperplanes.contiguous(), self.beta.contiguous()
        self.batch, self.queries, self.heads = self.query.shape[:3]
        self.keys, self.groups = self.key.shape[1:3]
        self.share = self.heads // self.groups
        self.rows = self.batch if self.bounds is None else self.bounds.shape[0] - 1
        rows = [self.query, self.key, self.value] + ([] if self.grad_out is None else [self.grad_out])
        self.aligned = all(map(_rows_aligned, rows))

    def runs(self, of_keys: bool) -> plan.Runs:
        tokens, bounds = (self.keys, self.key_bounds) if of_keys else (self.queries, self.bounds)
        return plan.runs_of(self.batch, tokens, self.groups, *plan.run_lengths(self.shape), bounds)

    def options(self, kernel: str, *, tiles: bool) -> dict[str, Any]:
        """The compile-time arguments and the configuration of a kernel."""
        config = self.shape.config(kernel)
        return {
            **self.shape.constants(tiles),
            "C": config.block,
            "ALIGNED": self.aligned,
            "PACKED": self.bounds is not None,
            "num_warps": config.warps,
            "num_stages": config.stages,
        }

    @property
    def conditions(self) -> dict[str, bool]:
        return {"HAS_MASK": self.key_mask is not None, "HAS_DECAY": self.log_decay is not None}

    @property
    def mask_strides(self) -> tuple[int, ...]:
        return (0, 0, 0) if self.key_mask is None else self.key_mask.stride()

    @property
    def decay_strides(self) -> tuple[int, ...]:
        return (0, 0, 0) if self.log_decay is None else self.log_decay.stride()

    def new(self, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.query.new_empty(size, dtype=dtype)

    def new_states(self, count: int, heads: int) -> Tensor:
        """Room for states. Those of empty runs are read by kernels of one block, and are then finite."""
        make = self.query.new_zeros if self.bounds is not None and not self.shape.narrow else self.query.new_empty
        return make((count, heads, self.shape.state_size), dtype=torch.float32)


def _unit_stride(x: Tensor) -> Tensor:
    """x itself, or a copy where the elements of a token are not adjacent: loads would not be wide.

    Offsets inside a block are 32-bit (they cost half the registers), so tokens too far apart are copied too.
    """
    near = abs(x.stride(1)) < 1 << 22
    return x if near and (x.stride(3) == 1 or x.shape[3] == 1) else x.contiguous()


def _rows_aligned(x: Tensor) -> bool:
    """Whether every row of x begins at a multiple of 16 bytes and of 8 elements."""
    strides = [s for s, n in zip(x.stride()[:3], x.shape[:3], strict=True) if n > 1]
    return x.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in strides)


@contextlib.contextmanager
def _launching(device: torch.device) -> Iterator[None]:
    """On the device, and without Hopper's warp-group matrix instructions.

    The ptxas of Triton 3.6 (12.8.93) keeps a predicate in the register that holds such an instruction's descriptor:
    wrong sums or illegal addresses, in kernels that compute-sanitizer otherwise finds clean, on an H200. The
    Ampere instructions take no descriptors. Triton reads the variable whenever it compiles.
    """
    before = os.environ.get("DISABLE_MMA_V3")
    os.environ["DISABLE_MMA_V3"] = "1"
    try:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            yield
    finally:
        if before is None:
            del os.environ["DISABLE_MMA_V3"]
        else:
            os.environ["DISABLE_MMA_V3"] = before


def _or(x: Tensor | None, stand_in: Tensor) -> Tensor:
    """x, or where a kernel does not read it any pointer."""
    return stand_in if x is None else x


# ---------------------------------------------------------------------------------------------- the verbs


def accumulate(problem: Problem, runs: plan.Runs) -> tuple[Tensor, Tensor]:
    """The state that the keys of each run leave, and each run's total log decay [runs, G] float64."""
    p = problem
    result = p.new(max(runs.count, 1), p.groups, p.shape.state_size)
    totals = p.new(max(runs.count, 1), p.groups, dtype=torch.float64) if p.log_decay is not None else p.beta
    if runs.count * p.groups:
        states.accumulate_kernel[(runs.count * p.groups, p.shape.tiles)](
            p.key, p.value, _or(p.key_mask, p.beta), _or(p.log_decay, p.beta), p.hyperplanes, p.beta,
            _or(runs.table, p.beta), result, totals,
            *p.key.stride()[:3], *p.value.stride()[:3], *p.mask_strides, *p.decay_strides,
            p.keys, runs.length, runs.per_row, p.groups, **p.conditions, **p.options("accumulate", tiles=False),
        )  # fmt: skip
    return result, totals


def scan(
    problem: Problem,
    runs: plan.Runs,
    parts: Tensor,
    totals: Tensor,
    before: Tensor,
    initial: tuple[Any, Any],
    *,
    share: int = 1,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Fills ``before`` with the state before each run (causal) or of each row, and returns the final (mass, value_sum).

    ``reverse`` mirrors it for adjoints. States inside are lifted; those of the interface are not.
    """  # fmt: skip
    p, shape = problem, problem.shape
    lift = 2.0 ** (shape.lift * shape.planes)
    mass = p.new(p.rows, p.groups, shape.tables, 1 << shape.planes, dtype=torch.float64)
    value_sum = p.new(*mass.shape, shape.value_dim, dtype=torch.float64)
    given = [None if x is None else x.contiguous() for x in initial]
    if (given[0] is None) != (given[1] is None):
        given = [torch.zeros_like(made) if x is None else x for x, made in zip(given, (mass, value_sum), strict=True)]
    if p.rows * p.groups:
        states.scan_kernel[(p.rows * p.groups, -(-shape.state_size // SCAN_ELEMENTS))](
            parts, before, totals, _or(runs.first, p.beta), _or(given[0], mass), _or(given[1], value_sum),
            mass, value_sum, 1.0 / lift if reverse else lift, p.groups, runs.per_row,
            SHARE=share, S=shape.buckets, V=shape.value_dim, RT=SCAN_RUNS, E=SCAN_ELEMENTS,
            CAUSAL=p.causal, REVERSE=reverse, PACKED=p.bounds is not None, HAS_DECAY=p.log_decay is not None,
            HAS_IN=given[0] is not None, HAS_OUT=True, num_warps=4,
        )  # fmt: skip
    return mass, value_sum


def readout(problem: Problem, runs: plan.Runs, before: Tensor) -> Tensor:
    p = problem
    out = p.query.new_empty(p.batch, p.queries, p.heads, p.shape.value_dim)
    programs = runs.count * p.heads
    if not programs:
        return out
    if p.causal:
        kernel = causal.readout_kernel if p.shape.narrow else wide.readout_kernel
        kernel[(programs,)](
            p.query, p.key, p.value, _or(p.key_mask, p.beta), _or(p.log_decay, p.beta), p.hyperplanes, p.beta,
            _or(runs.table, p.beta), before, out,
            *p.query.stride()[:3], *p.key.stride()[:3], *p.value.stride()[:3], *p.mask_strides, *p.decay_strides,
            p.queries, runs.length, runs.per_row, p.groups, SHARE=p.share,
            **p.conditions, **p.options("causal_readout", tiles=not p.shape.narrow),
        )  # fmt: skip
    else:
        full.readout_kernel[(programs,)](
            p.query, p.hyperplanes, p.beta, _or(runs.table, p.beta), before, out, *p.query.stride()[:3],
            p.queries, runs.length, runs.per_row, p.groups, SHARE=p.share, **p.options("full_readout", tiles=True),
        )  # fmt: skip
    return out


# ------------------------------------------------------------------------------------------------ forward


def forward(
    query: Tensor, key: Tensor, value: Tensor, hyperplanes: Tensor, beta: Tensor, log_decay: Tensor | None,
    key_mask: Tensor | None, bounds: Tensor | None, key_bounds: Tensor | None, mass: Tensor | None,
    value_sum: Tensor | None, causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(out, final mass, final value_sum, states): what the operator ``triton_forward`` returns."""
    shape = shape_of(query, value, hyperplanes)
    p = Problem(query, key, value, hyperplanes, beta, log_decay, key_mask, bounds, key_bounds, causal, shape)
    with _launching(query.device):
        runs = p.runs(of_keys=True)
        parts, totals = accumulate(p, runs)
        kept = kept_states(query, value, hyperplanes, p.rows, causal)
        if bounds is not None and not shape.narrow:
            kept.zero_()
        final = scan(p, runs, parts, totals, kept, (mass, value_sum))
        out = readout(p, runs if causal else p.runs(of_keys=False), kept)
    return out, *final, kept


# ----------------------------------------------------------------------------------------------- backward


def backward(
    grad_out: Tensor, grad_mass: Tensor | None, grad_value_sum: Tensor | None, query: Tensor, key: Tensor,
    value: Tensor, hyperplanes: Tensor, beta: Tensor, log_decay: Tensor | None, key_mask: Tensor | None,
    bounds: Tensor | None, key_bounds: Tensor | None, final_mass: Tensor | None, final_value_sum: Tensor | None,
    kept: Tensor, causal: bool, need_planes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What the operator ``triton_backward`` returns.

    Two passes over the tokens: from the queries, which leaves the gradient of the state before each run, and, after
    the scan over those, from the keys.
    """
    shape = shape_of(query, value, hyperplanes)
    p = Problem(
        query, key, value, hyperplanes, beta, log_decay, key_mask, bounds, key_bounds, causal, shape, grad_out
    )  # fmt: skip
    with _launching(query.device):
        sums = _ParameterSums(p, need_planes)
        passes = _backward_causal if causal else _backward_full
        dq, dk, dv, decay, initial = passes(
            p, kept, (grad_mass, grad_value_sum), (final_mass, final_value_sum), sums
        )  # fmt: skip
        planes, of_beta = sums.reduced()
    return dq, dk, dv, planes, of_beta, decay, *initial


class _ParameterSums:
    """Parts of the gradients of hyperplanes and beta, one for each program; added in float64, in a fixed order."""

    def __init__(self, problem: Problem, need_planes: bool) -> None:
        self.problem, self.need_planes = problem, need_planes
        self.planes: list[Tensor] = []
        self.beta: list[Tensor] = []

    def parts(self, runs: plan.Runs, heads: int) -> tuple[Tensor, Tensor]:
        """Room for the parts of runs * heads programs."""
        p, shape = self.problem, self.problem.shape
        size = (runs.count, heads, shape.tiles, shape.rows, shape.dim) if self.need_planes else (0,)
        empty_runs = p.bounds is not None and not shape.narrow  # they write nothing where runs are one block
        make = p.query.new_zeros if empty_runs else p.query.new_empty
        self.planes.append(make(size, dtype=torch.float32))
        self.beta.append(p.new(runs.count, heads))
        return self.planes[-1], self.beta[-1]

    def reduced(self) -> tuple[Tensor, Tensor]:
        """The gradients of hyperplanes [G, L, P, D] and of beta [G]."""
        p, shape = self.problem, self.problem.shape
        groups = p.groups
        beta = p.new(groups, dtype=torch.float64).zero_()
        for part in self.beta:
            beta += part.view(part.shape[0], groups, -1).sum((0, 2), dtype=torch.float64)
        if not self.need_planes:
            return p.new(0), beta.float()
        total = p.new(groups, shape.tiles, shape.rows, shape.dim, dtype=torch.float64).zero_()
        for part in self.planes:
            by_group = part.view(part.shape[0], groups, part.shape[1] // groups, *total.shape[1:])
            total += by_group.sum((0, 2), dtype=torch.float64)
        per_table = 1 << shape.planes
        if per_table > shape.tile:  # several tiles of one table, which all have its planes
            total = total.view(groups, shape.tables, per_table // shape.tile, *total.shape[2:]).sum(2)
            return total[:, :, : shape.planes].float().contiguous(), beta.float()
        tables = min(shape.tables, shape.tile // per_table)
        total = total[:, :, : tables * shape.planes].reshape(groups, -1, shape.planes, shape.dim)
        return total[:, : shape.tables].float().contiguous(), beta.float()


def _backward_causal(
    p: Problem, kept: Tensor, grad_final: tuple[Any, Any], final: tuple[Any, Any], sums: _ParameterSums
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    assert p.grad_out is not None
    runs, shape = p.runs(of_keys=True), p.shape
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (p.query, p.key, p.value))
    decay = p.new(*p.key.shape[:3]) if p.log_decay is not None else p.new(0)
    adjoints = p.new(max(runs.count, 1), p.heads, shape.state_size)
    per_query = p.new(2, p.batch, p.heads, p.queries)
    kernels = causal if shape.narrow else wide
    inputs: tuple[Tensor, ...] = (
        p.query,
        p.key,
        p.value,
        p.grad_out,
        _or(p.key_mask, p.beta),
        _or(p.log_decay, p.beta),
    )
    inputs += (p.hyperplanes, p.beta, _or(runs.table, p.beta))
    numbers = (
        *p.query.stride()[:3], *p.key.stride()[:3], *p.value.stride()[:3], *p.grad_out.stride()[:3],
        *p.mask_strides, *p.decay_strides, p.batch, p.queries, runs.length, runs.per_row, p.groups,
    )  # fmt: skip
    conditions = p.conditions | {"NEED_PLANES": sums.need_planes, "SHARE": p.share}
    if runs.count * p.heads:
        options = p.options("causal_query_gradient", tiles=not shape.narrow)
        kernels.query_gradient_kernel[(runs.count * p.heads,)](
            *inputs, kept, dq, adjoints, per_query, *sums.parts(runs, p.heads), *numbers, **conditions, **options
        )  # fmt: skip
    totals = _run_totals(p, runs)
    after = p.new_states(max(runs.count, 1), p.groups)
    initial = scan(p, runs, adjoints, totals, after, grad_final, share=p.share, reverse=True)
    if runs.count * p.groups:
        options = p.options("causal_key_gradient", tiles=not shape.narrow)
        kernels.key_gradient_kernel[(runs.count * p.groups,)](
            *inputs, kept, after, per_query, _at_the_end(p, final, grad_final), dk, dv, decay,
            *sums.parts(runs, p.groups), *numbers, **conditions, **options,
        )  # fmt: skip
    return dq, dk, dv, decay, initial


def _run_totals(p: Problem, runs: plan.Runs) -> Tensor:
    """Each run's total log decay again, [runs, G] float64."""
    if p.log_decay is None:
        return p.beta
    totals = p.new(max(runs.count, 1), p.groups, dtype=torch.float64)
    if runs.count * p.groups:
        states.total_decay_kernel[(runs.count * p.groups,)](
            p.log_decay, _or(runs.table, p.beta), totals, *p.decay_strides, p.keys, runs.length, runs.per_row,
            p.groups, C=128, PACKED=p.bounds is not None, num_warps=4,
        )  # fmt: skip
    return totals


def _at_the_end(p: Problem, final: tuple[Any, Any], grad_final: tuple[Any, Any]) -> Tensor:
    """The inner product of the final state with its gradient, [rows, G]: what the last log decay multiplies."""
    total = p.new(p.rows, p.groups, dtype=torch.float64).zero_()
    if p.log_decay is not None:
        for state, grad in zip(final, grad_final, strict=True):
            if grad is not None:
                total += (state * grad).flatten(2).sum(2)
    return total.float()


def _backward_full(
    p: Problem, kept: Tensor, grad_final: tuple[Any, Any], final: tuple[Any, Any], sums: _ParameterSums
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    assert p.grad_out is not None
    runs, key_runs, shape = p.runs(of_keys=False), p.runs(of_keys=True), p.shape
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (p.query, p.key, p.value))
    adjoints = p.new(max(runs.count, 1), p.heads, shape.state_size)
    if runs.count * p.heads:
        full.query_gradient_kernel[(runs.count * p.heads,)](
            p.query, p.grad_out, p.hyperplanes, p.beta, _or(runs.table, p.beta), kept, dq, adjoints,
            *sums.parts(runs, p.heads), *p.query.stride()[:3], *p.grad_out.stride()[:3],
            p.queries, runs.length, runs.per_row, p.groups, SHARE=p.share,
            NEED_PLANES=sums.need_planes, **p.options("full_query_gradient", tiles=True),
        )  # fmt: skip
    after = p.new(max(p.rows, 1), p.groups, shape.state_size)
    initial = scan(p, runs, adjoints, p.beta, after, grad_final, share=p.share, reverse=True)
    if key_runs.count * p.groups:
        full.key_gradient_kernel[(key_runs.count * p.groups,)](
            p.key, p.value, _or(p.key_mask, p.beta), p.hyperplanes, p.beta, _or(key_runs.table, p.beta), after,
            dk, dv, *sums.parts(key_runs, p.groups),
            *p.key.stride()[:3], *p.value.stride()[:3], *p.mask_strides,
            p.keys, key_runs.length, key_runs.per_row, p.groups, HAS_MASK=p.key_mask is not None,
            NEED_PLANES=sums.need_planes, **p.options("full_key_gradient", tiles=True),
        )  # fmt: skip
    return dq, dk, dv, p.new(0), initial
