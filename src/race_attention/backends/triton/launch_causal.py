"""Launching the causal forward kernels of heads whose buckets fit one tile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import causal, plan
from .launch import Problem, pointer_or
from .launch_states import scan
from .ops import clear_spare, kept_states
from .start import start

State = tuple[Tensor | None, Tensor | None]


def forward(p: Problem, initial: State) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, final mass, final value_sum, the state before each run); fills ``p.features``."""
    runs = p.runs(of_keys=True)
    parts, totals = _key_states(p, runs)
    before = room_for_states(p, runs)
    mass, value_sum = scan(p, runs, parts, totals, before, initial)
    return readout(p, runs, before), mass, value_sum, before


def room_for_states(p: Problem, runs: plan.Runs) -> Tensor:
    """Room for the state before each run."""
    if p.watched:
        packed, decays = p.bounds is not None, p.log_decay is not None
        before = kept_states(p.query, p.value, p.hyperplanes, p.rows, True, packed, decays)
        clear_spare(before, runs)
        return before
    # Of packed sequences one more, which is read behind an empty run.
    return p.new(max(runs.count + (runs.table is not None), 1), p.groups, p.shape.state_size)


def _key_states(p: Problem, runs: plan.Runs) -> tuple[Tensor, Tensor]:
    """The state that the keys of each run leave, its total log decay [runs, G] float64; fills ``p.features``.

    Descriptors only where addresses would make the kernel spill: elsewhere it is no faster with them.
    """
    states = p.new(max(runs.count, 1), p.groups, p.shape.state_size)
    fading = p.log_decay is not None or p.ages is not None
    totals = p.new(max(runs.count, 1), p.groups, dtype=torch.float64) if fading else p.beta
    features, _, hashes, _ = p.kept_rows()
    if runs.count * p.groups:
        start(
            causal.key_states_kernel, (runs.count * p.groups,),
            p.key, p.value, pointer_or(p.key_mask, p.beta), pointer_or(p.log_decay, p.beta), p.hyperplanes, p.beta,
            p.rows_of(runs), states, totals, features,
            hashes, p.inner, p.marks, p.fades,
            *p.key.stride()[:3], *p.value.stride()[:3], *p.mask_strides, *p.decay_strides,
            p.keys, runs.length, runs.per_row, p.groups, **p.conditions, CH=p.shape.chunk, KEEP=p.keep,
            YW=p.shape.hash_row, DESCRIBED=p.described and p.keep and p.shape.tile == 64,
            **options(p, "causal_key_states"),
        )  # fmt: skip
    return states, totals


def readout(p: Problem, runs: plan.Runs, before: Tensor) -> Tensor:
    """out of the queries, from the state before their run and the keys of it."""
    out = p.query.new_empty(p.batch, p.queries, p.heads, p.shape.value_dim)
    features, seen, _, hashes = p.kept_rows()
    if runs.count * p.heads:
        start(
            causal.readout_kernel, (runs.count * p.heads,),
            p.query, features, p.value, pointer_or(p.key_mask, p.beta), pointer_or(p.log_decay, p.beta), p.fades,
            p.hyperplanes, p.beta, p.rows_of(runs), before, out, seen, hashes,
            *p.query.stride()[:3], *p.value.stride()[:3], *p.mask_strides, *p.decay_strides,
            p.queries, runs.length, runs.per_row, p.groups, SHARE=p.share, CH=p.shape.chunk, DESCRIBED=p.described,
            KEEP=p.keep, YW=p.shape.hash_row, **p.conditions, **options(p, "causal_readout"),
        )  # fmt: skip
    return out


def options(p: Problem, kernel: str) -> dict[str, Any]:
    """Planes come in pairs of parts, so that eight of them already fill a product's sixteen."""
    rows = plan.power_of_two(p.shape.tables * p.shape.planes, 8)
    return p.options(kernel, tiles=False) | p.joined | {"N": rows, "SW": p.shape.row}
