"""The reference backend: the specification in chunks, plain torch, on any device.

Memory is linear in the length, gradients come from autograd (twice, if asked), and every option of the
interface is served. Arithmetic is float32, or float64 for float64 inputs and for more than 8 planes a table;
states and running sums of log_decay are float64 wherever the device has it.

Shape letters are those of :mod:`race_attention.backends.call`; besides, K = chunks of all rows, and
E = Dv + 1: a value carries a one behind it, so that value_sum and mass are one matrix [S, E].
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..features import bucket_weights
from ..state import state_dtype
from .call import Call

# The chunk's size balances the products inside a chunk (C a token) against its state (S * Dv / C a token).
_SMALLEST_CHUNK, _LARGEST_CHUNK = 64, 256
# Non-causal: only the float32 sums bound a chunk. 256 equal tokens err by 256 * 2**-25 = 8e-6 at the very worst, and
# that bias stays however many chunks follow; 1024 were measured to err by 1.5e-5, past the 1e-5 that a state may.
_CHUNK_WITHOUT_SCORES = 256
# The least sum of weights that counts: a key just seen has 2**-13P or more, which is 2**-104 at 8 planes.
_LEAST = {torch.float32: 2.0**-110, torch.float64: 2.0**-900}
_LEAST_BUCKET = {torch.float32: 2.0**-60, torch.float64: 2.0**-450}  # likewise of one bucket, whose square counts
_FLOAT32_PLANES = 8  # with more, a key's least weight and its inverse are float64 numbers only


def why_not(call: Call) -> str | None:
    """Always None: the reference serves every call."""
    return None


def run(call: Call, chunk_size: int | None = None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Algorithm 1 (non-causal) or 2 (causal) of the paper, chunk by chunk.

    Args:
        call: checked arguments.
        chunk_size: tokens a chunk; by default chosen from the number of buckets.

    Returns:
        out [B, Tq, H, Dv] in the query's dtype, and the final mass [rows, G, L, R] and value_sum
        [rows, G, L, R, Dv], or None twice where ``call.return_state`` is not set.
    """
    if call.hyperplanes.shape[2] > _FLOAT32_PLANES and call.hyperplanes.dtype != state_dtype(call.query.device):
        call = replace(call, hyperplanes=call.hyperplanes.double(), beta=call.beta.double())
    if call.query.is_meta:  # has no autocast, and torch raises
        return _run(call, chunk_size)
    with torch.autocast(device_type=call.query.device.type, enabled=False):
        return _run(call, chunk_size)


