"""What every launch shares: a call as the kernels read it, the device, the parameters' gradients. Host code only."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import plan, reduce
from .start import describes, start

#: Elements of the hyperplanes' gradient that one program adds up.
REDUCED = 32


@dataclass
class Problem:
    """The tensors of a call as the kernels read them, and its shape class.

    The forward pass fills and the backward pass reads, where it has any, ``inverses``, 1 / denominators [B, H, Tq],
    ``out``, ``features``, buckets and projections (see ``ops.kept_features``), and ``inner``, ``marks`` and ``fades``
    of chunks (see :mod:`race_attention.backends.triton.plan`). Where buckets fill several tiles ``inner`` is what
    rounding took from out (see ``ops.kept_residual``). Without ``keep`` there is no backward pass.
    With ``ages`` [T + 1] (see ``runs.ages_of``) the row is several sequences joined end to end, cut as if it were one.
    With ``all_bounds``, the offsets of all rows, ``bounds`` and ``key_bounds`` are spans [rows, 2] of long ones (see
    launch_short.py), and only those are cut into runs.
    ``watched`` results have the shapes that the operators promise, and are the same every time, all of them. Without
    ``final`` the state that comes out of a pass is not wanted.
    """

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
    out: Tensor | None = None
    inverses: Tensor | None = None
    features: Tensor | None = None
    inner: Tensor | None = None
    marks: Tensor | None = None
    fades: Tensor | None = None
    keep: bool = True
    watched: bool = True
    final: bool = True
    ages: Tensor | None = None
    all_bounds: tuple[Tensor, Tensor] | None = None

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

    def told_apart(self, how: Tensor) -> None:
        """Packed sequences whose states nobody takes or gives: by ages where causal, else by the spans of long ones.

        ``inverses`` keeps that for the backward pass, since of one tile there are none.
        """
        assert self.bounds is not None
        assert self.key_bounds is not None
        self.inverses = how
        if self.causal:
            self.ages, self.bounds, self.key_bounds, self.rows = how, None, None, self.batch
        else:
            self.all_bounds = self.bounds.contiguous(), self.key_bounds.contiguous()
            self.bounds, self.key_bounds, self.rows = how[0], how[1], how.shape[1]

    def runs(self, of_keys: bool) -> plan.Runs:
        tokens, bounds = (self.keys, self.key_bounds) if of_keys else (self.queries, self.bounds)
        extra = plan.extra_runs(self.shape, self.causal)
        if self.causal:
            lengths = plan.causal_run_lengths(self.shape, self.log_decay is not None)
        else:
            lengths = plan.run_lengths(self.shape, causal=False)
        return plan.runs_of(self.batch, tokens, self.groups, *lengths, bounds, extra)

    def options(self, kernel: str, *, tiles: bool) -> dict[str, Any]:
        """The compile-time arguments and the configuration of a kernel."""
        return plan.options(self.shape, kernel, tiles, self.aligned, self.bounds is not None)

    @property
    def described(self) -> bool:
        """Whether the causal forward kernels of one tile take rows by tensor descriptors.

        Those need rows that begin at multiples of 16 bytes, and know no mask: what is masked may be NaN.
        """
        return self.key_mask is None and self.describes(self.query, self.key, self.value)

    def describes(self, *rows: Tensor) -> bool:
        """Whether kernels may take these rows of the call, and those of out, by tensor descriptors."""
        return (
            self.aligned
            and self.shape.dtype != torch.float32
            and self.shape.value_dim % 8 == 0
            and all(x.shape[1] > 1 and x.stride(1) >= 8 for x in rows)
            and describes(self.query.device)
        )

    @property
    def at_once(self) -> bool:
        """Whether one kernel works out a block's gradients of queries, keys and values."""
        return self.causal and self.shape.at_once(self.share)

    def kept_rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The buckets of keys and of queries, the projections of keys and of queries; see ``ops.kept_features``.

        What lies behind the first is there only with ``keep``.
        """
        assert self.features is not None
        flat, shape = self.features.view(-1), self.shape
        if not self.keep:
            return flat, flat, flat, flat
        keys, queries = self.batch * self.keys * self.groups, self.batch * self.queries * self.heads
        sizes = keys * shape.row, queries * shape.row, keys * shape.hash_row
        return flat, flat[sizes[0] :], flat[sum(sizes[:2]) :], flat[sum(sizes) :]

    def rows_of(self, runs: plan.Runs) -> Tensor:
        """What tells the kernels which tokens belong together: the table of runs, or the tokens' ages, or nothing."""
        return pointer_or(self.ages if runs.table is None else runs.table, self.beta)

    @property
    def joined(self) -> dict[str, bool]:
        """How :meth:`rows_of` is to be read."""
        return {"PACKED": self.bounds is not None, "JOINED": self.ages is not None}

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
    (batch, tokens, heads, _), (of_batch, of_token, of_head, _) = x.shape, x.stride()
    apart = (batch > 1 and of_batch) | (tokens > 1 and of_token) | (heads > 1 and of_head)
    return not (x.data_ptr() % 16 or apart % 8)


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The device made current, where it is not."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def pointer_or(x: Tensor | None, stand_in: Tensor) -> Tensor:
    """x, or where a kernel does not read it any pointer."""
    return stand_in if x is None else x


