"""Launching the causal backward kernels of heads whose buckets fit one tile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import causal_adjoint, causal_blocks, causal_gradients, plan
from .configs import MORE_REGISTERS
from .launch import ParameterSums, Problem, at_the_end, pointer_or
from .launch_causal import State, options
from .launch_states import run_totals, scan
from .start import describes, start

#: Blocks of a head whose parts of beta's gradient are added up at once, and not first by runs.
FEW_BLOCKS = 256


@dataclass(frozen=True)
class _Blocks:
    """What the blocks of tokens leave for each other, see causal_adjoint.py; where there are no chunks, the runs.

    Attributes:
        length: C, tokens of a block. per_run: blocks of a run at most. places: of chunks.
        count: blocks that there is room for.
    """

    length: int
    per_run: int
    places: int
    count: int


def _blocks(p: Problem, runs: plan.Runs) -> _Blocks:
    chunk, length = p.shape.chunk, _options(p, "causal_key_gradient")["C"]
    if not chunk:
        return _Blocks(length, 1, max(runs.count, 1), max(runs.count, 1))
    places = plan.chunk_places(p.batch, p.keys, p.rows, chunk, p.bounds is not None)
    return _Blocks(length, runs.length // length, places, places * (chunk // length))


def backward(
    p: Problem, kept: Tensor, grad_final: State, final: State, sums: ParameterSums
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """(dq, dk, dv, the gradient of log_decay, that of the initial state); adds to ``sums``."""
    runs = p.runs(of_keys=True)
    if p.at_once:
        return _backward_at_once(p, runs, kept, grad_final, final, sums)
    of_queries, of_keys = sums.parts(runs, p.heads), sums.parts(runs, p.groups)
    adjoints, inner_after, *_ = _adjoints(p, runs)
    dq, deltas, parts, of_beta = _query_gradients(p, runs, kept, of_queries)
    masses = _masses(p, runs, parts, of_beta, adjoints, of_queries)
    del parts
    after = p.new_states(max(runs.count, 1), p.groups)
    initial = scan(p, runs, adjoints, run_totals(p, runs), after, grad_final, share=p.share, reverse=True)
    del adjoints
    dk, dv, decay, of_beta = _key_gradients(p, runs, after, inner_after, masses, deltas, of_keys)
    if _few_blocks(p, runs):
        sums.blocks = of_beta
    else:
        ends = at_the_end(p, final, grad_final)
        _finish(p, runs, kept, after, ends, decay, of_beta, of_keys[1], (inner_after, *masses))
    return dq, dk, dv, decay, initial


def _backward_at_once(
    p: Problem, runs: plan.Runs, kept: Tensor, grad_final: State, final: State, sums: ParameterSums
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """:func:`backward` where one kernel takes a block's queries, keys and values.

    It needs the gradients of masses, of which the adjoint pass knows what a rounded out says. With decay they are
    worked out again from what that kernel leaves, for the gradient of log_decay, which adds up too many errors.
    """
    adjoints, inner_after, *rounded = _adjoints(p, runs)
    masses = rounded[0], rounded[1]
    after = p.new_states(max(runs.count, 1), p.groups)
    totals = run_totals(p, runs)
    initial = scan(p, runs, adjoints, totals, after, grad_final, reverse=True)
    of_queries = sums.parts(runs, p.heads)
    of_keys = of_queries
    if sums.need_planes:  # of both sides their own; of beta one part for both
        of_keys = sums.parts(runs, p.groups)
        of_keys[1].zero_()
    dq, dk, dv, deltas, decay, of_beta = _block_gradients(
        p, runs, kept, after, inner_after, masses, of_queries, of_keys
    )
    if p.log_decay is not None:  # of the weights as rounded, and not of out
        parts = _mass_parts(p, runs, deltas)
        masses = _masses(p, runs, parts, of_beta, adjoints, of_queries)
        initial = scan(p, runs, adjoints, totals, after, grad_final, reverse=True)
    del adjoints
    if _few_blocks(p, runs):
        sums.blocks, sums.of_both = of_beta, True
    else:
        ends = at_the_end(p, final, grad_final)
        _finish(p, runs, kept, after, ends, decay, of_beta, of_queries[1], (inner_after, *masses))
    return dq, dk, dv, decay, initial


def _options(p: Problem, kernel: str) -> dict[str, Any]:
    """The compile-time arguments of a kernel. The two gradients' blocks are the same: they leave for each other."""
    given = options(p, kernel) | {"CH": p.shape.chunk, "YW": p.shape.hash_row, "HAS_DECAY": p.log_decay is not None}
    if kernel == "causal_adjoint":
        return given
    given["ASK"] = describes(p.query.device)  # the same devices
    if "maxnreg" in given and (p.share > 1 or p.log_decay is not None):
        given["maxnreg"] = max(given["maxnreg"], MORE_REGISTERS)
    if p.at_once:
        given["C"] = p.shape.chunk
    elif p.shape.chunk:
        given["C"] = min(options(p, name)["C"] for name in ("causal_query_gradient", "causal_key_gradient"))
    return given


