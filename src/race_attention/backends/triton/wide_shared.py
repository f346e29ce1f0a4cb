"""What the launches on wide heads share, causal or not."""

from __future__ import annotations

from torch import Tensor

from . import plan, wide_halves
from .launch import Problem
from .start import start
from .wide_configs import compiled, tiles_of


def has_residual(p: Problem) -> bool:
    """Whether what rounding takes from out is kept."""
    return p.inner is not None and p.inner.numel() > 0


def residual_of(p: Problem) -> Tensor:
    """What rounding takes from out, or what is not read."""
    return p.value if p.inner is None else p.inner


def planes_of_runs(
    p: Problem, x: Tensor, share: int, grad_y: Tensor, table: Tensor, parts: Tensor, lengths: tuple[int, ...],
    runs: int, group: int,
) -> None:  # fmt: skip
    """The runs' parts of the hyperplanes' gradient, from that of the projections, [lines, heads, groups of planes].

    Args:
        lengths: first run, T, RUN, NC, G. group: GB. parts: zeros where this leaves none.
    """
    shape, config = p.shape, tiles_of(p.shape).feature_gradients
    groups = -(-shape.buckets // group)
    start(
        wide_halves.planes_kernel, (runs * x.shape[2], groups),
        x, grad_y, table, parts, *x.stride()[:3], *lengths,
        SHARE=share, L=shape.tables, P=shape.planes, D=shape.dim, DP=plan.power_of_two(shape.dim, 16),
        N=grad_y.shape[2] // groups, GROUPS=groups, GB=group, ROWS=shape.rows, SP=shape.tile, NS=shape.tiles,
        C=config[0], PRECISION=shape.precision, ALIGNED=p.aligned, PACKED=p.bounds is not None,
        **compiled(config),
    )  # fmt: skip