class ParameterSums:
    """Parts of the gradients of hyperplanes and beta, one for each program of the queries' and of the keys' pass.

    Beta's of the keys, or of both sides together, may come by blocks instead: ``blocks`` [blocks, G], ``of_both``.
    """

    def __init__(self, problem: Problem, need_planes: bool) -> None:
        self.problem, self.need_planes = problem, need_planes
        self.of_queries = self.of_keys = (0, problem.beta, problem.beta)
        self.blocks: Tensor | None = None
        self.of_both = False

    def parts(self, runs: plan.Runs, heads: int, more: int = 0) -> tuple[Tensor, Tensor]:
        """Room for the parts of (runs + more) * heads programs: the queries' first, then the keys'; or one of them."""
        p, shape = self.problem, self.problem.shape
        count = runs.count + more
        size = (count, heads, shape.tiles, shape.rows, shape.dim) if self.need_planes else (0,)
        empty_runs = p.bounds is not None and not shape.narrow  # they write nothing where runs are one block
        make = p.query.new_zeros if empty_runs else p.query.new_empty
        made = (count, make(size, dtype=torch.float32), p.new(count, heads))
        if heads == p.heads and not self.of_queries[0]:  # with a share of 1 the two have one layout
            self.of_queries = made
        else:
            self.of_keys = made
        return made[1:]

    def reduced(self) -> tuple[Tensor, Tensor]:
        """The gradients of hyperplanes [G, L, P, D] and of beta [G]: added in float64, in a fixed order."""
        p, shape = self.problem, self.problem.shape
        size = (p.groups, shape.tables, shape.planes, shape.dim)
        planes, beta = p.new(*size) if self.need_planes else p.new(0), p.new(p.groups)
        of_planes = -(-size[1] * size[2] * size[3] // REDUCED) if self.need_planes else 0
        queries, keys = self.of_queries, self.of_keys
        blocks, count = (keys[2], keys[0]) if self.blocks is None else (self.blocks, self.blocks.shape[0])
        start(
            reduce.parameters_kernel, (p.groups, 1 + of_planes), *queries[1:], keys[1], blocks, planes, beta,
            queries[0], keys[0], 0 if self.of_both else queries[0], count, p.groups, SHARE=p.share, L=shape.tables,
            P=shape.planes, D=shape.dim, N=shape.rows, SP=shape.tile, NS=shape.tiles, RT=64, E=REDUCED,
            NEED_PLANES=self.need_planes, num_warps=4,
        )  # fmt: skip
        return planes, beta


def at_the_end(p: Problem, final: tuple[Any, Any], grad_final: tuple[Any, Any]) -> Tensor:
    """The inner product of the final state with its gradient, [rows, G]: what the last log decay multiplies."""
    if p.log_decay is None:
        return p.beta  # not read
    if grad_final == (None, None):
        return p.new(p.rows, p.groups).zero_()
    total = p.new(p.rows, p.groups, dtype=torch.float64).zero_()
    for state, grad in zip(final, grad_final, strict=True):
        if grad is not None:
            total += (state * grad).flatten(2).sum(2)
    return total.float()