def _without(given: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: x for name, x in given.items() if name not in names}


def _rows(p: Problem, tokens: int, heads: int) -> Tensor:
    """Room for the gradients of each token's projections."""
    return p.new(p.batch, heads, tokens, p.shape.hash_row)


def _adjoints(p: Problem, runs: plan.Runs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the value sums: before each run, and at the end of each chunk what the run's later queries give.

    Those before runs have room for the masses', and where blocks are done at once hold them; so does the third. The
    last is the log decay from there to the run's end, in that case with a decay.
    """
    assert p.grad_out is not None
    assert p.features is not None
    places = _blocks(p, runs).places if p.shape.chunk else 0
    adjoints = p.new(max(runs.count, 1), p.heads, p.shape.state_size)
    # Rounded, what a mean of values makes of them goes into a decay's gradient, 5e-2 of it where the mean is of three
    # deviations and a decay is -0.01 a token. Where products take them from memory they are.
    decays = p.log_decay is not None
    whole = decays and not (p.at_once or _split(p.shape))
    make = p.new if whole else p.features.new_empty
    inner_after = make(places, p.heads, p.shape.value_dim, p.shape.row)
    mass_after = p.new(places, p.heads, p.shape.row) if p.at_once else p.new(0)
    fades_after = p.new(places, p.heads) if p.at_once and decays else p.new(0)
    if runs.count * p.heads:
        start(
            causal_adjoint.adjoint_kernel, (runs.count * p.heads,),
            p.kept_rows()[1], p.grad_out, p.out if p.at_once else p.grad_out, pointer_or(p.log_decay, p.beta),
            p.rows_of(runs), adjoints, inner_after, mass_after, fades_after,
            *p.grad_out.stride()[:3], *p.decay_strides,
            p.queries, runs.length, runs.per_row, p.groups, SHARE=p.share, MASSES=p.at_once,
            DESCRIBED=p.describes(p.grad_out),
            **_without(_options(p, "causal_adjoint"), "D", "DP", "N", "YW", "LIFT"),
        )  # fmt: skip
    return adjoints, inner_after, mass_after, fades_after


def _block_gradients(
    p: Problem, runs: plan.Runs, before: Tensor, after: Tensor, inner_after: Tensor, masses: tuple[Tensor, Tensor],
    of_queries: tuple[Tensor, Tensor], of_keys: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv, what is subtracted from queries' weights' gradients, phi_k . grad phi_k, by blocks that of beta).

    And of the hyperplanes' gradient the runs' parts.
    """
    assert p.grad_out is not None
    blocks, need_planes = _blocks(p, runs), of_queries[0].numel() > 0
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (p.query, p.key, p.value))
    of_beta = p.new(blocks.count, p.groups)
    decays = p.log_decay is not None
    deltas = p.new(p.batch, p.heads, p.queries) if decays else p.new(0)
    decay = p.new(*p.key.shape[:3]) if decays else p.new(0)
    key_features, query_features, key_hashes, query_hashes = p.kept_rows()
    grad_hashes = [_rows(p, p.keys, p.groups) if need_planes else key_hashes for _ in range(2)]
    before_parts, after_parts = _parts(p, runs, before, after)
    if runs.count * p.groups:
        start(
            causal_blocks.block_gradient_kernel, (runs.count * blocks.per_run * p.groups,),
            query_features, query_hashes, key_features, key_hashes, p.value, p.grad_out,
            pointer_or(p.key_mask, p.beta), p.hyperplanes, p.beta, p.rows_of(runs),
            before, before_parts, p.inner, p.marks, after, after_parts, inner_after, masses[0], p.fades, masses[1],
            dq, dk, dv, *grad_hashes, deltas, decay, of_beta,
            *p.value.stride()[:3], *p.grad_out.stride()[:3], *p.mask_strides,
            p.queries, runs.length, runs.per_row, p.groups, HAS_MASK=p.key_mask is not None, NEED_PLANES=need_planes,
            **_without(_options(p, "causal_query_gradient"), "CH"),
        )  # fmt: skip
    if need_planes:
        _planes(p, runs, p.query, grad_hashes[0], of_queries[0])
        _planes(p, runs, p.key, grad_hashes[1], of_keys[0])
    return dq, dk, dv, deltas, decay, of_beta


