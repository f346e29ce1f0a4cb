"""How a call is cut up: bucket tiles, blocks, chunks, runs. Everything here is by shape class, or in the open.

A *shape class* is what a compiled kernel depends on: D, Dv, tables, planes, dtype. The length of a sequence only
chooses how many blocks make a run, which the kernels take as an ordinary number.

Causal calls of one tile of buckets keep what the keys of a run have summed up to each of its *chunks* of CH tokens,
so that the blocks of the gradients' kernels wait for nothing of each other. A run is whole chunks, the last of a row
excepted, and chunks count from a row's first token. The chunk that begins at token ``t`` of row ``r`` has the place

    batch * ceil(T / CH) + t // CH        of equal lengths
    r + t // CH                           packed, ``t`` counted from the first token of all rows: no two are the same

of ``B * ceil(T / CH)``, or ``T // CH + rows``, in two buffers (S buckets, SW = ``Shape.row``):

    inner  [places, G, Dv, SW]        operands' dtype  value sums, transposed, of the run's tokens before the chunk:
                                                       those of the values less their mean, weighted by buckets
    marks  [places, G, SW + 8 + VP]   float32          their masses; at SW the log decay of the run before the chunk; at
                                                       SW + 8 that mean [Dv], zeros up to a power of two, VP

both as of the chunk's first token, before its decay: the state there is ``exp(log decay) * before[run] + inner`` and
``mass * mean``. A run's first chunk has zeros. And with decay ``fades`` [B, G, T], float32: the sum of log_decay from
the chunk's first token to this one, each token's at least -88, where float32 has forgotten all. Where ``Shape.chunk``
is 0 (float32 inputs, whose blocks are too short for chunks), all three are empty, and programs carry the state along
their run.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from . import configs

#: States of at most this many more runs than long runs need are kept, so that short inputs fill a GPU too. Half as many
#: where a causal call has large states, each as much as 64 tokens: two programs a multiprocessor are all that fit.
EXTRA_RUNS = 512
#: CH, tokens of a chunk of 16-bit inputs, by buckets of a tile. As short as a block, no block of the gradients' has to
#: take up another; but a state of S = 64 is then as much as a tensor's chunk, and memory bounds the few buckets.
CHUNKS = {16: 128, 32: 64, 64: 64}
#: Tokens over which the gradient of log_decay is added up from the state at their end, by the tile's width.
STRETCHES = {16: 128, 32: 128, 64: 256}
#: Tokens of a run at most, in float32 with a decay: inside it there is no state to add up from anew, and the gradient
#: of a decay by head is off by as much as runs are long, 3e-5 to 3e-4 of itself with 4,096.
FLOAT32_RUN = 256
#: Causal packed sequences are cut as one row where they have fewer tokens than this on average: longer ones pay little
#: for their states, and comparisons that stop at a sequence's beginning cost a little too (the readout of 64 buckets
#: 1.74 ms in place of 1.21 for a million tokens, all else 1 to 4 %).
LONG = 8192
#: Where all keys are seen, packed sequences of at most so many queries and keys have no state: one program takes one.
SHORT = 1024
#: Programs that do so, of all heads.
SHORT_PROGRAMS = 4096
#: Tokens of a sub-run of the wide causal kernels: between two of them a state lies in memory, inside one all pairs of
#: tokens are compared.
SUB_RUN = 256


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n and at least ``least``."""
    return max(least, 1 << (n - 1).bit_length())


