"""What every launch shares: a call as the kernels read it, the device, the parameters' gradients. Host code only."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import plan


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
def launching(device: torch.device) -> Iterator[None]:
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


def pointer_or(x: Tensor | None, stand_in: Tensor) -> Tensor:
    """x, or where a kernel does not read it any pointer."""
    return stand_in if x is None else x


class ParameterSums:
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


def at_the_end(p: Problem, final: tuple[Any, Any], grad_final: tuple[Any, Any]) -> Tensor:
    """The inner product of the final state with its gradient, [rows, G]: what the last log decay multiplies."""
    total = p.new(p.rows, p.groups, dtype=torch.float64).zero_()
    if p.log_decay is not None:
        for state, grad in zip(final, grad_final, strict=True):
            if grad is not None:
                total += (state * grad).flatten(2).sum(2)
    return total.float()