def _mass_parts(p: Problem, runs: plan.Runs, deltas: Tensor) -> Tensor:
    """What each block's queries give to the gradient of the mass before it."""
    blocks, shape = _blocks(p, runs), p.shape
    parts = p.new(blocks.count, p.heads, shape.row)
    if runs.count * p.heads:
        start(
            causal_adjoint.mass_parts_kernel, (runs.count * blocks.per_run * p.heads,),
            p.kept_rows()[1], deltas, p.fades, p.rows_of(runs), parts, p.queries, runs.length, runs.per_row, p.groups,
            SP=shape.tile, SW=shape.row, C=blocks.length, **p.joined, PRECISION=shape.precision, num_warps=4,
        )  # fmt: skip
    return parts


def _query_gradients(
    p: Problem, runs: plan.Runs, before: Tensor, parts: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, what queries leave for keys [B, H, terms, T], by blocks: the gradient of the mass, and that of beta)."""
    assert p.grad_out is not None
    blocks = _blocks(p, runs)
    dq = torch.empty_like(p.query, memory_format=torch.contiguous_format)
    terms = 2 if p.log_decay is not None and p.shape.precision == "ieee" else 1
    deltas = p.new(p.batch, p.heads, terms, p.queries)
    masses, of_beta = p.new(blocks.count, p.heads, p.shape.row), p.new(blocks.count, p.heads)
    need_planes = parts[0].numel() > 0
    _, seen, _, hashes = p.kept_rows()
    grad_hashes = _rows(p, p.queries, p.heads) if need_planes else seen
    if runs.count * p.heads:
        start(
            causal_gradients.query_gradient_kernel, (runs.count * blocks.per_run * p.heads,),
            hashes, seen, p.features, p.value, p.grad_out, pointer_or(p.key_mask, p.beta),
            pointer_or(p.log_decay, p.beta), p.hyperplanes, p.beta, p.rows_of(runs), before,
            *_parts(p, runs, before), p.inner, p.marks, p.fades, masses, deltas, dq, grad_hashes, of_beta,
            *p.value.stride()[:3], *p.grad_out.stride()[:3], *p.mask_strides, *p.decay_strides,
            p.queries, runs.length, runs.per_row, p.groups, SHARE=p.share, HAS_MASK=p.key_mask is not None,
            NEED_PLANES=need_planes, SPLIT=_split(p.shape), **_options(p, "causal_query_gradient"),
        )  # fmt: skip
    if need_planes:
        _planes(p, runs, p.query, grad_hashes, parts[0])
    return dq, deltas, masses, of_beta


def _split(shape: plan.Shape) -> bool:
    """Whether the gradients take value sums from memory in two parts of bfloat16: many buckets' fill registers."""
    return shape.chunk > 0 and shape.tile >= 64 and shape.dtype == torch.bfloat16 and shape.precision == "bf16"


def _parts(p: Problem, runs: plan.Runs, *states: Tensor) -> tuple[Tensor, ...]:
    """Of one or two, the value sums as the products of many buckets take them; any tensor where none does."""
    shape = p.shape
    if not (_split(shape) or p.at_once):
        return states
    assert p.features is not None
    parts = p.features.new_empty(len(states), max(runs.count, 1), p.groups, 2, shape.value_dim, shape.row)
    if runs.count * p.groups:
        start(
            causal_adjoint.parts_kernel, (runs.count * p.groups, len(states)), states[0], states[-1], parts,
            S=shape.buckets, SP=shape.tile, SW=shape.row, V=shape.value_dim,
            VP=plan.power_of_two(shape.value_dim, 16), num_warps=8,
        )  # fmt: skip
    return parts.unbind()


def _planes(p: Problem, runs: plan.Runs, x: Tensor, grad_hashes: Tensor, parts: Tensor) -> None:
    """The runs' parts of the hyperplanes' gradient, from that of the projections."""
    heads, shape = x.shape[2], p.shape
    given = options(p, "causal_key_states")
    if runs.count * heads:
        start(
            causal_adjoint.planes_kernel, (runs.count * heads,),
            x, grad_hashes, p.rows_of(runs), parts, *x.stride()[:3],
            p.queries, runs.length, runs.per_row, heads, YW=p.shape.hash_row, ROWS=shape.rows,
            **{name: given[name] for name in ("D", "DP", "N", "C", "PRECISION", "ALIGNED", "PACKED")},
            num_warps=given["num_warps"], num_stages=given["num_stages"],
        )  # fmt: skip