def _run(call: Call, chunk_size: int | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    tables, planes = call.hyperplanes.shape[1:3]
    size = chunk_size or _chunk_size(call.causal, tables * 2**planes)
    grid = _grid(call.key.shape[:2], call.cu_seqlens_key, size, call.key.device)

    key, value, decay = _key_side(call, grid)
    total_decay = None if decay is None else decay[..., -1]
    before, final = scan(accumulate(key, value, decay), total_decay, _initial_state(call), grid)
    if call.causal:
        query = _query_side(call, grid)
        out = readout(query, before, tables, call.readout, inside=(key, value, decay))
    else:  # every query sees its row's whole sum, so one chunk a row will do
        size = chunk_size or (call.query.shape[1] if call.cu_seqlens is None else size)
        grid = _grid(call.query.shape[:2], call.cu_seqlens, size, call.query.device)
        out = readout(_query_side(call, grid), final[grid.row_of_chunk], tables, call.readout)

    heads_a_key = call.query.shape[2] // call.key.shape[2]
    out = out.unflatten(2, (-1, heads_a_key)).permute(0, 2, 1, 3, 4).flatten(2, 3)  # [K, C, H, Dv]
    out = grid.join(out).to(call.query.dtype)
    if not call.return_state:
        return out, None, None
    final = final.unflatten(2, (tables, 2**planes))
    return out, final[..., -1], final[..., :-1]


# ---- the three verbs ----------------------------------------------------------------------------------


def accumulate(key: Tensor, value: Tensor, decay: Tensor | None) -> Tensor:
    """The state of each chunk: [K, G, S, E] from buckets [K, G, C, S], values [K, G, C, E].

    decay: [K, G, C], the chunk's running sum of log_decay. A token weighs what is left of it at the end.
    """
    if decay is not None:
        key = key * (decay[..., -1:] - decay).exp().to(key.dtype).unsqueeze(-1)
    return (key.transpose(-1, -2) @ value).to(state_dtype(key.device))


def scan(states: Tensor, total_decay: Tensor | None, initial: Tensor, grid: _Grid) -> tuple[Tensor, Tensor]:
    """The state before each chunk [K, G, S, E] and after each row [rows, G, S, E].

    total_decay: [K, G], the log_decay of a whole chunk. No state is found by subtraction: it would cancel.
    """
    if not states.shape[0]:  # no tokens: results still hang on them, so that there is something to go back through
        initial = initial + states.sum(0)
    factor = None if total_decay is None else total_decay.exp()[..., None, None].to(states.dtype)
    return grid.scan(states, factor, initial)


def readout(
    query: Tensor,
    before: Tensor,
    tables: int,
    kind: str,
    inside: tuple[Tensor, Tensor, Tensor | None] | None = None,
) -> Tensor:
    """The output of each query: [K, G, C * n, Dv].

    query: buckets [K, G, C * n, S]; before: the state that all of a chunk's queries see [K, G, S, E];
    inside: buckets [K, G, C, S], values [K, G, C, E] and decay [K, G, C] of the chunk's own keys, of which
    a query sees those up to its own position.
    """
    if kind == "bucket":  # divides by single buckets, the squares of whose smallest float32 does not hold
        query = query.to(before.dtype)
        inside = inside and (inside[0].to(before.dtype), inside[1].to(before.dtype), inside[2])
    before = before.to(query.dtype)
    if inside is None:
        if kind == "bucket":
            query = _over(query, before[..., -1].unsqueeze(-2), _LEAST_BUCKET)
        read = query @ before
    else:
        key, value, decay = inside
        heads = query.shape[2] // key.shape[2]  # n
        weight = _position_weight(key, decay).repeat_interleave(heads, dim=-2)  # [K, G, C * n, C]
        left = None if decay is None else decay.exp().to(query.dtype).repeat_interleave(heads, dim=-1)[..., None]
        if kind == "bucket":
            mass = before[..., -1].unsqueeze(-2)
            query = _over(query, (mass if left is None else left * mass) + weight @ key, _LEAST_BUCKET)
        scores = (query @ key.transpose(-1, -2)) * weight
        read = scores @ value + (query if left is None else left * query) @ before
    if kind == "bucket":
        return read[..., :-1] / tables
    return _over(read[..., :-1], read[..., -1:])


# ---- around them ----------------------------------------------------------------------------------------


def _chunk_size(causal: bool, buckets: int) -> int:
    if not causal:
        return _CHUNK_WITHOUT_SCORES
    return min(max(1 << (buckets - 1).bit_length(), _SMALLEST_CHUNK), _LARGEST_CHUNK)


def _over(numerator: Tensor, denominator: Tensor, least: dict[torch.dtype, float] = _LEAST) -> Tensor:
    """The quotient, and 0 with zero gradients where no key is seen, or none of which decay has left anything.

    What is below ``least`` is what decay left of keys long past: it has lost its digits, and its inverse would
    overflow in the gradients.
    """
    return numerator / torch.where(denominator > least[denominator.dtype], denominator, float("inf"))


def _position_weight(key: Tensor, decay: Tensor | None) -> Tensor:
    """exp(g_i - g_j) for j <= i, else 0: [K, G, C, C] (leading ones without decay)."""
    size = key.shape[2]
    causal = torch.ones(size, size, dtype=torch.bool, device=key.device).tril()
    if decay is None:
        return causal.to(key.dtype).expand(1, 1, size, size)
    difference = decay.unsqueeze(-1) - decay.unsqueeze(-2)
    return difference.masked_fill(~causal, float("-inf")).exp().to(key.dtype)


def _key_side(call: Call, grid: _Grid) -> tuple[Tensor, Tensor, Tensor | None]:
    """Buckets [K, G, C, S], values with a one [K, G, C, E], running log_decay [K, G, C] of the keys."""
    key, value, decay = grid.split(call.key), grid.split(call.value), None
    part = grid.valid if grid.valid is None else grid.valid.unsqueeze(-1)  # [K, C, 1]
    if call.key_mask is not None:
        mask = grid.split(call.key_mask)
        part = mask if part is None else mask & part
    if part is not None:  # what takes no part may hold anything, NaN included
        key, value = (x.masked_fill(~part.unsqueeze(-1), 0) for x in (key, value))
    buckets = bucket_weights(key.to(call.hyperplanes.dtype).unsqueeze(-2), call.hyperplanes, call.beta)
    buckets = buckets.flatten(3)  # [K, C, G, S]
    if part is not None:
        buckets = buckets.masked_fill(~part.unsqueeze(-1), 0)  # not times 0: the gradient there may be anything
    value = F.pad(value.to(buckets.dtype), (0, 1), value=1.0)
    if call.log_decay is not None:
        log_decay = grid.split(call.log_decay).to(state_dtype(key.device))
        if grid.valid is not None:
            log_decay = log_decay.masked_fill(~grid.valid.unsqueeze(-1), 0)
        decay = log_decay.cumsum(1).transpose(1, 2)
    return buckets.transpose(1, 2), value.transpose(1, 2), decay


def _query_side(call: Call, grid: _Grid) -> Tensor:
    """Buckets of the queries [K, G, C * n, S], token by token, the n heads of a key head together."""
    groups = call.key.shape[2]
    query = grid.split(call.query).to(call.hyperplanes.dtype)
    query = query.unflatten(2, (groups, query.shape[2] // groups))  # [K, C, G, n, D]
    buckets = bucket_weights(query, call.hyperplanes, call.beta).flatten(4)
    return buckets.transpose(1, 2).flatten(2, 3)


def _initial_state(call: Call) -> Tensor:
    """The state before each row [rows, G, S, E]."""
    if call.initial_mass is None or call.initial_value_sum is None:
        _, groups, dim_v = call.value.shape[1:]
        buckets = call.hyperplanes.shape[1] * 2 ** call.hyperplanes.shape[2]
        dtype = state_dtype(call.query.device)
        return torch.zeros(call.rows, groups, buckets, dim_v + 1, dtype=dtype, device=call.query.device)
    return torch.cat((call.initial_value_sum, call.initial_mass.unsqueeze(-1)), dim=-1).flatten(2, 3)


# ---- cutting rows into chunks -----------------------------------------------------------------------------


class _Grid(Protocol):
    """How the tokens of all rows lie in K chunks of C tokens; a chunk belongs to one row."""

    valid: Tensor | None  # [K, C] bool: a token, not filling; None where there is no filling
    row_of_chunk: Tensor  # [K]

    def split(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [K, C, ...], filling unspecified."""

    def join(self, x: Tensor) -> Tensor:
        """[K, C, ...] -> [B, T, ...]."""

    def scan(self, states: Tensor, factor: Tensor | None, initial: Tensor) -> tuple[Tensor, Tensor]:
        """See :func:`scan`; factor [K, G, 1, 1] multiplies the state before a chunk is added."""


def _grid(shape: torch.Size, cu_seqlens: Tensor | None, size: int, device: torch.device) -> _Grid:
    if cu_seqlens is not None:
        return _PackedGrid(shape[1], cu_seqlens, size)
    return _BatchGrid(shape[0], shape[1], max(1, min(size, shape[1])), device)


class _BatchGrid:
    """Rows of one length, filled up to a multiple of the chunk."""

    def __init__(self, batch: int, length: int, size: int, device: torch.device):
        self.batch, self.length, self.size = batch, length, size
        self.chunks = -(-length // size)  # a row
        self.filling = self.chunks * size - length
        self.row_of_chunk = torch.arange(batch, device=device).repeat_interleave(self.chunks)
        self.valid: Tensor | None = None
        if self.filling:
            valid = torch.arange(self.chunks * size, device=device) < length
            self.valid = valid.view(1, self.chunks, size).expand(batch, -1, -1).flatten(0, 1)

    def split(self, x: Tensor) -> Tensor:
        if self.filling:
            x = torch.cat((x, x.new_zeros(x.shape[0], self.filling, *x.shape[2:])), dim=1)
        return x.unflatten(1, (self.chunks, self.size)).flatten(0, 1)

    def join(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (self.batch, self.chunks)).flatten(1, 2)[:, : self.length]

    def scan(self, states: Tensor, factor: Tensor | None, initial: Tensor) -> tuple[Tensor, Tensor]:
        states = states.unflatten(0, (self.batch, self.chunks))
        if factor is None:
            after = torch.cat((initial.unsqueeze(1), states), dim=1).cumsum(1)
        else:
            factor = factor.unflatten(0, (self.batch, self.chunks))
            running = [initial]
            for n in range(self.chunks):
                running.append(factor[:, n] * running[-1] + states[:, n])
            after = torch.stack(running, dim=1)
        return after[:, :-1].flatten(0, 1), after[:, -1]


class _PackedGrid:
    """Packed rows of any lengths; chunks are shortened where rows are short, so filling at most doubles T."""

    def __init__(self, length: int, cu_seqlens: Tensor, size: int):
        offsets: list[int] = cu_seqlens.tolist()
        rows, device = len(offsets) - 1, cu_seqlens.device
        mean = max(length // max(rows, 1), 16)
        size = min(size, 1 << (mean.bit_length() - 1))
        starts: list[int] = []
        ends: list[int] = []
        self.rows: list[int] = []  # chunks of each
        for row in range(rows):
            begins = range(offsets[row], offsets[row + 1], size)
            starts.extend(begins)
            ends.extend([offsets[row + 1]] * len(begins))
            self.rows.append(len(begins))
        start, end = (torch.tensor(x, dtype=torch.int64, device=device) for x in (starts, ends))
        position = start.unsqueeze(-1) + torch.arange(size, device=device)
        self.valid: Tensor | None = position < end.unsqueeze(-1)
        self.index = position.clamp(max=max(length - 1, 0))
        self.place = self.valid.flatten().nonzero().squeeze(-1)  # of each token among the K * C places
        self.row_of_chunk = torch.repeat_interleave(torch.tensor(self.rows, device=device, dtype=torch.int64))

    def split(self, x: Tensor) -> Tensor:
        return x[0][self.index]

    def join(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1)[self.place].unsqueeze(0)

    def scan(self, states: Tensor, factor: Tensor | None, initial: Tensor) -> tuple[Tensor, Tensor]:
        before, final, chunk = [], [], 0
        for row, chunks in enumerate(self.rows):
            state = initial[row]
            for _ in range(chunks):
                before.append(state)
                state = (state if factor is None else factor[chunk] * state) + states[chunk]
                chunk += 1
            final.append(state)
        # Empty lists: no token at all, or no row.
        return torch.stack(before) if before else states, torch.stack(final) if final else initial
