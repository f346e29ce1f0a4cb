"""A segment of a call on wide heads: some runs, their scratch memory, and the launches of the kernels on them."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from . import plan, wide, wide_gradients, wide_halves
from .launch import Problem, pointer_or
from .start import start
from .wide_configs import Halves, Tiles, column_tiles, compiled, group_of, halves_of, planes_of, tiles_of
from .wide_shared import has_residual, planes_of_runs, residual_of

#: Buckets or columns of the pieces in which a state is multiplied in two parts: their operands take registers.
FEW = 32
#: Numbers of a state that one program merges.
MERGED = 4096
Between = tuple[Tensor, Tensor]  # value sums [slots, G, S, Dv] and masses [slots, G, S] between sub-runs


class Segment:
    """Runs ``first`` to ``first + count - 1``, with room for ``lines`` tokens. What is scratch is filled on demand."""

    def __init__(self, p: Problem, runs: plan.Runs, totals: Tensor, first: int, count: int, lines: int) -> None:
        self.p, self.runs, self.totals, self.first, self.count, self.lines = p, runs, totals, first, count, lines
        self.tiles: Tiles = tiles_of(p.shape)
        self.halves: Halves = halves_of(p.shape, self.tiles.width)
        self.slots = lines // plan.SUB_RUN + count + 1  # of the states before sub-runs
        self.table = pointer_or(runs.table, p.beta)
        self.mask = pointer_or(p.key_mask, p.beta)
        self._between_keys: Between | None = None
        self._between_queries: Between | None = None

    def _blocks(self, block: int) -> int:
        return -(-self.runs.length // block)

    def _options(self, config: tuple[int, ...]) -> dict[str, Any]:
        p = self.p
        return {
            "ALIGNED": p.aligned,
            "PACKED": p.bounds is not None,
            **compiled(config),
        }

    @property
    def _state(self) -> dict[str, Any]:
        shape = self.p.shape
        return {"V": shape.value_dim, "S": shape.buckets, "SW": self.tiles.width, "PRECISION": shape.precision}

    @property
    def _lengths(self) -> tuple[int, int, int, int, int]:
        """T, RUN, SUB, NC, G."""
        return self.p.queries, self.runs.length, plan.SUB_RUN, self.runs.per_row, self.p.groups

    # ------------------------------------------------------------------------------------- features

    def _new_phi(self, heads: int) -> Tensor:
        dtype = torch.bfloat16 if self.p.shape.precision == "bf16" else torch.float32
        return self.p.query.new_empty(self.lines, heads, self.tiles.width, dtype=dtype)

    def _new_features(self, heads: int) -> Tensor:
        dtype = torch.bfloat16 if self.p.shape.precision == "bf16" else torch.float32
        return self.p.query.new_empty(self.lines, heads, self.halves.stored, dtype=dtype)

    def _feature_arguments(self, of_keys: bool, tile: int) -> tuple[Tensor, tuple[int, ...], dict[str, Any]]:
        """(x, the numbers, the options) of the kernel of features' gradients, with so many buckets at a time."""
        p = self.p
        x = p.key if of_keys else p.query
        t, run, _, per_row, groups = self._lengths
        options = {k: v for k, v in p.shape.constants(False).items() if k not in ("V", "VP")}
        options |= {"SP": tile, "N": p.shape.rows_of(tile), "SHARE": 1 if of_keys else p.share, "SW": self.tiles.width}
        options["HAS_MASK"] = of_keys and p.key_mask is not None
        return x, (*x.stride()[:3], *p.mask_strides, self.first, t, run, per_row, groups), options

    def _buckets(self, group: int) -> dict[str, Any]:
        """The options of kernels that compute so many buckets, and those of how tokens are compared."""
        always = self.p.shape.constants(False)
        options = {name: always[name] for name in ("L", "P", "D", "DP", "LIFT")}
        return options | {"N": planes_of(self.p.shape, group)} | self.halves.options

    @cached_property
    def phi_q(self) -> Tensor:
        """What tokens are compared by, of the queries, [lines, H, FW]; filled with the states between them."""
        return self._new_features(self.p.heads)

    @cached_property
    def phi_k(self) -> Tensor:
        """The same of the keys, [lines, G, FW], 0 where a key does not take part."""
        return self._new_features(self.p.groups)

    def feature_gradients(
        self, of_keys: bool, grad_phi: Tensor, grad_x: Tensor, parts: tuple[Tensor, Tensor], need_planes: bool
    ) -> None:
        """The gradient of queries or keys from that of their buckets, and parts of the parameters'."""
        p, config = self.p, self.tiles.feature_gradients
        for of_planes in (False, True) if need_planes else (False,):
            tile = p.shape.tile if of_planes else config[1]
            x, numbers, options = self._feature_arguments(of_keys, tile)
            start(
            wide_gradients.feature_gradients_kernel, (self.count * x.shape[2], p.shape.tiles if of_planes else 1),
                x, self.mask, p.hyperplanes, p.beta, self.table, grad_phi, grad_x, *parts, *numbers,
                NS=-(-p.shape.buckets // tile), C=config[0], OF_PLANES=of_planes, **options, **self._options(config),
            )  # fmt: skip

    # ---------------------------------------------------------------------------------------- decay

    @cached_property
    def decay(self) -> tuple[Tensor, Tensor]:
        """(ages [2, G, lines], log decay before each slot [slots, G]); fills the segment's part of ``totals``."""
        p = self.p
        if p.log_decay is None:
            return p.beta, p.beta
        ages, boundaries = p.new(2, p.groups, self.lines), p.new(self.slots, p.groups, dtype=torch.float64)
        start(
            wide.decay_kernel, (self.count * p.groups,),
            p.log_decay, self.table, ages, boundaries, self.totals, *p.decay_strides, self.first, self.lines,
            *self._lengths, C=min(64, plan.SUB_RUN), PRECISION=p.shape.precision, PACKED=p.bounds is not None,
            num_warps=2,
        )  # fmt: skip
        return ages, boundaries

    def decay_gradient(
        self, before: Tensor, after: Tensor, end: Tensor, of_key: Tensor, of_query: Tensor, result: Tensor
    ) -> None:
        """The gradient of log_decay, from what :meth:`value_gradient` or both gradients by halves left."""
        p = self.p
        t, run, _, per_row, groups = self._lengths
        start(
            wide_gradients.decay_gradient_kernel, (self.count * p.groups,),
            self.table, before, after, end, of_key, of_query, result, self.first, self.lines, t, run, per_row, groups,
            SIZE=p.shape.state_size, PARTS=of_key.shape[0], QP=of_query.shape[3], SHARE=p.share, E=2048, C=128,
            PACKED=p.bounds is not None, num_warps=4,
        )  # fmt: skip

    # --------------------------------------------------------------------------------------- states

    def between_keys(self, parts: Tensor) -> Between:
        """The states between sub-runs; fills the segment's part of those that each run leaves."""
        if self._between_keys is None:
            p = self.p
            dtype = torch.bfloat16 if p.grad_out is None and p.shape.precision == "bf16" else torch.float32
            self._between_keys = self._accumulate(p.key, p.value, self.phi_k, parts, None, dtype)
        return self._between_keys

    def between_queries(self, adjoints: Tensor, deltas: Tensor) -> Between:
        """The gradients of the states between sub-runs, and the segment's part of those before each run."""
        if self._between_queries is None:
            p = self.p
            assert p.grad_out is not None
            self._between_queries = self._accumulate(p.query, p.grad_out, self.phi_q, adjoints, deltas, torch.float32)
        return self._between_queries

    def _accumulate(
        self, x: Tensor, rows: Tensor, features: Tensor, states: Tensor, deltas: Tensor | None, dtype: torch.dtype
    ) -> Between:
        p, mirrored = self.p, deltas is not None
        config = self.tiles.accumulate_queries if mirrored else self.tiles.accumulate
        block, buckets, columns = config[:3]
        between = (
            p.new(self.slots, p.groups, p.shape.buckets, p.shape.value_dim, dtype=dtype),
            p.new(self.slots, p.groups, p.shape.buckets),
        )
        programs = self.count * p.groups * (self.tiles.width // buckets) * -(-p.shape.value_dim // columns)
        start(
            wide.accumulate_kernel, (programs,),
            x, rows, self.mask, p.hyperplanes, p.beta, pointer_or(deltas, p.beta), pointer_or(p.inverses, p.beta),
            self.decay[0], self.table, features, states, *between,
            *x.stride()[:3], *rows.stride()[:3], *p.mask_strides, self.first, self.lines, *self._lengths,
            SHARE=p.share if mirrored else 1, VB=columns, SB=buckets, C=block, MIRRORED=mirrored, CAUSAL=True,
            HAS_MASK=p.key_mask is not None and not mirrored, HAS_DECAY=p.log_decay is not None,
            **self._state, **self._buckets(buckets), **self._options(config),
        )  # fmt: skip
        return between

    # -------------------------------------------------------------------- readout and its gradients

    def _pairs(self, config: tuple[int, ...]) -> dict[str, Any]:
        """The options of the kernels that compare tokens of a sub-run."""
        options = {"SHARE": self.p.share, "C": config[0], "CK": config[1], "SB": config[2]} | self.p.conditions
        return options | plan.alike(self.p.shape.precision) | self._state | self._options(config)

    def _numbers(self, block: int) -> tuple[int, ...]:
        return *self.p.mask_strides, self.first, self.lines, *self._lengths, self._blocks(block)

    def readout(self, before: Tensor, between: Between, out: Tensor) -> None:
        """out of the queries from the state before each run, its residual, and the inverses of their denominators.

        ``between`` is used up: the state before each run is added to it.
        """
        p, config, shape = self.p, self.tiles.readout, self.p.shape
        t, run, sub, per_row, groups = self._lengths
        start(
            wide.merge_kernel, (self.count * self._blocks(sub) * groups, -(-shape.buckets * shape.value_dim // MERGED)),
            self.decay[1], self.table, before, *between, self.first, t, run, sub, per_row, groups, self._blocks(sub),
            V=shape.value_dim, S=shape.buckets, SP=plan.power_of_two(shape.buckets), E=MERGED,
            PACKED=p.bounds is not None, HAS_DECAY=p.log_decay is not None, num_warps=4,
        )  # fmt: skip
        group, columns = group_of(shape, config[2], self.halves.used), config[3]
        parts = column_tiles(shape, config)
        features_q = self.phi_k if self.halves.used else self._new_features(parts * p.heads)  # those are not read
        start(
            wide.readout_kernel, (self.count * self._blocks(config[0]) * p.heads * parts,),
            p.query, features_q, self.phi_k, p.value, self.mask, p.hyperplanes, p.beta, self.decay[0], self.table,
            *between, out, residual_of(p), p.inverses,
            *p.query.stride()[:3], *p.value.stride()[:3], *self._numbers(config[0]),
            VB=columns, GB=group, RESIDUAL=has_residual(p), **self._buckets(group), **self._pairs(config),
        )  # fmt: skip

    def value_gradient(self, after: Tensor, between: Between, deltas: Tensor, of_query: Tensor, dv: Tensor) -> Tensor:
        """Fills dv and parts of ``of_query``; returns, with decay, ``of_key``, [parts, lines, G] to be added."""
        p, config = self.p, self.tiles.value_gradient
        assert p.grad_out is not None
        parts = column_tiles(p.shape, config)
        of_key = p.beta if p.log_decay is None else p.new(parts, self.lines, p.groups)
        start(
            wide_gradients.value_gradient_kernel, (self.count * self._blocks(config[0]) * p.groups * parts,),
            self.phi_q, self.phi_k, p.value, p.grad_out, self.mask, deltas, p.inverses, *self.decay, self.totals,
            self.table, after, *between, dv, of_key, of_query, *p.value.stride()[:3], *p.grad_out.stride()[:3],
            *self._numbers(config[0]), VB=config[3], CA=self.tiles.accumulate[0], FEW=FEW,
            QP=self._query_parts(of_query), **self._pairs(config),
        )  # fmt: skip
        return of_key

    def query_buckets_gradient(self, before: Tensor, between: Between, deltas: Tensor, of_query: Tensor) -> Tensor:
        """The gradient of phi_q, [lines, H, SW]; fills ``deltas``, grad_out . out, [B, H, T], parts of ``of_query``."""
        p, config = self.p, self.tiles.buckets_gradient
        assert p.grad_out is not None
        grad_phi = self._new_phi(p.heads)
        buckets = {k: v for k, v in self._buckets(config[2]).items() if k not in self.halves.options}
        start(
            wide_gradients.query_buckets_gradient_kernel, (self._tiles(p.heads, config),),
            p.query, self.phi_k, p.value, p.grad_out, p.out, residual_of(p), self.mask, p.hyperplanes, p.beta, deltas,
            p.inverses, *self.decay, self.table, before, *between, grad_phi, of_query,
            *p.query.stride()[:3], *p.value.stride()[:3], *p.grad_out.stride()[:3], *self._numbers(config[0]),
            VP=plan.power_of_two(p.shape.value_dim, 16), FEW=FEW, CA=self.tiles.accumulate_queries[0],
            QP=self._query_parts(of_query), RESIDUAL=has_residual(p), **buckets, **self._pairs(config),
        )  # fmt: skip
        return grad_phi

    def key_buckets_gradient(self, after: Tensor, between: Between, deltas: Tensor) -> Tensor:
        """The gradient of phi_k, [lines, G, SW]."""
        p, config = self.p, self.tiles.buckets_gradient
        assert p.grad_out is not None
        grad_phi = self._new_phi(p.groups)
        start(
            wide_gradients.key_buckets_gradient_kernel, (self._tiles(p.groups, config),),
            self.phi_q, p.value, p.grad_out, p.out, residual_of(p), self.mask, deltas, p.inverses, *self.decay,
            self.totals, self.table, after, *between, grad_phi,
            *p.value.stride()[:3], *p.grad_out.stride()[:3], *self._numbers(config[0]),
            VP=plan.power_of_two(p.shape.value_dim, 16), FEW=FEW, RESIDUAL=has_residual(p), **self._pairs(config),
        )  # fmt: skip
        return grad_phi

    def _query_parts(self, of_query: Tensor) -> int:
        """QP, a part of what is compiled, with decay alone."""
        return 1 if self.p.log_decay is None else of_query.shape[3]

    def _tiles(self, heads: int, config: tuple[int, ...]) -> int:
        """How many blocks of tokens and buckets there are."""
        return self.count * self._blocks(config[0]) * heads * (self.tiles.width // config[2])

    # ---------------------------------------------------------------------------- gradients by halves

    def query_gradients(
        self, before: Tensor, between: Between, deltas: Tensor, of_query: Tensor, dq: Tensor,
        parts: tuple[Tensor, Tensor], planes: bool,
    ) -> None:  # fmt: skip
        """Fills dq, parts of the parameters' gradients, ``deltas``, grad_out . out, [B, H, T], and ``of_query``."""
        p, config = self.p, self.tiles.query_gradient
        assert p.grad_out is not None
        of_beta, options = self._by_halves(config, p.heads)
        grad_y = self._new_grad_y(p.heads, options["N"]) if planes else dq
        start(
            wide_halves.query_gradient_kernel, (of_beta.numel(),),
            p.query, self.phi_k, p.value, p.grad_out, p.out, residual_of(p), self.mask, p.hyperplanes, p.beta,
            deltas, p.inverses, *self.decay, self.table, before, *between, dq, grad_y, of_beta, of_query,
            *p.query.stride()[:3], *p.value.stride()[:3], *p.grad_out.stride()[:3], *self._numbers(config[0]),
            NEED_PLANES=planes, RESIDUAL=has_residual(p), CA=self.tiles.accumulate_queries[0], **options,
        )  # fmt: skip
        self._parameters(p.query, p.share, grad_y, of_beta, parts, planes)

    def key_gradients(
        self, after: Tensor, between: Between, deltas: Tensor, dk: Tensor, dv: Tensor, parts: tuple[Tensor, Tensor],
        planes: bool,
    ) -> Tensor:  # fmt: skip
        """Fills dk, dv and parts of the parameters' gradients; with decay ``of_key``, [1, lines, G]."""
        p, config = self.p, self.tiles.key_gradient
        assert p.grad_out is not None
        of_beta, options = self._by_halves(config, p.groups)
        grad_y = self._new_grad_y(p.groups, options["N"]) if planes else dk
        of_key = p.beta if p.log_decay is None else p.new(1, self.lines, p.groups)
        start(
            wide_halves.key_gradient_kernel, (of_beta.numel(),),
            p.key, self.phi_q, p.value, p.grad_out, self.mask, p.hyperplanes, p.beta, deltas, p.inverses,
            *self.decay, self.totals, self.table, after, *between, dk, dv, grad_y, of_beta, of_key,
            *p.key.stride()[:3], *p.value.stride()[:3], *p.grad_out.stride()[:3], *self._numbers(config[0]),
            NEED_PLANES=planes, CA=self.tiles.accumulate[0], **options,
        )  # fmt: skip
        self._parameters(p.key, 1, grad_y, of_beta, parts, planes)
        return of_key

    def _new_grad_y(self, heads: int, planes: int) -> Tensor:
        return self.p.new(self.lines, heads, planes)

    def _by_halves(self, config: tuple[int, ...], heads: int) -> tuple[Tensor, dict[str, Any]]:
        """(room for the blocks' parts of beta's gradient, [runs * blocks, heads], the options of the kernels)."""
        p, group = self.p, group_of(self.p.shape, config[2], True)
        options = self._pairs(config) | self._buckets(group)
        options = {name: x for name, x in options.items() if name not in ("SW", "HALVES")}
        options |= {"GB": group, "VP": plan.power_of_two(p.shape.value_dim, 16)}
        return p.new(self.count * self._blocks(config[0]), heads).zero_(), options

    def _parameters(
        self, x: Tensor, share: int, grad_y: Tensor, of_beta: Tensor, parts: tuple[Tensor, Tensor], planes: bool
    ) -> None:
        """From the blocks' parts of the parameters' gradients the runs'."""
        runs = slice(self.first, self.first + self.count)
        parts[1][runs] = of_beta.view(self.count, -1, x.shape[2]).sum(1)
        if planes:
            parts[0][runs] = 0
            group = group_of(self.p.shape, self.tiles.query_gradient[2], True)
            lengths = self.p.queries, self.runs.length, self.runs.per_row, self.p.groups
            planes_of_runs(self.p, x, share, grad_y, self.table, parts[0], (self.first, *lengths), self.count, group)