def _masses(
    p: Problem, runs: plan.Runs, mass_parts: Tensor, of_beta: Tensor, adjoints: Tensor, parts: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The gradients of the masses after each block, the log decay from there to the run's end; fills ``adjoints``.

    And of beta's gradient the runs' parts.
    """
    blocks, shape = _blocks(p, runs), p.shape
    mass_after = torch.empty_like(mass_parts) if shape.chunk else mass_parts
    fades_after = torch.empty_like(of_beta)
    if runs.count * p.heads:
        start(
            causal_adjoint.masses_kernel, (runs.count * p.heads,),
            mass_parts, p.fades, of_beta, p.rows_of(runs), adjoints, mass_after, fades_after, parts[1],
            p.queries, runs.length, runs.per_row, p.groups, SHARE=p.share, S=shape.buckets, SP=shape.tile,
            SW=shape.row, V=shape.value_dim, C=blocks.length, CH=shape.chunk, RB=_longest(p, blocks),
            **p.joined, HAS_DECAY=p.log_decay is not None, num_warps=4,
        )  # fmt: skip
    return mass_after, fades_after


def _longest(p: Problem, blocks: _Blocks) -> int:
    """At least the blocks of any run: by shape class."""
    return plan.run_lengths(p.shape)[1] // blocks.length if p.shape.chunk else 1


def _key_gradients(
    p: Problem, runs: plan.Runs, after: Tensor, inner_after: Tensor, masses: tuple[Tensor, Tensor], deltas: Tensor,
    parts: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dk, dv, phi_k . grad phi_k [B, T, G], by blocks the gradient of beta)."""
    assert p.grad_out is not None
    blocks = _blocks(p, runs)
    dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (p.key, p.value))
    of_keys = p.new(*p.key.shape[:3]) if p.log_decay is not None else p.new(0)
    of_beta = p.new(blocks.count, p.groups)
    need_planes = parts[0].numel() > 0
    _, seen, hashes, _ = p.kept_rows()
    grad_hashes = _rows(p, p.keys, p.groups) if need_planes else seen
    if runs.count * p.groups:
        start(
            causal_gradients.key_gradient_kernel, (runs.count * blocks.per_run * p.groups,),
            seen, p.features, hashes, p.value, p.grad_out, pointer_or(p.key_mask, p.beta),
            pointer_or(p.log_decay, p.beta), p.hyperplanes, p.beta, p.rows_of(runs), after,
            *_parts(p, runs, after), inner_after, *masses, p.fades, deltas, dk, dv, of_keys, grad_hashes, of_beta,
            *p.value.stride()[:3], *p.grad_out.stride()[:3], *p.mask_strides, *p.decay_strides,
            p.queries, runs.length, runs.per_row, p.groups, SHARE=p.share, HAS_MASK=p.key_mask is not None,
            NEED_PLANES=need_planes, SPLIT=_split(p.shape), **_options(p, "causal_key_gradient"),
        )  # fmt: skip
    if need_planes:
        _planes(p, runs, p.key, grad_hashes, parts[0])
    return dk, dv, of_keys, of_beta


def _few_blocks(p: Problem, runs: plan.Runs) -> bool:
    """Whether :func:`_finish` can be left out: nothing decays, each block has left its part, and there are few."""
    few = p.shape.chunk > 0 and _blocks(p, runs).count <= FEW_BLOCKS
    return few and p.log_decay is None and p.bounds is None


def _finish(
    p: Problem, runs: plan.Runs, before: Tensor, after: Tensor, at_the_end: Tensor, of_keys: Tensor, of_beta: Tensor,
    beta_parts: Tensor, behind: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """The gradient of log_decay in the place of ``of_keys``; of beta's gradient the runs' parts.

    ``behind`` are the gradients of value sums and masses inside runs, and the log decays.
    """
    blocks, shape = _blocks(p, runs), p.shape
    decays = p.log_decay is not None
    stretch = plan.STRETCHES[shape.tile] if decays and shape.chunk else plan.causal_run_lengths(shape, decays)[1]
    stretches = -(-runs.length // stretch) if decays else 1
    bounds = p.queries, runs.length, runs.per_row, p.groups, stretches
    lengths = {"C": blocks.length, "CH": shape.chunk, "RT": stretch} | p.joined
    if not runs.count * p.groups:
        return
    crossings = p.new(runs.count * stretches, p.groups) if decays else of_keys
    if decays:
        start(
            causal_adjoint.crossings_kernel, (runs.count * stretches * p.groups,),
            before, after, at_the_end, p.rows_of(runs), p.inner, p.marks, *behind, crossings,
            *bounds, SHARE=p.share, S=shape.buckets, SP=shape.tile, SW=shape.row, V=shape.value_dim,
            VP=plan.power_of_two(shape.value_dim, 16), **lengths, num_warps=4,
        )  # fmt: skip
    start(
        causal_adjoint.finish_kernel, (runs.count * stretches * p.groups,),
        crossings, p.rows_of(runs), of_keys, of_beta, beta_parts, p.kept_rows()[0], p.fades, after, *behind[1:],
        *bounds, **lengths, RB=_longest(p, blocks), HAS_DECAY=decays, FROM_NOTHING=not p.final,
        S=shape.buckets, SP=shape.tile, SW=shape.row, V=shape.value_dim, MASSES=decays and p.at_once,
        PRECISION=shape.precision, num_warps=8 if decays and p.at_once else 4,
    )  # fmt: skip
