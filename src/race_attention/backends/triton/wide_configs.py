"""Tiles and configurations of the kernels of wide heads, by shape class; never by length.

Those for 16-bit inputs with D and Dv up to 128 were measured on an H200, with D = Dv = 128 and (P, L) = (6, 2), (8, 1).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from . import plan

#: Registers a thread with which three programs of four warps run on a multiprocessor.
THIRD = 168


@dataclass(frozen=True)
class Tiles:
    """How the kernels of a shape class are cut and compiled.

    The last three of each are Triton's warps and stages, and a limit of registers a thread, or 0.

    Attributes:
        width: SW, buckets padded with zeros.
        feature_gradients: (C, SP, ...), tokens of a block and buckets that are computed at a time.
        accumulate, accumulate_queries: (C, SB, VB, ...), with the buckets and the columns of a state's tile.
        readout, value_gradient: (C, CK, SB, VB, ...), tokens of a block, of the blocks that it is compared with.
        buckets_gradient: (C, CK, SB, ...). query_gradient, key_gradient: likewise, by halves.
        full_readout, full_query_gradient, full_key_gradient: (C, SB, ...), the first with VB, not causal.
    """

    width: int
    feature_gradients: tuple[int, ...]
    accumulate: tuple[int, ...]
    accumulate_queries: tuple[int, ...]
    readout: tuple[int, ...]
    value_gradient: tuple[int, ...]
    buckets_gradient: tuple[int, ...]
    query_gradient: tuple[int, ...]
    key_gradient: tuple[int, ...]
    full_readout: tuple[int, ...]
    full_query_gradient: tuple[int, ...]
    full_key_gradient: tuple[int, ...]


def compiled(config: tuple[int, ...]) -> dict[str, int]:
    """Triton's options of a configuration."""
    warps, stages, registers = config[-3:]
    limit = {"maxnreg": registers} if registers and torch.version.hip is None else {}
    return {"num_warps": warps, "num_stages": stages} | limit


@dataclass(frozen=True)
class Halves:
    """How tokens are compared, see wide_features.py.

    Attributes:
        used: whether by the halves of each table's planes. lower: PL. width: HW, buckets of both halves, padded.
        stored: FW, numbers stored of a token.
    """

    used: bool
    lower: int
    width: int
    stored: int

    @property
    def options(self) -> dict[str, int | bool]:
        return {"PL": self.lower, "HW": self.width, "FW": self.stored, "HALVES": self.used}


@functools.lru_cache(maxsize=1024)
def halves_of(shape: plan.Shape, width: int, wanted: bool = True) -> Halves:
    """Tables of many planes are compared by halves, if ``wanted`` and so few that a program holds them all."""
    lower = (shape.planes + 1) // 2
    used = wanted and shape.planes >= 6 and shape.tables <= 4
    both = plan.power_of_two((1 << lower) + (1 << shape.planes - lower), 16)
    return Halves(used, lower, both, shape.tables * both if used else width)


def group_of(shape: plan.Shape, least: int, whole: bool) -> int:
    """GB, the buckets whose planes are taken together: all in one where ``whole``, else of some 32 planes."""
    group = max(1 << shape.planes, least)
    while group < shape.buckets and (whole or (2 * group >> shape.planes) * shape.planes <= 32):
        group *= 2
    return group


def column_tiles(shape: plan.Shape, config: tuple[int, ...]) -> int:
    """Over how many programs the columns of a block go, by a configuration (C, CK, SB, VB, ...)."""
    return -(-shape.value_dim // config[3])


def planes_of(shape: plan.Shape, group: int) -> int:
    """N, the planes of so many buckets, padded."""
    return plan.power_of_two(max(1, min(shape.tables, group >> shape.planes)) * shape.planes, 8)


@functools.lru_cache(maxsize=1024)
def tiles_of(shape: plan.Shape) -> Tiles:
    """The tiles of a shape class."""
    columns = plan.power_of_two(shape.value_dim, 16)
    if shape.dtype == torch.float32:
        return _float32(shape, columns)
    width = -(-shape.buckets // 128) * 128
    narrow = min(columns, 128)
    if columns <= 128 and shape.dim <= 128:
        pair = (128, 64, 128, narrow, 8, 2, 0)
        return Tiles(
            width,
            feature_gradients=(32, shape.tile, 4, 1, 0),
            accumulate=(128, 128, narrow, 8, 2, 0),
            accumulate_queries=(64, 64, narrow, 4, 2, 0),
            readout=(64, 32, 64, narrow, 4, 2, THIRD),
            value_gradient=pair,
            buckets_gradient=(128, 64, 128, 8, 2, 0),
            query_gradient=(64, 32, 32, 4, 1, THIRD),
            key_gradient=(64, 32, 32, 4, 2, 0),
            full_readout=(64, 64, narrow, 4, 1, THIRD),
            full_query_gradient=(64, 32, 4, 1, THIRD),
            full_key_gradient=(64, 32, 4, 1, 0),
        )
    return Tiles(
        width,
        feature_gradients=(32, shape.tile, 8, 1, 0),
        accumulate=(64, 128, narrow, 8, 2, 0),
        accumulate_queries=(64, 128, narrow, 8, 2, 0),
        readout=(128, 64, 64, narrow, 8, 2, 0),
        value_gradient=(128, 64, 128, narrow, 8, 2, 0),
        buckets_gradient=(64, 32, 64, 8, 1, 0),
        query_gradient=(64, 32, 32, 8, 1, 0),
        key_gradient=(64, 32, 32, 8, 1, 0),
        full_readout=(128, 64, narrow, 8, 1, 0),
        full_query_gradient=(64, 32, 8, 1, 0),
        full_key_gradient=(64, 32, 8, 1, 0),
    )


def _float32(shape: plan.Shape, columns: int) -> Tiles:
    """Products on the plain units, whose operands take registers: small tiles."""
    narrow = min(columns, 64)
    return Tiles(
        width=-(-shape.buckets // 64) * 64,
        feature_gradients=(16, shape.tile, 8, 1, 0),
        accumulate=(16, 64, narrow, 8, 1, 0),
        accumulate_queries=(16, 64, narrow, 8, 1, 0),
        readout=(32, 32, 64, narrow, 8, 1, 0),
        value_gradient=(32, 32, 64, narrow, 8, 1, 0),
        buckets_gradient=(16, 16, 64, 8, 1, 0),
        query_gradient=(16, 16, 32, 8, 1, 0),
        key_gradient=(16, 16, 32, 8, 1, 0),
        full_readout=(32, 64, narrow, 8, 1, 0),
        full_query_gradient=(16, 32, 8, 1, 0),
        full_key_gradient=(16, 32, 8, 1, 0),
    )