@dataclass(frozen=True, eq=False)
class Shape:
    """A shape class: the compile-time numbers of its kernels. There is one object of each; see ``shape_class``.

    Attributes:
        tile: SP, buckets of a tile. tiles: NS, tiles of a head. rows: N, planes of a tile's tables, padded.
        lift: buckets are computed times 2**(lift * planes).
        precision: of dots, "bf16" or "ieee".
    """

    dim: int
    value_dim: int
    tables: int
    planes: int
    dtype: torch.dtype
    precision: str
    tile: int
    tiles: int
    rows: int
    lift: int

    @property
    def buckets(self) -> int:
        return self.tables << self.planes

    @property
    def row(self) -> int:
        """SW, the numbers of a token's stored buckets: whole pieces of 16 bytes."""
        return -(-self.buckets // 8) * 8

    @property
    def hash_row(self) -> int:
        """YW, the numbers of a token's stored projections: whole pieces of 8 bytes."""
        return -(-self.tables * self.planes // 4) * 4

    @property
    def state_size(self) -> int:
        return self.buckets * (self.value_dim + 1)

    @property
    def narrow(self) -> bool:
        return self.tiles == 1

    @property
    def chunk(self) -> int:
        """CH, the tokens of a chunk; 0 where programs carry the state along their run."""
        return CHUNKS[self.tile] if self.narrow and self.dtype != torch.float32 else 0

    @property
    def operand(self) -> torch.dtype:
        """The dtype in which a matrix product takes buckets and sums."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def at_once(self, share: int) -> bool:
        """Whether one kernel works out a block's gradients of queries, keys and values; the backward pass reads out."""
        fits = self.dtype == torch.bfloat16 or self.precision == "ieee"  # float16's operands would be two parts each
        return self.chunk > 0 and self.tile == configs.TILE and fits and share == 1

    def rows_of(self, tile: int) -> int:
        """N for tiles of so many buckets."""
        return power_of_two(max(1, min(self.tables, tile >> self.planes)) * self.planes, 16)

    def constants(self, tiles: bool) -> dict[str, object]:
        """The compile-time arguments that every kernel has; with ``tiles`` also how many tiles there are."""
        always = {
            "L": self.tables,
            "P": self.planes,
            "D": self.dim,
            "V": self.value_dim,
            "DP": power_of_two(self.dim, 16),
            "VP": power_of_two(self.value_dim, 16),
            "N": self.rows,
            "SP": self.tile,
            "LIFT": self.lift,
            "PRECISION": self.precision,
        }
        return always | ({"NS": self.tiles} if tiles else {})

    def config(self, kernel: str) -> configs.Config:
        """The configuration of a kernel, where the buckets fit one tile."""
        return configs.config(
            kernel, power_of_two(self.dim, 16), power_of_two(self.value_dim, 16), self.tile, self.dtype
        )


@functools.cache
def shape_class(dim: int, value_dim: int, tables: int, planes: int, dtype: torch.dtype, precision: str) -> Shape:
    buckets = tables << planes
    tile = power_of_two(buckets, 16)
    tile = min(tile, configs.widest_tile(power_of_two(max(dim, value_dim), 16)))
    rows = power_of_two(max(1, min(tables, tile >> planes)) * planes, 16)
    # A bucket reaches 2**-14P. Up to P = 6 the product of two is a normal float32; past that both are lifted to
    # lie around 1: their products stay above 2**-60 for the bucket that decides, and sums below 2**127.
    lift = 0 if planes <= 6 else 4
    return Shape(dim, value_dim, tables, planes, dtype, precision, tile, -(-buckets // tile), rows, lift)


@functools.lru_cache(maxsize=1024)
def run_lengths(shape: Shape, causal: bool = True) -> tuple[int, int]:
    """The shortest and the longest runs where the buckets fit one tile.

    A scan over many states waits for itself: where it is causal or the states are large, runs are twice as long.
    """
    blocks = {kernel: shape.config(kernel).block for kernel in configs.KERNELS}
    shortest = max(block for kernel, block in blocks.items() if kernel.startswith("full") != causal)
    shortest = max(shortest, shape.chunk) if causal else shortest
    return shortest, 2 * configs.LONGEST_RUN if causal or shape.tile == 64 else configs.LONGEST_RUN


@functools.lru_cache(maxsize=1024)
def options(shape: Shape, kernel: str, tiles: bool, aligned: bool, packed: bool) -> dict[str, object]:
    """The compile-time arguments of a kernel, and its configuration: one dictionary, not to be changed."""
    config = shape.config(kernel)
    return {
        **shape.constants(tiles),
        "C": min(config.block, shape.chunk) if shape.chunk and kernel.startswith("causal") else config.block,
        "ALIGNED": aligned,
        "PACKED": packed,
        "num_warps": config.warps,
        "num_stages": config.stages,
        **({"maxnreg": config.registers} if config.registers and torch.version.hip is None else {}),
        **alike(shape.precision),
    }


def alike(precision: str) -> dict[str, bool]:
    """Options of float32 kernels by which lanes that add up the same come to the same.

    A product that goes into a sum over lanes is fused on one side of the exchange and rounded on the other, so that
    lanes differ in the last bit, and all of them write: which one is read would be the hardware's choice.
    """
    return {"enable_fp_fusion": False} if precision == "ieee" else {}


def forget() -> None:
    """Forgets what was looked up in the table of configurations, which has changed."""
    run_lengths.cache_clear()
    options.cache_clear()


def causal_run_lengths(shape: Shape, decays: bool) -> tuple[int, int]:
    """The shortest and the longest runs of the causal kernels."""
    shortest, longest = run_lengths(shape) if shape.narrow else (SUB_RUN, configs.LONGEST_RUN)
    return shortest, min(longest, max(shortest, FLOAT32_RUN)) if decays and shape.dtype == torch.float32 else longest


@dataclass(frozen=True)
class Runs:
    """The runs that the tokens of a call are cut into.

    Attributes:
        length: tokens of a run at most. count: runs, of all rows; with packed sequences some may be empty.
        per_row: runs of a row, where rows have equal lengths. capacity: at least ``count``, and linear in the
            number of tokens, so that the shape of what is kept for the backward pass needs no guard.
        table: [count, 4] int64 (row, first token, end, last of its row?) or None. first: [rows + 1] int64 or None.
    """

    length: int
    count: int
    per_row: int
    capacity: int
    table: Tensor | None
    first: Tensor | None


def extra_runs(shape: Shape, causal: bool = True) -> int:
    """See EXTRA_RUNS."""
    return EXTRA_RUNS // 2 if causal and shape.narrow and shape.tile >= 64 else EXTRA_RUNS


def capacity(batch: int, tokens: int, rows: int, groups: int, longest: int, extra: int, packed: bool = False) -> int:
    """Runs to keep room for. Linear in ``tokens // longest``: no branch on a length.

    Of packed rows half as many again: where they are short, runs are then not much longer than they, and kernels whose
    programs own a block of a run have few that find nothing to do.
    """
    return rows + (rows // 2 if packed else 0) + batch * (tokens // longest) + max(1, extra // groups)


def chunk_places(batch: int, tokens: int, rows: int, chunk: int, packed: bool) -> int:
    """Places for chunks. No branch on a length."""
    if not chunk:
        return 0
    return tokens // chunk + rows if packed else batch * -(-tokens // chunk)


def rows_of(bounds: Tensor) -> int:
    """Rows of packed offsets [rows + 1], or of spans [rows, 2], first tokens and ends."""
    return bounds.shape[0] - (bounds.ndim == 1)


def apart(shape: Shape, rows: int, tokens: int, causal: bool) -> bool:
    """Whether packed sequences whose states nobody takes or gives are told apart otherwise than by rows of states.

    Where all keys are seen that pays where a state is much in comparison: for 400,000 tokens of 4 heads forward and
    backward in sequences of 10 and of 100 tokens 19 -> 11 and 3.2 -> 4.0 ms with 8 buckets, 77 -> 20 and 9.1 -> 6.1
    with 64.
    """
    return tokens < LONG * rows if causal else tokens <= 4 * shape.buckets * rows


def long_rows(queries: int, keys: int) -> int:
    """At least the packed sequences that are not short. No branch on a length."""
    return (queries + keys) // SHORT + 1


def runs_of(
    batch: int, tokens: int, groups: int, shortest: int, longest: int, bounds: Tensor | None, extra: int | None = None
) -> Runs:
    """Cuts tokens into runs of a power of two times ``shortest`` tokens, as short as the capacity allows."""
    rows = batch if bounds is None else rows_of(bounds)
    extra = EXTRA_RUNS if extra is None else extra
    room = capacity(batch, tokens, rows, groups, longest, extra, bounds is not None)
    length = shortest
    while length < longest and batch * (tokens // length) + rows > room:
        length *= 2
    if bounds is None:
        per_row = -(-tokens // length)
        return Runs(length, batch * per_row, per_row, room, None, None)
    count = tokens // length + rows if rows else 0
    from .runs import packed_table  # what has no kernels needs no Triton

    table, first = packed_table(bounds, length, count)
    return Runs(length, count, 0, room, table, first)
